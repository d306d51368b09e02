"""The root of the YAML file: one reinforcement-learning run with verifiable rewards (RLVR)."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from roll_r3.config.base import Config, Seconds
from roll_r3.config.rewards import RewardConfig
from roll_r3.config.sections import (
    CheckpointConfig,
    FilterGroupsConfig,
    OverlongBufferConfig,
    PgArgsConfig,
    RolloutCorrectionConfig,
    ValidationConfig,
    WorkerTimeoutsConfig,
)
from roll_r3.config.workers import ActorInferConfig, ActorTrainConfig, ReferenceConfig


def _resume_from_yaml(value: Any) -> Any:
    """Take False, as YAML 1.1 reads a bare `off`, for "off"; reject True."""
    if value is False:
        return "off"
    if value is True:
        raise ValueError("YAML reads on/yes/true as the boolean True: write auto, or the path of a checkpoint")
    return value


ResumeFrom = Annotated[
    str,
    Field(min_length=1),
    BeforeValidator(_resume_from_yaml, json_schema_input_type=str | Literal[False]),
]


def _kl_in_loss(value: Any) -> Any:
    """Reject k1 with the reason."""
    if value == "k1":
        raise ValueError(
            "k1 in the loss regularises nothing: its gradient is 0 in the mean. Write k2 or k3, or take k1 off the "
            "advantages: add_token_level_kl: true with kl_penalty: k1"
        )
    return value


def _kl_in_reward(value: Any) -> Any:
    """Reject k3 with the reason."""
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
    """The whole run. A step samples rollout_batch_size prompts x num_return_sequences_in_group responses and trains on
    all of them, ppo_epochs times."""

    dialect: Literal["roll_r3", "roll"] = "roll_r3"
    """Keys and defaults of the file; `roll`: ROLL's (docs/from_roll.md). Default: decided by the file's keys; a report
    begins with the result. `roll_r3` once the file is read."""
    exp_name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=128)]
    """Name of the experiment and of its directory under `output_dir`."""
    seed: NonNegativeInt = 42
    """Seed of all random numbers."""
    output_dir: str = "output"
    """Runs are written to `output_dir/exp_name/<run>/`: worker logs, and checkpoints by default. A disk shared by all
    nodes."""
    device_type: Literal["auto", "cpu", "cuda"] = "auto"
    """Meaning of a device in `device_mapping`: a GPU (cuda) or a CPU slot (cpu). auto: GPUs if the cluster has any."""
    num_gpus_per_node: PositiveInt | None = None
    """Devices per node, for checks and `--plan` (a run asks the cluster): device d is on node d // num_gpus_per_node.
    Default: 8."""

    pretrain: str
    """Hugging Face checkpoint of every role, unless its `model_args` names another."""
    max_steps: PositiveInt = 500
    """Number of steps; each is one rollout and the updates on it."""
    rollout_batch_size: PositiveInt = 128
    """Prompts per step."""
    num_return_sequences_in_group: PositiveInt = 8
    """Responses per prompt (the group compared by GRPO)."""
    prompt_length: PositiveInt = 1024
    """Longest prompt, in tokens. Longer prompts are skipped when the data is read, and counted in logs/driver.log."""
    response_length: PositiveInt = 1024
    """Longest response, in tokens."""

    fp32_lm_head: bool = False
    """Compute a bf16 model's logits in fp32, in trainer, reference and engine; the weights stay bf16. In bf16 each side
    rounds differently, by about 0.01 in log-probabilities; MiniMax-M1 found fp32 decisive (arXiv 2506.13585). Costs an
    fp32 matrix product and a temporary fp32 weight. Not with vLLM."""

    reward_shift: float = 0.0
    """Added to each score, before reward_scale."""
    reward_scale: PositiveFloat = 1.0
    """Factor of each score."""
    overlong_buffer: OverlongBufferConfig | None = None
    """Penalty of long responses, subtracted from the score before reward_shift; default: none."""
    adv_estimator: Literal["grpo", "reinforce", "rloo", "reinforce_plus_plus_baseline"] = "grpo"
    """grpo: (reward - group mean) / group standard deviation. reinforce: reward, normalised by norm_mean_type and
    norm_std_type. rloo: reward - mean of the other samples of its group (arXiv 2402.14740).
    reinforce_plus_plus_baseline: reward - group mean, then whitened over the step's trained tokens (arXiv
    2501.03262)."""
    norm_adv_by_std_in_grpo: bool = True
    """Divide by the group's standard deviation (GRPO); false: Dr. GRPO's advantage."""
    norm_mean_type: Literal["group", "batch"] | None = "batch"
    """With reinforce: mean subtracted from the rewards, of the group or of the step's samples of one domain. null: no
    baseline."""
    norm_std_type: Literal["group", "batch"] | None = None
    """With reinforce: standard deviation to divide by, of the group (needs norm_mean_type: group) or of the step's
    samples of one domain. null: no division."""
    reward_clip: PositiveFloat | None = None
    """Clip normalised rewards to [-x, x], and rewards of tokens after the KL penalty; default: no clipping."""
    whiten_advantages: bool = False
    """Bring the advantages of a domain's trained tokens to mean 0 and variance 1, after the KL penalty."""
    max_len_mask: bool = False
    """Do not train on truncated responses. Their scores stay in means and deviations."""
    difficulty_mask: bool = False
    """Do not train on groups with a mean score outside (difficulty_low_threshold, difficulty_high_threshold), bounds
    excluded. The score is the one before shaping."""
    difficulty_low_threshold: float = 0.0
    """Lower bound of the mean score, excluded."""
    difficulty_high_threshold: float = 1.0
    """Upper bound of the mean score, excluded."""
    advantage_clip: PositiveFloat | None = None
    """Clip advantages to [-x, x]; default: no clipping."""
    ppo_epochs: PositiveInt = 1
    """Passes over a step's samples."""
    force_on_policy_ratio: Literal["auto"] | bool = "auto"
    """Use the live log-probabilities, detached, as the old ones: the ratio is 1, and the pass for old log-probabilities
    runs only for R2, add_token_level_kl or rollout_correction. auto: if a step has one optimizer step, and without
    rollout_correction.bypass. true: always; needs one optimizer step. false: never; the ratio then shows rounding
    between passes with and without gradients."""
    pg_variant: Literal["ppo", "vanilla", "tis", "topr", "cispo", "kimi15", "dppo_tv"] = "ppo"
    """Policy-gradient loss of a token, with A its advantage, p its probability, r = policy / old policy, and [] for a
    factor without gradient. ppo: -min(r A, clip(r) A). vanilla: -A log p. tis: -[r within bounds] A log p. topr: -A log
    p, times [min(r, 1)] in samples with a score of 0 or less. cispo: -[clip(r)] A log p. kimi15: -A log p + tau / 2
    (log r)^2. dppo_tv: -[min(r, 20)] A log p, without tokens whose p already moved by more than the clip range in the
    advantage's direction."""
    pg_args: PgArgsConfig = PgArgsConfig()
    """Parameters of pg_variant."""
    importance_sampling: Literal["token", "seq"] = "token"
    """token: each token's own ratio. seq: exp of the mean log ratio over the sample, for all of its tokens (GSPO, arXiv
    2507.18071). seq needs loss_agg_mode: seq-mean-token-mean and a narrow clip (the paper: 3e-4 and 4e-4)."""
    top_entropy_quantile: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of a step's trained tokens with a policy gradient: those with the highest entropy (arXiv 2506.01939). Below
    1 the pass for old log-probabilities always runs, since the entropies are its."""
    pg_clip: PositiveFloat = 0.2
    """Clip range of the ratio (ppo, cispo) or of the change in probability (dppo_tv; 0.15 is usual), both sides, unless
    pg_clip_low or pg_clip_high is set."""
    pg_clip_low: PositiveFloat | None = None
    """Lower clip range: the ratio is clipped at 1 - pg_clip_low; default: pg_clip. Below 1; with cispo 1 is no lower
    bound."""
    pg_clip_high: PositiveFloat | None = None
    """Upper clip range: the ratio is clipped at 1 + pg_clip_high; default: pg_clip."""
    dual_clip_loss: PositiveFloat | None = None
    """Dual clip of ppo: for negative advantages the loss is at most -dual_clip_loss x advantage. Must be above 1;
    default: off."""
    loss_agg_mode: Literal["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"] = (
        "token-mean"
    )
    """Aggregation of an optimizer step's token losses. token-mean: mean over all trained tokens. The others are means
    over responses of the token mean, the token sum, or the token sum / loss_scale_factor (Dr. GRPO)."""
    loss_scale_factor: PositiveFloat | None = None
    """With seq-mean-token-sum-norm: divisor of a response's token sum, in tokens; default: response_length."""
    entropy_loss_coef: NonNegativeFloat = 0.0
    """Weight of the entropy bonus."""
    use_kl_loss: bool = False
    """Add kl_loss_coef x KL(policy || reference), estimated by kl_estimator, to the loss; needs `reference`."""
    kl_loss_coef: NonNegativeFloat = 0.001
    """Weight of the KL term in the loss."""
    kl_estimator: KLInLoss = "k3"
    """Estimator of the KL term in the loss. On the policy's own samples k2 has the gradient of KL(policy || reference),
    k3 of KL(reference || policy); in later optimizer steps both are off by the ratio (see use_unbiased_kl). k3 is
    clamped to 10, log ratios to +-20; clamped tokens have no gradient."""
    use_unbiased_kl: bool = False
    """Multiply k3 by the ratio policy / old policy, with its gradient: the gradient of KL(policy || reference) in every
    optimizer step (DeepSeek-V3.2). Not weighted by rollout_correction."""
    add_token_level_kl: bool = False
    """Subtract init_kl_coef x KL(old policy || reference), summed over a token and the later ones, from the token's
    advantage, after its normalisation. Needs `reference`."""
    kl_penalty: KLInReward = "k1"
    """Estimator of the KL penalty in the advantage. k1 has the gradient of KL(policy || reference). k2 and abs also
    lower tokens already less likely than under the reference. Log ratios are clamped to +-20."""
    init_kl_coef: NonNegativeFloat = 0.0
    """Weight of the KL penalty in the advantage."""
    rollout_correction: RolloutCorrectionConfig = RolloutCorrectionConfig()
    """Weights and filters for the difference between rollout and trainer."""
    filter_groups: FilterGroupsConfig = FilterGroupsConfig()
    """Dynamic sampling."""
    max_additional_running_prompts: NonNegativeInt = 0
    """Number of prompts sampled beyond rollout_batch_size. The step takes the first groups that finish, and aborts the
    rest."""

    actor_train: ActorTrainConfig
    """The trained policy: prompts, optimizer, layout."""
    actor_infer: ActorInferConfig
    """The rollout engines."""
    reference: ReferenceConfig | None = None
    """The frozen policy; only for a KL term."""
    rewards: dict[str, RewardConfig] = {"default": RewardConfig(reward="exact_match")}
    """Reward rules, by a name of your choice. Default: `exact_match` for all domains."""
    reward_workers: PositiveInt = 4
    """Processes for reward rules, on the driver's node; each scores one of the step's samples at a time."""
    max_failed_rewards: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Largest share of a step's responses without a reward (the rule raised, timed out, ended its process, or returned
    no finite number). They are dropped; above this share the run stops."""

    validation: ValidationConfig | None = None
    """Evaluation; default: none."""
    eval_steps: NonNegativeInt = 0
    """Steps between evaluations; the last step is evaluated too. 0: only at start and end."""

    save_steps: NonNegativeInt = 50
    """Steps between checkpoints; the last step is saved too. 0: no checkpoints."""
    max_ckpt_to_keep: NonNegativeInt = 0
    """Number of newest checkpoints to keep; 0: all."""
    save_hf_steps: NonNegativeInt = 0
    """Steps between exports of weights for transformers; the last step is exported too. 0: none; `python -m
    roll_r3.export` exports a checkpoint later."""
    checkpoint_config: CheckpointConfig = CheckpointConfig()
    """Directory of checkpoints, and background writing."""
    resume_from_checkpoint: ResumeFrom = "off"
    """off: start from `pretrain`. auto: resume, in its directory, the newest run of this experiment with a complete
    checkpoint; without one, as off. PATH of a checkpoint: start a new run from it. PATH of a run: as auto for a run of
    this experiment, else start a new run from its newest checkpoint."""

    max_recoveries: NonNegativeInt = 3
    """Number of consecutive restarts from the newest checkpoint after a lost worker or node, without progress in
    between. One more loss ends the run; a loss before the first step always does."""
    sigterm_grace_period: Seconds = 300.0
    """Seconds from SIGTERM to the end of the run at the latest. The current weight update is finished and the newest
    step saved; the last 15 seconds (half, if less than 30) are for ending processes. A second SIGTERM ends the run at
    once."""

    worker_timeouts: WorkerTimeoutsConfig = WorkerTimeoutsConfig()
    """Limits of waiting for workers."""

    system_envs: dict[str, str] = {}
    """Environment variables of the run, its workers, engines and rewards. Reports never show a value. Saved and
    printed configurations have `<hidden>` for secrets (names with KEY, TOKEN, SECRET or PASSWORD, addresses with a
    password)."""

    track_with: tuple[Literal["tensorboard", "wandb", "mlflow", "swanlab", "trackio"], ...] = ("tensorboard",)
    """Trackers besides metrics.jsonl, which is always written."""
    tracker_kwargs: dict[str, dict[str, str | int | float | bool | tuple[str, ...]]] = {}
    """Arguments of a tracker's own start function, by its name in track_with. Not for keys."""
    num_logged_samples: NonNegativeInt = 4
    """Number of prompts per step, the first ones, written to samples.jsonl in the run's directory, with one response
    each."""

    @property
    def samples_per_step(self) -> int:
        return self.rollout_batch_size * self.num_return_sequences_in_group

    @property
    def clip_range(self) -> tuple[float, float]:
        """(low, high): the ratio is clipped to [1 - low, 1 + high]."""
        return (self.pg_clip_low or self.pg_clip, self.pg_clip_high or self.pg_clip)

    @property
    def loss_divisor(self) -> float:
        """Divisor of a response's token sum, with seq-mean-token-sum-norm."""
        return self.loss_scale_factor or float(self.response_length)
