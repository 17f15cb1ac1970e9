"""Fused attention that also returns the logsumexp of its scores, both with gradients. No scores are kept in memory.

An unrolled draft step and a block's row see many entries, the text's, and a few of their own. PyTorch's fused attention
does the first part, and its logsumexp says how much weight that part gets beside the other. But the fused backward pass
knows no gradient of the logsumexp. FusedAttention adds it.
"""
import torch
import torch.nn.functional as F
from torch import Tensor

aten = torch.ops.aten


class FusedAttention(torch.autograd.Function):
    """Attention of q [B, H, T, D] over k and v [B, H, S, D], which returns y [B, H, T, D] and the logsumexp of each
    row's scores [B, H, T, 1] fp32.

    bias [B, H, T, S] in q's dtype is added to the scores (see `seen`); None: causal, with T = S.

    The gradient of a score is p (dp - delta + d), where p is its weight, dp the product of its value with y's gradient
    g, delta = sum(g y) of the row, and d the gradient of the logsumexp. The fused pass has the formula without d. It
    computes delta from the y that it is given, so it is given y - g d / sum(g g). Two limits: d is lost where g is 0
    (in the softmax that goes on, d is 0 there too), and each row must see an entry.
    """

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        causal = bias is None
        if q.is_cuda:  # the fused attention that takes a bias, and heads of any size on any card
            y, sums, *dropout = aten._scaled_dot_product_efficient_attention(q, k, v, bias, True, is_causal=causal)
        else:
            y, sums = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, is_causal=causal, attn_mask=bias)
            dropout = []
        ctx.save_for_backward(q, k, v, bias, y, sums, *dropout)
        return y, sums[..., :q.shape[2], None]  # on a GPU filled up to whole 32 rows

    @staticmethod
    def backward(ctx, grad: Tensor, grad_sum: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, bias, y, sums, *dropout = ctx.saved_tensors
        causal = bias is None
        squares = grad.float().square().sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        y = (y - grad * (grad_sum / squares)).to(q.dtype)
        if not q.is_cuda:
            grads = aten._scaled_dot_product_flash_attention_for_cpu_backward(
                grad, q, k, v, y, sums, 0.0, causal, attn_mask=bias)
        else:
            grads = aten._scaled_dot_product_efficient_attention_backward(
                grad, q, k, v, bias, y, sums, *dropout, 0.0, [True, True, True, False], causal)
        return *grads[:3], None


def seen(mask: Tensor, heads: int, dtype: torch.dtype) -> Tensor:
    """The bias of FusedAttention for rows that see the entries where mask [B, T, S] is set: [B, heads, T, S]."""
    bias = torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, -torch.inf)
    bias = F.pad(bias, (0, -mask.shape[-1] % 8))[..., :mask.shape[-1]]  # row stride a multiple of 8, for GPU kernels
    return bias[:, None].expand(-1, heads, -1, -1)
