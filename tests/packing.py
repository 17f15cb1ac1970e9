"""How others pack quantised weights, written from their formats' descriptions: what quant/published.py must undo.

Every function takes integers and scales and returns the tensors of one weight by the ends of their names. `u` are
integers from 0 on, [N, K]; scales and zeros are [N, groups].
"""
import json

import numpy as np
import torch
from torch import Tensor


def words(integers: Tensor, bits: int) -> Tensor:
    """Integers [rows, n] as words int32 [rows, n * bits / 32], the first ones in the lowest bits; filled up with 0."""
    per_word = 32 // bits
    values = np.pad(integers.numpy().astype(np.uint32), ((0, 0), (0, -integers.shape[1] % per_word)))
    out = np.zeros((len(values), values.shape[1] // per_word), np.uint32)
    for i in range(per_word):
        out |= values[:, i::per_word] << np.uint32(bits * i)
    return torch.from_numpy(out.view(np.int32).copy())


def formula(u: Tensor, scale: Tensor, zero: Tensor, groups: Tensor) -> Tensor:
    """What all of these formats mean: w[n, k] = scale[n, g] * (u[n, k] - zero[n, g]), g = groups[k]. fp32."""
    return scale.float()[:, groups] * (u.float() - zero.float()[:, groups])


def awq(u: Tensor, scale: Tensor, zero: Tensor) -> dict[str, Tensor]:
    """AutoAWQ, gemm: bits 4 i of word j are output 8 j + (0, 2, 4, 6, 1, 3, 5, 7)[i]."""
    def packed(t: Tensor) -> Tensor:  # [any, N]
        return words(t.unflatten(1, (-1, 8))[..., [0, 2, 4, 6, 1, 3, 5, 7]].flatten(1), 4)
    return {"qweight": packed(u.T), "qzeros": packed(zero.T), "scales": scale.half().T.contiguous()}


def gptq(u: Tensor, scale: Tensor, zero: Tensor, g_idx: Tensor, bits: int = 4, v2: bool = False) -> dict[str, Tensor]:
    return {"qweight": words(u, bits).T.contiguous(), "qzeros": words(zero.T - (0 if v2 else 1), bits),
            "scales": scale.half().T.contiguous(), "g_idx": g_idx.int()}


def pack_quantized(u: Tensor, scale: Tensor, zero: Tensor | None, bits: int = 4, g_idx: Tensor | None = None
                   ) -> dict[str, Tensor]:
    """compressed-tensors: u = q + 2^(bits - 1), and zeros alike."""
    parts = {"weight_packed": words(u, bits), "weight_scale": scale, "weight_shape": torch.tensor(u.shape)}
    if zero is not None:
        parts["weight_zero_point"] = words(zero.T, bits).T.contiguous()
    return parts if g_idx is None else parts | {"weight_g_idx": g_idx.int()}


NF4 = torch.tensor([-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
                    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
                    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
                    0.7229568362236023, 1.0])


def nf4(u: Tensor, absmax: Tensor, nested: bool) -> tuple[dict[str, Tensor], Tensor]:
    """bitsandbytes: u [N, K] number levels of NF4, absmax fp32 [N * K / 64] scales blocks of the flat weight. The first
    of two neighbours has the upper four bits. Returns the tensors and, fp32, the weight."""
    flat = u.flatten().to(torch.uint8)
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": list(u.shape)}
    parts = {"weight": (flat[0::2] << 4 | flat[1::2])[:, None], "weight.quant_map": NF4}
    if nested:
        table = torch.linspace(-1, 1, 256)
        offset = float(absmax.mean())
        coarse = (absmax - offset).unflatten(0, (-1, 4)).abs().amax(1) if len(absmax) % 4 == 0 else None
        size = 4 if coarse is not None else len(absmax)
        coarse = coarse if coarse is not None else (absmax - offset).abs().amax()[None]
        near = (absmax - offset) / coarse.repeat_interleave(size)
        byte = (near[:, None] - table).abs().argmin(1)
        absmax = table[byte] * coarse.repeat_interleave(size) + offset
        parts |= {"weight.absmax": byte.to(torch.uint8), "weight.nested_quant_map": table,
                  "weight.nested_absmax": coarse}
        state |= {"nested_blocksize": size, "nested_dtype": "float32", "nested_offset": offset}
    else:
        parts["weight.absmax"] = absmax
    text = json.dumps(state).encode()
    parts["weight.quant_state.bitsandbytes__nf4"] = torch.tensor(list(text), dtype=torch.uint8)
    weight = (NF4[u.flatten().long()] * absmax.repeat_interleave(64)[:u.numel()]).view(u.shape)
    return parts, weight
