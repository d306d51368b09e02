"""Rules about capabilities of strategies and releases of engines."""

from __future__ import annotations

from collections.abc import Callable

from roll_r3.config.derived import model_workers, returns_kept, sglang, vllm
from roll_r3.config.pipeline import RLVRConfig
from roll_r3.config.rules.example import OWN_GPUS
from roll_r3.config.rules.paths import ENGINE, INFER_REPLAY, TRAIN_REPLAY
from roll_r3.config.rules.table import Verdict
from roll_r3.engines.sglang import server as sglang_server
from roll_r3.engines.sglang import version as sglang_version
from roll_r3.engines.vllm import server as vllm_server
from roll_r3.engines.vllm import version as vllm_version
from roll_r3.errors import EngineError
from roll_r3.preflight.rules.surroundings_rule import VLLM_INSTALLED, Pretend, SurroundingsRule, strategy_names
from roll_r3.preflight.surroundings import Surroundings
from roll_r3.strategies.base import Capabilities
from roll_r3.strategies.registry import StrategyEntry

MEGATRON_CORE = "0.16"
"""Release followed by the Megatron strategy in routers, layer placement and schedules."""


_VLLM = "actor_infer.strategy_args={strategy_name: vllm}"


def _entry(config: RLVRConfig, surroundings: Surroundings, role: str) -> StrategyEntry:
    """Return the registry entry of a role's strategy."""
    return surroundings.strategies[strategy_names(config)[role]]


def _rollout_cannot_record(config: RLVRConfig, surroundings: Surroundings) -> Verdict:
    wanted = config.actor_infer.router_replay.mode == "R3"
    return wanted and not _entry(config, surroundings, "actor_infer").capabilities.records_routes


def _trainer_cannot_replay(config: RLVRConfig, surroundings: Surroundings) -> Verdict:
    mode = config.actor_train.router_replay.mode
    able = _entry(config, surroundings, "actor_train").capabilities.replays
    return f"it replays {', '.join(sorted(able)) or 'nothing'}" if mode not in (*able, "disable") else False


def _cannot_pack(config: RLVRConfig, surroundings: Surroundings) -> Verdict:
    roles = [role for role, worker in model_workers(config).items() if worker.use_sequence_packing]
    return ", ".join(role for role in roles if not _entry(config, surroundings, role).capabilities.packs)


def _args_that_lose_routes(config: RLVRConfig, surroundings: Surroundings) -> Verdict:
    on_sglang, on_vllm = sglang(config), vllm(config)
    records = config.actor_infer.router_replay.mode == "R3"
    found = sglang_server.args_that_lose_routes(on_sglang, record_routes=records) if on_sglang else []
    return "; ".join(found + (vllm_server.args_that_lose_routes(on_vllm) if on_vllm else []))


def _refused_server_args(config: RLVRConfig, surroundings: Surroundings) -> Verdict:
    on_sglang, on_vllm = sglang(config), vllm(config)
    found = sglang_server.refused_server_args(on_sglang) if on_sglang else []
    return "; ".join(found + (vllm_server.refused_server_args(on_vllm) if on_vllm else []))


def _missing(package: str) -> Callable[[RLVRConfig, Surroundings], Verdict]:
    """Return a verdict about a missing package."""
    return lambda config, where: package in where.versions and where.versions[package] is None


def _sglang_too_old(config: RLVRConfig, surroundings: Surroundings) -> Verdict:
    version = surroundings.versions.get("sglang")
    if version is None:
        return False
    try:
        sglang_version.check_version(version)
    except EngineError as error:
        return str(error)
    return False


def _sglang_keeps_no_sets(config: RLVRConfig, surroundings: Surroundings) -> Verdict:
    version = surroundings.versions.get("sglang")
    if version is None or _sglang_too_old(config, surroundings) or not returns_kept(config):
        return False
    return sglang(config) is not None and not sglang_version.returns_kept(version)


def _sglang_untested(config: RLVRConfig, surroundings: Surroundings) -> Verdict:
    version = surroundings.versions.get("sglang")
    if version is None or _sglang_too_old(config, surroundings):
        return False
    return sglang_version.check_version(version) or False


