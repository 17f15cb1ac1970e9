"""int4: choosing a scale and an offset for each group of columns, and GPTQ.

A weight [N, K] becomes integers q from -8 to 7. `group` neighbouring columns of a row share a scale and an offset, and
the weight is scale * q + offset. Both are chosen first (`search_scales`), then the integers: each the nearest
(`nearest_integers`), or with the inputs of a text at hand by GPTQ (`gptq`).

Shapes: N outputs, K inputs (columns of the weight). Scales and offsets are fp32 [groups, N].
"""
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

SHRINK = tuple(1 - i / 40 for i in range(13))  # the search tries these fractions of a group's range: 1 down to 0.7
REGRESSIONS = 2  # per fraction: how often scale and offset are fitted to the weights again
COLUMNS = 128  # columns of a block: GPTQ corrects the columns after a block once, when the block is done


# ----- Choosing scales and offsets ---------------------------------------------------------------------------------


def column_importance(hessian: Tensor) -> Tensor:
    """How much an error in each column counts, [K]: the mean square of its input, the diagonal of the Hessian [K, K].
    An input that was always 0 in the text counts as much as the least important one that was not."""
    diagonal = hessian.diagonal()
    return torch.where(diagonal > 0, diagonal, torch.where(diagonal > 0, diagonal, 1e30).amin())


