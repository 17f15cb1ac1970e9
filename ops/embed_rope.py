"""Embeddings and RoPE: what a forward starts with, and rotating queries and keys while they go to the cache.

Shapes: T tokens, V tokens of the vocabulary, C hidden size, H query heads, K key/value heads, D head dim, S cache
slots or, of a RoPE table, positions.
"""
import torch
import torch.nn.functional as F
from torch import Tensor

from ops import cpu_kernels
from ops.device import by_device, pdl_options, tl, triton, wait_for_previous


@triton.jit
def embed_kernel(table, tokens, rope, positions, addend, stride, addend_rows, x, angles, C, S, D, T,
                 SIZE: tl.constexpr, PDL: tl.constexpr):
    """See `embed_torch`. Grid (rows of x): a program writes one row of x and, if it is one of the first T, the angles
    of that token. SIZE is the larger of C and D, rounded up to a power of two.

    Pointers: table [V, C], tokens [rows] int64, rope [2, S, D], positions [T] int64, addend [any, C] with rows
    `stride` apart (or None), addend_rows [rows] int64 (or None: in order), x [rows, C], angles [2, T, D].
    """
    wait_for_previous(PDL)
    row, i = tl.program_id(0), tl.arange(0, SIZE)
    out = tl.load(table + tl.load(tokens + row) * C + i, mask=i < C)
    if addend is not None:
        source = row if addend_rows is None else tl.load(addend_rows + row)
        out = out.to(tl.float32) + tl.load(addend + source * stride + i, mask=i < C).to(tl.float32)
    tl.store(x + row * C + i, out, mask=i < C)
    if row < T:
        from_rope = tl.load(positions + row) * D + i
        for plane in tl.static_range(2):  # cos, sin
            angle = tl.load(rope + plane * S * D + from_rope, mask=i < D)
            tl.store(angles + (plane * T + row) * D + i, angle, mask=i < D)


