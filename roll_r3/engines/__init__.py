"""Rollout strategies: what any engine needs lies here, each engine has a folder of its own."""
