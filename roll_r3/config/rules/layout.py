"""Layout and recomputation by Megatron: settings that conflict, or have no effect."""

from __future__ import annotations

from roll_r3.config.derived import (
    MegatronWorker,
    changed,
    expert_layout,
    layout,
    megatron_workers,
    roles_with_gpu_kernels,
)
from roll_r3.config.pipeline import RLVRConfig
from roll_r3.config.pipeline_layout import parse_pipeline_layout
from roll_r3.config.rules.example import OWN_GPUS
from roll_r3.config.rules.paths import BATCH, EP, ETP, MEGATRON, PP, REFERENCE, SP, TP, TRAIN, VPP
from roll_r3.config.rules.table import AnyRule, LayoutRule, Rule, Verdict, remainder, unread
from roll_r3.config.strategies import MegatronConfig

FIRST = f"{MEGATRON}.num_layers_in_first_pipeline_stage"
LAST = f"{MEGATRON}.num_layers_in_last_pipeline_stage"
EMBEDDING = f"{MEGATRON}.account_for_embedding_in_pipeline_split"
LOSS = f"{MEGATRON}.account_for_loss_in_pipeline_split"
LAYOUT = f"{MEGATRON}.pipeline_model_parallel_layout"
RECOMPUTE = f"{MEGATRON}.recompute"
TRAINING_ONLY = tuple(
    f"{REFERENCE}.{name}"
    for name in (
        "use_distributed_optimizer",
        "overlap_grad_reduce",
        "moe_router_bias_update_rate",
        "recompute_granularity",
        "recompute",
    )
)


def _first_or_last(m: MegatronConfig) -> bool:
    return bool(m.num_layers_in_first_pipeline_stage or m.num_layers_in_last_pipeline_stage)


def _accounting(m: MegatronConfig) -> bool:
    return m.account_for_embedding_in_pipeline_split or m.account_for_loss_in_pipeline_split


def _layout_stages(m: MegatronConfig) -> int:
    """Return the number of stages in the pipeline layout; 0 without one."""
    text = m.pipeline_model_parallel_layout
    return 0 if text is None else len(parse_pipeline_layout(text))


def _layout_against_vpp(worker: MegatronWorker) -> Verdict:
    m = layout(worker)
    stages, pp, vpp = _layout_stages(m), m.pipeline_model_parallel_size, m.virtual_pipeline_model_parallel_size
    if not stages or vpp is None or stages % pp or stages == pp * vpp:
        return False
    return f"{stages} stages / {pp} make {stages // pp}"


def _experts_split_otherwise(worker: MegatronWorker) -> Verdict:
    split, experts, _ = expert_layout(worker)
    tensor = layout(worker).tensor_model_parallel_size
    return split != tensor and (experts == 1 or split > tensor)


def _full_recompute_incomplete(worker: MegatronWorker) -> Verdict:
    m = layout(worker)
    return m.recompute_granularity == "full" and (m.recompute_method is None or m.recompute_num_layers is None)


def _recomputes_ungrouped(config: RLVRConfig) -> Verdict:
    roles = {role: layout(worker) for role, worker in megatron_workers(config).items()}
    ungrouped = config.device_type == "cpu"
    return ", ".join(
        role
        for role, m in roles.items()
        if m.recompute_granularity == "selective"
        and "moe_act" in m.recompute_modules
        and (ungrouped or m.moe_grouped_gemm is False)
    )


def _recomputes_norms_on_cpu(config: RLVRConfig) -> Verdict:
    roles = {role: layout(worker) for role, worker in megatron_workers(config).items()}
    used = [role for role, m in roles.items() if "layernorm" in m.recompute_modules]
    return ", ".join(used) if config.device_type == "cpu" else False


def _gpu_kernels_on_cpu(config: RLVRConfig) -> Verdict:
    return ", ".join(roles_with_gpu_kernels(config)) if config.device_type == "cpu" else False


