"""Rollout by vLLM servers."""