def search_scales(w: Tensor, group: int, importance: Tensor | None, shrink: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Scale and offset of each group of w [N, K] fp32, already rounded to what bf16 can store.

    A range that is shrunk by a factor of `shrink` clips the group's outliers and has a finer step for all other
    weights. Every factor is tried. importance: [K], or None where the layer's inputs are not known.
    """
    K = w.shape[1]
    padded = torch.cat((w, w[:, -1:].expand(-1, -K % group)), 1)
    x = padded.unflatten(1, (-1, group))  # [N, groups, group]
    share = F.pad(w.new_ones(K) if importance is None else importance, (0, -K % group)).view(-1, group)
    share = share / share.sum(1, keepdim=True)  # [groups, group], sums to 1 in each group; 0 for padding
    many_zeros = ((x == 0) & (share > 0)).sum(2) > group // 16
    if importance is None:
        scale, offset = search_without_inputs(x, share, many_zeros, shrink)
    else:
        scale, offset = search_with_inputs(x, share, many_zeros, shrink)
    return scale.T.contiguous(), offset.T.contiguous()


def search_without_inputs(x: Tensor, share: Tensor, many_zeros: Tensor, shrink: Sequence[float]
                          ) -> tuple[Tensor, Tensor]:
    """Scale and offset [N, groups] of x [N, groups, group] where nothing is known about the inputs.

    Then it is best to keep 0 as one of the 16 values in every group, and to spare the outliers: the error that counts
    is the sixth power of the difference.
    """
    low = x.amin(2).clamp(max=0)
    high = x.amax(2).clamp(min=0)
    best = Best(x, share, power=6)
    for fraction in shrink:
        scale, offset = cover_range(low, high, fraction)
        best.consider(*round_to_bf16(scale, offset, torch.ones_like(many_zeros), many_zeros))
    return best.scale, best.offset


def search_with_inputs(x: Tensor, share: Tensor, many_zeros: Tensor, shrink: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Scale and offset [N, groups] of x [N, groups, group] with the least squared error, each column weighted by its
    `share` of the group's importance. Linear regressions of the weights on their integers refine each range."""
    low, high = x.amin(2), x.amax(2)
    mean = (x * share).sum(2)
    best = Best(x, share, power=2)
    for fraction in shrink:
        scale, offset = cover_range(low, high, fraction)
        scale, offset = round_to_bf16(scale, offset, many_zeros, many_zeros)
        for _ in range(REGRESSIONS):
            q = best.consider(scale, offset)
            q_mean = (q * share).sum(2)
            q -= q_mean[..., None]
            slope = (q * share * x).sum(2) / (q * share * q).sum(2).clamp(min=1e-30)
            scale = torch.where(slope > 0, slope, scale)
            scale, offset = round_to_bf16(scale, mean - scale * q_mean, many_zeros, many_zeros)
        best.consider(scale, offset)
    return best.scale, best.offset


class Best:
    """The best scale and offset [N, groups] of those considered so far, for each group of x [N, groups, group]."""

    def __init__(self, x: Tensor, share: Tensor, power: int) -> None:
        self.x, self.share, self.power = x, share, power
        self.error = x.new_full(x.shape[:2], torch.inf)
        self.scale = torch.ones_like(self.error)
        self.offset = torch.zeros_like(self.error)

    def consider(self, scale: Tensor, offset: Tensor) -> Tensor:
        """Keep scale and offset [N, groups] where their error is smaller. Returns their integers, like x."""
        q = ((self.x - offset[..., None]) / scale[..., None]).round_().clamp_(-8, 7)
        difference = (q * scale[..., None]).add_(offset[..., None]).sub_(self.x)
        error = difference.pow_(self.power).mul_(self.share).sum(2)
        better = error < self.error
        self.error = torch.where(better, error, self.error)
        self.scale = torch.where(better, scale, self.scale)
        self.offset = torch.where(better, offset, self.offset)
        return q


def cover_range(low: Tensor, high: Tensor, fraction: float) -> tuple[Tensor, Tensor]:
    """The scale and offset whose 16 values span this fraction of the range from low to high, around its middle."""
    scale = ((high - low) * (fraction / 15)).clamp(min=1e-30)
    return scale, (high + low + scale) / 2  # the middle of -8 ... 7 is -1/2


def round_to_bf16(scale: Tensor, offset: Tensor, has_zero: Tensor, exact_zero: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and offset rounded to what bf16 can store, as fp32.

    Where `has_zero`, the offset is the scale times an integer before it is rounded, so that one of the 16 values is 0
    (within rounding). Where `exact_zero` too, the scale keeps only five significant bits: its product with an integer
    from -7 to 8 then fits the eight bits of bf16, and the value is exactly 0.
    """
    five_bits = ((scale.view(torch.int32) + 2**18) & -2**19).view(torch.float32)
    scale = torch.where(exact_zero, five_bits, scale.bfloat16().float())
    offset = torch.where(has_zero, scale * (offset / scale).round().clamp(-7, 8), offset)
    return scale, offset.bfloat16().float()


# ----- Choosing the integers ---------------------------------------------------------------------------------------


def nearest_integers(w: Tensor, scale: Tensor, offset: Tensor, group: int) -> Tensor:
    """Each weight of w [N, K] rounded to the nearest of its group's 16 values: integers from -8 to 7, fp32 [N, K]."""
    s, o = (t.T.repeat_interleave(group, 1)[:, :w.shape[1]] for t in (scale, offset))
    return ((w - o) / s).round_().clamp_(-8, 7)


def gptq(w: Tensor, scale: Tensor, offset: Tensor, group: int, hessian: Tensor, damp: float = 0.01) -> Tensor:
    """GPTQ (arXiv 2210.17323): round w [N, K] column by column, and let the columns that follow undo each error, as far
    as their inputs are correlated. hessian [K, K] fp32: mean of x.T @ x. Returns integers from -8 to 7, fp32 [N, K].

    Columns go in the order of falling Hessian diagonals, so that the errors of the most important ones have the most
    columns left to undo them. Scales and offsets are fixed beforehand, which allows any order.
    """
    N, K = w.shape
    importance = column_importance(hessian)
    order = importance.argsort(descending=True)
    H = hessian[order][:, order].double()
    H.diagonal().add_(damp * importance.double().mean())
    U = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(H)), upper=True).float()
    group_of = order // group
    wanted = w.T[order]  # [K, N]: what each column should be, corrected for the errors of the columns before
    q = torch.empty_like(wanted)
    for start in range(0, K, COLUMNS):
        end = min(start + COLUMNS, K)
        s = scale[group_of[start:end]]
        o = offset[group_of[start:end]]
        errors = wanted.new_empty(end - start, N)
        for i in range(end - start):
            column = start + i
            torch.sub(wanted[column], o[i], out=q[column])
            q[column].div_(s[i]).round_().clamp_(-8, 7)
            errors[i] = (wanted[column] - torch.addcmul(o[i], q[column], s[i])) / U[column, column]
            wanted[column + 1:end].addmm_(U[column, column + 1:end, None], errors[i, None], alpha=-1)
        wanted[end:].addmm_(U[start:end, end:].T, errors, alpha=-1)
    return q[order.argsort()].T.contiguous()