RULES: tuple[AnyRule, ...] = (
    LayoutRule(
        id="experts-split-as-weights",
        fields=(ETP, EP, TP),
        why="weights are converted only if an expert's matrices are split over all tensor-parallel ranks or, with "
        "expert parallelism, over fewer of them",
        fix="leave expert_tensor_parallel_size out",
        wrong=("actor_train.device_mapping=range(2)", f"{TRAIN}.expert_tensor_parallel_size=2"),
        right=(
            "actor_train.device_mapping=range(2)",
            f"{TRAIN}.expert_tensor_parallel_size=2",
            f"{TRAIN}.tensor_model_parallel_size=2",
        ),
        violates=_experts_split_otherwise,
    ),
    LayoutRule(
        id="allgather-needs-one-stage",
        fields=(f"{MEGATRON}.moe_token_dispatcher_type", PP),
        why="with the allgather dispatcher megatron-core sends only micro-batches of one shape between stages",
        fix="write moe_token_dispatcher_type: alltoall",
        wrong=(
            "actor_train.device_mapping=range(2)",
            f"{TRAIN}.moe_token_dispatcher_type=allgather",
            f"{TRAIN}.pipeline_model_parallel_size=2",
        ),
        right=("actor_train.device_mapping=range(2)", f"{TRAIN}.moe_token_dispatcher_type=allgather"),
        violates=lambda w: (
            layout(w).moe_token_dispatcher_type == "allgather" and layout(w).pipeline_model_parallel_size > 1
        ),
    ),
    LayoutRule(
        id="vpp-needs-pp",
        fields=(VPP, PP),
        why="model chunks are interleaved over pipeline stages, at least two of them",
        fix="raise pipeline_model_parallel_size to 2 or more, or leave virtual_pipeline_model_parallel_size out",
        wrong=(f"{TRAIN}.virtual_pipeline_model_parallel_size=2",),
        right=(
            "actor_train.device_mapping=range(2)",
            f"{TRAIN}.virtual_pipeline_model_parallel_size=2",
            f"{TRAIN}.pipeline_model_parallel_size=2",
            f"{BATCH}.gradient_accumulation_steps=2",
        ),
        violates=lambda w: (
            (layout(w).virtual_pipeline_model_parallel_size or 1) > 1 and layout(w).pipeline_model_parallel_size < 2
        ),
    ),
    LayoutRule(
        id="vpp-of-one",
        fields=(VPP,),
        why="one chunk per stage is the plain schedule",
        fix="leave virtual_pipeline_model_parallel_size out, or write 2 or more",
        wrong=(
            "actor_train.device_mapping=range(2)",
            f"{TRAIN}.virtual_pipeline_model_parallel_size=1",
            f"{TRAIN}.pipeline_model_parallel_size=2",
        ),
        right=("actor_train.device_mapping=range(2)", f"{TRAIN}.pipeline_model_parallel_size=2"),
        violates=lambda w: layout(w).virtual_pipeline_model_parallel_size == 1,
        severity="warning",
    ),
    LayoutRule(
        id="uneven-stages-need-pp",
        fields=(FIRST, LAST, EMBEDDING, LOSS, LAYOUT, PP),
        why="with one pipeline stage there is no split of layers",
        fix="leave them out, or raise pipeline_model_parallel_size",
        wrong=(f"{TRAIN}.num_layers_in_first_pipeline_stage=3",),
        right=(
            "actor_train.device_mapping=range(2)",
            f"{TRAIN}.pipeline_model_parallel_size=2",
            f"{TRAIN}.account_for_loss_in_pipeline_split=true",
        ),
        violates=lambda w: (
            layout(w).pipeline_model_parallel_size == 1
            and (_first_or_last(layout(w)) or _accounting(layout(w)) or _layout_stages(layout(w)) > 0)
        ),
    ),
    LayoutRule(
        id="one-way-to-split-layers",
        fields=(LAYOUT, FIRST, LAST, EMBEDDING, LOSS),
        why="each of these defines the split of layers: a layout the whole split, num_layers_in_* the first or last "
        "stage, account_for_* further layers to count",
        fix="keep the layout, or num_layers_in_*, or account_for_*",
        wrong=(
            "actor_train.device_mapping=range(2)",
            f"{TRAIN}.pipeline_model_parallel_size=2",
            f"{TRAIN}.pipeline_model_parallel_layout='Ett|ttL'",
            f"{TRAIN}.num_layers_in_first_pipeline_stage=2",
        ),
        right=(
            "actor_train.device_mapping=range(2)",
            f"{TRAIN}.pipeline_model_parallel_size=2",
            f"{TRAIN}.pipeline_model_parallel_layout='Ett|ttL'",
        ),
        violates=lambda w: sum((_layout_stages(layout(w)) > 0, _first_or_last(layout(w)), _accounting(layout(w)))) > 1,
    ),
    LayoutRule(
        id="layout-stages-over-pp",
        fields=(LAYOUT, PP),
        why="every pipeline rank has the same number of stages of the layout",
        fix="write a multiple of pipeline_model_parallel_size stages",
        wrong=(
            "actor_train.device_mapping=range(2)",
            f"{TRAIN}.pipeline_model_parallel_size=2",
            f"{TRAIN}.pipeline_model_parallel_layout='Et|t|tL'",
        ),
        right=(
            "actor_train.device_mapping=range(2)",
            f"{TRAIN}.pipeline_model_parallel_size=2",
            f"{TRAIN}.pipeline_model_parallel_layout='Et|t|t|tL'",
            f"{BATCH}.gradient_accumulation_steps=2",
        ),
        violates=lambda w: remainder(_layout_stages(layout(w)), layout(w).pipeline_model_parallel_size, "ranks"),
    ),
    LayoutRule(
        id="layout-agrees-with-vpp",
        fields=(VPP, LAYOUT, PP),
        why="with a layout, the chunks per pipeline stage are its stages / pipeline_model_parallel_size",
        fix="leave virtual_pipeline_model_parallel_size out",
        wrong=(
            "actor_train.device_mapping=range(2)",
            f"{TRAIN}.pipeline_model_parallel_size=2",
            f"{TRAIN}.pipeline_model_parallel_layout='Ett|ttL'",
            f"{TRAIN}.virtual_pipeline_model_parallel_size=2",
            f"{BATCH}.gradient_accumulation_steps=2",
        ),
        right=(
            "actor_train.device_mapping=range(2)",
            f"{TRAIN}.pipeline_model_parallel_size=2",
            f"{TRAIN}.pipeline_model_parallel_layout='Et|t|t|tL'",
            f"{TRAIN}.virtual_pipeline_model_parallel_size=2",
            f"{BATCH}.gradient_accumulation_steps=2",
        ),
        violates=_layout_against_vpp,
    ),
    LayoutRule(
        id="tp-needs-sp",
        fields=(SP, TP),
        why="megatron-core trains MoE layers under tensor parallelism only with sequence parallelism",
        fix="leave sequence_parallel out: it is on whenever TP is above 1",
        wrong=(
            "actor_train.device_mapping=range(2)",
            f"{TRAIN}.tensor_model_parallel_size=2",
            f"{TRAIN}.sequence_parallel=false",
        ),
        right=("actor_train.device_mapping=range(2)", f"{TRAIN}.tensor_model_parallel_size=2"),
        violates=lambda w: layout(w).sequence_parallel is False and layout(w).tensor_model_parallel_size > 1,
    ),
    LayoutRule(
        id="sp-needs-tp",
        fields=(SP, TP),
        why="sequence parallelism splits the sequence over the tensor-parallel ranks, but there is only one",
        fix="leave sequence_parallel out, or raise tensor_model_parallel_size",
        wrong=(f"{TRAIN}.sequence_parallel=true",),
        right=(
            "actor_train.device_mapping=range(2)",
            f"{TRAIN}.tensor_model_parallel_size=2",
            f"{TRAIN}.sequence_parallel=true",
        ),
        violates=lambda w: layout(w).sequence_parallel is True and layout(w).tensor_model_parallel_size == 1,
        severity="warning",
    ),
    LayoutRule(
        id="full-recompute-says-how",
        fields=(f"{RECOMPUTE}_method", f"{RECOMPUTE}_num_layers", f"{RECOMPUTE}_granularity"),
        why="full recompute needs the groups of layers to recompute",
        fix="write recompute_method: uniform and recompute_num_layers: 1 (the least memory)",
        wrong=(f"{TRAIN}.recompute_granularity=full", f"{TRAIN}.recompute_method=uniform"),
        right=(
            f"{TRAIN}.recompute_granularity=full",
            f"{TRAIN}.recompute_method=block",
            f"{TRAIN}.recompute_num_layers=1",
        ),
        violates=_full_recompute_incomplete,
    ),
    LayoutRule(
        id="recompute-method-needs-full",
        fields=(f"{RECOMPUTE}_granularity", f"{RECOMPUTE}_method", f"{RECOMPUTE}_num_layers"),
        why="recompute_method and recompute_num_layers have an effect with full recompute only",
        fix="write recompute_granularity: full, or leave them out",
        wrong=(f"{TRAIN}.recompute_method=block",),
        right=(
            f"{TRAIN}.recompute_granularity=full",
            f"{TRAIN}.recompute_method=block",
            f"{TRAIN}.recompute_num_layers=1",
        ),
        violates=lambda w: (
            layout(w).recompute_granularity != "full"
            and bool(layout(w).recompute_method or layout(w).recompute_num_layers)
        ),
        severity="warning",
    ),
    LayoutRule(
        id="selective-recompute-says-what",
        fields=(f"{RECOMPUTE}_modules", f"{RECOMPUTE}_granularity"),
        why="selective recompute needs the modules to recompute",
        fix="write recompute_modules: [moe], for example",
        wrong=(f"{TRAIN}.recompute_granularity=selective", f"{TRAIN}.recompute_modules=[]"),
        right=(f"{TRAIN}.recompute_granularity=selective", f"{TRAIN}.recompute_modules=[moe]"),
        violates=lambda w: layout(w).recompute_granularity == "selective" and not layout(w).recompute_modules,
    ),
    Rule(
        id="moe-act-needs-grouped-experts",
        fields=(f"*.{RECOMPUTE}_modules", f"*.{MEGATRON}.moe_grouped_gemm", "device_type"),
        depends=(f"*.{RECOMPUTE}_granularity",),
        why="megatron-core recomputes the experts' activation only with grouped matrix products, on a GPU",
        fix="remove moe_act",
        wrong=(
            f"{TRAIN}.recompute_granularity=selective",
            f"{TRAIN}.recompute_modules=[moe_act]",
            f"{TRAIN}.moe_grouped_gemm=false",
        ),
        right=(*OWN_GPUS, f"{TRAIN}.recompute_granularity=selective", f"{TRAIN}.recompute_modules=[moe_act]"),
        violates=_recomputes_ungrouped,
    ),
    Rule(
        id="layernorm-needs-transformer-engine",
        fields=(f"*.{RECOMPUTE}_modules", "device_type"),
        why="megatron-core recomputes norms with TransformerEngine, on a GPU only",
        fix="remove layernorm",
        wrong=(
            "device_type=cpu",
            f"{TRAIN}.recompute_granularity=selective",
            f"{TRAIN}.recompute_modules=[layernorm]",
        ),
        right=(*OWN_GPUS, f"{TRAIN}.recompute_granularity=selective", f"{TRAIN}.recompute_modules=[layernorm]"),
        violates=_recomputes_norms_on_cpu,
    ),
    Rule(
        id="gpu-kernels-on-cpu",
        fields=(f"*.{MEGATRON}.moe_grouped_gemm", f"*.{MEGATRON}.moe_router_fusion", "device_type"),
        why="these kernels of TransformerEngine run on a GPU only",
        fix="leave moe_grouped_gemm and moe_router_fusion out",
        wrong=("device_type=cpu", f"{TRAIN}.moe_grouped_gemm=true"),
        right=("device_type=cpu", f"{TRAIN}.moe_grouped_gemm=false"),
        violates=_gpu_kernels_on_cpu,
    ),
    LayoutRule(
        id="recompute-modules-need-selective",
        fields=(f"{RECOMPUTE}_granularity", f"{RECOMPUTE}_modules"),
        why="recompute_modules has an effect with selective recompute only",
        fix="write recompute_granularity: selective, or leave the modules out",
        wrong=(f"{TRAIN}.recompute_modules=[moe]",),
        right=(f"{TRAIN}.recompute_granularity=selective", f"{TRAIN}.recompute_modules=[moe]"),
        violates=lambda w: layout(w).recompute_granularity != "selective" and bool(layout(w).recompute_modules),
        severity="warning",
    ),
    unread(
        "reference-runs-no-code",
        "reference.model_args.trust_remote_code",
        "actor_train.model_args.trust_remote_code",
        lambda c: False,
        "leave it out: models are built without the checkpoint's code, and the tokenizer is actor_train's",
        wrong=("use_kl_loss=true", "reference.model_args.trust_remote_code=true"),
        right=("use_kl_loss=true", "actor_train.model_args.trust_remote_code=true", "reference={}"),
        severity="warning",
    ),
    Rule(
        id="reference-only-infers",
        fields=TRAINING_ONLY,
        why="the reference has neither gradients nor an optimizer: some of its settings have no effect",
        fix="leave them out under reference",
        wrong=("use_kl_loss=true", f"{REFERENCE}.use_distributed_optimizer=true"),
        right=(f"{TRAIN}.use_distributed_optimizer=true",),
        violates=lambda c: any(changed(c, field) for field in TRAINING_ONLY),
        severity="warning",
    ),
)

SPLIT_RULES = tuple(
    rule
    for rule in RULES
    if isinstance(rule, LayoutRule)
    and rule.id
    in (
        "vpp-needs-pp",
        "uneven-stages-need-pp",
        "one-way-to-split-layers",
        "layout-stages-over-pp",
        "layout-agrees-with-vpp",
    )
)
"""Rules about the split of layers into stages. After a violation, no comparison with the model makes sense."""
