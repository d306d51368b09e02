"""What vLLM lacks on a machine without a GPU. Written for exactly one release, whose inner parts it reaches into.

1. Routed experts. vLLM feeds the connector that records them from its newer model runner only, which needs a Triton
   for CPUs. `roll_r3_vllm_cpu.runner` feeds the same connector from the runner that a CPU has; the check that would
   refuse this is told so.
2. New expert weights. A CPU's kernel reads experts in a packed layout of its own, and vLLM packs them at the first
   load only: after an update the kernel would take plain rows for packed ones, and nothing would say so.
"""

from __future__ import annotations

from importlib.metadata import version

RELEASE = "0.32.0"


def register() -> None:
    """Called by vLLM in each of its processes, in some more than once.

    Raises:
        RuntimeError: another release of vLLM.
    """
    installed = version("vllm").partition("+")[0]
    if installed != RELEASE:
        raise RuntimeError(f"on a CPU roll_r3 runs vLLM {RELEASE} and no other release; {installed} is installed")
    from vllm.config import VllmConfig
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        raise RuntimeError("this vLLM was built for another platform than a CPU: `make vllm-env` installs one that is")
    if not hasattr(VllmConfig, "_roll_r3_cpu"):
        VllmConfig._roll_r3_cpu = True
        _record_routes_on_a_cpu()
        _pack_experts_on_every_update()


def _record_routes_on_a_cpu() -> None:
    """Let vLLM check everything about recording but the model runner, and name the worker that brings ours."""
    from vllm.config import VllmConfig
    from vllm.platforms import current_platform

    check = VllmConfig._verify_aux_output_compatibility
    platform = type(current_platform)

    def check_for_a_cpu(self: VllmConfig) -> None:
        if not self.aux_output_config.enabled:
            return
        if self.speculative_config is not None:
            raise ValueError("routed experts are not recorded under speculative decoding on a CPU")
        # Platforms of others "bring their own model runner" and are not asked for the newer one.
        platform.is_out_of_tree = lambda self: True
        try:
            check(self)
        finally:
            del platform.is_out_of_tree
        self.parallel_config.worker_cls = "roll_r3_vllm_cpu.runner.RecordingWorker"

    assert "is_out_of_tree" not in platform.__dict__, "it is inherited"
    VllmConfig._verify_aux_output_compatibility = check_for_a_cpu


def _pack_experts_on_every_update() -> None:
    """Have the kernel take new weights in as it took the first ones."""
    from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod

    set_up = UnquantizedFusedMoEMethod._setup_kernel

    def set_up_and_pack(self, layer, w13, w2) -> None:  # type: ignore[no-untyped-def]
        is_update = self.moe_kernel is not None
        set_up(self, layer=layer, w13=w13, w2=w2)
        if is_update:
            self.moe_kernel.fused_experts.process_weights_after_loading(layer)

    UnquantizedFusedMoEMethod._setup_kernel = set_up_and_pack
