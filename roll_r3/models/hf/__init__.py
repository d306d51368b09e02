"""transformers' own models: what the strategies that run them share."""
