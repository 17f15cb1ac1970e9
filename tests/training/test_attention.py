"""training/attention.py: fused attention whose logsumexp has a gradient, against plain attention in float64."""
import pytest
import torch
from torch import Tensor

from training.attention import FusedAttention, seen

DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU")])]


def plain(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    scores = (q @ k.mT * q.shape[-1]**-0.5).masked_fill(~mask, -torch.inf)
    return scores.softmax(-1) @ v, scores.logsumexp(-1, keepdim=True)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("size", [8, 64, 256])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_gradients(dtype: torch.dtype, bound: float, causal: bool, size: int, device: str) -> None:
    """Fails if the gradient of the logsumexp is lost, or a row whose output has no gradient spoils the others."""
    rows, columns = (37, 37) if causal else (21, 45)
    generator = torch.Generator().manual_seed(size)
    mask = torch.ones(rows, columns, dtype=torch.bool).tril()
    if not causal:
        mask = torch.rand(2, rows, columns, generator=generator) < 0.5
        mask[..., 0] = True
    mask = mask.to(device)
    shapes = [(2, 3, n, size) for n in (rows, columns, columns)]
    inputs = [torch.randn(shape, generator=generator).to(device, dtype).requires_grad_() for shape in shapes]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    found = FusedAttention.apply(*inputs, None if causal else seen(mask, 3, dtype))
    wanted = plain(*exact, mask if causal else mask[:, None])
    given = [1e-6 * torch.randn(y.shape, generator=generator).to(device, y.dtype) for y in found]
    for g in given:
        g[:, :, ::3] = 0
    found += torch.autograd.grad(found, inputs, given)
    wanted += torch.autograd.grad(wanted, exact, [g.double() for g in given])
    for y, expected in zip(found, wanted, strict=True):
        assert (y.double() - expected).norm() < bound * expected.norm()
