"""How others pack quantised weights: each function takes the tensors of one weight and describes it as a Foreign.

Shapes: N outputs, K inputs (columns). Words are int32; their lowest bits come first, but where a format says otherwise.
The layouts were read in AutoAWQ (modules/linear/gemm.py), AutoGPTQ (qlinear_cuda_old.py), GPTQModel (utils/model.py),
compressed-tensors (compressors/pack_quantized), bitsandbytes (functional.py) and gguf (quants.py). Each function raises
ValueError for tensors that are not what it reads.
"""
import gguf
import torch
from torch import Tensor

from formats.hf import LazyTensor
from formats.packed import Packed
from quant.imported import Affine, Foreign, Numbers, Rows, int4_layout
from quant.linear import empty_quantized

AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # outputs 8 j to 8 j + 7 are these four bits of word j
LARGEST_ZERO = 60000  # fp16 holds it. The steps of a group with a larger one are nothing beside its offset


# ----- Words of integers ---------------------------------------------------------------------------------------------


def nibbles(words: Tensor) -> Tensor:
    """The integers of four bits, uint8 [..., 8 n], of words int32 [..., n], or uint8 [..., 2 n] of bytes [..., n]."""
    byte = words.contiguous().view(torch.uint8)
    return torch.stack((byte & 15, byte >> 4), -1).flatten(-2)


def unpack_words(words: Tensor, bits: int) -> Tensor:
    """The integers of 4 or 8 bits, uint8, of words int32."""
    return nibbles(words) if bits == 4 else words.contiguous().view(torch.uint8)


def signed(u: Tensor) -> Tensor:
    """0 to 15, uint8, as -8 to 7, int8."""
    return u.to(torch.int8) - 8


def check(fits: bool, what: str, *tensors: Tensor | None) -> None:
    """ValueError unless fits: the tensors are of other shapes or types than `what` says."""
    if not fits:
        found = ", ".join(f"{list(t.shape)} of {str(t.dtype).removeprefix('torch.')}" for t in tensors if t is not None)
        raise ValueError(f"its tensors are {found}, which is not {what}")


def columns_per_group(K: int, groups: int) -> int:
    """ValueError where that many groups do not divide K columns into equal parts."""
    if groups < 1 or K % groups:
        raise ValueError(f"{groups} groups do not divide {K} columns into equal parts: the file is damaged")
    return K // groups


