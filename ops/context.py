"""What a block drafter remembers of the text: keys and values of all of its layers, made from the target's features.

Every layer projects the same row of a token, whatever the layers before it made of the block. So the keys and values of
all layers are one matrix product, and one kernel norms, rotates and stores its result.

Letters: T tokens, L layers of the drafter, K key/value heads, D head dim, S cache slots and RoPE positions.
"""
import torch
import torch.nn.functional as F
from torch import Tensor

from ops.device import by_device, pdl_options, tl, triton, wait_for_previous
from ops.embed_rope import round_like


@triton.jit
def store_context_kernel(rows, rope, slots, kv, k_norms, eps, HEADS, S, plane, K: tl.constexpr, D: tl.constexpr,
                         DP: tl.constexpr, BH: tl.constexpr, PDL: tl.constexpr):
    """See `store_context_torch`. Grid (T, groups of BH heads): a program does BH of the HEADS = L * 2 * K heads of a
    token: K keys and K values of the first layer, then those of the second. DP is D rounded up to a power of two.

    Pointers: rows [T, HEADS, D], rope [2, S, D] with cos and sin `plane` apart, slots [T] int64, kv [HEADS, S, D],
    k_norms [L, D].
    """
    wait_for_previous(PDL)
    token, head = tl.program_id(0), (tl.program_id(1) * BH + tl.arange(0, BH))[:, None]
    d = tl.arange(0, DP // 2)[None, :]
    slot = tl.load(slots + token)
    half, is_key = d < D // 2, head % (2 * K) < K
    mask = half & (head < HEADS)
    at = rows + (token * HEADS + head) * D + d
    value_a = tl.load(at, mask=mask, other=0.0)
    value_b = tl.load(at + D // 2, mask=mask, other=0.0)
    angle = rope + slot * D + d  # both halves of D hold the same angles
    cos = tl.load(angle, mask=half).to(tl.float32)
    sin = tl.load(angle + plane, mask=half).to(tl.float32)
    weight = k_norms + head // (2 * K) * D + d
    wa = tl.load(weight, mask=mask & is_key).to(tl.float32)
    wb = tl.load(weight + D // 2, mask=mask & is_key).to(tl.float32)

    a, b = value_a.to(tl.float32), value_b.to(tl.float32)
    inverse = tl.rsqrt((tl.sum(a * a, 1) + tl.sum(b * b, 1)) / D + eps)[:, None]
    a, b = round_like(a * inverse * wa, rows), round_like(b * inverse * wb, rows)
    x, y = round_like(a * cos, rows) - round_like(b * sin, rows), round_like(b * cos, rows) + round_like(a * sin, rows)
    to = kv + (head.to(tl.int64) * S + slot) * D + d  # kv has the heads in the order in which a row has them
    tl.store(to, tl.where(is_key, x.to(kv.dtype.element_ty), value_a), mask=mask)
    tl.store(to + D // 2, tl.where(is_key, y.to(kv.dtype.element_ty), value_b), mask=mask)


def store_context_triton(rows: Tensor, rope: Tensor, slots: Tensor, kv: Tensor, k_norms: Tensor, eps: float) -> None:
    L, _, K, S, D = kv.shape
    heads, BH = L * 2 * K, 4
    assert all(x.is_contiguous() for x in (rows, rope, slots, kv, k_norms))
    store_context_kernel[len(rows), triton.cdiv(heads, BH)](
        rows, rope, slots, kv, k_norms, eps, heads, S, rope.stride(0), K, D, triton.next_power_of_2(D), BH,
        num_warps=1, **pdl_options(rows.device))


def store_context_torch(rows: Tensor, rope: Tensor, slots: Tensor, kv: Tensor, k_norms: Tensor, eps: float) -> None:
    """Store the keys and values of T tokens in slots [T] int64 of kv [L, 2, K, S, D], the caches of L layers.

    rows [T, L * 2 * K * D]: for each layer the keys and then the values of K heads. A layer normalises each of its keys
    (RMSNorm with its row of k_norms [L, D] and eps), then rotates it by the angles of position slots[t] in the whole
    table rope [2, S, D] (cos and sin). It stores values as they are. All tensors but the slots have one dtype.
    """
    L, _, K, _, D = kv.shape
    keys, values = rows.unflatten(-1, (L, 2, K, D)).unbind(2)  # [T, L, K, D]
    keys = torch.stack([F.rms_norm(keys[:, layer], (D,), k_norms[layer], eps) for layer in range(L)], 1)
    cos, sin = rope.index_select(1, slots)[:, :, None, None].unbind(0)  # [T, 1, 1, D]
    keys = keys * cos + torch.cat((-keys[..., D // 2:], keys[..., :D // 2]), -1) * sin
    kv.index_copy_(3, slots, torch.stack((keys, values)).permute(2, 0, 3, 1, 4))


store_context = by_device(store_context_triton, store_context_torch)
