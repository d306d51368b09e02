"""Model runner of a CPU worker: it feeds vLLM's recorder of routed experts at every step, and returns kept tokens."""

from __future__ import annotations

from typing import Any

import numpy as np

# First: the import adapts torch to vLLM's CPU build.
import vllm.v1.worker.cpu_worker as cpu_worker
from vllm.distributed.aux_output_connector.worker import (
    AuxOutputWorkerConnector,
    PendingAuxOutput,
    get_aux_output_connector,
)
from vllm.v1.outputs import SamplingMaskLists
from vllm.v1.worker.cpu_model_runner import CPUModelRunner


class RecordingModelRunner(CPUModelRunner):
    """CPU runner recording routes like vLLM's newer runner: opens each step, takes its routes, hands them out.

    It returns the sets of truncated sampling too: the tokens with a finite log-probability after top_k and top_p.
    """

    _recorder: AuxOutputWorkerConnector | None = None
    _kept: SamplingMaskLists | None = None
    """Sets of the step just sampled, in the runner's order of requests."""

    def _sample(self, *args: Any, **named: Any) -> Any:
        if not self.model_config.return_sampling_mask:
            return super()._sample(*args, **named)
        sample = self.sampler.sample
        processed: list[Any] = []

        def sample_and_keep(*of: Any, **with_: Any) -> Any:
            sampled, log_probs = sample(*of, **with_)
            processed.append(log_probs)
            return sampled, log_probs

        self.sampler.sample = sample_and_keep
        try:
            output = super()._sample(*args, **named)
        finally:
            del self.sampler.sample
        kept = (processed[0] > float("-inf")).cpu().numpy()
        offsets = np.concatenate([np.zeros(1, np.int64), kept.sum(-1).cumsum()])
        self._kept = SamplingMaskLists(np.nonzero(kept)[1].astype(np.int32), offsets)
        return output

    def initialize_kv_cache(self, kv_cache_config: Any, is_profiling: bool = False, *args: Any, **named: Any) -> None:
        super().initialize_kv_cache(kv_cache_config, is_profiling, *args, **named)
        if self.vllm_config.aux_output_config.enabled and not is_profiling:
            self._recorder = get_aux_output_connector(self.model, self.vllm_config, self.kv_cache_config)

    def execute_model(self, scheduler_output: Any, *args: Any, **named: Any) -> Any:
        if self._recorder is not None:
            self._recorder.begin_step(scheduler_output.aux_output_connector_metadata)
        return super().execute_model(scheduler_output, *args, **named)

    def sample_tokens(self, grammar_output: Any) -> Any:
        pending = self._routes_of_this_step()
        held = self._hold_back_generators()
        try:
            output = super().sample_tokens(grammar_output)
        finally:
            self.input_batch.generators.update(held)
        if self._kept is not None and output is not None:
            output.sampling_masks, self._kept = self._kept, None
        if pending is not None:
            assert list(output.req_ids) == pending.request_ids, "routes and tokens of other requests"
            sampled = np.array([len(tokens) for tokens in output.sampled_token_ids], dtype=np.int32)
            pending.enqueue_cpu_copy(num_sampled=sampled, num_rejected=np.zeros_like(sampled))
            output.aux_output_connector_output = pending.process_output()
        return output

    def shutdown(self, *args: Any, **named: Any) -> Any:
        if self._recorder is not None:
            self._recorder.close()
        return super().shutdown(*args, **named)

    def _routes_of_this_step(self) -> PendingAuxOutput | None:
        """Return the rows of the step just computed, in the runner's order of requests.

        None on ranks without output, and for steps without tokens.
        """
        recorder = self._recorder
        if recorder is None or recorder._buffer is None or recorder._step_metadata is None:
            return None
        if self.execute_model_state is None:
            return None
        request_ids = list(self.input_batch.req_ids)
        starts = self.query_start_loc.np[: len(request_ids) + 1].copy()
        pending = PendingAuxOutput(
            connector=recorder,
            request_ids=request_ids,
            token_starts=self.input_batch.num_computed_tokens_cpu[: len(request_ids)].copy(),
            query_start_loc=starts,
            routed_experts_gpu=recorder._capturer.snapshot_routing_data(int(starts[-1])),
        )
        with recorder._lock:
            recorder._pending_outputs.append(pending)
            for request_id in request_ids:
                recorder._requests[request_id].pending_outputs += 1
        return pending

    def _hold_back_generators(self) -> dict[int, Any]:
        """Take out the seeded generators of requests with an unfinished prompt, by place in the batch.

        The token sampled for such a request is discarded. vLLM then resets the generator to its offset, unsupported by
        CPU generators; a generator outside the step needs no reset.
        """
        unfinished = np.flatnonzero(self.discard_request_mask.np[: self.input_batch.num_reqs]).tolist()
        generators = self.input_batch.generators
        return {place: generators.pop(place) for place in unfinished if place in generators}


class RecordingWorker(cpu_worker.CPUWorker):
    """CPU worker of vLLM with the recording runner."""

    def init_device(self) -> None:
        own, cpu_worker.CPUModelRunner = cpu_worker.CPUModelRunner, RecordingModelRunner
        try:
            super().init_device()
        finally:
            cpu_worker.CPUModelRunner = own
