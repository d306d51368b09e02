"""Advantages: estimators in a registry (`estimators`), and the advantages of tokens made from them (`token_level`)."""

from roll_r3.algorithms.advantages.token_level import TokenAdvantages, token_advantages

__all__ = ["TokenAdvantages", "token_advantages"]
