"""Environments: the other side of a conversation with the policy."""
