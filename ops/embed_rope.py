"""What a forward starts with (embeddings and RoPE angles), and RoPE with the cache write."""
import torch
import torch.nn.functional as F
from torch import Tensor

from ops.device import device_limits, either, enter, tl, triton


@triton.jit
def rounded(x, like):
    """fp32 as precise as what `like` points to: each step rounds where PyTorch's does."""
    return x.to(like.dtype.element_ty).to(tl.float32)


@triton.jit
def embed_kernel(table, tokens, rope, places, onward, stride, rows, x, angles, C, S, D, T, SIZE: tl.constexpr,
                 PDL: tl.constexpr):
    """One row of x, and of the first T the angles."""
    enter(PDL)
    row, i = tl.program_id(0), tl.arange(0, SIZE)
    out = tl.load(table + tl.load(tokens + row) * C + i, mask=i < C)
    if onward is not None:
        source = row if rows is None else tl.load(rows + row)
        out = out.to(tl.float32) + tl.load(onward + source * stride + i, mask=i < C).to(tl.float32)
    tl.store(x + row * C + i, out, mask=i < C)
    if row < T:
        from_rope = tl.load(places + row) * D + i
        for plane in tl.static_range(2):  # cos, sin
            angle = tl.load(rope + plane * S * D + from_rope, mask=i < D)
            tl.store(angles + (plane * T + row) * D + i, angle, mask=i < D)


def embed_triton(table: Tensor, tokens: Tensor, rope: Tensor, places: Tensor, onward: Tensor | None = None,
                 rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
    C, T, (S, D), pdl = table.shape[1], len(places), rope.shape[1:], device_limits(table.device)[1] >= (9, 0)
    tokens = tokens.contiguous()
    assert all(t is None or t.is_contiguous() for t in (table, rope, places, rows))
    assert onward is None or onward.stride(1) == 1
    x, angles, size = table.new_empty(*tokens.shape, C), rope.new_empty(2, T, D), triton.next_power_of_2(max(C, D))
    embed_kernel[tokens.numel(),](table, tokens, rope, places, onward, 0 if onward is None else onward.stride(0), rows,
                                  x, angles, C, S, D, T, size, pdl, num_warps=min(8, max(1, size // 256)),
                                  launch_pdl=pdl)
    return x, angles


def embed_torch(table: Tensor, tokens: Tensor, rope: Tensor, places: Tensor, onward: Tensor | None = None,
                rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """What a forward starts with: table[tokens] [..., T, C], and the angles of their places, rope[:, places] [2, T, D].

    table [V, C], tokens [..., T] int64, rope [2, S, D], places [T] int64. To the rows of a draft head, tokens [T],
    onward[rows] is added ([any, C], of any dtype, perhaps columns of something wider; rows None: in order), and the sum
    is rounded once.
    """
    x = F.embedding(tokens, table)
    if onward is not None:
        x = (x + (onward if rows is None else onward[rows])).to(table.dtype)
    return x, rope.index_select(1, places)


@triton.jit
def rope_store_kernel(qkv, rope, cache_pos, kv, q_norm, k_norm, out, eps, S, H: tl.constexpr,
                      K: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BH: tl.constexpr, PDL: tl.constexpr):
    """Program (token, BH of its H + 2K heads). Values turn by angle 0: cos 1 and sin 0 leave them exact."""
    enter(PDL)
    token, head = tl.program_id(0), (tl.program_id(1) * BH + tl.arange(0, BH))[:, None]
    d = tl.arange(0, DP // 2)[None, :]
    half, turns = d < D // 2, head < H + K
    mask = half & (head < H + 2 * K)
    at = qkv + token * (H + 2 * K) * D + head * D + d
    a = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(at + D // 2, mask=mask, other=0.0).to(tl.float32)
    if q_norm is not None:
        inverse = tl.rsqrt((tl.sum(a * a, 1) + tl.sum(b * b, 1)) / D + eps)[:, None]
        wa = tl.where(head < H, tl.load(q_norm + d, mask=half), tl.load(k_norm + d, mask=half))
        wb = tl.where(head < H, tl.load(q_norm + D // 2 + d, mask=half), tl.load(k_norm + D // 2 + d, mask=half))
        a = tl.where(turns, rounded(a * inverse * wa, qkv), a)
        b = tl.where(turns, rounded(b * inverse * wb, qkv), b)
    angle = rope + token * D + d  # both halves of D hold the same angles
    cos = tl.where(turns, tl.load(angle, mask=half).to(tl.float32), 1.0)
    sin = tl.where(turns, tl.load(angle + tl.num_programs(0) * D, mask=half).to(tl.float32), 0.0)
    x, y = rounded(a * cos, qkv) - rounded(b * sin, qkv), rounded(b * cos, qkv) + rounded(a * sin, qkv)
    to_q = out + token * H * D + head * D + d
    # kv [2, K, S, D] is 2K heads of S slots, in the order in which keys and values follow the queries in qkv
    to_kv = kv + ((head - H).to(tl.int64) * S + tl.load(cache_pos + token)) * D + d
    tl.store(to_q, x, mask=half & (head < H))
    tl.store(to_q + D // 2, y, mask=half & (head < H))
    tl.store(to_kv, x, mask=mask & (head >= H))
    tl.store(to_kv + D // 2, y, mask=mask & (head >= H))


def rope_store_triton(qkv: Tensor, rope: Tensor, cache_pos: Tensor, kv: Tensor,
                      q_norm: Tensor | None = None, k_norm: Tensor | None = None, eps: float = 0.0) -> Tensor:
    (T, width), (K, S, D), BH = qkv.shape, kv.shape[1:], 4
    pdl = device_limits(qkv.device)[1] >= (9, 0)
    assert qkv.is_contiguous() and kv.is_contiguous() and rope.is_contiguous()
    out = qkv.new_empty(T, width // D - 2 * K, D)
    rope_store_kernel[(T, triton.cdiv(width // D, BH))](
        qkv, rope, cache_pos, kv, q_norm, k_norm, out, eps, S, out.shape[1], K, D,
        triton.next_power_of_2(D), BH, pdl, num_warps=1, launch_pdl=pdl)
    return out


def rope_store_torch(qkv: Tensor, rope: Tensor, cache_pos: Tensor, kv: Tensor,
                     q_norm: Tensor | None = None, k_norm: Tensor | None = None, eps: float = 0.0) -> Tensor:
    """Rotated q [T, H, D] of qkv [T, (H + 2K) * D]; rotated k, and v, go to slots cache_pos [T] of kv [2, K, S, D].

    rope [2, T, D]: cos and sin of each token's place, in qkv's dtype. q_norm, k_norm [D] (Qwen3): norm each head first.
    """
    K, D = kv.shape[1], kv.shape[3]
    q, k, v = qkv.unflatten(-1, (-1, D)).split((qkv.shape[1] // D - 2 * K, K, K), dim=1)  # [T, heads, D]
    if q_norm is not None:
        q, k = F.rms_norm(q, (D,), q_norm, eps), F.rms_norm(k, (D,), k_norm, eps)
    cos, sin = rope[:, :, None].unbind(0)  # [T, 1, D]
    q, k = (x * cos + torch.cat((-x[..., D // 2:], x[..., :D // 2]), -1) * sin for x in (q, k))
    kv.index_copy_(2, cache_pos, torch.stack((k, v)).transpose(1, 2))
    return q


embed = either(embed_triton, embed_torch)
rope_store = either(rope_store_triton, rope_store_torch)
