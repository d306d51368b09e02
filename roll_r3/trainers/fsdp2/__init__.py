"""Training and log-probabilities by transformers' models under PyTorch's FSDP2."""
