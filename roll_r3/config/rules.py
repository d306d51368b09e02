"""The rule table: combinations of fields that cannot work, or that would leave a setting unread.

A rule is one row: which fields, when they clash, why, and what to write instead. Rows that need to know what a strategy
can do are in `roll_r3.strategies.rules`; what depends on a checkpoint is checked at launch.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from math import prod

from roll_r3.config.base import Config
from roll_r3.config.pipeline import RLVRConfig
from roll_r3.config.pipeline_layout import parse_pipeline_layout
from roll_r3.config.report import Finding, Severity
from roll_r3.config.strategies import MegatronConfig
from roll_r3.config.workers import ActorTrainConfig, ReferenceConfig, WorkerConfig
from roll_r3.config.yaml_file import join

BUILT_IN_REWARDS = frozenset({"exact_match", "math"})
_FUNCTION = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")

MegatronWorker = ActorTrainConfig | ReferenceConfig
Verdict = bool | str
"""Whether a rule is violated; text says so too, and gives the figures that make it plain."""


@dataclass(frozen=True)
class Rule:
    """One row about the whole configuration."""

    id: str
    fields: tuple[str, ...]
    """Dotted paths, the one to change first."""
    why: str
    fix: str
    violates: Callable[[RLVRConfig], Verdict]
    severity: Severity = "error"

    def check(self, config: RLVRConfig) -> Iterator[Finding]:
        """Yield one finding if `config` violates the rule."""
        if verdict := self.violates(config):
            yield _finding(self, config, self.fields, verdict)


@dataclass(frozen=True)
class LayoutRule:
    """One row about each role that Megatron runs: `actor_train`, and `reference` where there is one."""

    id: str
    fields: tuple[str, ...]
    """Dotted paths within the role, the one to change first."""
    why: str
    fix: str
    violates: Callable[[MegatronWorker], Verdict]
    severity: Severity = "error"

    def check(self, config: RLVRConfig) -> Iterator[Finding]:
        """Yield one finding for each role that violates the rule."""
        for role, worker in megatron_workers(config).items():
            if verdict := self.violates(worker):
                yield _finding(self, config, tuple(f"{role}.{field}" for field in self.fields), verdict)


AnyRule = Rule | LayoutRule


def check_rules(config: RLVRConfig, rules: Iterable[AnyRule] | None = None) -> list[Finding]:
    """Every violation of `rules` (default: `RULES`), in the order of the table."""
    return [finding for rule in (RULES if rules is None else rules) for finding in rule.check(config)]


def values_at(config: RLVRConfig, path: str) -> list[tuple[str, object]]:
    """(dotted path, value) of what `path` names; `*` is every key. Empty below a section that is None."""
    found: list[tuple[str, object]] = [("", config)]
    for key in path.split("."):
        above, found = found, []
        for prefix, value in above:
            items = value if isinstance(value, dict) else dict(value) if isinstance(value, Config) else {}
            found += [(join(prefix, name), items[name]) for name in items if key in (name, "*")]
    return found


def _finding(rule: AnyRule, config: RLVRConfig, fields: tuple[str, ...], verdict: Verdict) -> Finding:
    why = rule.why if verdict is True else f"{rule.why} ({verdict})"
    found = tuple(item for field in fields for item in values_at(config, field))
    return Finding(rule.id, rule.severity, found, why, rule.fix)


# What the conditions are made of.


def workers(config: RLVRConfig) -> dict[str, WorkerConfig]:
    """The roles that are configured, by name."""
    roles = {"actor_train": config.actor_train, "actor_infer": config.actor_infer, "reference": config.reference}
    return {name: worker for name, worker in roles.items() if worker is not None}


def megatron_workers(config: RLVRConfig) -> dict[str, MegatronWorker]:
    """The roles that Megatron runs, by name."""
    return {n: w for n, w in workers(config).items() if isinstance(w, ActorTrainConfig | ReferenceConfig)}


def layout(worker: MegatronWorker) -> MegatronConfig:
    return worker.strategy_args.strategy_config


def model_parallel_size(worker: MegatronWorker) -> int:
    """Ranks that share one copy of the model outside its experts: TP x PP x CP."""
    m = layout(worker)
    return m.tensor_model_parallel_size * m.pipeline_model_parallel_size * m.context_parallel_size


def data_parallel_size(worker: MegatronWorker) -> int:
    """Copies of the model; 0 when the devices do not divide, which a rule of its own refuses."""
    devices, ranks = len(worker.device_mapping), model_parallel_size(worker)
    return 0 if devices % ranks else devices // ranks


def expert_layout(worker: MegatronWorker) -> tuple[int, int, int]:
    """(ETP, EP, PP), the expert-tensor-parallel default filled in."""
    m = layout(worker)
    default = 1 if m.expert_model_parallel_size > 1 else m.tensor_model_parallel_size
    return (
        m.expert_tensor_parallel_size or default,
        m.expert_model_parallel_size,
        m.pipeline_model_parallel_size,
    )


def changed(config: RLVRConfig, path: str) -> bool:
    """Whether a field differs from its default. (That it was given says nothing: a printed configuration gives all.)"""
    parent_path, _, name = path.rpartition(".")
    sections = [value for _, value in values_at(config, parent_path)] if parent_path else [config]
    return any(getattr(s, name) != type(s).model_fields[name].default for s in sections if isinstance(s, Config))


def token_alignment(worker: MegatronWorker) -> int:
    """Tokens that every row, or sample of a packed row, is padded to a multiple of: `Layout.alignment` of its ranks."""
    m = layout(worker)
    sp = 1 if m.sequence_parallel is False else m.tensor_model_parallel_size
    cp = m.context_parallel_size
    return sp * (2 * cp if cp > 1 else 1) * worker.sequence_length_round


def longest_sequence(config: RLVRConfig) -> int:
    """Tokens of the longest prompt and response together."""
    return config.prompt_length + config.response_length


def _remainder(whole: int, parts: int, what: str) -> Verdict:
    return f"{whole} / {parts} {what} leaves {whole % parts}" if whole % parts else False


def _samples_over_ranks(config: RLVRConfig) -> Verdict:
    for role, worker in megatron_workers(config).items():
        size = data_parallel_size(worker)
        if size and (verdict := _remainder(config.samples_per_step, size, f"data-parallel ranks of {role}")):
            return verdict
    return False


def _mini_batch(config: RLVRConfig) -> int:
    """Samples of an optimizer step over all ranks; 0 when the layout has no data-parallel size."""
    args = config.actor_train.training_args
    return args.per_device_train_batch_size * args.gradient_accumulation_steps * data_parallel_size(config.actor_train)


def _samples_over_mini_batches(config: RLVRConfig) -> Verdict:
    size = _mini_batch(config)
    if size == 0 or config.samples_per_step % data_parallel_size(config.actor_train):
        return False  # rules of their own
    return _remainder(config.samples_per_step, size, "samples of an optimizer step")


def _interleaved_micro_batches(config: RLVRConfig) -> Verdict:
    m = layout(config.actor_train)
    stages = m.pipeline_model_parallel_size
    if m.chunks_per_stage is None or stages < 2 or config.actor_train.use_dynamic_batching_in_train:
        return False
    return _remainder(config.actor_train.training_args.gradient_accumulation_steps, stages, "pipeline stages")


def _repeated_devices(config: RLVRConfig) -> Verdict:
    for role, worker in workers(config).items():
        if repeated := sorted(d for d, n in Counter(worker.device_mapping).items() if n > 1):
            return f"{role} names {repeated[:8]} more than once"
    return False


def _roles_without_devices(config: RLVRConfig) -> Verdict:
    return ", ".join(role for role, worker in workers(config).items() if not worker.device_mapping)


def _shared_gpus(config: RLVRConfig) -> Verdict:
    shared = sorted(set(config.actor_train.device_mapping) & set(config.actor_infer.device_mapping))
    return f"they share {shared[:8]}" if config.device_type == "cuda" and shared else False


def _no_prompts(config: RLVRConfig) -> Verdict:
    names = config.actor_train.data_args.file_name
    return not names if isinstance(names, str) else not names or "" in names


def _unknown_rewards(config: RLVRConfig) -> Verdict:
    rules = (rule.reward for rule in config.rewards.values())
    return ", ".join(repr(r) for r in rules if r not in BUILT_IN_REWARDS and not _FUNCTION.fullmatch(r))


def _ambiguous_domains(config: RLVRConfig) -> Verdict:
    domains = Counter(tag for rule in config.rewards.values() for tag in rule.tag_included or ("every other domain",))
    return ", ".join(f"{tag} by {n} rules" for tag, n in domains.items() if n > 1)


def _unreachable_rewards(config: RLVRConfig) -> Verdict:
    if config.actor_train.data_args.domain is not None:
        return False
    return ", ".join(n for n, r in config.rewards.items() if r.tag_included and "default" not in r.tag_included)


def _first_or_last(m: MegatronConfig) -> bool:
    return bool(m.num_layers_in_first_pipeline_stage or m.num_layers_in_last_pipeline_stage)


def _accounting(m: MegatronConfig) -> bool:
    return m.account_for_embedding_in_pipeline_split or m.account_for_loss_in_pipeline_split


def _layout_stages(m: MegatronConfig) -> int:
    """Stages that the pipeline layout writes; 0 without one."""
    text = m.pipeline_model_parallel_layout
    return 0 if text is None else len(parse_pipeline_layout(text))


def _layout_against_vpp(worker: MegatronWorker) -> Verdict:
    m = layout(worker)
    stages, pp, vpp = _layout_stages(m), m.pipeline_model_parallel_size, m.virtual_pipeline_model_parallel_size
    if not stages or vpp is None or stages % pp or stages == pp * vpp:
        return False
    return f"{stages} stages / {pp} make {stages // pp}"


def _budget_too_small(config: RLVRConfig, path: str, worker: MegatronWorker, kind: str) -> Verdict:
    budget, alignment = getattr(worker, f"max_tokens_per_microbatch_in_{kind}"), token_alignment(worker)
    needed = -(-(longest_sequence(config) - 1) // alignment) * alignment
    return f"{path} needs {needed}" if budget is not None and budget < needed else False


def _infer_budget_too_small(config: RLVRConfig) -> Verdict:
    found = (_budget_too_small(config, role, w, "infer") for role, w in megatron_workers(config).items())
    return next((verdict for verdict in found if verdict), False)


def _dynamic(worker: MegatronWorker) -> bool:
    """Whether any pass of the role is cut by a token budget."""
    in_train = isinstance(worker, ActorTrainConfig) and worker.use_dynamic_batching_in_train
    return worker.use_dynamic_batching_in_infer or in_train


def _experts_split_otherwise(worker: MegatronWorker) -> Verdict:
    split, experts, _ = expert_layout(worker)
    tensor = layout(worker).tensor_model_parallel_size
    return split != tensor and (experts == 1 or split > tensor)


def _audits_elsewhere(config: RLVRConfig) -> Verdict:
    return ", ".join(role for role, w in workers(config).items() if role != "actor_train" and w.router_replay.audit)


def _audit_every_unread(config: RLVRConfig) -> Verdict:
    roles = (r for r, w in workers(config).items() if not w.router_replay.audit)
    return ", ".join(role for role in roles if changed(config, f"{role}.router_replay.audit_every"))


def _full_recompute_incomplete(worker: MegatronWorker) -> Verdict:
    m = layout(worker)
    return m.recompute_granularity == "full" and (m.recompute_method is None or m.recompute_num_layers is None)


def _unread(id: str, field: str, switch: str, is_read: Callable[[RLVRConfig], bool], fix: str) -> Rule:
    """A field that is read only under a condition, and was changed outside it."""
    return Rule(
        id=id,
        fields=(field, switch),
        why="as things stand, nothing would read this setting",
        fix=fix,
        violates=lambda config: changed(config, field) and not is_read(config),
    )


_MEGATRON = "strategy_args.strategy_config"
_TP = f"{_MEGATRON}.tensor_model_parallel_size"
_PP = f"{_MEGATRON}.pipeline_model_parallel_size"
_VPP = f"{_MEGATRON}.virtual_pipeline_model_parallel_size"
_CP = f"{_MEGATRON}.context_parallel_size"
_EP = f"{_MEGATRON}.expert_model_parallel_size"
_ETP = f"{_MEGATRON}.expert_tensor_parallel_size"
_SP = f"{_MEGATRON}.sequence_parallel"
_FIRST = f"{_MEGATRON}.num_layers_in_first_pipeline_stage"
_LAST = f"{_MEGATRON}.num_layers_in_last_pipeline_stage"
_EMBEDDING = f"{_MEGATRON}.account_for_embedding_in_pipeline_split"
_LOSS = f"{_MEGATRON}.account_for_loss_in_pipeline_split"
_LAYOUT = f"{_MEGATRON}.pipeline_model_parallel_layout"
_RECOMPUTE = f"{_MEGATRON}.recompute"
_ENGINE = "actor_infer.strategy_args.strategy_config"
_TRAIN_REPLAY = "actor_train.router_replay.mode"
_INFER_REPLAY = "actor_infer.router_replay.mode"
_BATCH = "actor_train.training_args"
_TRAIN_DYNAMIC = "actor_train.use_dynamic_batching_in_train"
_TRAIN_BUDGET = "actor_train.max_tokens_per_microbatch_in_train"
_INFER_DYNAMIC = "use_dynamic_batching_in_infer"
_INFER_BUDGET = "max_tokens_per_microbatch_in_infer"

_TRAINING_ONLY = tuple(
    f"reference.{_MEGATRON}.{name}"
    for name in ("use_distributed_optimizer", "overlap_grad_reduce", "recompute_granularity")
)

RULES: tuple[AnyRule, ...] = (
    # Router replay
    Rule(
        id="r3-on-both-sides",
        fields=(_TRAIN_REPLAY, _INFER_REPLAY),
        why="R3 needs both sides: the rollout records the experts that the trainer replays",
        fix="write R3 for both, or disable for both",
        violates=lambda c: (c.actor_train.router_replay.mode == "R3") != (c.actor_infer.router_replay.mode == "R3"),
    ),
    Rule(
        id="r2-is-the-trainers",
        fields=(_INFER_REPLAY,),
        why="R2 replays what the trainer's own old-log-prob pass recorded; the rollout has no part in it",
        fix="write actor_infer.router_replay.mode: disable, and R2 under actor_train",
        violates=lambda c: c.actor_infer.router_replay.mode == "R2",
    ),
    Rule(
        id="reference-routes-by-itself",
        fields=("reference.router_replay.mode",),
        why="the reference is another policy: made to use this policy's experts, the KL term would measure neither",
        fix="write reference.router_replay.mode: disable",
        violates=lambda c: c.reference is not None and c.reference.router_replay.mode != "disable",
    ),
    Rule(
        id="fused-router-skips-replay",
        fields=(f"actor_train.{_MEGATRON}.moe_router_fusion", _TRAIN_REPLAY),
        why="megatron-core's fused top-k returns before it consults the recorded routes, so nothing would be replayed",
        fix="write moe_router_fusion: false",
        violates=lambda c: layout(c.actor_train).moe_router_fusion and c.actor_train.router_replay.mode != "disable",
    ),
    LayoutRule(
        id="no-aux-loss",
        fields=(f"{_MEGATRON}.moe_aux_loss_coeff",),
        why="megatron-core's load-balancing loss takes a top-k of its own over all rows, padding included: it balances "
        "experts that no token used",
        fix="write moe_aux_loss_coeff: 0",
        violates=lambda w: layout(w).moe_aux_loss_coeff != 0,
    ),
    Rule(
        id="reference-bias-is-frozen",
        fields=(f"reference.{_MEGATRON}.moe_router_bias_update_rate",),
        why="the reference takes no optimizer steps, so its expert bias stays as in the checkpoint",
        fix="leave it out under reference",
        violates=lambda c: c.reference is not None and layout(c.reference).moe_router_bias_update_rate != 0,
    ),
    Rule(
        id="audit-is-the-trainers",
        fields=("actor_infer.router_replay.audit", "reference.router_replay.audit"),
        why="only the trainer replays, so there is nothing to audit elsewhere",
        fix="write audit under actor_train.router_replay",
        violates=_audits_elsewhere,
    ),
    Rule(
        id="audit-needs-replay",
        fields=("actor_train.router_replay.audit", _TRAIN_REPLAY),
        why="without replay there are no recorded experts to compare with",
        fix="write mode R2 or R3, or audit: false",
        violates=lambda c: c.actor_train.router_replay.audit and c.actor_train.router_replay.mode == "disable",
    ),
    Rule(
        id="audit-reads-the-dispatcher",
        fields=(f"actor_train.{_MEGATRON}.moe_token_dispatcher_type", "actor_train.router_replay.audit"),
        why="the flex dispatcher keeps no routing map that an audit could read",
        fix="write alltoall or allgather, or audit: false",
        violates=lambda c: (
            c.actor_train.router_replay.audit and layout(c.actor_train).moe_token_dispatcher_type == "flex"
        ),
    ),
    Rule(
        id="audit-every-unread",
        fields=("*.router_replay.audit_every", "*.router_replay.audit"),
        why="as things stand, nothing would read this setting",
        fix="write audit: true, or leave audit_every out",
        violates=_audit_every_unread,
    ),
    # Parallel layout
    Rule(
        id="devices-named",
        fields=("actor_train.device_mapping", "actor_infer.device_mapping", "reference.device_mapping"),
        why="a role without devices cannot run",
        fix="write device_mapping: list(range(0,N))",
        violates=_roles_without_devices,
    ),
    Rule(
        id="devices-once",
        fields=("actor_train.device_mapping", "actor_infer.device_mapping", "reference.device_mapping"),
        why="a role runs one process on each of its devices, so it can name a device only once",
        fix="remove the repetition",
        violates=_repeated_devices,
    ),
    LayoutRule(
        id="devices-over-model-parallel",
        fields=("device_mapping", _TP, _PP, _CP),
        why="the number of devices must be a multiple of TP x PP x CP, the ranks that share one copy of the model",
        fix="change the number of devices, or the layout",
        violates=lambda w: _remainder(len(w.device_mapping), model_parallel_size(w), "ranks of a copy"),
    ),
    LayoutRule(
        id="devices-over-expert-parallel",
        fields=("device_mapping", _EP, _ETP, _PP),
        why="the number of devices must be a multiple of EP x ETP x PP, the ranks that share one copy of the experts "
        "(ETP defaults to 1 with expert parallelism, else to TP)",
        fix="change the number of devices, or the layout",
        violates=lambda w: _remainder(len(w.device_mapping), prod(expert_layout(w)), "ranks of a copy of the experts"),
    ),
    LayoutRule(
        id="experts-split-as-weights",
        fields=(_ETP, _EP, _TP),
        why="weights are converted only where an expert's matrices are split over all tensor-parallel ranks or, with "
        "expert parallelism, over fewer of them",
        fix="leave expert_tensor_parallel_size out",
        violates=_experts_split_otherwise,
    ),
    LayoutRule(
        id="allgather-needs-one-stage",
        fields=(f"{_MEGATRON}.moe_token_dispatcher_type", _PP),
        why="with the allgather dispatcher megatron-core passes only micro-batches of one shape between stages",
        fix="write moe_token_dispatcher_type: alltoall",
        violates=lambda w: (
            layout(w).moe_token_dispatcher_type == "allgather" and layout(w).pipeline_model_parallel_size > 1
        ),
    ),
    LayoutRule(
        id="vpp-needs-pp",
        fields=(_VPP, _PP),
        why="model chunks are interleaved over pipeline stages: that takes at least two stages",
        fix="raise pipeline_model_parallel_size to 2 or more, or leave virtual_pipeline_model_parallel_size out",
        violates=lambda w: (
            layout(w).virtual_pipeline_model_parallel_size is not None and layout(w).pipeline_model_parallel_size < 2
        ),
    ),
    LayoutRule(
        id="vpp-of-one",
        fields=(_VPP,),
        why="one chunk per stage is the plain schedule",
        fix="leave virtual_pipeline_model_parallel_size out, or write 2 or more",
        violates=lambda w: layout(w).virtual_pipeline_model_parallel_size == 1,
    ),
    LayoutRule(
        id="uneven-stages-need-pp",
        fields=(_FIRST, _LAST, _EMBEDDING, _LOSS, _LAYOUT, _PP),
        why="with one pipeline stage there is nothing to share layers out to",
        fix="leave them out, or raise pipeline_model_parallel_size",
        violates=lambda w: (
            layout(w).pipeline_model_parallel_size == 1
            and (_first_or_last(layout(w)) or _accounting(layout(w)) or _layout_stages(layout(w)) > 0)
        ),
    ),
    LayoutRule(
        id="one-way-to-split-layers",
        fields=(_LAYOUT, _FIRST, _LAST, _EMBEDDING, _LOSS),
        why="each of these says how layers are shared out: a layout all of it, num_layers_in_* those of the first or "
        "last stage, account_for_* what else counts as a layer",
        fix="keep the layout, or num_layers_in_*, or account_for_*",
        violates=lambda w: sum((_layout_stages(layout(w)) > 0, _first_or_last(layout(w)), _accounting(layout(w)))) > 1,
    ),
    LayoutRule(
        id="layout-stages-over-pp",
        fields=(_LAYOUT, _PP),
        why="every pipeline rank takes as many stages of the layout",
        fix="write a multiple of pipeline_model_parallel_size stages",
        violates=lambda w: _remainder(_layout_stages(layout(w)), layout(w).pipeline_model_parallel_size, "ranks"),
    ),
    LayoutRule(
        id="layout-agrees-with-vpp",
        fields=(_VPP, _LAYOUT, _PP),
        why="with a layout, the chunks per pipeline stage are its stages / pipeline_model_parallel_size",
        fix="leave virtual_pipeline_model_parallel_size out",
        violates=_layout_against_vpp,
    ),
    LayoutRule(
        id="tp-needs-sp",
        fields=(_SP, _TP),
        why="megatron-core trains MoE layers under tensor parallelism only with sequence parallelism",
        fix="leave sequence_parallel out: it is on whenever TP is above 1",
        violates=lambda w: layout(w).sequence_parallel is False and layout(w).tensor_model_parallel_size > 1,
    ),
    LayoutRule(
        id="sp-needs-tp",
        fields=(_SP, _TP),
        why="sequence parallelism splits the sequence over the tensor-parallel ranks, and there is only one",
        fix="leave sequence_parallel out, or raise tensor_model_parallel_size",
        violates=lambda w: layout(w).sequence_parallel is True and layout(w).tensor_model_parallel_size == 1,
    ),
    Rule(
        id="engine-devices-over-tp",
        fields=("actor_infer.device_mapping", f"{_ENGINE}.tp_size"),
        why="every engine takes tp_size devices",
        fix="change the number of devices to a multiple of tp_size",
        violates=lambda c: _remainder(
            len(c.actor_infer.device_mapping),
            c.actor_infer.strategy_args.strategy_config.tp_size,
            "devices of an engine",
        ),
    ),
    Rule(
        id="gpus-not-shared",
        fields=("actor_infer.device_mapping", "actor_train.device_mapping", "device_type"),
        why="weights go from trainer to engine over NCCL, which refuses two ranks on one GPU, and an engine that "
        "shares a GPU cannot make room yet",
        fix="give actor_infer and actor_train GPUs of their own",
        violates=_shared_gpus,
    ),
    # Recompute
    LayoutRule(
        id="full-recompute-says-how",
        fields=(f"{_RECOMPUTE}_method", f"{_RECOMPUTE}_num_layers", f"{_RECOMPUTE}_granularity"),
        why="full recompute needs to know in which groups layers are recomputed",
        fix="write recompute_method: uniform and recompute_num_layers: 1 (the least memory)",
        violates=_full_recompute_incomplete,
    ),
    LayoutRule(
        id="recompute-method-needs-full",
        fields=(f"{_RECOMPUTE}_granularity", f"{_RECOMPUTE}_method", f"{_RECOMPUTE}_num_layers"),
        why="recompute_method and recompute_num_layers are read with full recompute only",
        fix="write recompute_granularity: full, or leave them out",
        violates=lambda w: (
            layout(w).recompute_granularity != "full"
            and bool(layout(w).recompute_method or layout(w).recompute_num_layers)
        ),
    ),
    LayoutRule(
        id="selective-recompute-says-what",
        fields=(f"{_RECOMPUTE}_modules", f"{_RECOMPUTE}_granularity"),
        why="selective recompute needs the modules to recompute",
        fix="write recompute_modules: [moe], say",
        violates=lambda w: layout(w).recompute_granularity == "selective" and not layout(w).recompute_modules,
    ),
    LayoutRule(
        id="recompute-modules-need-selective",
        fields=(f"{_RECOMPUTE}_granularity", f"{_RECOMPUTE}_modules"),
        why="recompute_modules is read with selective recompute only",
        fix="write recompute_granularity: selective, or leave the modules out",
        violates=lambda w: layout(w).recompute_granularity != "selective" and bool(layout(w).recompute_modules),
    ),
    # Batch arithmetic
    Rule(
        id="samples-over-ranks",
        fields=("rollout_batch_size", "num_return_sequences_in_group"),
        why="the samples of a step (rollout_batch_size x num_return_sequences_in_group) must divide over the "
        "data-parallel ranks (devices / (TP x PP x CP))",
        fix="change rollout_batch_size, or the number of devices",
        violates=_samples_over_ranks,
    ),
    Rule(
        id="samples-over-mini-batches",
        fields=(
            f"{_BATCH}.gradient_accumulation_steps",
            f"{_BATCH}.per_device_train_batch_size",
            "rollout_batch_size",
            "num_return_sequences_in_group",
        ),
        why="the samples of a step must be a multiple of those of an optimizer step (per_device_train_batch_size x "
        "gradient_accumulation_steps x data-parallel size): a short last one would step on a noisier gradient",
        fix="change one of these so that it divides",
        violates=_samples_over_mini_batches,
    ),
    Rule(
        id="interleaved-micro-batches",
        fields=(f"{_BATCH}.gradient_accumulation_steps", f"actor_train.{_PP}", f"actor_train.{_VPP}"),
        why="the interleaved schedule takes micro-batches in groups of one per pipeline stage",
        fix="write a multiple of pipeline_model_parallel_size",
        violates=_interleaved_micro_batches,
    ),
    Rule(
        id="train-budget-given",
        fields=(_TRAIN_BUDGET, _TRAIN_DYNAMIC),
        why="a token budget is read with dynamic batching only, and dynamic batching needs one",
        fix="write both, or neither",
        violates=lambda c: (
            c.actor_train.use_dynamic_batching_in_train
            != (c.actor_train.max_tokens_per_microbatch_in_train is not None)
        ),
    ),
    LayoutRule(
        id="infer-budget-given",
        fields=(_INFER_BUDGET, _INFER_DYNAMIC),
        why="a token budget is read with dynamic batching only, and dynamic batching needs one",
        fix="write both, or neither",
        violates=lambda w: w.use_dynamic_batching_in_infer != (w.max_tokens_per_microbatch_in_infer is not None),
    ),
    Rule(
        id="train-budget-fits-longest",
        fields=(_TRAIN_BUDGET, "prompt_length", "response_length"),
        why="the longest sample (prompt_length + response_length - 1 inputs, padded to what its ranks need) must fit "
        "into a micro-batch",
        fix="raise the budget",
        violates=lambda c: _budget_too_small(c, "actor_train", c.actor_train, "train"),
    ),
    Rule(
        id="infer-budget-fits-longest",
        fields=(f"*.{_INFER_BUDGET}", "prompt_length", "response_length"),
        why="the longest sample (prompt_length + response_length - 1 inputs, padded to what its ranks need) must fit "
        "into a micro-batch",
        fix="raise the budget",
        violates=_infer_budget_too_small,
    ),
    LayoutRule(
        id="infer-batch-unread",
        fields=("infer_batch_size", _INFER_DYNAMIC),
        why="with dynamic batching the token budget cuts micro-batches: nothing would read this setting",
        fix="leave infer_batch_size out",
        violates=lambda w: (
            w.use_dynamic_batching_in_infer
            and w.infer_batch_size != WorkerConfig.model_fields["infer_batch_size"].default
        ),
    ),
    LayoutRule(
        id="dynamic-batching-with-allgather",
        fields=("use_sequence_packing", f"{_MEGATRON}.moe_token_dispatcher_type", _EP),
        why="the allgather dispatcher exchanges equal shapes between expert-parallel ranks, and padded micro-batches "
        "of a token budget differ in their number of rows",
        fix="write moe_token_dispatcher_type: alltoall, or use_sequence_packing: true",
        violates=lambda w: (
            _dynamic(w)
            and not w.use_sequence_packing
            and layout(w).moe_token_dispatcher_type == "allgather"
            and layout(w).expert_model_parallel_size > 1
        ),
    ),
    # Algorithm
    Rule(
        id="kl-needs-reference",
        fields=("reference", "use_kl_loss", "add_token_level_kl"),
        why="the KL term compares with a reference policy, and there is none",
        fix="add a `reference` section, or switch the KL term off",
        violates=lambda c: c.reference is None and (c.use_kl_loss or c.add_token_level_kl),
    ),
    Rule(
        id="reference-unused",
        fields=("use_kl_loss", "add_token_level_kl"),
        why="a reference is configured, but no KL term uses it: it would take devices and time for nothing",
        fix="write use_kl_loss: true, or remove the `reference` section",
        violates=lambda c: c.reference is not None and not (c.use_kl_loss or c.add_token_level_kl),
    ),
    Rule(
        id="kl-weighs-nothing",
        fields=("use_kl_loss", "kl_loss_coef", "add_token_level_kl", "init_kl_coef"),
        why="a KL term with a coefficient of 0 is computed but changes nothing",
        fix="set kl_loss_coef (with use_kl_loss) or init_kl_coef (with add_token_level_kl)",
        violates=lambda c: (c.use_kl_loss and c.kl_loss_coef == 0) or (c.add_token_level_kl and c.init_kl_coef == 0),
        severity="warning",
    ),
    Rule(
        id="dual-clip-above-one",
        fields=("dual_clip_loss",),
        why="the dual clip bounds the loss at this times the advantage; at 1 or below it would bound unclipped ratios",
        fix="write a value above 1 (3 is usual), or null",
        violates=lambda c: c.dual_clip_loss is not None and c.dual_clip_loss <= 1,
    ),
    Rule(
        id="grpo-needs-groups",
        fields=("num_return_sequences_in_group", "adv_estimator"),
        why="GRPO compares the responses of one group; alone in its group, every response has advantage 0",
        fix="write num_return_sequences_in_group: 2 or more, or adv_estimator: reinforce",
        violates=lambda c: c.adv_estimator == "grpo" and c.num_return_sequences_in_group == 1,
    ),
    # Sampling
    Rule(
        id="response-fits",
        fields=("actor_infer.generating_args.max_new_tokens", "response_length"),
        why="the engine could sample more tokens than response_length, the longest response there is room for",
        fix="leave max_new_tokens out, or raise response_length",
        violates=lambda c: (c.actor_infer.generating_args.max_new_tokens or 0) > c.response_length,
    ),
    Rule(
        id="engine-context-fits",
        fields=(f"{_ENGINE}.context_length", "prompt_length", "response_length"),
        why="the engine would refuse or cut the longest samples",
        fix="leave context_length out, or write at least prompt_length + response_length",
        violates=lambda c: (
            (c.actor_infer.strategy_args.strategy_config.context_length or longest_sequence(c)) < longest_sequence(c)
        ),
    ),
    Rule(
        id="engine-cache-fits",
        fields=(f"{_ENGINE}.max_total_tokens", "prompt_length", "response_length"),
        why="the engine's cache could not hold one of the longest samples",
        fix="leave max_total_tokens out, or write at least prompt_length + response_length",
        violates=lambda c: (
            (c.actor_infer.strategy_args.strategy_config.max_total_tokens or longest_sequence(c)) < longest_sequence(c)
        ),
    ),
    Rule(
        id="top-k-range",
        fields=("actor_infer.generating_args.top_k",),
        why="top_k is a number of tokens",
        fix="write -1 for all tokens, or a positive number",
        violates=lambda c: c.actor_infer.generating_args.top_k < 1 and c.actor_infer.generating_args.top_k != -1,
    ),
    Rule(
        id="truncated-sampling",
        fields=("actor_infer.generating_args.top_p", "actor_infer.generating_args.top_k"),
        why="tokens are sampled from a truncated distribution, but log-probabilities are those of the whole one: the "
        "ratios between policies are biased",
        fix="write top_p: 1 and top_k: -1",
        violates=lambda c: c.actor_infer.generating_args.top_p < 1 or c.actor_infer.generating_args.top_k > 0,
        severity="warning",
    ),
    # Data and rewards
    Rule(
        id="data-named",
        fields=("actor_train.data_args.file_name",),
        why="there are no prompts to train on",
        fix="name one or more .jsonl or .parquet files, or bundled:NAME",
        violates=_no_prompts,
    ),
    Rule(
        id="rewards-named",
        fields=("rewards",),
        why="without a reward there is nothing to learn",
        fix="leave rewards out (exact_match), or add a rule",
        violates=lambda c: not c.rewards,
    ),
    Rule(
        id="reward-known",
        fields=("rewards.*.reward",),
        why=f"a reward is one of {', '.join(sorted(BUILT_IN_REWARDS))}, or package.module:function",
        fix="write one of those",
        violates=_unknown_rewards,
    ),
    Rule(
        id="reward-domains-once",
        fields=("rewards.*.tag_included",),
        why="every domain has exactly one reward rule",
        fix="give each rule tag_included of its own; at most one rule may leave it out",
        violates=_ambiguous_domains,
    ),
    Rule(
        id="reward-reachable",
        fields=("rewards.*.tag_included", "actor_train.data_args.domain"),
        why="without a domain column every sample has the domain `default`, so these rules would score nothing",
        fix="name the column in actor_train.data_args.domain, or remove the rules",
        violates=_unreachable_rewards,
    ),
    # Settings that nothing would read
    _unread("kl-loss-coef-unread", "kl_loss_coef", "use_kl_loss", lambda c: c.use_kl_loss, "write use_kl_loss: true"),
    _unread(
        "init-kl-coef-unread",
        "init_kl_coef",
        "add_token_level_kl",
        lambda c: c.add_token_level_kl,
        "write add_token_level_kl: true",
    ),
    _unread(
        "kl-estimator-unread",
        "kl_estimator",
        "use_kl_loss",
        lambda c: c.use_kl_loss or c.add_token_level_kl,
        "write use_kl_loss: true, or leave kl_estimator out",
    ),
    _unread(
        "correction-cap-unread",
        "rollout_correction.cap",
        "rollout_correction.mode",
        lambda c: c.rollout_correction.mode != "disable",
        "write rollout_correction.mode: token_tis",
    ),
    _unread(
        "group-std-unread",
        "norm_adv_by_std_in_grpo",
        "adv_estimator",
        lambda c: c.adv_estimator == "grpo",
        "leave norm_adv_by_std_in_grpo out, or write adv_estimator: grpo",
    ),
    _unread(
        "prompt-column-unread",
        "actor_train.data_args.prompt",
        "actor_train.data_args.messages",
        lambda c: c.actor_train.data_args.messages is None,
        "leave one of the two out: `messages` takes the place of `prompt`",
    ),
    _unread(
        "engine-batch-unread",
        "actor_infer.infer_batch_size",
        f"{_ENGINE}.max_running_requests",
        lambda c: False,
        "leave it out: the engine batches by itself, up to strategy_config.max_running_requests",
    ),
    _unread(
        "engine-dtype-unread",
        "actor_infer.model_args.dtype",
        f"{_ENGINE}.dtype",
        lambda c: False,
        "write the engine's precision as strategy_config.dtype",
    ),
    Rule(
        id="reference-only-infers",
        fields=_TRAINING_ONLY,
        why="megatron_infer has neither gradients nor an optimizer: some settings of the reference have no effect",
        fix="leave them out under reference",
        violates=lambda c: any(changed(c, field) for field in _TRAINING_ONLY),
        severity="warning",
    ),
    Rule(
        id="memory-share-on-cpu",
        fields=(f"{_ENGINE}.mem_fraction_static", "device_type"),
        why="a CPU engine has no device memory to share out: mem_fraction_static has no effect",
        fix="leave it out, and set max_total_tokens",
        violates=lambda c: (
            c.device_type == "cpu" and c.actor_infer.strategy_args.strategy_config.mem_fraction_static is not None
        ),
        severity="warning",
    ),
)
