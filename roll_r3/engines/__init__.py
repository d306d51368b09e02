"""Rollout engines: the common parts, and one folder per engine."""
