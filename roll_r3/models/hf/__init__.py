"""Code shared by the strategies that run transformers' own models."""
