"""quant/published.py and quant/imported.py: what others have packed means here what it meant there, bit for bit or
within what is said.

    python -m pytest tests/quant/test_published.py
"""
import gguf
import numpy as np
import packing
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from formats.packed import Packed, join_parts
from ops.quantized import Quantized, dequantize
from quant.imported import Foreign, Read, read_stacked, stacked_layout
from quant.linear import quantize_weight
from quant.published import describe

torch.set_num_threads(1)
rows = st.integers(1, 6).map(lambda n: 8 * n)
seeds = st.integers(0, 2**31)
few = settings(max_examples=25, deadline=None)


def columns(group: int) -> st.SearchStrategy[int]:
    """Columns that groups of this size divide; 0: one group."""
    return st.integers(1, 40).map(lambda n: n * 8) if not group else st.integers(1, max(2, 512 // group)).map(
        lambda n: n * group)


@st.composite
def affine(draw: st.DrawFn, bits: int = 4, sizes: tuple[int, ...] = (32, 64, 128, 256, 0)) -> tuple:
    """Random u, scale (fp16) and zero, and the group of each column."""
    group = draw(st.sampled_from(sizes))
    N, K = draw(rows), draw(columns(group))
    generator = torch.Generator().manual_seed(draw(seeds))
    groups = torch.arange(K) // (group or K)
    u = torch.randint(0, 2**bits, (N, K), generator=generator)
    count = int(groups[-1]) + 1
    scale = (torch.rand(N, count, generator=generator) * 10.0 ** torch.randint(-5, 1, (N, 1), generator=generator))
    zero = torch.randint(1, 2**bits, (N, count), generator=generator)
    return u, (scale + 1e-6).half(), zero, groups


def kept(foreign: Foreign) -> tuple[Read, Tensor, Quantized]:
    """What becomes of one weight, its values fp32 [N, K], and the layout that was announced for it."""
    like = stacked_layout([foreign])
    read = read_stacked([foreign], like)
    weight = read.weight
    assert (weight.data.shape, weight.scale.shape, weight.scale.dtype) == (
        like.data.shape, like.scale.shape, like.scale.dtype)
    return read, dequantize(weight, torch.float32)[:, :foreign.shape[1]], like


def assert_moves_as_said(read: Read, found: Tensor, wanted: Tensor, most: float) -> None:
    error = ((found - wanted).double().square().sum() / wanted.double().square().sum()).sqrt().item()
    assert read.error == pytest.approx(error, rel=1e-2, abs=1e-9) and error <= most


# ----- Four bits ---------------------------------------------------------------------------------------------------


@few
@given(affine())
def test_awq(parts: tuple) -> None:
    """Fails if one weight of an AWQ checkpoint differs in one bit, or is not said to be exact."""
    u, scale, zero, groups = parts
    foreign = describe(Packed("awq", packing.awq(u, scale, zero), {}))
    wanted = packing.formula(u, scale, zero, groups)
    read, found, like = kept(foreign)
    assert foreign.dense().equal(wanted) and found.equal(wanted) and read.error == 0 and like.group


@few
@given(affine(), st.booleans(), st.booleans(), seeds)
def test_gptq(parts: tuple, v2: bool, shuffled: bool, seed: int) -> None:
    """The same for GPTQ, either version, with columns in any order of groups."""
    u, scale, zero, groups = parts
    if shuffled:
        groups = groups[torch.randperm(len(groups), generator=torch.Generator().manual_seed(seed))]
    foreign = describe(Packed("gptq", packing.gptq(u, scale, zero, groups, v2=v2), {"v2": v2}))
    wanted = packing.formula(u, scale, zero, groups)
    read, found, like = kept(foreign)
    assert foreign.dense().equal(wanted) and found.equal(wanted) and read.error == 0
    assert (like.order is None) == torch.equal(groups, groups.sort().values)


@few
@given(affine(), st.booleans(), st.booleans(), seeds)
def test_pack_quantized(parts: tuple, symmetric: bool, shuffled: bool, seed: int) -> None:
    """Fails if a W4A16 checkpoint with bf16 scales differs in one bit: symmetric in pairs of bf16, asymmetric in pairs
    of fp16, whose range is smaller, but not too small for weights."""
    u, scale, zero, groups = parts
    scale = scale.clamp(min=1e-3).bfloat16()
    if shuffled:
        groups = groups[torch.randperm(len(groups), generator=torch.Generator().manual_seed(seed))]
    packed = packing.pack_quantized(u, scale, None if symmetric else zero, g_idx=groups if shuffled else None)
    foreign = describe(Packed("packed_int", packed, {}))
    wanted = packing.formula(u, scale, torch.full_like(zero, 8) if symmetric else zero, groups)
    read, found, like = kept(foreign)
    assert foreign.dense().equal(wanted) and found.equal(wanted) and read.error == 0
    assert like.scale.dtype == (torch.bfloat16 if symmetric else torch.float16)


def test_scales_that_do_not_fit_are_said() -> None:
    """Fails if fp32 scales are rounded and nothing is said, or by more than fp16 rounds."""
    u = torch.randint(0, 16, (16, 128))
    scale = torch.rand(16, 1) / 100 + 1e-3
    read, found, _ = kept(describe(Packed("packed_int", packing.pack_quantized(u, scale, torch.full((16, 1), 3)), {})))
    assert_moves_as_said(read, found, packing.formula(u, scale, torch.full((16, 1), 3), torch.zeros(128).long()), 5e-4)
    assert read.error > 1e-5


def test_groups_that_no_layout_holds() -> None:
    """Fails if groups of 16 are taken for others: they become int8, and by how much that moves is said."""
    u, zero = torch.randint(0, 16, (16, 64)), torch.full((16, 4), 8)
    scale = (torch.rand(16, 4) / 100 + 1e-3).half()
    read, found, like = kept(describe(Packed("awq", packing.awq(u, scale, zero), {})))
    assert not like.group
    assert_moves_as_said(read, found, packing.formula(u, scale, zero, torch.arange(64) // 16), 0.02)


# ----- Eight bits ----------------------------------------------------------------------------------------------------


@few
@given(affine(bits=8, sizes=(32, 128, 0)), st.booleans(), seeds)
def test_gptq_of_8_bits(parts: tuple, v2: bool, seed: int) -> None:
    """Fails if 8 bits of GPTQ are unpacked wrongly, or what int8 of them moves is not said."""
    u, scale, zero, groups = parts
    groups = groups[torch.randperm(len(groups), generator=torch.Generator().manual_seed(seed))]
    foreign = describe(Packed("gptq", packing.gptq(u, scale, zero, groups, 8, v2), {"v2": v2}))
    wanted = packing.formula(u, scale, zero, groups)
    read, found, like = kept(foreign)
    assert foreign.dense().equal(wanted) and not like.group
    assert_moves_as_said(read, found, wanted, 0.03)


@few
@given(affine(bits=8, sizes=(0,)), st.sampled_from(["plain", "packed", "bnb", "one"]))
def test_rows_of_8_bits(parts: tuple, kind: str) -> None:
    """Fails if an int8 checkpoint with a scale for each row, or for all of them, differs in one bit."""
    u, scale, _, groups = parts
    scale = scale.bfloat16()
    q = (u - 128).to(torch.int8)
    if kind == "bnb":
        found = describe(Packed("bnb_int8", {"weight": q, "SCB": scale[:, 0].float()}, {}))
        scale = scale.float() / 127
    elif kind == "packed":
        found = describe(Packed("packed_int", packing.pack_quantized(u, scale, None, 8), {}))
    else:
        scale = scale[:1].expand_as(scale) if kind == "one" else scale
        parts = {"weight": q, "weight_scale": scale[:1, 0] if kind == "one" else scale}
        found = describe(Packed("plain_int8", parts, {}))
    read, values, _ = kept(found)
    assert values.equal(packing.formula(q, scale, torch.zeros_like(scale), groups)) and read.error == 0
    assert read.weight.data.equal(q)


def test_int8_with_zeros_or_groups() -> None:
    """Fails if the zero or the group of an int8 weight is ignored."""
    q = torch.randint(-128, 128, (16, 64), dtype=torch.int8)
    scale, zero = torch.rand(16, 2) + 0.1, torch.randint(-9, 9, (16, 2), dtype=torch.int8)
    found = describe(Packed("plain_int8", {"weight": q, "weight_scale": scale, "weight_zero_point": zero}, {}))
    assert found.like is None
    assert found.dense().equal(packing.formula(q, scale, zero, torch.arange(64) // 32))


@few
@given(rows, st.integers(1, 300), st.sampled_from(["block", "row", "one"]), seeds)
def test_fp8(N: int, K: int, kind: str, seed: int) -> None:
    """Fails if a scale of FP8 meets another row or block, ragged ones included, or what int8 moves is not said."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(N, K, generator=generator).to(torch.float8_e4m3fn)
    block = {"block": (16, 128), "row": (1, K), "one": (N, K)}[kind]
    scale = torch.rand(-(-N // block[0]), -(-K // block[1]), generator=generator) + 0.1
    parts = {"weight": w, "weight_scale_inv" if kind == "block" else "weight_scale": scale.flatten()[0]
             if kind == "one" else scale}
    foreign = describe(Packed("fp8", parts, {"block": block} if kind == "block" else {}))
    wanted = torch.empty(N, K)
    for n in range(N):
        for first in range(0, K, block[1]):
            columns = slice(first, first + block[1])
            wanted[n, columns] = w[n, columns].float() * scale[n // block[0], first // block[1]]
    assert foreign.dense().equal(wanted)
    read, found, like = kept(foreign)
    assert not like.group
    assert_moves_as_said(read, found, wanted, 0.03)


@few
@given(rows, st.integers(1, 9), st.booleans(), seeds)
def test_nf4(N: int, blocks: int, nested: bool, seed: int) -> None:
    """Fails if a level, a block's maximum or its second quantisation is read wrongly, also from a row in the middle."""
    generator = torch.Generator().manual_seed(seed)
    u = torch.randint(0, 16, (N, 32 * blocks), generator=generator)
    absmax = torch.rand(-(-u.numel() // 64), generator=generator) + 0.01
    parts, wanted = packing.nf4(u, absmax, nested)
    joined = join_parts({f"q_proj.{end}": t for end, t in parts.items()}, "bitsandbytes", {})
    foreign = describe(joined["q_proj.weight"])
    torch.testing.assert_close(foreign.dense(), wanted, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(foreign.read().values(slice(3, 6)), wanted[3:6], rtol=1e-6, atol=1e-7)
    read, found, _ = kept(foreign)
    assert_moves_as_said(read, found, wanted, 0.02)


# ----- GGUF --------------------------------------------------------------------------------------------------------


def blocks_of(kind: str, N: int, K: int, seed: int) -> Tensor:
    """Random rows of blocks with sensible fp16 numbers: the first one or two of a block, or of Q6_K the last."""
    rng = np.random.default_rng(seed)
    count, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    made = rng.integers(0, 256, (N, K // count, size), dtype=np.uint8)
    at = slice(size - 2, size) if kind == "Q6_K" else slice(0, 4 if kind in ("Q4_1", "Q4_K", "Q5_1", "Q5_K") else 2)
    numbers = rng.uniform(0.001, 0.02, (N, K // count, (at.stop - at.start) // 2)).astype(np.float16)
    made[..., at] = numbers.view(np.uint8)
    return torch.from_numpy(made.reshape(N, -1))


@few
@given(st.sampled_from(["Q4_0", "Q4_1", "Q4_K", "Q5_0", "Q5_K", "Q6_K", "Q8_0", "IQ4_XS"]), st.integers(1, 3), seeds,
       st.booleans())
def test_gguf(kind: str, blocks: int, seed: int, reordered: bool) -> None:
    """Fails if weights of a GGUF type are not what gguf says, by more than is said: 0 for Q4_0, fp16's rounding for
    Q4_1 and Q4_K, and int8's for the others. With rows in another order too."""
    made = blocks_of(kind, 8, 256 * blocks, seed)
    wanted = torch.from_numpy(gguf.dequantize(made.numpy(), gguf.GGMLQuantizationType[kind]).copy())
    order = torch.randperm(8, generator=torch.Generator().manual_seed(seed)) if reordered else None
    foreign = describe(Packed(kind, {"blocks": made}, {}, order))
    wanted = wanted if order is None else wanted[order]
    read, found, like = kept(foreign)
    four = kind in ("Q4_0", "Q4_1", "Q4_K")
    torch.testing.assert_close(foreign.dense(), wanted, rtol=1e-6, atol=1e-6)
    assert (like.group == 32) == four
    error = ((found - wanted).square().sum() / wanted.square().sum()).sqrt()
    assert error <= {"Q4_0": 0, "Q4_1": 4e-4, "Q4_K": 4e-4}.get(kind, 0.03)
    assert read.error == pytest.approx(error.item(), rel=0.05, abs=1e-6)


def test_groups_without_a_step() -> None:
    """Fails if a group whose scale is 0, or nothing beside its offset, gives numbers that are not finite or another
    constant."""
    made = blocks_of("Q4_1", 4, 64, 0).view(4, 2, 20)
    made[0, 0, :4] = torch.from_numpy(np.array([0, -0.5], np.float16).view(np.uint8))
    made[1, 1, :4] = torch.from_numpy(np.array([6e-8, 0.5], np.float16).view(np.uint8))
    made[2, 0, :4] = 0
    _, found, _ = kept(describe(Packed("Q4_1", {"blocks": made.flatten(1)}, {})))
    assert (found[0, :32] == -0.5).all() and (found[1, 32:] == 0.5).all() and not found[2, :32].any()
    assert found.isfinite().all() and found[0, 32:].unique().numel() > 4


# ----- One below the other -----------------------------------------------------------------------------------------


def test_pieces_of_one_matrix() -> None:
    """Fails if rows of stacked weights get another's scales; or if weights of different layouts do not become int8."""
    made = []
    for seed, (N, group) in enumerate(((16, 32), (8, 32), (8, 64))):
        generator = torch.Generator().manual_seed(seed)
        u = torch.randint(0, 16, (N, 128), generator=generator)
        scale = (torch.rand(N, 128 // group, generator=generator) / 50 + 1e-3).half()
        zero = torch.randint(1, 16, scale.shape, generator=generator)
        made.append((describe(Packed("awq", packing.awq(u, scale, zero), {})),
                     packing.formula(u, scale, zero, torch.arange(128) // group)))
    for count, group in ((2, 32), (3, 0)):
        pieces, weights = zip(*made[:count])
        like = stacked_layout(list(pieces))
        read = read_stacked(list(pieces), like)
        wanted = torch.cat(weights)
        found = dequantize(read.weight, torch.float32)[:, :128]
        assert like.group == group and like.shape[0] == len(wanted)
        if group:
            assert found.equal(wanted) and read.error == 0
        else:
            assert found.equal(dequantize(quantize_weight(wanted, "int8"), torch.float32))
            assert_moves_as_said(read, found, wanted, 0.02)


def test_orders_that_differ_become_int8() -> None:
    """Fails if two weights with different orders of columns share one of them."""
    pieces, wanted = [], []
    for seed in (1, 2):
        groups = (torch.arange(64) // 32)[torch.randperm(64, generator=torch.Generator().manual_seed(seed))]
        u, scale, zero = torch.randint(0, 16, (8, 64)), torch.rand(8, 2).half() + 0.01, torch.full((8, 2), 8)
        pieces.append(describe(Packed("gptq", packing.gptq(u, scale, zero, groups), {"v2": False})))
        wanted.append(packing.formula(u, scale, zero, groups))
    like = stacked_layout(pieces)
    found = dequantize(read_stacked(pieces, like).weight, torch.float32)
    assert not like.group and found.equal(dequantize(quantize_weight(torch.cat(wanted), "int8"), torch.float32))


# ----- What is refused ---------------------------------------------------------------------------------------------


def sample(kind: str) -> tuple[str, dict[str, Tensor], dict]:
    u, scale, zero = torch.randint(0, 15, (16, 64)), torch.rand(16, 2).half(), torch.full((16, 2), 8)
    groups = torch.arange(64) // 32
    if kind == "awq":
        return kind, packing.awq(u, scale, zero), {}
    if kind == "gptq":
        return kind, packing.gptq(u, scale, zero, groups), {"v2": False}
    if kind == "fp8":
        return kind, {"weight": torch.zeros(16, 64).to(torch.float8_e4m3fn), "weight_scale": torch.ones(16, 1)}, {}
    return kind, packing.pack_quantized(u, scale, zero), {}


@pytest.mark.parametrize(("kind", "part", "change"), [
    ("awq", "qweight", lambda t: t[:, :-1]), ("awq", "qweight", lambda t: t.long()), ("awq", "qzeros", lambda t: t[:1]),
    ("awq", "scales", lambda t: t[:, :9]), ("awq", "scales", lambda t: None), ("awq", "scales", lambda t: t[[0, 1, 1]]),
    ("gptq", "qweight", lambda t: t[:-1]), ("gptq", "qzeros", lambda t: t[:, :1]), ("gptq", "qzeros", lambda t: None),
    ("gptq", "g_idx", lambda t: t[:-1]), ("gptq", "g_idx", lambda t: t * 0), ("gptq", "g_idx", lambda t: t + 5),
    ("gptq", "g_idx", lambda t: t - 1), ("gptq", "scales", lambda t: t.int()),
    ("packed_int", "weight_packed", lambda t: t[:, :-1]), ("packed_int", "weight_shape", lambda t: t.flip(0)),
    ("packed_int", "weight_zero_point", lambda t: t[:1]), ("packed_int", "weight_scale", lambda t: t[:9]),
    ("packed_int", "weight_shape", lambda t: None), ("packed_int", "weight_scale", lambda t: t[:, [0, 1, 1]]),
    ("fp8", "weight", lambda t: t.to(torch.float8_e5m2)), ("fp8", "weight_scale", lambda t: t[:9]),
])
def test_damaged_tensors_are_refused(kind: str, part: str, change) -> None:
    """Fails if a tensor of another shape or type, or a missing one, gives weights, or an error of more than a line."""
    kind, parts, facts = sample(kind)
    changed = change(parts.pop(part))
    parts |= {} if changed is None else {part: changed}
    with pytest.raises(ValueError) as error:
        describe(Packed(kind, parts, facts)).dense()
    assert "\n" not in str(error.value)


def test_a_zero_that_readers_disagree_about() -> None:
    """Fails if GPTQ's stored zero of 15 is taken for 16 or for 0 in version 1. In version 2 it is 15."""
    u, scale = torch.randint(0, 16, (8, 64)), torch.rand(8, 2).half() + 0.01
    zero, groups = torch.full((8, 2), 15), torch.arange(64) // 32
    parts = packing.gptq(u, scale, zero, groups, v2=True)
    with pytest.raises(ValueError, match="largest number"):
        describe(Packed("gptq", parts, {"v2": False})).dense()
    assert describe(Packed("gptq", parts, {"v2": True})).dense().equal(packing.formula(u, scale, zero, groups))


def test_scales_that_are_not_finite() -> None:
    """Fails if a damaged scale is written into a file."""
    for kind in ("awq", "fp8"):
        _, parts, facts = sample(kind)
        parts["scales" if kind == "awq" else "weight_scale"][1] = torch.inf
        foreign = describe(Packed(kind, parts, facts))
        with pytest.raises(ValueError, match="finite"):
            read_stacked([foreign], stacked_layout([foreign]))
