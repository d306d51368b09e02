"""The loaded model of an `hf_infer` engine: batches of samples, checked like answers of a server."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from roll_r3.batch.kept_tokens import KeptTokens
from roll_r3.batch.routes import RoutedExperts
from roll_r3.batch.trajectory import Trajectory
from roll_r3.config.engine_role import EngineRole
from roll_r3.engines.hf.parameters import tensors_by_name
from roll_r3.engines.hf.routers import RouteRecorder
from roll_r3.engines.hf.sampler import Sampled, Stop, sample
from roll_r3.engines.hf.weights import WeightReceiver
from roll_r3.engines.kept_checks import check_kept
from roll_r3.engines.sample import SampleRequest
from roll_r3.errors import ConfigError, RouteError
from roll_r3.models.architectures import ARCHITECTURES
from roll_r3.models.checkpoint_files import resolve_checkpoint, safetensors_files
from roll_r3.models.facts import read_facts
from roll_r3.models.hf.config import read_hf_config
from roll_r3.models.hf.head import compute_logits_in_fp32
from roll_r3.models.hf.norms import set_latent_epsilon
from roll_r3.models.hf.routers import find_routers
from roll_r3.models.hf.tokenizer import read_end_tokens, read_tokenizer
from roll_r3.replay.checks import check_log_probs, compact_routes
from roll_r3.strategies.base import EnginePlace


class LoadedModel:
    """Model, tokenizer and receiver of weights."""

    def __init__(self, role: EngineRole, place: EnginePlace, dtype: str) -> None:
        """Load the checkpoint.

        Raises:
            ConfigError: a checkpoint with unreadable routing facts, unknown routers, or missing weights.
        """
        checkpoint = resolve_checkpoint(role.checkpoint)
        self._facts = read_facts(checkpoint)
        self.model = _read_model(checkpoint, getattr(torch, dtype)).to(place.device)
        if role.fp32_lm_head:
            compute_logits_in_fp32(self.model)
        routers = find_routers(self.model, self._facts.moe_layers)
        self._recorder = RouteRecorder(routers) if role.record_routes else None
        self._tokenizer = read_tokenizer(checkpoint, trust_remote_code=role.trust_remote_code)
        self._end_tokens = read_end_tokens(checkpoint, self._tokenizer)
        self._busy = threading.Lock()
        tensors = tensors_by_name(self.model, ARCHITECTURES[self._facts.model_type])
        self.receiver = WeightReceiver(tensors, self._busy, place.node_address)

    def sample(self, wanted: Sequence[SampleRequest], weight_version: int) -> list[Trajectory | str]:
        """Sample one batch, all with the settings of the first; return trajectories, or reasons why there is none."""
        outcomes = {one.sample_id: self._why_not(one) for one in wanted}
        good = [one for one in wanted if not outcomes[one.sample_id]]
        settings = wanted[0].sampling
        stop = Stop(self._end_tokens.union(settings.stop_token_ids), settings.stop_strings, self._decode)
        found: dict[str, Trajectory | str] = {}
        with self._busy:  # weights do not change under a batch
            if good and self.receiver.version != str(weight_version):
                version = self.receiver.version
                outcomes |= dict.fromkeys(
                    (one.sample_id for one in good),
                    f"the answer would come from weights of version {version}, not {weight_version}",
                )
            elif good:
                sampled = sample(self.model, good, settings, stop=stop, recorder=self._recorder)
                found = {
                    one.sample_id: self._checked(one, result, weight_version)
                    for one, result in zip(good, sampled, strict=True)
                }
        return [found.get(one.sample_id, outcomes[one.sample_id]) for one in wanted]

    def _decode(self, token_ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(token_ids, skip_special_tokens=False))

    def _why_not(self, wanted: SampleRequest) -> str:
        """Return why a sample cannot be drawn; empty if it can."""
        if not wanted.prompt_ids:
            return "the prompt is empty"
        longest, context = len(wanted.prompt_ids) + wanted.sampling.max_new_tokens, self._facts.context_length
        if longest > context:
            return f"prompt and response may have {longest} tokens, the model's context has {context}"
        return ""

    def _checked(self, wanted: SampleRequest, sampled: Sampled, weight_version: int) -> Trajectory | str:
        """Return the trajectory, or how log-probabilities, kept tokens or routes break their contract."""
        log_probs_R = np.array(sampled.log_probs, np.float32)
        try:
            check_log_probs(log_probs_R, len(sampled.token_ids))
            num_rows = len(wanted.prompt_ids) + len(sampled.token_ids) - 1
            routes = self._routes(sampled, num_rows) if wanted.record_routes else None
            kept = KeptTokens.from_lists(sampled.kept) if wanted.sampling.return_kept else None
            if kept is not None:
                check_kept(kept, sampled.token_ids, self._facts.vocab_size)
        except RouteError as error:
            return str(error)
        return Trajectory.one_turn(
            wanted.sample_id,
            wanted.group_id,
            prompt_ids=wanted.prompt_ids,
            response_ids=sampled.token_ids,
            log_probs=log_probs_R,
            version=weight_version,
            finish_reason=sampled.finish_reason,
            routes=routes,
            kept=kept,
        )

    def _routes(self, sampled: Sampled, num_rows: int) -> RoutedExperts:
        if not sampled.routes:
            raise RouteError("the engine was not started to record routes")
        facts = self._facts
        ids_MRK = torch.cat(sampled.routes, 1).numpy()
        ids_RLK = np.zeros((ids_MRK.shape[1], facts.num_layers, ids_MRK.shape[2]), np.int64)
        ids_RLK[:, list(facts.moe_layers)] = ids_MRK.transpose(1, 0, 2)
        return compact_routes(
            ids_RLK,
            num_rows=num_rows,
            num_layers=facts.num_layers,
            moe_layers=facts.moe_layers,
            num_experts=facts.num_experts,
            top_k=facts.top_k,
        )


def _read_model(checkpoint: Path, dtype: torch.dtype) -> Any:
    """Return transformers' own ...ForCausalLM with the checkpoint's weights, on the CPU.

    Raises:
        ConfigError: as `read_hf_config`, no safetensors (pickles are never read), or missing weights, which
            transformers would replace by random ones.
    """
    safetensors_files(checkpoint)
    loading: Any = AutoModelForCausalLM.from_pretrained(
        checkpoint,
        config=read_hf_config(checkpoint),
        dtype=dtype,
        trust_remote_code=False,
        use_safetensors=True,
        output_loading_info=True,
    )
    model, loaded = loading
    if lacking := sorted(loaded["missing_keys"]):
        raise ConfigError(f"{checkpoint} lacks the weights of {', '.join(lacking[:5])} ({len(lacking)} in all)")
    set_latent_epsilon(model)
    return model.eval().requires_grad_(False)
