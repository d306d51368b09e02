"""The root of the YAML file: one reinforcement-learning run with verifiable rewards (RLVR)."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from roll_r3.config.base import Config, Seconds
from roll_r3.config.workers import ActorInferConfig, ActorTrainConfig, ReferenceConfig


class RewardConfig(Config):
    """One reward rule."""

    reward: str
    """A built-in rule (`exact_match`, `math`) or `package.module:function`, which takes by name what it needs of
    `response`, `ground_truth`, `domain`, `prompt`, `messages`, `row`, `finish_reason` and `num_response_tokens`."""
    tag_included: tuple[str, ...] = ()
    """Domains that this rule scores; empty: every domain that no other rule names."""
    kwargs: dict[str, str | int | float | bool] = {}
    """Further arguments of the rule, under other names. No place for a key: the configuration is printed, and lies in
    the run's directory and in its checkpoints. A rule finds the environment of the run in `os.environ`, without Ray's
    variables, so let it read a key there."""
    timeout: Seconds | None = None
    """Seconds that the rule may take for one response; default: 30, and 2 for `math`. The process of a function is
    killed then, and the response has no reward. Its first call in a process may take longer, as it may import.
    `math` scores 0 then, and its seconds are of processor time, so that a busy machine changes no score."""
    skip_special_tokens: bool = True
    """Leave special tokens, such as the end token, out of the response's text. false: the rule sees them."""

    @property
    def time_limit(self) -> float:
        """Seconds for one response."""
        return self.timeout or (2.0 if self.reward == "math" else 30.0)


class RolloutCorrectionConfig(Config):
    """Off-policy correction for what still differs between rollout and trainer."""

    mode: Literal["disable", "token_tis"] = "disable"
    """token_tis: weigh each token's loss by min(pi_old / pi_rollout, cap), truncated importance sampling."""
    cap: PositiveFloat = 2.0
    """Upper bound of the weight."""


class CheckpointConfig(Config):
    """Where checkpoints are written, and whether the run waits for it."""

    output_dir: str | None = None
    """Checkpoints are written to output_dir/exp_name/<run>/checkpoints/, weights for transformers to .../hf/, on a disk
    that every node sees; default: `output_dir` of the run, so that they are in its directory."""
    async_save: bool = False
    """Train on while a checkpoint is written: the run waits only until every rank has copied its part into its host's
    memory, and for the checkpoint before."""


class WorkerTimeoutsConfig(Config):
    """Limits of waiting for a worker: a training or reference rank, or the worker of an engine. Past one it is lost.
    Its process is killed then, and the run goes on from its newest checkpoint. The terminal says earlier who is waited
    for."""

    stopped: Seconds | None = 120.0
    """Seconds that a worker's process may be stopped, as by SIGSTOP, or Ray's own processes on the driver's node; null:
    for ever."""
    silent: Seconds | None = 600.0
    """Seconds that a worker may give no sign of life. It gives one beside whatever it computes, unless one call of a
    library keeps Python from running for as long; null: for ever."""
    call: Seconds | None = None
    """Seconds that a worker may compute at one call (a step of training, the samples of a step, a start) though it
    gives signs of life. A call may take twice as long as the longest of its kind so far, and a minute, in any case;
    null: for ever."""


def _resume_from_yaml(value: Any) -> Any:
    """YAML 1.1 reads a bare `off` as the boolean False; say what to write for the other booleans."""
    if value is False:
        return "off"
    if value is True:
        raise ValueError("YAML reads on/yes/true as the boolean True; write auto, or the path of a checkpoint")
    return value


ResumeFrom = Annotated[
    str,
    Field(min_length=1),
    BeforeValidator(_resume_from_yaml, json_schema_input_type=str | Literal[False]),
]


def _kl_in_loss(value: Any) -> Any:
    """Say why k1 is no estimator of the KL loss."""
    if value == "k1":
        raise ValueError(
            "k1 in the loss regularises nothing: its gradient is 0 in the mean. Write k2 or k3, or take k1 off the "
            "advantages: add_token_level_kl: true with kl_penalty: k1"
        )
    return value


def _kl_in_reward(value: Any) -> Any:
    """Say why k3 is no estimator of the KL penalty."""
    if value == "k3":
        raise ValueError(
            "k3 in the reward pulls towards nothing near the reference: only its value acts there, which is of second "
            "order. Write k1, or take k3 into the loss: use_kl_loss: true with kl_estimator: k3"
        )
    return value


KLInLoss = Annotated[Literal["k2", "k3"], BeforeValidator(_kl_in_loss, json_schema_input_type=Literal["k2", "k3"])]
KLInReward = Annotated[
    Literal["k1", "k2", "abs"], BeforeValidator(_kl_in_reward, json_schema_input_type=Literal["k1", "k2", "abs"])
]


