"""The smallest configuration without findings. Examples of rules are overrides of it."""

MINIMAL = """\
exp_name: demo
device_type: cpu
pretrain: Qwen/Qwen3-30B-A3B
rollout_batch_size: 16
num_return_sequences_in_group: 4
actor_train:
  router_replay: {mode: R3}
  data_args: {file_name: "bundled:addition_mod10"}
actor_infer:
  router_replay: {mode: R3}
"""
OWN_GPUS = ("device_type=cuda", "actor_infer.device_mapping=[1]")
"""Overrides to run it on GPUs."""
