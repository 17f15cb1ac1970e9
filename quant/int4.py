"""int4: a scale and an offset for each group, and GPTQ."""
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

SHRINK = tuple(1 - i / 40 for i in range(13))  # of a group's range, tried one after the other
COLUMNS = 128  # of GPTQ, between two corrections of all columns that follow


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