def _vllm_verdict(config: RLVRConfig, surroundings: Surroundings) -> tuple[str, str]:
    """Return (refusal, warning) about the installed vLLM; at most one of them is not empty.

    With unknown devices, a release is refused only if no device allows it.
    """
    version = surroundings.versions.get("vllm")
    if version is None:
        return "", ""
    try:
        return "", vllm_version.check_version(version, device=config.device_type) or ""
    except EngineError as error:
        return str(error), ""


def _other_megatron(config: RLVRConfig, surroundings: Surroundings) -> Verdict:
    version = surroundings.versions.get("megatron-core")
    return f"{version} is installed" if version and not version.startswith(f"{MEGATRON_CORE}.") else False


RULES: tuple[SurroundingsRule, ...] = (
    SurroundingsRule(
        id="r3-needs-recording-rollout",
        fields=("actor_infer.strategy_args.strategy_name", INFER_REPLAY),
        why="R3 replays the experts of the rollout, and this rollout strategy does not record them",
        fix="choose a rollout strategy that records routes (sglang, vllm or hf_infer), or disable replay on both sides",
        wrong=(),
        wrong_where=Pretend(capabilities={"sglang": Capabilities()}),
        right=(),
        violates=_rollout_cannot_record,
    ),
    SurroundingsRule(
        id="trainer-replays-mode",
        fields=(TRAIN_REPLAY, "actor_train.strategy_args.strategy_name"),
        why="this training strategy does not support the replay mode",
        fix="choose another mode, or another strategy_name",
        wrong=(),
        wrong_where=Pretend(capabilities={"megatron_train": Capabilities(replays=frozenset({"R2"}), packs=True)}),
        right=(),
        violates=_trainer_cannot_replay,
    ),
    SurroundingsRule(
        id="packing-supported",
        fields=(
            "actor_train.use_sequence_packing",
            "reference.use_sequence_packing",
            "actor_train.strategy_args.strategy_name",
            "reference.strategy_args.strategy_name",
        ),
        why="this strategy cannot pack samples into one row",
        fix="write use_sequence_packing: false for the role",
        wrong=("actor_train.use_sequence_packing=true",),
        wrong_where=Pretend(capabilities={"megatron_train": Capabilities(replays=frozenset({"R2", "R3"}))}),
        right=("actor_train.use_sequence_packing=true",),
        violates=_cannot_pack,
    ),
    SurroundingsRule(
        id="server-args-lose-routes",
        fields=(f"{ENGINE}.server_args",),
        depends=(INFER_REPLAY,),
        why="with these engine features routed experts would be missing or wrong",
        fix="remove them from server_args",
        wrong=(f"{ENGINE}.server_args.speculative_algorithm=EAGLE",),
        right=(f"{ENGINE}.server_args.schedule_policy=fcfs",),
        violates=_args_that_lose_routes,
    ),
    SurroundingsRule(
        id="server-args-owned",
        fields=(f"{ENGINE}.server_args",),
        why="the strategy sets or needs these arguments of the engine itself",
        fix="remove them from server_args",
        wrong=(f"{ENGINE}.server_args.port=30000",),
        right=(f"{ENGINE}.server_args.schedule_policy=fcfs",),
        violates=_refused_server_args,
    ),
    SurroundingsRule(
        id="sglang-installed",
        fields=("actor_infer.strategy_args.strategy_name", f"{ENGINE}.python"),
        why="SGLang is not installed for the interpreter of the engine",
        fix="install it, or set strategy_config.python to an interpreter with SGLang",
        wrong=(),
        wrong_where=Pretend(versions={"sglang": None}),
        right=(),
        right_where=Pretend(versions={"sglang": "0.5.23"}),
        violates=_missing("sglang"),
    ),
    SurroundingsRule(
        id="sglang-version",
        fields=("actor_infer.strategy_args.strategy_name", f"{ENGINE}.python"),
        why="this strategy does not work with the installed release of SGLang",
        fix="install a supported release",
        wrong=(),
        wrong_where=Pretend(versions={"sglang": "0.4.6"}),
        right=(),
        right_where=Pretend(versions={"sglang": "0.5.23"}),
        violates=_sglang_too_old,
    ),
    SurroundingsRule(
        id="sglang-returns-kept-tokens",
        fields=("actor_infer.generating_args.sampling_mask", "actor_infer.strategy_args.strategy_name"),
        why="the installed release of SGLang does not return the tokens kept by top_p and top_k for certain: the "
        "trainer's log-probabilities would be of the whole distribution, a policy that did not sample",
        fix=f"install SGLang {sglang_version.RETURNS_KEPT} or later, or write top_p: 1 and top_k: -1",
        depends=("actor_infer.generating_args.top_p", "actor_infer.generating_args.top_k"),
        wrong=("actor_infer.generating_args={top_k: 50, sampling_mask: true}",),
        wrong_where=Pretend(versions={"sglang": "0.5.20"}),
        right=("actor_infer.generating_args={top_k: 50, sampling_mask: true}",),
        right_where=Pretend(versions={"sglang": "0.5.23"}),
        violates=_sglang_keeps_no_sets,
        only_warns=lambda c: c.actor_infer.generating_args.sampling_mask == "auto",
    ),
    SurroundingsRule(
        id="sglang-untested",
        fields=("actor_infer.strategy_args.strategy_name", f"{ENGINE}.python"),
        why="this strategy was not tested with the installed release of SGLang",
        fix="watch router_replay/coverage and the log-probability differences of the first steps",
        wrong=(),
        wrong_where=Pretend(versions={"sglang": "0.5.99"}),
        right=(),
        right_where=Pretend(versions={"sglang": "0.5.23"}),
        violates=_sglang_untested,
        severity="warning",
    ),
    SurroundingsRule(
        id="vllm-installed",
        fields=("actor_infer.strategy_args.strategy_name", f"{ENGINE}.python"),
        why="vLLM is not installed for the interpreter of the engine",
        fix="run `make vllm-env`, on GPUs `make vllm-env VLLM_KIND=gpu`, or set "
        "strategy_config.python to an interpreter with vLLM",
        wrong=(_VLLM,),
        wrong_where=Pretend(versions={"vllm": None}),
        right=(_VLLM,),
        right_where=VLLM_INSTALLED,
        violates=_missing("vllm"),
    ),
    SurroundingsRule(
        id="vllm-version",
        fields=("actor_infer.strategy_args.strategy_name", f"{ENGINE}.python", "device_type"),
        why="this strategy does not work with the installed release of vLLM",
        fix="install the tested release, built for the devices of the run",
        wrong=(_VLLM, "device_type=cpu"),
        wrong_where=Pretend(versions={"vllm": "0.33.0+cpu"}),
        right=(_VLLM, "device_type=cpu"),
        right_where=VLLM_INSTALLED,
        violates=lambda config, where: _vllm_verdict(config, where)[0],
    ),
    SurroundingsRule(
        id="vllm-untested",
        fields=("actor_infer.strategy_args.strategy_name", f"{ENGINE}.python"),
        why="this strategy was not tested with the installed release of vLLM",
        fix="watch router_replay/coverage and the log-probability differences of the first steps",
        depends=("device_type",),
        wrong=(_VLLM, *OWN_GPUS),
        wrong_where=Pretend(versions={"vllm": "0.33.0"}),
        right=(_VLLM,),
        right_where=VLLM_INSTALLED,
        violates=lambda config, where: _vllm_verdict(config, where)[1],
        severity="warning",
    ),
    SurroundingsRule(
        id="megatron-installed",
        fields=("actor_train.strategy_args.strategy_name",),
        why="megatron-core is not installed",
        fix="install it, for example with the extra `cpu` or `gpu` of roll_r3",
        wrong=(),
        wrong_where=Pretend(versions={"megatron-core": None}),
        right=(),
        right_where=Pretend(versions={"megatron-core": "0.16.1"}),
        violates=_missing("megatron-core"),
    ),
    SurroundingsRule(
        id="megatron-version",
        fields=("actor_train.strategy_args.strategy_name",),
        why=f"the Megatron strategy follows megatron-core {MEGATRON_CORE}: another release routes, places layers or "
        "schedules differently",
        fix=f"install megatron-core {MEGATRON_CORE}",
        wrong=(),
        wrong_where=Pretend(versions={"megatron-core": "0.17.0"}),
        right=(),
        right_where=Pretend(versions={"megatron-core": "0.16.1"}),
        violates=_other_megatron,
    ),
)
