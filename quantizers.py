"""From weights to integers, and the linear layer that holds them. What the integers mean is qlinears.py's to say.

int8 has nothing to choose: a row's largest value becomes 127. int4 has. The range of a group of columns may be shrunk,
which clips its outliers and halves the error of everything else; and an error made in one column can be undone in the
columns after it, as far as the layer's inputs go together (GPTQ, arXiv 2210.17323). Both want to know the inputs, as
the Hessian x.T @ x of a text, which quantize.py collects; without it each group gets the scale of least squared error,
and each weight the nearest integer.

Where a group holds many zeros, zero stays zero: what widen.py leaves dead must not come to life.
"""
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linears import linear
from qlinears import ROTATION, Quantized, pack, rotate

MODES = ("int8", "int8dyn", "int4")
GROUPS = (64, 128)
SHRINK = tuple(1 - i / 40 for i in range(13))  # of a group's range, tried one after the other
ROWS = 4096  # quantised together: what is needed in fp32 beside the weights
COLUMNS = 128  # of GPTQ, between two corrections of all columns that follow


def layout(N: int, K: int, mode: str, group: int, device: torch.device | str = "meta") -> Quantized:
    """Of a weight [N, K], not filled in. Raises ValueError where mode or group is unknown."""
    if mode not in MODES:
        raise ValueError(f"quantisation {mode!r} is not known: there is {', '.join(MODES)}")
    if mode != "int4":
        rotated = mode == "int8dyn" and K % ROTATION == 0
        return Quantized(torch.empty(N, K, dtype=torch.int8, device=device), torch.empty(N, device=device), 0,
                         1 if mode == "int8dyn" else 2, rotated)
    if group not in GROUPS:
        raise ValueError(f"int4 in groups of {group} is not implemented: use {' or '.join(map(str, GROUPS))}")
    half = -(-K // 256) * 128
    return Quantized(torch.empty(N, half, dtype=torch.int8, device=device),
                     torch.empty(2 * half // group, N, 2, dtype=torch.bfloat16, device=device), group, 2)


def quantize_weight(w: Tensor, mode: str, group: int = 128, hessian: Tensor | None = None,
                    shrink: Sequence[float] = SHRINK) -> Quantized:
    """w [N, K], any dtype and device. int4 with the `hessian` [K, K] of its inputs (fp32, mean of x.T @ x) is GPTQ, and
    without it the search alone, of which shrink=(1,) leaves round-to-nearest."""
    out = layout(*w.shape, mode, group, w.device)
    count = None if hessian is None else weights(hessian)
    for first in range(0, len(w), ROWS):
        rows = slice(first, first + ROWS)
        part = w[rows].float()
        if mode == "int4":
            scale, offset = search(part, group, count, shrink)
            out.scale[:len(scale), rows] = torch.stack((scale / 16, offset), -1).bfloat16()
            out.scale[len(scale):, rows] = 0  # of padding
            if hessian is None:
                out.data[rows] = pack(nearest(part, scale, offset, group))
        else:
            part = rotate(part) if out.rotated else part
            out.scale[rows] = part.abs().amax(1) / 127
            out.data[rows] = (part / out.scale[rows, None].clamp(min=1e-30)).round().to(torch.int8)
    if hessian is not None and mode == "int4":
        scale, offset = out.scale.float().unbind(-1)
        out.data.copy_(pack(gptq(w.float(), scale * 16, offset, group, hessian)))
    return out


def weights(hessian: Tensor) -> Tensor:
    """[K]: how much an error in a column counts. An input that the text never had counts as little as any."""
    d = hessian.diagonal()
    return torch.where(d > 0, d, torch.where(d > 0, d, 1e30).amin())


def search(w: Tensor, group: int, weight: Tensor | None, shrink: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Scale and offset as they are stored, fp32 [groups, N] each, of w [N, K]: of several shrunken ranges, each refined
    by linear regressions of the weights on their integers, that of the least squared error, columns weighted by
    weight [K]. Not knowing what counts, one should spare zero and the outliers: no regression, and the power is 6."""
    K, fits, power = w.shape[1], 0 if weight is None else 2, 6 if weight is None else 2
    x = torch.cat((w, w[:, -1:].expand(-1, -K % group)), 1).unflatten(1, (-1, group))  # [N, groups, group]
    share = F.pad(w.new_ones(K) if weight is None else weight, (0, -K % group)).view(-1, group)
    share = share / share.sum(1, keepdim=True)
    low, high, mean = x.amin(2), x.amax(2), (x * share).sum(2)  # [N, groups]
    whole = exact = ((x == 0) & (share > 0)).sum(2) > group // 16
    if weight is None:
        low, high, whole = low.clamp(max=0), high.clamp(min=0), torch.ones_like(exact)
    best, scale, offset = torch.full_like(low, torch.inf), torch.ones_like(low), torch.zeros_like(low)
    for part in shrink:
        s = ((high - low) * (part / 15)).clamp(min=1e-30)
        s, o = stored(s, (high + low + s) / 2, whole, exact)  # q is from -8 to 7: its middle is -1/2
        for fit in range(fits + 1):
            q = ((x - o[..., None]) / s[..., None]).round_().clamp_(-8, 7)
            error = (q * s[..., None]).add_(o[..., None]).sub_(x).pow_(power).mul_(share).sum(2)
            better = error < best
            best = torch.where(better, error, best)
            scale, offset = torch.where(better, s, scale), torch.where(better, o, offset)
            if fit < fits:
                middle = (q * share).sum(2)
                q -= middle[..., None]
                slope = (q * share * x).sum(2) / (q * share * q).sum(2).clamp(min=1e-30)
                s = torch.where(slope > 0, slope, s)
                s, o = stored(s, mean - s * middle, whole, exact)
    return scale.T.contiguous(), offset.T.contiguous()


def stored(scale: Tensor, offset: Tensor, whole: Tensor, exact: Tensor) -> tuple[Tensor, Tensor]:
    """As bf16 has them. Where `whole`, the offset is a multiple of the scale, and zero is one of the 16 values; where
    `exact` too, the scale has five significant bits, so that bf16 has room for the product."""
    five = ((scale.view(torch.int32) + 2**18) & -2**19).view(torch.float32)
    scale = torch.where(exact, five, scale.bfloat16().float())
    offset = torch.where(whole, scale * (offset / scale).round().clamp(-7, 8), offset)
    return scale, offset.bfloat16().float()


def nearest(w: Tensor, scale: Tensor, offset: Tensor, group: int) -> Tensor:
    """[N, K] -> integers from -8 to 7, fp32."""
    s, o = (t.T.repeat_interleave(group, 1)[:, :w.shape[1]] for t in (scale, offset))
    return ((w - o) / s).round_().clamp_(-8, 7)


def gptq(w: Tensor, scale: Tensor, offset: Tensor, group: int, hessian: Tensor, damp: float = 0.01) -> Tensor:
    """Integers from -8 to 7, fp32 [N, K]. Columns go in the order of falling Hessian diagonals: the error of those that
    count most has the most columns left to undo it. Scales were chosen before, so any order will do."""
    (N, K), d = w.shape, weights(hessian)
    order = d.argsort(descending=True)
    H = hessian[order][:, order].double()
    H.diagonal().add_(damp * d.double().mean())
    U = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(H)), upper=True).float()
    of, left = order // group, w.T[order]  # left: what each column [N] still should add up to
    q = torch.empty_like(left)
    for b in range(0, K, COLUMNS):
        e = min(b + COLUMNS, K)
        s, o, errors = scale[of[b:e]], offset[of[b:e]], left.new_empty(e - b, N)
        for i in range(e - b):
            now = left[b + i]
            torch.sub(now, o[i], out=q[b + i])
            q[b + i].div_(s[i]).round_().clamp_(-8, 7)
            errors[i] = (now - torch.addcmul(o[i], q[b + i], s[i])) / U[b + i, b + i]
            left[b + i + 1:e].addmm_(U[b + i, b + i + 1:e, None], errors[i, None], alpha=-1)
        left[e:].addmm_(U[b:e, e:].T, errors, alpha=-1)
    return q[order.argsort()].T.contiguous()


def rows_of(weight: Tensor | Quantized, rows: Tensor | slice) -> Tensor | Quantized:
    """Some outputs of a linear layer, of 8 bits or not quantised."""
    if not isinstance(weight, Quantized):
        return weight[rows]
    return weight._replace(data=weight.data[rows], scale=weight.scale[rows])


def stack(above: Tensor | Quantized, below: Tensor | Quantized) -> Tensor | Quantized | None:
    """Two linear layers of the same input as one, where they are of one kind and not of 4 bits."""
    if not isinstance(above, Quantized) and not isinstance(below, Quantized):
        return torch.cat((above, below))
    if isinstance(above, Quantized) and isinstance(below, Quantized) and above[2:] == below[2:] and not above.group:
        return above._replace(data=torch.cat((above.data, below.data)), scale=torch.cat((above.scale, below.scale)))
    return None


class QuantizedLinear(nn.Module):
    """In place of nn.Linear: its `weight` is Quantized, made of buffers, which move and are saved as weights are."""

    def __init__(self, weight: Quantized, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        self.register_buffer("data", weight.data)
        self.register_buffer("scale", weight.scale)
        self.bias, self.how = bias, weight[2:]

    @property
    def weight(self) -> Quantized:
        return Quantized(self.data, self.scale, *self.how)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)

    def _apply(self, function, recurse=True):
        """Of nn.Module.to: a dtype is for what is computed with, not for scales."""
        scale = self.scale
        super()._apply(function, recurse)
        self.scale = scale.to(self.data.device)
        return self


def mode_of(name: str, mode: str) -> str:
    """Of the linear of this name: an lm_head is int8 in any mode, as its errors reach the choice of a token at once."""
    return "int8" if name == "lm_head" else mode


def quantize_linears(module: nn.Module, mode: str, group: int = 128, device: torch.device | str | None = None,
                     shrink: Sequence[float] = SHRINK) -> None:
    """Every nn.Linear of `module`, one after the other; `device` is where their integers go. On the meta device
    shapes and dtypes alone."""
    for name, old in list(module.named_modules()):
        if isinstance(old, nn.Linear):
            parent, _, own = name.rpartition(".")
            how = mode_of(own, mode)
            weight = layout(*old.weight.shape, how, group) if old.weight.is_meta else quantize_weight(
                old.weight.detach().to(device or old.weight.device), how, group, shrink=shrink)
            setattr(module.get_submodule(parent), own, QuantizedLinear(weight, old.bias))
