"""Training and log-probabilities by megatron-core. Importing this package prepares the platform for megatron."""

from roll_r3.platform import megatron_cpu

megatron_cpu.install()
