"""Plan as text, at most 100 columns wide, and as JSON."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import groupby
from typing import Any

from roll_r3.preflight.plan.plan import ChunkPlan, GroupPlan, Plan, RolePlan, RoutesPlan, StagePlan
from roll_r3.preflight.plan.step import MicroBatches

WIDTH = 100
MEMORY_FIGURES = "computed, not measured"
_LIKE_STAGES_SHOWN, _LISTED, _RUNS_SHOWN, _CHUNKS_SHOWN = 3, 3, 4, 4
_UNITS = (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10), ("B", 1))


def plan_json(plan: Plan) -> dict[str, Any]:
    """Return the whole plan as plain values: the fields of `Plan`, sizes in bytes, and memory totals."""
    found: dict[str, Any] = _plain(asdict(plan)) | {"nodes": plan.nodes, "memory_figures": MEMORY_FIGURES}
    for role, written in zip(plan.roles, found["roles"], strict=True):
        for stage, shown in zip(role.stages, written["stages"], strict=True):
            shown["memory"]["total"] = stage.memory.total
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple | list) else value


def render_plan(plan: Plan) -> str:
    """Return the plan for a terminal. Repeated rows are shown once."""
    sections = [_summary(plan), _step(plan)]
    sections += [_role(role, plan) for role in plan.roles]
    sections += [_engines(plan), _routes(plan), _sync(plan), _between_nodes(plan), _shared(plan)]
    return "\n\n".join("\n".join(lines) for lines in map(list, sections) if lines)


def _summary(plan: Plan) -> Iterator[str]:
    model = plan.model
    nodes = f"{_number(plan.nodes, 'node')} of {plan.devices_per_node}"
    yield f"{plan.experiment}: {_number(plan.devices, 'device')}, {nodes}"
    yield (
        f"  {model.checkpoint} ({model.model_type}): {_count(model.parameters)} parameters, "
        f"{_count(model.active_parameters)} for a token"
    )
    yield (
        f"  {model.num_layers} layers, {len(model.moe_layers)} of them MoE: {model.top_k} of {model.num_experts} "
        "experts for a token"
    )


def _step(plan: Plan) -> Iterator[str]:
    step = plan.step
    epochs = f" in {step.epochs} epochs" if step.epochs > 1 else ""
    yield "a step, if every sample has the maximum length"
    yield (
        f"  rollout   {step.prompts:,} prompts x {step.samples // step.prompts:,} = {step.samples:,} samples of "
        f"{step.longest:,} tokens: {step.tokens:,} tokens"
    )
    if step.most_prompts > step.prompts:
        yield f"  sampled   up to {step.most_prompts:,} prompts, of which {step.prompts:,} are kept"
    updates = _number(step.optimizer_steps, "optimizer step")
    yield f"  updates   {updates}{epochs}, each on {_number(step.samples_per_optimizer_step, 'sample')}"


def _role(role: RolePlan, plan: Plan) -> Iterator[str]:
    grid, model, passes = role.grid, plan.model, role.passes
    yield f"{role.name}: {role.strategy} on {_devices(role.devices)}"
    sizes = {"TP": grid.tp, "PP": grid.pp, "VPP": role.chunks_per_stage, "CP": grid.cp, "DP": grid.dp}
    experts = {"EP": grid.ep, "ETP": grid.etp, "copies": grid.edp}
    if role.stages:
        yield f"  {_sizes(sizes)}; experts {_sizes(experts)}"
    else:
        yield f"  DP {grid.dp}, each rank with its part of every weight; memory is not planned"
    if role.checkpoint != model.checkpoint:
        yield f"  {role.checkpoint}: {_count(role.parameters)} parameters"
    if passes.train:
        yield f"  each DP rank trains on {_micro_batches(passes.train, 'an optimizer step')}"
    who = "and" if passes.train else "each DP rank"
    if passes.infer:
        yield f"  {who} computes log-probabilities of {_micro_batches(passes.infer, 'a step')}"
    else:
        yield "  and makes no pass before it (force_on_policy_ratio, or rollout_correction.bypass)"
    if role.stages:
        yield from _memory(role)
    if like := next((r.name for r in plan.roles[: plan.roles.index(role)] if r.shards == role.shards), None):
        yield f"  data-parallel shards: as {like}"
    elif grid.dp > 1:
        shards = [f"{shard} on {_ranges(devices)}" for shard, devices in enumerate(role.shards)]
        yield from _listed("data-parallel shards: ", shards)


def _memory(role: RolePlan) -> Iterator[str]:
    """Yield the table of stages."""
    trains = role.passes.train is not None
    totals = [stage.memory.total for stage in role.stages]
    unit, factor = _unit(max(totals))
    head = ["stage", "devices", "layers", "MoE", "params", "weights"]
    head += ["grads", "adam", "kept", "(mb)"] if trains else []
    rows = [[str(number), *_stage(stage, factor, trains=trains)] for number, stage in enumerate(role.stages)]
    yield from _table([*head, "extra", "total"], rows, [_kind(stage) for stage in role.stages])
    yield f"  {unit} on each device, {MEMORY_FIGURES}; stage {totals.index(max(totals))} is the fullest"
    if trains:
        yield "  kept: activations waiting for backward, and their number of micro-batches (mb) over all chunks"
        yield "  extra: logits, recomputed layers, or the additional need of the log-probabilities"


def _micro_batches(cut: MicroBatches, of: str) -> str:
    most = "up to " if cut.budgeted else ""
    return f"{most}{_number(cut.number, 'micro-batch', 'es')} {of}, of up to {cut.tokens:,} tokens"


def _stage(stage: StagePlan, factor: int, *, trains: bool) -> list[str]:
    """Return a row of the table of stages, without its number; sizes in units of `factor` bytes."""
    memory = stage.memory
    layers = [layer for chunk in stage.chunks for layer in chunk.layers]
    routed = [layer for chunk in stage.chunks for layer in chunk.moe_layers]
    moe = "all" if routed == layers else _ranges(routed) or "none"
    parameters = sum(chunk.dense_parameters + chunk.expert_parameters for chunk in stage.chunks)
    names = [_ranges(stage.devices), _shortened([_layers(chunk) for chunk in stage.chunks], _CHUNKS_SHOWN, " | "), moe]
    lasting = [memory.weights, *([memory.gradients, memory.optimizer, memory.activations] if trains else [])]
    sizes = [f"{size / factor:.1f}" for size in (*lasting, memory.total - sum(lasting), memory.total)]
    if trains:
        sizes.insert(len(lasting), f"({sum(memory.in_flight)})")
    return [*names, _count(parameters), *sizes]


def _kind(stage: StagePlan) -> tuple[tuple[int, ...], ...]:
    """Return a key that is equal for stages of the same shape."""
    return tuple((len(c.layers), len(c.moe_layers), c.dense_parameters, c.expert_parameters) for c in stage.chunks)


def _layers(chunk: ChunkPlan) -> str:
    return " ".join(part for part in ("E" * chunk.embedding, _ranges(chunk.layers), "L" * chunk.output) if part) or "-"


def _engines(plan: Plan) -> Iterator[str]:
    engines = plan.engines
    each = len(engines[0].devices)
    yield (
        f"actor_infer: {plan.engine_strategy}, {_number(len(engines), 'engine')} of {_number(each, 'device')}, "
        f"{_size(engines[0].weights)} of weights on each"
    )
    yield from _listed("", [f"{engine.index} on {_ranges(engine.devices)}" for engine in engines])


def _routes(plan: Plan) -> Iterator[str]:
    routes = plan.routes
    if routes.mode == "disable":
        yield "routes: none are recorded"
        return
    passes = f", read in {_number(routes.passes, 'pass', 'es')} a step" if routes.passes else ""
    yield f"routes ({routes.mode}), at full length{passes}"
    yield (
        f"  {_size(routes.token)} a token ({len(plan.model.moe_layers)} layers x {plan.model.top_k} experts), "
        f"{_size(routes.sample)} a sample, {_size(routes.step)} a step"
    )
    yield f"  {_where_routes_are(routes)}"


def _where_routes_are(routes: RoutesPlan) -> str:
    sizes = sorted(set(routes.rank))
    some = _size(sizes[0]) if len(sizes) == 1 else f"{_size(sizes[0])} to {_size(sizes[-1])}"
    if routes.mode == "R2":
        return f"a trainer's rank keeps {some} on its host: its samples, its stage's layers"
    return f"a pass brings a rank {some} (its samples, layers and tokens), a node {_size(routes.node)}"


def _sync(plan: Plan) -> Iterator[str]:
    sync = plan.weight_sync
    yield "weights to the engines, before the first step and after every step"
    moved = f": up to {_size(sync.gathered_node)} into a node, {_size(sync.gathered)} into all"
    yield f"  the trainer gathers the model{moved if sync.gathered else ' inside its node'}"
    yield (
        f"  device {sync.from_device} broadcasts {_size(sync.update)} to {_number(sync.receivers, 'device')}, "
        f"{_size(sync.bucket)} at a time"
    )


def _between_nodes(plan: Plan) -> Iterator[str]:
    yield f"between nodes, if device d is on node d // {plan.devices_per_node}"
    quiet = not plan.weight_sync.nodes
    said: dict[tuple[tuple[str, int, int, int, int], ...], str] = {}
    for role in plan.roles:
        key = tuple((g.kind, len(g.members), len(g.members[0]), g.crossing, g.most_nodes) for g in role.groups)
        if not key:
            continue
        if key in said:
            yield f"  {role.name}: as {said[key]}"
            continue
        said[key] = role.name
        for group in role.groups:
            if group.crossing:
                yield f"  {role.name}: {_crossing(group)}"
        quiet &= not any(group.crossing for group in role.groups)
        if inside := [group.kind for group in role.groups if not group.crossing]:
            yield f"  {role.name}: {', '.join(inside)} inside a node"
    if reached := len(plan.weight_sync.nodes):
        yield f"  weights: {_size(plan.weight_sync.update)} to {_number(reached, 'other node')} after every step"
    if quiet:
        yield "  nothing but samples"


def _crossing(group: GroupPlan) -> str:
    count, each = len(group.members), len(group.members[0])
    if count == 1:
        return f"{group.kind}, one group of {each:,}, on {_number(group.most_nodes, 'node')}"
    which = f"all {count:,}" if group.crossing == count else f"{group.crossing:,} of {count:,}"
    return f"{group.kind}, {which} groups of {each:,}, each on up to {_number(group.most_nodes, 'node')}"


def _shared(plan: Plan) -> Iterator[str]:
    if plan.shared:
        yield "devices with several roles"
    for shared in plan.shared:
        size = "not planned" if shared.memory is None else f"up to {_size(shared.memory)} together, computed"
        yield f"  {_ranges(shared.devices)}: {', '.join(shared.roles)}, {size}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], kinds: Sequence[object]) -> Iterator[str]:
    """Yield a table: names left, numbers right. Of many similar rows in a run, the first and the last are shown."""
    shown: list[Sequence[str] | int] = []
    start = 0
    for _, group in groupby(kinds):
        end = start + len(list(group))
        run = rows[start:end]
        shown += run if len(run) <= _LIKE_STAGES_SHOWN else [run[0], len(run) - 2, run[-1]]
        start = end
    lines = [head, *(row for row in shown if not isinstance(row, int))]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    for row in [head, *shown]:
        if isinstance(row, int):
            yield f"  .. {row} similar"
            continue
        cells = [f"{c:<{w}}" if i < 4 else f"{c:>{w}}" for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        yield f"  {'  '.join(cells)}".rstrip()


def _listed(title: str, items: Sequence[str]) -> Iterator[str]:
    """Yield the title and all items, or the first few and the last, in one line if they fit."""
    left_out = len(items) - _LISTED
    few = list(items) if left_out <= 0 else [*items[: _LISTED - 1], f".. {left_out:,} more", items[-1]]
    for choice in (items, few):
        line = f"  {title}{'; '.join(choice)}"
        if len(line) <= WIDTH:
            yield line
            return
    for number, item in enumerate(few):
        yield f"  {title if number == 0 else ' ' * len(title)}{item}"


def _ranges(numbers: Sequence[int]) -> str:
    """Return runs of numbers: `0-3, 8-11`. Many runs are shortened: `0-3, 8-11, .. 56-59 (8 runs)`."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    texts = [str(start) if start == end else f"{start}-{end}" for start, end in runs]
    if len(texts) <= _RUNS_SHOWN:
        return ", ".join(texts)
    return f"{texts[0]}, {texts[1]}, .. {texts[-1]} ({len(texts)} runs)"


def _shortened(texts: Sequence[str], shown: int, between: str) -> str:
    """Join all texts, or the first few and the last."""
    if len(texts) <= shown:
        return between.join(texts)
    return between.join([*texts[: shown - 2], "..", texts[-1]])


def _devices(devices: Sequence[int]) -> str:
    return f"{_number(len(devices), 'device')}: {_ranges(devices)}"


def _sizes(sizes: dict[str, int]) -> str:
    return " ".join(f"{name} {size}" for name, size in sizes.items() if size > 1 or name in ("TP", "PP", "DP", "EP"))


def _number(number: int, noun: str, plural: str = "s") -> str:
    return f"{number:,} {noun}{'' if number == 1 else plural}"


def _count(number: int) -> str:
    """Return a number of parameters as text: 30.5 B, 671 B, 12.3 M."""
    for unit, size in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return str(number)


def _unit(size: int) -> tuple[str, int]:
    """Return the largest unit not above `size` bytes."""
    return next(((unit, factor) for unit, factor in _UNITS if size >= factor), _UNITS[-1])


def _size(size: int) -> str:
    unit, factor = _unit(size)
    return f"{size:,} B" if factor == 1 else f"{size / factor:,.1f} {unit}"