def column_order(g_idx: Tensor | None, K: int, group: int) -> Tensor | None:
    """Act-order: the inputs sorted by group, int64 [K]. g_idx [K] int: the group of each input. None if they are sorted
    already, or without g_idx. ValueError where a group has more or fewer members than `group`."""
    if g_idx is None or not len(g_idx):
        return None
    g = g_idx.long()
    if torch.equal(g, torch.arange(K) // group):
        return None
    if g.shape != (K,) or g.min() < 0 or not torch.equal(g.sort().values, torch.arange(K) // group):
        raise ValueError(f"g_idx does not put {group} of {K} columns into each group: the file is damaged")
    return g.argsort(stable=True)


# ----- AWQ and GPTQ --------------------------------------------------------------------------------------------------


def awq(parts: dict[str, Tensor]) -> Foreign:
    """AutoAWQ's "gemm": qweight int32 [K, N / 8] and qzeros int32 [groups, N / 8], both packed along the outputs in
    AWQ_ORDER; scales fp16 [groups, N]. Without qzeros the zero is 8."""
    words, scales, zeros = parts["qweight"], parts["scales"], parts.get("qzeros")
    fits = words.dtype == torch.int32 and words.dim() == scales.dim() == 2 and scales.shape[1] == 8 * words.shape[1]
    fits &= zeros is None or (zeros.dtype == torch.int32 and zeros.shape == (len(scales), words.shape[1]))
    check(fits and scales.is_floating_point(), "AWQ of 4 bits, version gemm", words, scales, zeros)
    K, N = words.shape[0], scales.shape[1]
    group = columns_per_group(K, len(scales))

    def unpacked(packed: Tensor) -> Tensor:
        return nibbles(packed).unflatten(1, (-1, 8))[..., AWQ_ORDER].flatten(1)

    def read() -> Affine:
        zero = torch.zeros(scales.shape) if zeros is None else signed(unpacked(zeros)).float()
        return Affine(signed(unpacked(words).T.contiguous()), scales, zero, group)

    return Foreign(f"AWQ, groups of {group}", (N, K), int4_layout(N, K, group, scales.dtype, False), read)


def gptq(parts: dict[str, Tensor], v2: bool = False) -> Foreign:
    """GPTQ: qweight int32 [K * bits / 32, N], packed along the inputs; qzeros int32 [groups, N * bits / 32], along the
    outputs; scales [groups, N]; g_idx int32 [K]. 4 or 8 bits. Version 1 stores each zero less one.

    What the largest stored zero means in version 1, the programs that read it disagree about: ValueError.
    """
    words, scales, zeros, g_idx = (parts.get(end) for end in ("qweight", "scales", "qzeros", "g_idx"))
    fits = scales is not None and zeros is not None and words.dim() == scales.dim() == zeros.dim() == 2
    check(fits and scales.numel() > 0, "GPTQ", words, scales, zeros)
    N = scales.shape[1]
    bits = 32 * zeros.shape[1] // N
    fits = words.dtype == zeros.dtype == torch.int32 and words.shape[1] == N and len(zeros) == len(scales)
    fits &= scales.is_floating_point() and bits in (4, 8) and zeros.shape[1] * 32 == N * bits
    check(fits, "GPTQ of 4 or 8 bits", words, scales, zeros)
    K = len(words) * 32 // bits
    group = columns_per_group(K, len(scales))
    order = column_order(g_idx, K, group)

    def read() -> Affine | Numbers:
        stored = unpack_words(zeros, bits)
        if not v2 and (stored == 2**bits - 1).any():
            raise ValueError("a stored zero is the largest number, which readers of GPTQ version 1 understand in two "
                             "ways: look for a version 2")
        zero = stored.float() + (0 if v2 else 1)
        u = unpack_words(words.T, bits)
        if order is not None:
            u = u[:, order]
        if bits == 4:
            return Affine(signed(u), scales, zero - 8, group, order)
        return Numbers(Affine(u.short(), scales, zero, group, order).values)

    like = int4_layout(N, K, group, scales.dtype, False, order) if bits == 4 else None
    how = "" if order is None else ", act-order"
    return Foreign(f"GPTQ of {bits} bits, groups of {group}{how}", (N, K), like, read)


# ----- compressed-tensors and bitsandbytes ---------------------------------------------------------------------------


def packed_int(parts: dict[str, Tensor]) -> Foreign:
    """compressed-tensors' pack-quantized: weight_packed int32 [N, K * bits / 32], along the inputs; weight_scale
    [N, groups]; weight_shape [2]. Not symmetric: weight_zero_point int32 [N * bits / 32, groups], packed along the
    outputs. Both hold the number plus 2^(bits - 1). Act-order: weight_g_idx [K]. 4 or 8 bits."""
    words, scale, shape, zeros, g_idx = (parts.get(f"weight_{end}") for end in (
        "packed", "scale", "shape", "zero_point", "g_idx"))
    check(scale is not None and shape is not None and shape.numel() == 2, "pack-quantized", words, scale, shape)
    N, K = shape.tolist()
    bits = next((bits for bits in (4, 8) if words.shape == (N, -(-K * bits // 32))), 0)
    fits = bits > 0 and words.dtype == torch.int32 and scale.dim() == 2 and len(scale) == N
    fits &= zeros is None or (zeros.dtype == torch.int32 and zeros.shape == (-(-N * bits // 32), scale.shape[-1]))
    check(fits and scale.is_floating_point(), "pack-quantized with 4 or 8 bits", words, scale, shape, zeros)
    group = columns_per_group(K, scale.shape[1])
    order = column_order(g_idx, K, group)

    def read() -> Affine | Rows | Numbers:
        u = unpack_words(words, bits)[:, :K]
        if order is not None:
            u = u[:, order]
        half = 2 ** (bits - 1)
        zero = torch.zeros(scale.T.shape) if zeros is None else unpack_words(zeros.T, bits)[:, :N].float() - half
        q = u.to(torch.int8) - 8 if bits == 4 else (u.short() - half).to(torch.int8)
        if bits == 8 and zeros is None and group == K:
            return Rows(q, scale[:, 0].float())
        source = Affine(q, scale.T.contiguous(), zero, group, order)
        return source if bits == 4 else Numbers(source.values)

    like = int4_layout(N, K, group, scale.dtype, zeros is None, order) if bits == 4 else None
    if bits == 8 and zeros is None and group == K:
        like = empty_quantized(N, K, "int8")
    kind = "symmetric" if zeros is None else "asymmetric"
    return Foreign(f"compressed-tensors of {bits} bits, {kind}, groups of {group}", (N, K), like, read)


def plain_int8(parts: dict[str, Tensor]) -> Foreign:
    """compressed-tensors' int-quantized: weight int8 [N, K], weight_scale [N, 1], [1], or of groups [N, groups];
    weight_zero_point like the scale where it is not symmetric. The scale of activations is not used: ours have 16
    bits."""
    q, scale, zeros = (parts.get(end) for end in ("weight", "weight_scale", "weight_zero_point"))
    check(q.dim() == 2 and scale.is_floating_point() and (zeros is None or zeros.shape == scale.shape), "int-quantized",
          q, scale, zeros)
    N, K = q.shape
    scale, zeros = (t if t is None else t.float().reshape(-1, 1).expand(N, 1) if t.numel() == 1
                    else t.float().reshape(len(t), -1) for t in (scale, zeros))
    check(len(scale) == N, "int-quantized", q, scale)
    if scale.shape[1] == 1 and (zeros is None or not zeros.any()):
        like = empty_quantized(N, K, "int8")
        return Foreign("compressed-tensors of 8 bits", (N, K), like, lambda: Rows(q, scale[:, 0]))
    zeros = torch.zeros_like(scale) if zeros is None else zeros
    source = Affine(q, scale.T, zeros.T, columns_per_group(K, scale.shape[1]))
    return Foreign(f"compressed-tensors of 8 bits, {scale.shape[1]} groups", (N, K), None,
                   lambda: Numbers(source.values))


def fp8(parts: dict[str, Tensor], block: tuple[int, int] = (128, 128)) -> Foreign:
    """weight float8_e4m3fn [N, K], and what it is multiplied by, whatever its name says (weight_scale or
    weight_scale_inv): one number, [N, 1], or [N / block, K / block] with smaller blocks at the ends."""
    w = parts["weight"]
    scale = parts.get("weight_scale_inv", parts.get("weight_scale"))
    check(w.dim() == 2 and w.dtype == torch.float8_e4m3fn, "FP8 (E4M3)", w, scale)
    N, K = w.shape
    if scale.numel() == 1:
        block, how = (N, K), "one scale"
    elif scale.numel() == N and len(scale) == N:
        block, how = (1, K), "a scale for each row"
    else:
        how = f"a scale for {block[0]} x {block[1]}"
    s = scale.float().reshape(-(-N // block[0]), -1)
    check(s.shape[1] == -(-K // block[1]) and scale.numel() == s.numel(), f"FP8 with {how}", w, scale)

    def values(rows: slice) -> Tensor:
        at = torch.arange(N)[rows] // block[0]
        return w[rows].float() * s[at].repeat_interleave(block[1], 1)[:, :K]

    return Foreign(f"FP8, {how}", (N, K), None, lambda: Numbers(values))


def bnb_int8(parts: dict[str, Tensor]) -> Foreign:
    """bitsandbytes' int8: weight int8 [N, K] and SCB fp32 [N], w = q * SCB / 127."""
    q, largest, form = (parts.get(end) for end in ("weight", "SCB", "weight_format"))
    check(q.dim() == 2 and largest.shape == q.shape[:1], "int8 of bitsandbytes", q, largest)
    if form is not None and form.any():
        raise ValueError("its columns are in the order of an old GPU (weight_format): save it again with a newer "
                         "bitsandbytes")
    return Foreign("bitsandbytes of 8 bits", tuple(q.shape), empty_quantized(*q.shape, "int8"),
                   lambda: Rows(q, largest.float() / 127))


def bnb_4bit(parts: dict[str, Tensor], state: dict) -> Foreign:
    """bitsandbytes' nf4 and fp4: weight uint8 [N * K / 2, 1], flat, the higher four bits first; weight.quant_map fp32
    [16] has their values. weight.absmax scales each block of the flat weight: fp32, or uint8 into nested_quant_map
    [256], times nested_absmax for each 256 of them, plus the offset in `state`, the JSON of weight.quant_state."""
    words, absmax, table = parts["weight"], parts["weight.absmax"], parts["weight.quant_map"].float()
    N, K = state["shape"]
    size = state["blocksize"]
    check(words.dtype == torch.uint8 and words.numel() * 2 == N * K and table.shape == (16,)
          and absmax.numel() == -(-N * K // size), "4 bits of bitsandbytes", words, absmax, table)
    if absmax.dtype == torch.uint8:
        nested = parts["weight.nested_quant_map"].float()[absmax.long()]
        blocks = parts["weight.nested_absmax"].float().repeat_interleave(state["nested_blocksize"])[:len(nested)]
        check(len(blocks) == len(nested), "4 bits of bitsandbytes", absmax, parts["weight.nested_absmax"])
        absmax = nested * blocks + state["nested_offset"]
    byte = words.flatten()

    def values(rows: slice) -> Tensor:
        first, last, _ = (index * K for index in rows.indices(N))
        pair = byte[first // 2:-(-last // 2)]
        u = torch.stack((pair >> 4, pair & 15), -1).flatten()[first % 2:][:last - first]
        return (table[u.int()] * absmax[torch.arange(first, last) // size]).view(-1, K)

    return Foreign(f"bitsandbytes {state['quant_type']}", (N, K), None, lambda: Numbers(values))


# ----- GGUF ----------------------------------------------------------------------------------------------------------


def gguf_blocks(blocks: Tensor, kind: str, order: Tensor | None = None) -> Foreign:
    """Rows of GGUF blocks, uint8 [any, bytes], of any type that quantises; order, int64 [N]: which of them, None: all.
    Q4_0, Q4_1 and Q4_K have a scale and an offset for each 32 columns; the scale is fp16, or of Q4_K the product of an
    fp16 number and one of six bits."""
    type_ = gguf.GGMLQuantizationType[kind]
    columns, size = gguf.GGML_QUANT_SIZES[type_]
    N, K = len(blocks if order is None else order), blocks.shape[1] // size * columns
    halves = {"Q4_0": q4_0, "Q4_1": q4_1, "Q4_K": q4_k}.get(kind)

    def chosen(rows: slice) -> Tensor:
        return blocks[rows] if order is None else blocks[order[rows]]

    if halves is None:
        return Foreign(kind, (N, K), None, lambda: Numbers(
            lambda rows: torch.from_numpy(gguf.dequantize(chosen(rows).numpy(), type_).copy())))

    def read() -> Affine:
        q, scale, offset = halves(chosen(slice(None)).unflatten(1, (-1, size)))
        return from_offsets(q.flatten(1), scale.flatten(1), offset.flatten(1))

    return Foreign(kind, (N, K), int4_layout(N, K, 32, torch.float16, False), read)


def q4_0(blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Integers uint8 [N, blocks, 32], scales and offsets fp32 [N, blocks] of blocks uint8 [N, blocks, 18]: w = d * (q -
    8). Byte l of the integers holds columns l and l + 16."""
    d = half(blocks, 0)
    return halves_apart(blocks[..., 2:]), d, -8 * d


def q4_1(blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same of blocks of 20 bytes: w = d * q + m."""
    return halves_apart(blocks[..., 4:]), half(blocks, 0), half(blocks, 2)


def q4_k(blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same of blocks of 144 bytes with 8 groups each, [N, blocks, 256] and [N, blocks, 8]:
    w = d * sc * q - dmin * m. sc and m have six bits: those of the first four groups lie in bytes of their own, and the
    bits that are left over there are the upper two of the others."""
    d, dmin, b, q = half(blocks, 0), half(blocks, 2), blocks[..., 4:16], blocks[..., 16:]
    first, second, third = b.unflatten(-1, (3, 4)).unbind(-2)
    sc = torch.cat((first & 63, third & 15 | first >> 6 << 4), -1)
    m = torch.cat((second & 63, third >> 4 | second >> 6 << 4), -1)
    return halves_apart(q.unflatten(-1, (4, 32))).flatten(2), d[..., None] * sc, -dmin[..., None] * m


def half(blocks: Tensor, at: int) -> Tensor:
    """The fp16 number at this byte of each block, as fp32."""
    return blocks[..., at:at + 2].contiguous().view(torch.float16)[..., 0].float()


def halves_apart(byte: Tensor) -> Tensor:
    """The lower four bits of all bytes [..., n], then the upper ones: [..., 2 n]."""
    return torch.cat((byte & 15, byte >> 4), -1)


def from_offsets(u: Tensor, scale: Tensor, offset: Tensor) -> Affine:
    """w = scale * u + offset as an Affine: u uint8 [N, K], 0 to 15; scale and offset fp32 [N, K / 32]. A group whose
    zero fp16 cannot hold (its step is nothing beside its offset) gets q = 1, scale = offset and zero = 0."""
    zero = -8 - offset / scale
    flat = ~(zero.abs() <= LARGEST_ZERO)  # also where the scale is 0
    q = torch.where(flat.repeat_interleave(32, 1), 1, signed(u))
    return Affine(q, torch.where(flat, offset, scale).T, torch.where(flat, 0, zero).T, 32)


# ----- All of them ---------------------------------------------------------------------------------------------------

FORMATS = {"awq": awq, "gptq": gptq, "packed_int": packed_int, "plain_int8": plain_int8, "fp8": fp8,
           "bnb_int8": bnb_int8, "bnb_4bit": bnb_4bit}


def describe(packed: Packed) -> Foreign:
    """What a packed weight is. Raises ValueError for tensors that are not what its kind says."""
    if "blocks" in packed.parts:
        weight = gguf_blocks(packed.parts["blocks"], packed.kind, packed.rows)
    else:
        try:
            weight = FORMATS[packed.kind](packed.parts, **packed.facts)
        except KeyError as error:
            raise ValueError(f"its tensor {error.args[0]} is missing: the file is damaged") from None
        if packed.rows is not None:
            weight = weight.of_rows(packed.rows)
    return weight if packed.factor == 1 else weight.times(packed.factor)


def with_values(tensors: dict[str, LazyTensor]) -> dict[str, LazyTensor]:
    """The tensors of a folder, with the shapes of packed weights and functions that give their values, fp32 [N, K].
    Raises ValueError that names a weight which cannot be unpacked."""
    found = dict(tensors)
    for name, tensor in tensors.items():
        if tensor.read is None:
            try:
                weight = describe(tensor.packed)
            except (ValueError, TypeError, RuntimeError) as error:  # a damaged shape may fail anywhere
                raise ValueError(f"{name}: {error}") from error
            found[name] = LazyTensor(weight.shape, weight.dense, tensor.packed)
    return found
