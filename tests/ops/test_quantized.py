"""ops/quantized.py, integer weights: its numbers in Triton's interpreter against float64, its machine code from a
compiler without a GPU (tests/triton_tools.py), and what its PyTorch twins compute."""
import itertools
import re
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from triton_tools import (
    CARDS,
    ROWS,
    SHAPES,
    assert_fits,
    cards,
    compile_ahead,
    compile_linear,
    interpreted,
    largest,
    not_interpreted,
)

from ops import quantized
from ops.device import triton
from ops.embed_rope import rope_store_torch
from ops.integer_rows import quantize_kernel, quantize_triton
from ops.linear import linear_torch, linear_triton
from ops.quantized import (
    AT_ONCE,
    Quantized,
    dequantize,
    dequantize_torch,
    dequantize_triton,
    hadamard,
    integer_linear,
    pack,
    quantize_rows,
    rotate,
    row_parts,
    unpack,
)
from ops.tiling import Tiling, integer_config

MODES = {"int8": (0, 2, False), "int8dyn": (0, 1, True), "int4, 128": (128, 2, False), "int4, 64": (64, 2, False),
         "int4, 32": (32, 2, False), "zeros, 32": (32, 2, False), "zeros, 128": (128, 2, False)}


def weights(N: int, K: int, mode: str) -> Quantized:
    """Random weights of that shape."""
    (group, planes, rotated), g = MODES[mode], torch.Generator().manual_seed(N + K)
    if not group:
        q = torch.randint(-127, 128, (N, K), generator=g, dtype=torch.int8)
        return Quantized(q, (0.5 + torch.rand(N, generator=g)) / 100, 0, planes, rotated and K % 16 == 0)
    data = pack(torch.randint(-8, 8, (N, K), generator=g))
    scale = torch.randn(data.shape[1] * 2 // group, N, 2, generator=g) / 100
    if not mode.startswith("zeros"):
        return Quantized(data, scale.bfloat16(), group, planes)
    scale[..., 1] = torch.randint(-8, 8, scale.shape[:2], generator=g)
    return Quantized(data, scale.half(), group, planes, order=torch.randperm(K, generator=g).int())


def integral(M: int, K: int, weight: Quantized) -> tuple[Tensor, Tensor]:
    """x [M, K] that the kernel quantises without rounding, and in float64 what it multiplies the weights by: x, or the
    rotated x if weights are rotated. Rows are integers times a scale of their own; the last of several is zero. One row
    is made of 14 bits and the sign, so that 16 columns by themselves are not rounded either."""
    limit, g = 127 if weight.planes == 1 else 32512 if M > 1 else 8128, torch.Generator().manual_seed(M)
    q = torch.randint(-limit, limit + 1, (M, K), generator=g).double()
    q[:, K // 2] = limit
    q *= 2.0 ** -torch.arange(M)[:, None] / limit if 1 < M < 20 else 1 / (limit if M > 1 else 8192)
    q[M - 1] *= M == 1
    return (rotate(q) if weight.rotated else q).float(), q


def test_pack():
    """Fails if the halves of a byte are mixed up, a sign is lost, or columns are filled up with anything but zeros."""
    q = torch.randint(-8, 8, (5, 576))
    data = pack(q)
    assert data.shape == (5, 384) and data.dtype == torch.int8
    weight = Quantized(data, torch.ones(6, 5, 2).bfloat16(), 128, 2)
    assert weight.shape == (5, 768)
    assert unpack(weight)[:, :576].equal(q.to(torch.int8)) and not unpack(weight)[:, 576:].any()
    assert data[2, 3] & 15 == q[2, 3] % 16 and (data[2, 3] >> 4) == q[2, 3 + 384] * (3 + 384 < 576)


def test_dequantize():
    """Fails if a group gets its neighbour's scale, or if the offset or the factor of 16 is forgotten."""
    weight = weights(3, 512, "int4, 64")
    q, full = unpack(weight), dequantize(weight, torch.float64)
    for n, k in ((0, 0), (1, 63), (1, 64), (2, 255), (2, 256), (0, 511)):
        scale, offset = weight.scale[k // 64, n].double()
        assert full[n, k] == pytest.approx((16 * q[n, k] * scale + offset).item(), rel=1e-6)
    int8 = weights(3, 64, "int8")
    assert dequantize(int8, torch.float64)[2, 5] == pytest.approx((int8.data[2, 5] * int8.scale[2]).item(), rel=1e-6)


def test_rotation():
    """Fails if the matrix is not the Kronecker power of [[1, 1], [1, -1]] / sqrt(2), if rotating both sides changes a
    product, or if a column spreads to another block."""
    wanted, two = torch.ones(1, 1), torch.tensor([[1, 1], [1, -1]]) / 2**0.5
    for _ in range(4):
        wanted = torch.kron(wanted, two)
    torch.testing.assert_close(hadamard(), wanted)
    x, w = torch.randn(3, 192), torch.randn(4, 192)
    torch.testing.assert_close(F.linear(rotate(x), rotate(w)), F.linear(x, w), rtol=1e-4, atol=1e-4)
    assert rotate(torch.eye(192)[:1])[0, 16:].abs().max() == 0, "a column has spread to another block"


@pytest.mark.parametrize("mode", MODES)
def test_twin(mode: str):
    """Fails if in fp32 the twin is not x times the dequantised weights; with one plane, the quantised x."""
    weight, bias = weights(6, 192, mode), torch.randn(6)
    x = torch.randn(2, 3, 192)
    full = dequantize(weight, torch.float64)[:, :192]
    q, scale = quantize_rows(x, 1, weight.rotated)
    inputs = (q * scale).double() if weight.planes == 1 else x.double()
    torch.testing.assert_close(integer_linear(x, weight, bias), (inputs @ full.T + bias).float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", MODES)
def test_some_rows_at_a_time(mode: str, monkeypatch: pytest.MonkeyPatch):
    """Fails if a weight that is multiplied some rows at a time gives another product: rows of another part, their
    scales or biases, a short last part. Or if more than AT_ONCE weights are in floating point together."""
    weight, bias = weights(330, 192, mode), torch.randn(330)
    x, made = torch.randn(2, 3, 192), []
    wanted = integer_linear(x, weight, bias)
    for name in ("dequantize", "unpack"):
        original = getattr(quantized, name)
        monkeypatch.setattr(quantized, name, lambda w, *dtype, original=original: made.append(w.shape) or original(
            w, *dtype))
    monkeypatch.setattr(quantized, "AT_ONCE", 150 * weight.shape[1])  # two tiles of 64 rows
    torch.testing.assert_close(integer_linear(x, weight, bias), wanted, rtol=1e-5, atol=1e-5)
    assert {rows for rows, _ in made} == {128, 74}


@pytest.mark.parametrize("N, K", [(27648, 5120), (5120, 13824), (22016, 4096), (4096, 4096), (13100, 5120),
                                  (130, 2**25)])
def test_parts_of_rows(N: int, K: int):
    """Fails if parts leave rows out, are of other than whole tiles, are larger than AT_ONCE allows, or are more than
    that takes."""
    rows = [range(N)[part] for part in row_parts(N, K)]
    assert [n for part in rows for n in part] == list(range(N))
    assert all(len(part) == len(rows[0]) and len(part) % 64 == 0 for part in rows[:-1])
    assert K > AT_ONCE // 64 or len(rows[0]) * K <= AT_ONCE and len(rows) == -(-N // (AT_ONCE // K // 64 * 64))


def test_rows_are_quantized_one_by_one():
    """Fails if an integer is more than half a step off, if a row of zeros becomes anything else, or if a row depends on
    its neighbours."""
    x = torch.randn(4, 64) * torch.tensor([1, 100, 1e-3, 0])[:, None]
    for planes, limit in ((1, 127), (2, 32512)):
        q, scale = quantize_rows(x, planes)
        assert q.abs().max() == limit and q.equal(q.round()) and not q[3].any()
        assert ((q * scale - x).abs() <= scale * 0.501).all()
        assert quantize_rows(x[1:2], planes)[0].equal(q[1:2])


@cache
def quantized_once(x: Tensor, weight: Quantized, norm: None) -> tuple[Tensor, Tensor, Tensor | None]:
    """quantize_triton, with something that nobody may read behind the sums."""
    out, scale, sums = quantize_triton(x, weight, norm)
    if sums is not None:
        sums = torch.cat((sums, torch.full_like(sums, torch.nan)))[:len(sums)]
    return out, scale, sums


def check(M: int, N: int, K: int, mode: str, *configs: Tiling | None) -> list[Tensor]:
    """What the kernel gives with each config, compared with float64. x is quantised once for all of them."""
    weight = weights(N, K, mode)
    x, q = integral(M, K, weight)
    wanted, found = q @ dequantize(weight, torch.float64)[:, :K].T, []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ops.linear.quantize_triton", quantized_once)
        for config in configs:
            out = linear_triton(x, weight, config=config)
            error = ((out.double() - wanted).abs() / (1 + wanted.abs())).max().item()
            assert out.shape == wanted.shape and error < 2e-5, f"{M} rows, {N} x {K}, {mode}, {config}: error {error}"
            found.append(out)
    return found


@pytest.mark.slow
@interpreted
@pytest.mark.parametrize("mode", MODES)
def test_rows(mode: str) -> None:
    """Fails if some number of rows, an N that is no multiple of a tile, or a K that is a multiple of neither a block
    nor two groups gives wrong sums. Two modes that share a loop meet each number of rows with another K."""
    turn = mode in ("int8dyn", "int4, 64")
    for M, K in zip(ROWS, itertools.cycle((576, 320) if turn else (320, 576))):
        BM = 8 if M <= 8 else 16 if M <= 16 else 64
        check(M, 50, K, mode, None, Tiling(BM, 32, max(128, MODES[mode][0]), 1, 4, 3))


@pytest.mark.slow
@interpreted
@pytest.mark.parametrize("mode", MODES)
def test_splits(mode: str) -> None:
    """Fails if split sums are wrong, if anything past a row's end counts (a block has several groups, and the last
    block has none left), or if the same call gives other bits."""
    for SK, BK in itertools.product((1, 2, 3), (128, 256)):
        config = Tiling(16, 32, BK, SK, 4, 3)
        first, second = check(10, 50, 1280, mode, config, config)
        assert first.equal(second)


@pytest.mark.slow
@interpreted
@pytest.mark.parametrize("mode", MODES)
def test_options(mode: str) -> None:
    """Fails if norm, bias, residual, gate or output dtype differ from the separate steps. x is rounded here, so one
    step of its integers is allowed."""
    for (norm, gated), SK in itertools.product(((False, False), (True, True), (True, False)), (1, 2)):
        weight, g = weights(44, 576, mode), torch.Generator().manual_seed(SK)
        x, bias, scale = torch.randn(5, 576, generator=g), torch.randn(44, generator=g), torch.rand(576, generator=g)
        residual = torch.randn(5, 22 if gated else 44, generator=g)
        norms = (scale, 0.1) if norm else None
        out = linear_triton(x, weight, bias, norms, residual, gated, dtype=torch.float32,
                            config=Tiling(16, 32, 128, SK, 4, 3))
        q, s = quantize_rows(F.rms_norm(x, (576,), *norms) if norm else x, weight.planes, weight.rotated)
        plain = weight._replace(planes=2, rotated=False)  # two planes: the twin does not quantise x again
        wanted = linear_torch(q * s, plain, bias, None, residual, gated)
        assert (out - wanted).norm() / wanted.norm() < (5e-3 if weight.planes == 1 else 1e-4), (mode, norm, gated, SK)


@pytest.mark.slow
@interpreted
@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "int8dyn"])
def test_one_row(mode: str) -> None:
    """Fails if one row, whose columns become integers 16 by 16, gets wrong sums: a K that ends within a block or
    within one of int4's halves, splits, norm, gate, residual, or pairs of a head's halves; if 16 columns of 0 are
    not 0, if a large column takes precision from others than the 15 beside it, or if an infinite one is lost."""
    def rounded(x: Tensor) -> Tensor:
        parts = x.unflatten(1, (-1, 16))
        size = parts.abs().amax(2, keepdim=True).clamp(min=1e-30).log2().floor().exp2() / 8192
        return ((parts / size).round() * size).flatten(1)
    for K, SK, (norm, gated) in itertools.product((576, 1280), (1, 2), ((False, False), (True, True))):
        weight, g = weights(44, K, mode)._replace(order=None), torch.Generator().manual_seed(K)
        x, bias, scale = torch.randn(1, K, generator=g), torch.randn(44, generator=g), torch.rand(K, generator=g)
        residual = None if norm else torch.randn(1, 44, generator=g)
        x[:, 48:64], x[:, 100] = 0, 1000
        out = linear_triton(x, weight, bias, (scale, 0.1) if norm else None, residual, gated,
                            config=Tiling(1, 4, 256, SK, 2, 1, 1, 2))
        if norm:
            x, norm_scale = rounded(x * scale), (x.square().mean() + 0.1).rsqrt()
        wanted = linear_torch(x * norm_scale if norm else rounded(x), weight, bias, None, residual, gated)
        torch.testing.assert_close(out, wanted, rtol=1e-4, atol=1e-4)
    x, weight = torch.ones(1, 576), weights(44, 576, mode)._replace(order=None)
    x[0, 5] = float("inf")  # no number comes out, as with more rows
    assert not linear_triton(x, weight, config=Tiling(1, 4, 256, 1, 2, 1, 1, 2)).isfinite().any()
    weight = weights(5 * 24, 576, mode)._replace(order=None)  # 3 query heads of 24, 1 of keys, 1 of values
    x, angles, kv = torch.randn(1, 576), torch.randn(1, 12).repeat(1, 2), torch.zeros(2, 1, 8, 24)
    heads, wanted = (torch.stack((angles.cos(), angles.sin())), torch.tensor([5])), kv.clone()
    q = rope_store_torch(linear_torch(rounded(x), weight), *heads, wanted)
    out = linear_triton(x, weight, rope_cache=(*heads, kv))
    torch.testing.assert_close(out, q.flatten(1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(kv, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@interpreted
@pytest.mark.parametrize("mode", MODES)
def test_heads(mode: str) -> None:
    """Fails if scales stay in order where the rows of a tile are pairs of a head's halves."""
    for norm in (True, False):
        M, H, K, D = 5, 3, 1, 24
        weight, g = weights((H + 2 * K) * D, 576, mode), torch.Generator().manual_seed(M)
        x, norms = torch.randn(M, 576, generator=g), (torch.rand(576, generator=g), 0.1) if norm else None
        angles, slots = 6 * torch.rand(M, D // 2, generator=g).repeat(1, 2), torch.randperm(40, generator=g)[:M]
        rope, kv = torch.stack((angles.cos(), angles.sin())), torch.zeros(2, K, 40, D)
        wanted = kv.clone()
        q = rope_store_torch(linear_torch(x, weight, None, norms), rope, slots, wanted)
        config = Tiling(16, 32, 128, 1, 4, 3)
        out = linear_triton(x, weight, None, norms, rope_cache=(rope, slots, kv), config=config)
        for a, b in ((out, q.flatten(1)), (kv, wanted)):
            assert (a - b).norm() / b.norm() < (5e-3 if weight.planes == 1 else 1e-4), (mode, norm)


@interpreted
def test_quantize() -> None:
    """Fails if the kernel's integers, scales or group sums are not the twin's, but for one step where fp32 sums
    differ."""
    for K, norm, (name, (group, planes, rotated)) in itertools.product((576, 1536), (False, True), MODES.items()):
        x, weight = torch.randn(3, K) * torch.tensor([1, 50, 0])[:, None], torch.rand(K)
        x[0, 7] = 30
        groups = -(-K // 256) * 256 // max(group, 1) if group else 0
        order = torch.randperm(K).int() if "zeros" in name else None
        like = Quantized(x, torch.zeros(groups), group, planes, rotated, order)
        norms = (weight, 0.1) if norm else None
        out, scale, sums = quantize_triton(x, like, norms)
        y = F.rms_norm(x, (K,), *norms) if norm else x
        q, wanted = quantize_rows(y if order is None else y[:, order], planes, rotated)
        got = out[0].int() if planes == 1 else out[0].int() * 256 + out[1]
        torch.testing.assert_close(scale, wanted[:, 0], rtol=1e-5, atol=0)
        assert (got - q).abs().max() <= 1 and (got != q).float().mean() < 0.02
        if group:
            filled = F.pad(got, (0, groups * group - K))
            assert sums.T.equal(filled.unflatten(1, (-1, group)).sum(2).float())


@pytest.mark.slow
@interpreted
def test_dequantize_by_the_kernel() -> None:
    """Fails if the kernel's weights differ from the twin's in one bit: in either half of a byte, any group, or a last
    block that is not full; or if scales that are a view are read as if they were not."""
    for mode, dtype in itertools.product(MODES, (torch.float32, torch.float16)):
        weight = weights(5, 2304, mode)
        full = dequantize_torch(weight, dtype)
        assert dequantize_triton(weight, dtype).equal(full), (mode, dtype)
        scale = weight.scale[:, 2:4] if weight.group else weight.scale[2:4]
        some = weight._replace(data=weight.data[2:4], scale=scale)
        assert dequantize_triton(some, dtype).equal(full[2:4]), (mode, dtype)


@pytest.mark.slow
@not_interpreted
@pytest.mark.xdist_group("interpreter")
def test_in_the_interpreter(interpreter) -> None:
    """Fails if one of the tests above that are marked `interpreted` fails."""
    interpreter(__file__)


def tilings(arch: int) -> list[tuple[int, int, bool, Tiling, bool]]:
    """All that the listed models ask for: (planes, group, zeros or not, tiling, whether no mask is needed)."""
    found = set()
    for (name, (group, planes, _)), (N, K), M in itertools.product(MODES.items(), itertools.chain(*SHAPES.values()),
                                                                   (1, 10, 30, 60)):
        columns = -(-K // 256) * 128 if group else K
        tiling = integer_config(M, N, columns, planes, group, CARDS[arch], divmod(arch, 10))
        found.add((planes, group, name.startswith("zeros"), tiling, K % (2 * tiling.BK if group else tiling.BK) == 0))
    return sorted(found)


@pytest.mark.parametrize("arch", CARDS)
def test_config(arch: int) -> None:
    """Fails if a block holds no whole groups, or a prefetch no whole lines."""
    for _, group, _, c, _ in tilings(arch):
        assert c.BK % max(group, 64) == 0 and (c.BM == 1 or c.BN % 64 == 0) and 1 <= c.SK <= 64
        assert c.ahead * c.BK % 128 == 0, "the prefetch counts in lines of 128 bytes"


@pytest.mark.slow
@not_interpreted
@pytest.mark.parametrize("arch", cards("quantized"))
def test_compiles(arch: int) -> None:
    """Fails if a tiling spills, wants too much shared memory, or reads its weights in pieces of less than 16 bytes a
    thread; or if its loop has more instructions a weight than the limit: then memory is no longer the slower part
    (BENCHMARKS.md), which happens where weights are converted. For one row of x, fails if a thread reads other pieces
    than of 8 bytes, the columns that it adds up, or if threads exchange columns through shared memory. The largest
    tilings; on sm_90 every third, on cards that share the code of sm_86 every second one."""
    pytest.importorskip("triton")
    for planes, group, zeros, c, even in largest(tilings(arch))[::{86: 1, 90: 3}.get(arch, 2)]:
        limited = even and c.BK >= 128 and c.BM > 1  # by instructions
        made = compile_linear(c, even, arch, True, c.BM == 1, planes=planes, group=group, zeros=zeros, loop=limited)
        assert_fits(made, arch, c, spilled=112 if arch == 80 else 0)  # an A100's int4 at 60 rows
        if c.BM == 1:
            assert {*re.findall(r"evict_first\S*?((?:\.v\d)?\.b\d+)", made.ptx)} == {".v2.b32"} and made.shared < 512, c
        else:
            assert re.search(r"cp\.async\.cg|ld\.global\S*\.v4\.b32", made.ptx), f"{c} does not read 16 bytes a thread"
        if not limited:
            continue
        cost = made.loop / (c.BN * c.BK * (2 if group else 1) / (32 * c.warps))
        print(f"sm_{arch} {'int4' if group else 'int8'} {planes} {group} {tuple(c)} {cost:.2f}")
        assert cost < {0: 3, 32: 12, 64: 7, 128: 5}[group], f"{c}: {cost} instructions a weight"
    for M in (1, 10, 60):
        c = integer_config(M, 12288, 4096, 2, 0, CARDS[arch], divmod(arch, 10))
        made = compile_linear(c, True, arch, True, norm=False, heads=True, planes=2)
        assert made.spilled == 0, f"{c} spills with heads"


@pytest.mark.slow
@not_interpreted
@pytest.mark.parametrize("arch", [86, 90])
def test_quantize_compiles(arch: int) -> None:
    """Fails if a row of up to 14,336 columns, rotated or not, does not stay in registers."""
    pytest.importorskip("triton")
    for (K, norm), name in itertools.product(((576, True), (14336, True), (14336, False)), MODES):
        group, planes, rotated = MODES[name]
        padded = max(1024, triton.next_power_of_2(K))
        constants = {"K": K, "PADDED": padded, "PLANES": planes, "GROUP": group, "ROTATED": rotated, "PDL": arch >= 90}
        constants |= {} if norm else {"norm_ptr": None}
        constants |= {} if group else {"sums_ptr": None}
        constants |= {} if name.startswith("zeros") else {"order_ptr": None}
        types = {"x_ptr": "*bf16", "norm_ptr": "*bf16", "order_ptr": "*i32", "out_ptr": "*i8", "scale_ptr": "*fp32",
                 "sums_ptr": "*fp32", "groups": "i32", "eps": "fp32", "M": "i32"}
        made = compile_ahead(quantize_kernel, arch, types, constants, min(8, padded // 512))
        assert_fits(made, arch, (K, group, rotated))
        assert ".local" not in made.ptx, (K, group, rotated)
