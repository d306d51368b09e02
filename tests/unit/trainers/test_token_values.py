"""Log-probabilities and entropy on one rank against PyTorch's softmax, values and gradients."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True, scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    import torch.distributed as dist

    from roll_r3.platform import megatron_cpu

    megatron_cpu.install()
    from megatron.core import parallel_state

    store = f"file://{tmp_path_factory.mktemp('store')}/store"
    dist.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    yield
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("entropy_gradient", [True, False])
@pytest.mark.parametrize("padded", [0, 3])
def test_values_and_gradients(padded: int, entropy_gradient: bool, dtype: torch.dtype) -> None:
    from roll_r3.trainers.megatron.token_values import label_log_probs_and_entropy

    torch.manual_seed(0)
    logits = (4 * torch.randn(2, 5, 11 + padded)).to(dtype).requires_grad_()
    labels = torch.randint(0, 11, (2, 5))
    weights = torch.randn(2, 2, 5)
    before = logits.detach().clone()

    log_probs, entropy = label_log_probs_and_entropy(
        logits, labels, temperature=0.8, vocab_size=11, entropy_gradient=entropy_gradient
    )
    loss = (weights[0] * log_probs).sum()
    if entropy_gradient:
        loss = loss + (weights[1] * entropy).sum()
    loss.backward()

    reference = before.clone().requires_grad_()
    whole = (reference[..., :11].double() / 0.8).log_softmax(-1)
    wanted = whole.gather(-1, labels[..., None])[..., 0]
    wanted_entropy = -(whole.exp() * whole).sum(-1)
    ((weights[0] * wanted).sum() + entropy_gradient * (weights[1] * wanted_entropy).sum()).backward()
    assert torch.allclose(log_probs.double(), wanted, atol=1e-6)
    assert torch.allclose(entropy.double(), wanted_entropy, atol=1e-6)
    assert entropy.requires_grad == entropy_gradient
    assert torch.equal(logits.detach(), before)  # the model's output is unchanged
    assert logits.grad is not None and reference.grad is not None
    assert torch.allclose(logits.grad, reference.grad, atol=1e-2 if dtype is torch.bfloat16 else 1e-6)
    assert not logits.grad[..., 11:].any()


def test_a_certain_token_has_no_entropy_and_finite_gradients() -> None:
    from roll_r3.trainers.megatron.token_values import label_log_probs_and_entropy

    logits = torch.zeros(1, 1, 4)
    logits[..., 2] = 1e4
    logits.requires_grad_()
    log_probs, entropy = label_log_probs_and_entropy(
        logits, torch.tensor([[2]]), temperature=1.0, vocab_size=4, entropy_gradient=True
    )
    (log_probs + entropy).sum().backward()
    assert log_probs.item() == 0 and entropy.item() == 0
    assert logits.grad is not None and logits.grad.isfinite().all()
