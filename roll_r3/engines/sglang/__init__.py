"""Rollout by SGLang servers."""
