"""Rollout by a transformers model in this process: the contract of a rollout in the plainest code."""