def embed_triton(table: Tensor, tokens: Tensor, rope: Tensor, positions: Tensor, addend: Tensor | None = None,
                 addend_rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
    C, T = table.shape[1], len(positions)
    S, D = rope.shape[1:]
    tokens = tokens.contiguous()
    assert all(t is None or t.is_contiguous() for t in (table, rope, positions, addend_rows))
    assert addend is None or addend.stride(1) == 1
    stride = 0 if addend is None else addend.stride(0)
    x = table.new_empty(*tokens.shape, C)
    angles = rope.new_empty(2, T, D)
    size = triton.next_power_of_2(max(C, D))
    embed_kernel[tokens.numel(),](table, tokens, rope, positions, addend, stride, addend_rows, x, angles, C, S, D, T,
                                  size, num_warps=min(8, max(1, size // 256)), **pdl_options(table.device))
    return x, angles


def embed_torch(table: Tensor, tokens: Tensor, rope: Tensor, positions: Tensor, addend: Tensor | None = None,
                addend_rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The embeddings table[tokens] [..., T, C], and the RoPE angles of the tokens' positions, rope[:, positions]
    [2, T, D].

    table [V, C], tokens [..., T] int64, rope [2, S, D] (cos and sin), positions [T] int64. A draft head, with tokens
    [T], adds addend[addend_rows] (without addend_rows: addend [T, C]) to the embeddings; the sum is rounded once.
    addend [any, C] may have another dtype and be some columns of a wider tensor.
    """
    x = F.embedding(tokens, table)
    if addend is not None:
        x = (x + (addend if addend_rows is None else addend[addend_rows])).to(table.dtype)
    return x, rope.index_select(1, positions)


@triton.jit
def embed_pair_kernel(table, tokens, embed_norm, features, parent_rows, feature_norm, eps, rope, positions, x, residual,
                      angles, C, S, D, T, NORMED: tl.constexpr, SIZE: tl.constexpr, PDL: tl.constexpr):
    """See `embed_pair_torch`. Grid (T): a program writes one row of each result. SIZE is the larger of C and D, rounded
    up to a power of two.

    Pointers: table [V, C], tokens [T] int64, embed_norm and feature_norm [C], features [any, C], parent_rows [T] int64
    (or None: in order), rope [2, S, D], positions [T] int64, x [T, 2 C], residual [T, C], angles [2, T, D].
    """
    row, i = tl.program_id(0), tl.arange(0, SIZE)
    inside = i < C
    embed_weight = tl.load(embed_norm + i, mask=inside, other=0.0).to(tl.float32)
    feature_weight = tl.load(feature_norm + i, mask=inside, other=0.0).to(tl.float32)
    wait_for_previous(PDL)
    e = tl.load(table + tl.load(tokens + row) * C + i, mask=inside, other=0.0).to(tl.float32)
    source = row if parent_rows is None else tl.load(parent_rows + row)
    feature = tl.load(features + source * C + i, mask=inside, other=0.0)
    f = feature.to(tl.float32)
    normed = f * tl.rsqrt(tl.sum(f * f, 0) / C + eps) * feature_weight
    tl.store(x + row * 2 * C + i, e * tl.rsqrt(tl.sum(e * e, 0) / C + eps) * embed_weight, mask=inside)
    tl.store(x + row * 2 * C + C + i, normed, mask=inside)
    tl.store(residual + row * C + i, normed if NORMED else feature, mask=inside)
    from_rope = tl.load(positions + row) * D + i
    for plane in tl.static_range(2):  # cos, sin
        angle = tl.load(rope + plane * S * D + from_rope, mask=i < D)
        tl.store(angles + (plane * T + row) * D + i, angle, mask=i < D)


def embed_pair_triton(table: Tensor, tokens: Tensor, embed_norm: Tensor, features: Tensor, parent_rows: Tensor | None,
                      feature_norm: Tensor, eps: float, rope: Tensor, positions: Tensor, normed_residual: bool = False
                      ) -> tuple[Tensor, Tensor, Tensor]:
    T, C = len(tokens), table.shape[1]
    S, D = rope.shape[1:]
    tokens = tokens.contiguous()
    features = features.contiguous()
    assert table.is_contiguous() and rope.is_contiguous() and positions.is_contiguous()
    x = table.new_empty(T, 2 * C)
    residual = table.new_empty(T, C)
    angles = rope.new_empty(2, T, D)
    size = triton.next_power_of_2(max(C, D))
    embed_pair_kernel[T,](table, tokens, embed_norm, features, parent_rows, feature_norm, eps, rope, positions, x,
                          residual, angles, C, S, D, T, normed_residual, size,
                          num_warps=min(8, max(1, size // 256)), **pdl_options(table.device))
    return x, residual, angles


def embed_pair_torch(table: Tensor, tokens: Tensor, embed_norm: Tensor, features: Tensor, parent_rows: Tensor | None,
                     feature_norm: Tensor, eps: float, rope: Tensor, positions: Tensor, normed_residual: bool = False
                     ) -> tuple[Tensor, Tensor, Tensor]:
    """What the first layer of an EAGLE-3 head reads (drafters/eagle3.py): the embedding of each token and the feature
    before it, each normed, side by side [T, 2 C]; the residual [T, C], which is the feature, or with `normed_residual`
    the normed one; and the RoPE angles [2, T, D].

    table [V, C], tokens [T] int64, features [any, C], of which row parent_rows[i] (without parent_rows: row i) comes
    before token i; embed_norm and feature_norm [C]: the weights of the norms; rope [2, S, D], positions [T] int64.
    """
    feature = features if parent_rows is None else features[parent_rows]
    normed = F.rms_norm(feature, feature_norm.shape, feature_norm, eps)
    embedding = F.rms_norm(F.embedding(tokens, table), embed_norm.shape, embed_norm, eps)
    x = torch.cat((embedding, normed), -1)
    return x, normed if normed_residual else feature, rope.index_select(1, positions)


@triton.jit
def round_like(x, pointer):
    """x rounded to the dtype that `pointer` points to, as fp32: PyTorch rounds after each step, so does the kernel."""
    return x.to(pointer.dtype.element_ty).to(tl.float32)


@triton.jit
def rope_store_kernel(qkv, rope, slots, kv, q_norm, k_norm, out, eps, S, H: tl.constexpr,
                      K: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BH: tl.constexpr, PDL: tl.constexpr):
    """See `rope_store_torch`. Grid (T, groups of BH heads): a program does BH of one token's H + 2K heads. Values are
    rotated by angle 0: cos 1 and sin 0 leave them exact. DP is D rounded up to a power of two.

    Pointers: qkv [T, H + 2K, D], rope [2, T, D], slots [T] int64, kv [2, K, S, D], q_norm and k_norm [D] (or None), out
    [T, H, D].
    """
    wait_for_previous(PDL)
    token, head = tl.program_id(0), (tl.program_id(1) * BH + tl.arange(0, BH))[:, None]
    d = tl.arange(0, DP // 2)[None, :]
    half, rotates = d < D // 2, head < H + K
    mask = half & (head < H + 2 * K)
    at = qkv + token * (H + 2 * K) * D + head * D + d
    a = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(at + D // 2, mask=mask, other=0.0).to(tl.float32)
    if q_norm is not None:
        inverse = tl.rsqrt((tl.sum(a * a, 1) + tl.sum(b * b, 1)) / D + eps)[:, None]
        wa = tl.where(head < H, tl.load(q_norm + d, mask=half), tl.load(k_norm + d, mask=half))
        wb = tl.where(head < H, tl.load(q_norm + D // 2 + d, mask=half), tl.load(k_norm + D // 2 + d, mask=half))
        a = tl.where(rotates, round_like(a * inverse * wa, qkv), a)
        b = tl.where(rotates, round_like(b * inverse * wb, qkv), b)
    angle = rope + token * D + d  # both halves of D hold the same angles
    cos = tl.where(rotates, tl.load(angle, mask=half).to(tl.float32), 1.0)
    sin = tl.where(rotates, tl.load(angle + tl.num_programs(0) * D, mask=half).to(tl.float32), 0.0)
    x, y = round_like(a * cos, qkv) - round_like(b * sin, qkv), round_like(b * cos, qkv) + round_like(a * sin, qkv)
    to_q = out + token * H * D + head * D + d
    # kv [2, K, S, D] is 2K heads of S slots, in the order in which keys and values follow the queries in qkv
    to_kv = kv + ((head - H).to(tl.int64) * S + tl.load(slots + token)) * D + d
    tl.store(to_q, x, mask=half & (head < H))
    tl.store(to_q + D // 2, y, mask=half & (head < H))
    tl.store(to_kv, x, mask=mask & (head >= H))
    tl.store(to_kv + D // 2, y, mask=mask & (head >= H))


def rope_store_triton(qkv: Tensor, rope: Tensor, slots: Tensor, kv: Tensor,
                      q_norm: Tensor | None = None, k_norm: Tensor | None = None, eps: float = 0.0) -> Tensor:
    T, width = qkv.shape
    K, S, D = kv.shape[1:]
    BH = 4
    assert qkv.is_contiguous() and kv.is_contiguous() and rope.is_contiguous()
    out = qkv.new_empty(T, width // D - 2 * K, D)
    rope_store_kernel[(T, triton.cdiv(width // D, BH))](
        qkv, rope, slots, kv, q_norm, k_norm, out, eps, S, out.shape[1], K, D, triton.next_power_of_2(D), BH,
        num_warps=1, **pdl_options(qkv.device))
    return out


def rope_store_torch(qkv: Tensor, rope: Tensor, slots: Tensor, kv: Tensor,
                     q_norm: Tensor | None = None, k_norm: Tensor | None = None, eps: float = 0.0) -> Tensor:
    """Split qkv [T, (H + 2K) * D], rotate q and k, store k and v in slots [T] of kv [2, K, S, D], and return q
    [T, H, D].

    rope [2, T, D]: cos and sin of each token's position, in qkv's dtype. With q_norm and k_norm [D] (Qwen3), each head
    of q and k is normed before it is rotated.
    """
    K, D = kv.shape[1], kv.shape[3]
    q, k, v = qkv.unflatten(-1, (-1, D)).split((qkv.shape[1] // D - 2 * K, K, K), dim=1)  # [T, heads, D]
    if q_norm is not None:
        q = F.rms_norm(q, (D,), q_norm, eps)
        k = F.rms_norm(k, (D,), k_norm, eps)
    cos, sin = rope[:, :, None].unbind(0)  # [T, 1, D]
    q, k = (x * cos + torch.cat((-x[..., D // 2:], x[..., :D // 2]), -1) * sin for x in (q, k))
    kv.index_copy_(2, slots, torch.stack((k, v)).transpose(1, 2))
    return q


embed = by_device(embed_triton, embed_torch)
embed_pair = by_device(embed_pair_triton, embed_pair_torch)
def rope_store_cpu(qkv: Tensor, rope: Tensor, slots: Tensor, kv: Tensor, *norms: Tensor | float | None) -> Tensor:
    if cpu_kernels.takes_rows(qkv) and kv.dtype == torch.float32 and not norms:
        return cpu_kernels.rope_store(qkv, rope, slots, kv)
    return rope_store_torch(qkv, rope, slots, kv, *norms)


rope_store = by_device(rope_store_triton, rope_store_cpu)
