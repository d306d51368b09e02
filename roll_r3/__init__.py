"""roll_r3: reinforcement learning of Mixture-of-Experts models with router replay, from one YAML file."""

__version__ = "0.1.0"