class RLVRConfig(Config):
    """Everything that a run is made of. Batch arithmetic: a step samples rollout_batch_size prompts x
    num_return_sequences_in_group responses and trains on all of them, ppo_epochs times."""

    dialect: Literal["roll_r3", "roll"] = "roll_r3"
    """Keys and defaults that the file is written in; `roll`: those of ROLL (docs/from_roll.md). Without this key, all
    keys of the file together decide, and the first line of a report says so. Once read, it is `roll_r3`."""
    exp_name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=128)]
    """Name of the experiment and of its directory under `output_dir`."""
    seed: NonNegativeInt = 42
    """Everything random is derived from it."""
    output_dir: str = "output"
    """Runs are written to output_dir/exp_name/<run>/, on a disk that every node sees: each worker writes its log there,
    and by default checkpoints go there too."""
    device_type: Literal["auto", "cpu", "cuda"] = "auto"
    """What a device in `device_mapping` is: a GPU, or a CPU slot. auto: GPUs where the cluster has any."""
    num_gpus_per_node: PositiveInt | None = None
    """Devices of a node, for checks and `--plan`: device d is taken to be on node d // this. None: 8 are assumed. A run
    asks the cluster instead."""

    pretrain: str
    """Hugging Face checkpoint that every role starts from unless its `model_args` names another."""
    max_steps: PositiveInt = 500
    """Steps of the run; each is one rollout and the updates on it."""
    rollout_batch_size: PositiveInt = 128
    """Prompts of a step."""
    num_return_sequences_in_group: PositiveInt = 8
    """Responses sampled for each prompt (the group that GRPO compares)."""
    prompt_length: PositiveInt = 1024
    """Longest prompt in tokens; longer ones are left out when the data is read, and counted in logs/driver.log."""
    response_length: PositiveInt = 1024
    """Longest response in tokens."""

    fp32_lm_head: bool = False
    """Compute the logits in fp32, of a bf16 model too: in the trainer, the reference and the engine. The output layer's
    weights stay bf16 and are widened for its matrix product. In bf16 each side would round its logits by itself, which
    moves log-probabilities by about a hundredth; MiniMax-M1 found that decisive (arXiv 2506.13585). It costs an fp32
    matrix product, and a wide copy of that weight while it runs. Not with vLLM."""

    adv_estimator: Literal["grpo", "reinforce"] = "grpo"
    """grpo: reward less its group's mean, over the group's standard deviation. reinforce: reward less the batch's
    mean."""
    norm_adv_by_std_in_grpo: bool = True
    """Divide by the group's standard deviation (GRPO); off gives Dr. GRPO's advantage."""
    advantage_clip: PositiveFloat | None = None
    """Advantages are clipped to [-x, x]; None: not."""
    ppo_epochs: PositiveInt = 1
    """Passes over a step's samples."""
    force_on_policy_ratio: Literal["auto"] | bool = "auto"
    """Take the live log-probabilities, without their gradient, for the old ones: the ratio is then exactly 1. auto:
    where a step has one optimizer step (ppo_epochs 1, its samples one mini-batch). The trainer's pass for old
    log-probabilities is then made only where R2 or add_token_level_kl needs it. true: always, which takes one optimizer
    step. false: never, so that the ratio shows how far a pass without gradients rounds otherwise than one with them."""
    pg_clip: PositiveFloat = 0.2
    """PPO's clip range of the ratio, both sides, unless pg_clip_low or pg_clip_high say otherwise."""
    pg_clip_low: PositiveFloat | None = None
    """Lower clip range: the ratio is clipped at 1 - this; default: pg_clip."""
    pg_clip_high: PositiveFloat | None = None
    """Upper clip range: the ratio is clipped at 1 + this; default: pg_clip."""
    dual_clip_loss: PositiveFloat | None = None
    """For negative advantages the loss is bounded by this times the advantage (dual-clip PPO, above 1); None: not."""
    loss_agg_mode: Literal["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"] = (
        "token-mean"
    )
    """Aggregation of an optimizer step's token losses. token-mean: their mean over all trained tokens. The rest
    are means over responses: of the token mean, the token sum, or the token sum over loss_scale_factor (Dr. GRPO)."""
    loss_scale_factor: PositiveFloat | None = None
    """With seq-mean-token-sum-norm: tokens that the sum of a response is divided by; default: response_length."""
    entropy_loss_coef: NonNegativeFloat = 0.0
    """Weight of the entropy bonus."""
    use_kl_loss: bool = False
    """Add kl_loss_coef x kl_estimator's estimate of KL(policy || reference) to the loss; needs `reference`."""
    kl_loss_coef: NonNegativeFloat = 0.001
    """Weight of that term."""
    kl_estimator: KLInLoss = "k3"
    """Estimate of the KL divergence in the loss. On samples of the policy itself, k2's gradient is that of KL(policy ||
    reference) and k3's that of KL(reference || policy). In later optimizer steps on the same samples both are off by
    the ratio, see use_unbiased_kl. k3 is clamped to 10, log ratios to +-20; clamped tokens give no gradient."""
    use_unbiased_kl: bool = False
    """Multiply k3 by the ratio policy / old policy, whose gradient counts too. The term's gradient is then that of
    KL(policy || reference) in every optimizer step (DeepSeek-V3.2). Weights of rollout_correction do not touch it."""
    add_token_level_kl: bool = False
    """Subtract init_kl_coef x KL(old policy || reference), summed over a token and the later ones of its response, from
    the token's advantage. That is after the normalisation by adv_estimator; needs `reference`."""
    kl_penalty: KLInReward = "k1"
    """Estimate of the KL divergence in that penalty. k1's gradient is that of KL(policy || reference). k2 and abs also
    push down tokens that the policy already holds below the reference. Log ratios are clamped to +-20."""
    init_kl_coef: NonNegativeFloat = 0.0
    """Weight of that penalty."""
    rollout_correction: RolloutCorrectionConfig = RolloutCorrectionConfig()
    """Truncated importance sampling between rollout and trainer."""

    actor_train: ActorTrainConfig
    """The policy that learns: its prompts, its optimizer, its layout."""
    actor_infer: ActorInferConfig
    """The rollout engines."""
    reference: ReferenceConfig | None = None
    """The frozen policy; needed by a KL term only."""
    rewards: dict[str, RewardConfig] = {"default": RewardConfig(reward="exact_match")}
    """Reward rules, by a name of your own."""
    reward_workers: PositiveInt = 4
    """Processes that run reward rules, on the driver's node; each is given one of the step's samples at a time."""
    max_failed_rewards: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Share of a step's responses that may have no reward, because their rule raised, took too long, killed its process
    or returned no finite number. They are left out of the step; with more of them the run stops."""

    save_steps: NonNegativeInt = 50
    """Steps from one checkpoint to the next; there is one after the last step too. 0: none, so that what was learned
    is lost with the run."""
    max_ckpt_to_keep: NonNegativeInt = 0
    """Checkpoints that are kept, those of the newest steps; 0: all."""
    save_hf_steps: NonNegativeInt = 0
    """Steps from one export of the weights, which transformers loads, to the next; there is one after the last step
    too. 0: none; `python -m roll_r3.export` makes one of a checkpoint."""
    checkpoint_config: CheckpointConfig = CheckpointConfig()
    """Where they are written."""
    resume_from_checkpoint: ResumeFrom = "off"
    """off: start from `pretrain`. auto: go on with the newest run of this experiment that has a checkpoint, in its own
    directory, from its newest whole one; without any it is as off. Or the path of a checkpoint: a new run goes on from
    there. Or the directory of a run that has one: of this experiment it goes on there, as by auto; of another one a new
    run does."""

    max_recoveries: NonNegativeInt = 3
    """New starts from its newest checkpoint that a run makes by itself, in a row and without getting further, when a
    worker or its node was lost. One more loss ends the run, and so does one before its first step. 0: the first."""
    sigterm_grace_period: Seconds = 300.0
    """Seconds from SIGTERM to the end at the latest, whatever hangs. Within it the step that changes weights is
    finished and the newest step is saved; the last 15 of them, or the second half of less than 30, are for ending the
    run's processes. A second SIGTERM waits for nothing."""

    worker_timeouts: WorkerTimeoutsConfig = WorkerTimeoutsConfig()
    """Limits of waiting for workers."""

    track_with: tuple[Literal["tensorboard"], ...] = ("tensorboard",)
    """Trackers besides metrics.jsonl, which is always written."""
    num_logged_samples: NonNegativeInt = 4
    """So many of each step's first prompts are written to samples.jsonl in the run directory, with one sample each."""

    @property
    def samples_per_step(self) -> int:
        return self.rollout_batch_size * self.num_return_sequences_in_group

    @property
    def clip_range(self) -> tuple[float, float]:
        """(low, high): the ratio is clipped to [1 - low, 1 + high]."""
        return (self.pg_clip_low or self.pg_clip, self.pg_clip_high or self.pg_clip)

    @property
    def loss_divisor(self) -> float:
        """With seq-mean-token-sum-norm: what the sum of a response is divided by."""
        return self.loss_scale_factor or float(self.response_length)
