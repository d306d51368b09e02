"""Router replay: both sides must agree, and nothing may bypass the recorded experts."""

from __future__ import annotations

from roll_r3.config.derived import changed, layout, runs_megatron, workers
from roll_r3.config.pipeline import RLVRConfig
from roll_r3.config.rules.example import OWN_GPUS
from roll_r3.config.rules.paths import INFER_REPLAY, MEGATRON, TRAIN, TRAIN_REPLAY
from roll_r3.config.rules.table import AnyRule, LayoutRule, Rule, Verdict


def _audits_elsewhere(config: RLVRConfig) -> Verdict:
    return ", ".join(role for role, w in workers(config).items() if role != "actor_train" and w.router_replay.audit)


def _audit_every_unread(config: RLVRConfig) -> Verdict:
    roles = (r for r, w in workers(config).items() if not w.router_replay.audit)
    return ", ".join(role for role in roles if changed(config, f"{role}.router_replay.audit_every"))


def _on_one_side(config: RLVRConfig) -> Verdict:
    trained, sampled = config.actor_train.router_replay.mode, config.actor_infer.router_replay.mode
    return sampled != "R2" and (trained == "R3") != (sampled == "R3")  # another rule rejects R2 in the rollout


RULES: tuple[AnyRule, ...] = (
    Rule(
        id="r3-on-both-sides",
        fields=(TRAIN_REPLAY, INFER_REPLAY),
        why="R3 needs both sides: the rollout records experts, and the trainer replays them",
        fix="write R3 for both, or disable for both",
        wrong=("actor_train.router_replay.mode=disable",),
        right=("actor_train.router_replay.mode=off", "actor_infer.router_replay.mode=off"),
        violates=_on_one_side,
    ),
    Rule(
        id="r2-is-the-trainers",
        fields=(INFER_REPLAY,),
        why="R2 replays the experts of the trainer's own old-log-prob pass; the rollout is not involved",
        fix="write actor_infer.router_replay.mode: disable, and R2 under actor_train",
        wrong=("actor_train.router_replay.mode=R2", "actor_infer.router_replay.mode=R2"),
        right=("actor_train.router_replay.mode=R2", "actor_infer.router_replay.mode=disable"),
        violates=lambda c: c.actor_infer.router_replay.mode == "R2",
    ),
    Rule(
        id="reference-routes-by-itself",
        fields=("reference.router_replay.mode",),
        why="the reference is another policy: with this policy's experts, the KL term would measure neither",
        fix="write reference.router_replay.mode: disable",
        wrong=("use_kl_loss=true", "reference.router_replay.mode=R3"),
        right=("use_kl_loss=true", "reference.router_replay.mode=disable"),
        violates=lambda c: c.reference is not None and c.reference.router_replay.mode != "disable",
    ),
    Rule(
        id="fused-router-skips-replay",
        fields=(f"{TRAIN}.moe_router_fusion", TRAIN_REPLAY),
        why="megatron-core's fused top-k does not read the recorded routes, so nothing would be replayed",
        fix="write moe_router_fusion: false",
        wrong=(f"{TRAIN}.moe_router_fusion=true",),
        right=(
            *OWN_GPUS,
            f"{TRAIN}.moe_router_fusion=true",
            "actor_train.router_replay={}",
            "actor_infer.router_replay={}",
        ),
        violates=lambda c: (
            c.actor_train.router_replay.mode != "disable"
            and runs_megatron(c.actor_train)
            and layout(c.actor_train).moe_router_fusion
        ),
    ),
    LayoutRule(
        id="no-aux-loss",
        fields=(f"{MEGATRON}.moe_aux_loss_coeff",),
        why="megatron-core's load-balancing loss takes its own top-k: it would balance experts used by no token",
        fix="write moe_aux_loss_coeff: 0",
        wrong=(f"{TRAIN}.moe_aux_loss_coeff=0.01",),
        right=(f"{TRAIN}.moe_aux_loss_coeff=0",),
        violates=lambda w: layout(w).moe_aux_loss_coeff != 0,
    ),
    Rule(
        id="audit-is-the-trainers",
        fields=("actor_infer.router_replay.audit", "reference.router_replay.audit"),
        why="only the trainer replays, so there is nothing to audit elsewhere",
        fix="write audit under actor_train.router_replay",
        wrong=("actor_infer.router_replay.audit=true",),
        right=("actor_train.router_replay.audit=true",),
        violates=_audits_elsewhere,
        severity="warning",
    ),
    Rule(
        id="audit-needs-replay",
        fields=("actor_train.router_replay.audit", TRAIN_REPLAY),
        why="without replay there are no recorded experts to compare with",
        fix="write mode R2 or R3, or audit: false",
        wrong=("actor_train.router_replay={audit: true}", "actor_infer.router_replay={}"),
        right=("actor_train.router_replay={mode: R2, audit: true}", "actor_infer.router_replay={}"),
        violates=lambda c: c.actor_train.router_replay.audit and c.actor_train.router_replay.mode == "disable",
        severity="warning",
    ),
    Rule(
        id="audit-every-unread",
        fields=("*.router_replay.audit_every", "*.router_replay.audit"),
        why="this setting has no effect here",
        fix="write audit: true, or leave audit_every out",
        wrong=("actor_train.router_replay.audit_every=5",),
        right=("actor_train.router_replay={mode: R3, audit: true, audit_every: 5}",),
        violates=_audit_every_unread,
        severity="warning",
    ),
)
