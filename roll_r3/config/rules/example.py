"""The smallest configuration that every rule accepts: what the examples of the rules are overrides of."""

MINIMAL = """\
exp_name: demo
pretrain: Qwen/Qwen3-30B-A3B
rollout_batch_size: 16
num_return_sequences_in_group: 4
actor_train:
  router_replay: {mode: R3}
  data_args: {file_name: "bundled:addition_mod10"}
actor_infer:
  router_replay: {mode: R3}
"""
