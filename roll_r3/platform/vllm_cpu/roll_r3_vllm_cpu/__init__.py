"""Patches for vLLM on machines without a GPU. Written for exactly one release, as they use its internals.

1. Routed experts. vLLM feeds its recording connector from the newer model runner only, which needs Triton on a CPU.
   `roll_r3_vllm_cpu.runner` feeds the same connector from the CPU's runner, and vLLM's check is patched to accept it.
2. Kept tokens. vLLM returns the sets of truncated sampling from the newer model runner only; ours adds them.
3. New expert weights. The CPU kernel reads experts in a packed layout, and vLLM packs them at the first load only.
   After an update the kernel would silently read plain rows as packed ones.
"""

from __future__ import annotations

from importlib.metadata import version

RELEASE = "0.32.0"
_WORKER = "roll_r3_vllm_cpu.runner.RecordingWorker"


def register() -> None:
    """Install the patches. vLLM calls this in each of its processes, in some more than once.

    Raises:
        RuntimeError: another release of vLLM, or a build for another platform.
    """
    installed = version("vllm").partition("+")[0]
    if installed != RELEASE:
        raise RuntimeError(f"on a CPU roll_r3 supports vLLM {RELEASE} only, got {installed}")
    from vllm.config import VllmConfig
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        raise RuntimeError("this vLLM was not built for CPUs: run `make vllm-env` to install one")
    if not hasattr(VllmConfig, "_roll_r3_cpu"):
        VllmConfig._roll_r3_cpu = True
        _record_routes_on_a_cpu()
        _return_kept_tokens_on_a_cpu()
        _pack_experts_on_every_update()


def _record_routes_on_a_cpu() -> None:
    """Skip vLLM's check of the model runner, keep its other checks of recording, and select our worker."""
    from vllm.config import VllmConfig
    from vllm.platforms import current_platform

    check = VllmConfig._verify_aux_output_compatibility
    platform = type(current_platform)

    def check_for_a_cpu(self: VllmConfig) -> None:
        if not self.aux_output_config.enabled:
            return
        if self.speculative_config is not None:
            raise ValueError("routed experts are not recorded under speculative decoding on a CPU")
        # The check skips the model runner of platforms out of tree.
        platform.is_out_of_tree = lambda self: True
        try:
            check(self)
        finally:
            del platform.is_out_of_tree
        self.parallel_config.worker_cls = _WORKER

    assert "is_out_of_tree" not in platform.__dict__, "it is inherited"
    VllmConfig._verify_aux_output_compatibility = check_for_a_cpu


def _return_kept_tokens_on_a_cpu() -> None:
    """Skip vLLM's check of the model runner, keep its other checks of sampling masks, and select our worker."""
    from vllm.config import VllmConfig

    check = VllmConfig._verify_sampling_replay_config
    newer = VllmConfig.use_v2_model_runner

    def check_for_a_cpu(self: VllmConfig) -> None:
        VllmConfig.use_v2_model_runner = True
        try:
            check(self)
        finally:
            VllmConfig.use_v2_model_runner = newer
        if self.model_config is not None and self.model_config.return_sampling_mask:
            self.parallel_config.worker_cls = _WORKER

    VllmConfig._verify_sampling_replay_config = check_for_a_cpu


def _pack_experts_on_every_update() -> None:
    """Pack new weights like the first ones."""
    from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod

    set_up = UnquantizedFusedMoEMethod._setup_kernel

    def set_up_and_pack(self, layer, w13, w2) -> None:  # type: ignore[no-untyped-def]
        is_update = self.moe_kernel is not None
        set_up(self, layer=layer, w13=w13, w2=w2)
        if is_update:
            self.moe_kernel.fused_experts.process_weights_after_loading(layer)

    UnquantizedFusedMoEMethod._setup_kernel = set_up_and_pack
