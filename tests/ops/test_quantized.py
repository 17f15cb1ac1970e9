"""qlinears.py: integer weights. Its numerics in Triton's interpreter against float64, its machine code from a compiler
without a GPU, and what PyTorch's twins compute."""
import itertools
import re
import subprocess
import tempfile
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from triton_tools import CARDS, LIMIT, ROWS, SHAPES, compile_kernel, in_child

from ops import linear, quantized
from ops.embed_rope import rope_store_torch
from ops.linear import Tiling as Config
from ops.linear import linear_torch
from ops.quantized import (
    Quantized,
    dequantize,
    hadamard,
    integer_config,
    integer_linear,
    pack,
    quantize_rows,
    rotate,
    unpack,
)

MODES = {"int8": (0, 2, False), "int8dyn": (0, 1, True), "int4, 128": (128, 2, False), "int4, 64": (64, 2, False)}


def weights(N: int, K: int, mode: str) -> Quantized:
    """Any of that shape."""
    (group, planes, rotated), g = MODES[mode], torch.Generator().manual_seed(N + K)
    if not group:
        q = torch.randint(-127, 128, (N, K), generator=g, dtype=torch.int8)
        return Quantized(q, (0.5 + torch.rand(N, generator=g)) / 100, 0, planes, rotated and K % 16 == 0)
    data = pack(torch.randint(-8, 8, (N, K), generator=g))
    scale = torch.randn(data.shape[1] * 2 // group, N, 2, generator=g) / 100
    return Quantized(data, scale.bfloat16(), group, planes)


def integral(M: int, K: int, weight: Quantized) -> tuple[Tensor, Tensor]:
    """x [M, K] whose rows are integers times a scale, so that nothing is rounded, and those in float64: what rotation
    makes of x where weights are rotated. Rows differ in scale, the last is zero where there are several."""
    limit, g = 127 if weight.planes == 1 else 32512, torch.Generator().manual_seed(M)
    q = torch.randint(-limit, limit + 1, (M, K), generator=g).double()
    q[:, K // 2] = limit
    q *= 2.0 ** -torch.arange(M)[:, None] / limit if M < 20 else 1 / limit
    q[M - 1] *= M == 1
    return (rotate(q) if weight.rotated else q).float(), q


def test_pack():
    """Halves of a byte mixed up, a sign lost, columns that were filled up with anything but zeros."""
    q = torch.randint(-8, 8, (5, 576))
    data = pack(q)
    assert data.shape == (5, 384) and data.dtype == torch.int8
    weight = Quantized(data, torch.ones(6, 5, 2).bfloat16(), 128, 2)
    assert weight.shape == (5, 768)
    assert unpack(weight)[:, :576].equal(q.to(torch.int8)) and not unpack(weight)[:, 576:].any()
    assert data[2, 3] & 15 == q[2, 3] % 16 and (data[2, 3] >> 4) == q[2, 3 + 384] * (3 + 384 < 576)


def test_dequantize():
    """A group's scale taken from its neighbour, the offset forgotten, the factor of 16."""
    weight = weights(3, 512, "int4, 64")
    q, full = unpack(weight), dequantize(weight, torch.float64)
    for n, k in ((0, 0), (1, 63), (1, 64), (2, 255), (2, 256), (0, 511)):
        scale, offset = weight.scale[k // 64, n].double()
        assert full[n, k] == pytest.approx((16 * q[n, k] * scale + offset).item(), rel=1e-6)
    int8 = weights(3, 64, "int8")
    assert dequantize(int8, torch.float64)[2, 5] == pytest.approx((int8.data[2, 5] * int8.scale[2]).item(), rel=1e-6)


def test_rotation():
    """The matrix as its definition has it: Kronecker powers of [[1, 1], [1, -1]] / sqrt(2)."""
    wanted, two = torch.ones(1, 1), torch.tensor([[1, 1], [1, -1]]) / 2**0.5
    for _ in range(4):
        wanted = torch.kron(wanted, two)
    torch.testing.assert_close(hadamard(), wanted)
    x, w = torch.randn(3, 192), torch.randn(4, 192)
    torch.testing.assert_close(F.linear(rotate(x), rotate(w)), F.linear(x, w), rtol=1e-4, atol=1e-4)
    assert rotate(torch.eye(192)[:1])[0, 16:].abs().max() == 0, "one block's column has spread to another"


@pytest.mark.parametrize("mode", MODES)
def test_twin(mode: str):
    """In fp32 the twin is x times the dequantised weights; with one plane, the quantised x."""
    weight, bias = weights(6, 192, mode), torch.randn(6)
    x = torch.randn(2, 3, 192)
    full = dequantize(weight, torch.float64)[:, :192]
    q, scale = quantize_rows(x, 1, weight.rotated)
    inputs = (q * scale).double() if weight.planes == 1 else x.double()
    torch.testing.assert_close(integer_linear(x, weight, bias), (inputs @ full.T + bias).float(), rtol=1e-4, atol=1e-4)


def test_rows_are_quantized_one_by_one():
    """8 bits: at most half a step off; a row of zeros stays one; a row does not see its neighbours."""
    x = torch.randn(4, 64) * torch.tensor([1, 100, 1e-3, 0])[:, None]
    for planes, limit in ((1, 127), (2, 32512)):
        q, scale = quantize_rows(x, planes)
        assert q.abs().max() == limit and q.equal(q.round()) and not q[3].any()
        assert ((q * scale - x).abs() <= scale * 0.501).all()
        assert quantize_rows(x[1:2], planes)[0].equal(q[1:2])


def check(M: int, N: int, K: int, mode: str, config: Config | None = None) -> Tensor:
    weight = weights(N, K, mode)
    x, q = integral(M, K, weight)
    wanted = q @ dequantize(weight, torch.float64)[:, :K].T
    out = linear.linear_triton(x, weight, config=config)
    error = ((out.double() - wanted).abs() / (1 + wanted.abs())).max().item()
    assert out.shape == wanted.shape and error < 2e-5, f"{M} rows, {N} x {K}, {mode}, {config}: error {error}"
    return out


def check_rows() -> None:
    """Every row count, N no multiple of a tile, K of neither a tile nor two groups."""
    for mode, M, K in itertools.product(MODES, ROWS, (576, 832)):
        group = MODES[mode][0]
        BM = 8 if M <= 8 else 16 if M <= 16 else 64
        check(M, 50, K, mode)
        check(M, 50, K, mode, Config(BM, 32, max(128, group), 1, 4, 3))


def check_splits() -> None:
    """Split sums, and blocks of several groups of which the last has none left: nothing past a row's end may count.
    Twice the same call, twice the same bits."""
    for mode, SK, BK in itertools.product(MODES, (1, 2, 3), (128, 256)):
        config = Config(16, 32, BK, SK, 4, 3)
        assert check(10, 50, 1280, mode, config).equal(check(10, 50, 1280, mode, config))


def check_options() -> None:
    """Norm, bias, residual, gate and output dtype, against the steps one by one. x is rounded here, so one step of its
    integers is allowed."""
    for mode, (norm, gated), SK in itertools.product(MODES, ((False, False), (True, True), (True, False)), (1, 2)):
        weight, g = weights(44, 576, mode), torch.Generator().manual_seed(SK)
        x, bias, scale = torch.randn(5, 576, generator=g), torch.randn(44, generator=g), torch.rand(576, generator=g)
        residual = torch.randn(5, 22 if gated else 44, generator=g)
        norms = (scale, 0.1) if norm else None
        out = linear.linear_triton(x, weight, bias, norms, residual, gated, dtype=torch.float32,
                                    config=Config(16, 32, 128, SK, 4, 3))
        q, s = quantize_rows(F.rms_norm(x, (576,), *norms) if norm else x, weight.planes, weight.rotated)
        plain = Quantized(weight.data, weight.scale, weight.group, 2)  # its integers as they are
        wanted = linear_torch(q * s, plain, bias, None, residual, gated)
        assert (out - wanted).norm() / wanted.norm() < (5e-3 if weight.planes == 1 else 1e-4), (mode, norm, gated, SK)


def check_heads() -> None:
    """The rows of a tile are pairs of a head's halves: their scales are too."""
    for mode, norm in itertools.product(MODES, (True, False)):
        M, H, K, D = 5, 3, 1, 24
        weight, g = weights((H + 2 * K) * D, 576, mode), torch.Generator().manual_seed(M)
        x, norms = torch.randn(M, 576, generator=g), (torch.rand(576, generator=g), 0.1) if norm else None
        angles, slots = 6 * torch.rand(M, D // 2, generator=g).repeat(1, 2), torch.randperm(40, generator=g)[:M]
        rope, kv = torch.stack((angles.cos(), angles.sin())), torch.zeros(2, K, 40, D)
        wanted = kv.clone()
        q = rope_store_torch(linear_torch(x, weight, None, norms), rope, slots, wanted)
        config = Config(16, 32, 128, 1, 4, 3)
        out = linear.linear_triton(x, weight, None, norms, heads=(rope, slots, kv), config=config)
        for a, b in ((out, q.flatten(1)), (kv, wanted)):
            assert (a - b).norm() / b.norm() < (5e-3 if weight.planes == 1 else 1e-4), (mode, norm)


def check_quantize() -> None:
    """The kernel's integers, scales and group sums are the twin's, but for one step where fp32 sums differ."""
    for K, norm, (group, planes, rotated) in itertools.product((576, 1536), (False, True), MODES.values()):
        x, weight = torch.randn(3, K) * torch.tensor([1, 50, 0])[:, None], torch.rand(K)
        x[0, 7] = 30
        groups = -(-K // 256) * 256 // max(group, 1) if group else 0
        like = Quantized(x, torch.zeros(groups), group, planes, rotated)
        norms = (weight, 0.1) if norm else None
        out, scale, sums = quantized.quantize_triton(x, like, norms, pdl=False)
        q, wanted = quantize_rows(F.rms_norm(x, (K,), *norms) if norm else x, planes, rotated)
        got = out[0].int() if planes == 1 else out[0].int() * 256 + out[1]
        torch.testing.assert_close(scale, wanted[:, 0], rtol=1e-5, atol=0)
        assert (got - q).abs().max() <= 1 and (got != q).float().mean() < 0.02
        if group:
            filled = F.pad(got, (0, groups * group - K))
            assert sums.T.equal(filled.unflatten(1, (-1, group)).sum(2).float())


def check_dequantize() -> None:
    """The kernel's weights are the twin's, to the last bit: halves, groups, a last block that is not full."""
    for mode, dtype in itertools.product(MODES, (torch.float32, torch.float16)):
        weight = weights(5, 2304, mode)
        assert quantized.dequantize_triton(weight, dtype).equal(dequantize(weight, dtype)), (mode, dtype)


def test_rows():
    in_child("check_rows()", True, __file__)


def test_splits():
    in_child("check_splits(); check_quantize(); check_dequantize()", True, __file__)


def test_options():
    in_child("check_options(); check_heads()", True, __file__)


def configs(cap: tuple[int, int]) -> dict[tuple, int]:
    """All that the listed models ask for: (planes, group, configuration, whether no mask is needed) and a K."""
    found = {}
    for (group, planes, _), (N, K), M in itertools.product(MODES.values(), itertools.chain(*SHAPES.values()),
                                                           (1, 10, 30, 60)):
        columns = -(-K // 256) * 128 if group else K
        c = Config(*integer_config(M, N, columns, planes, group, CARDS[cap], cap))
        found[planes, group, c, K % (2 * c.BK if group else c.BK) == 0] = K
    return found


@pytest.mark.parametrize("cap", CARDS)
def test_config(cap: tuple[int, int]):
    for _, group, c, _ in configs(cap):
        assert c.BK % max(group, 64) == 0 and c.BN % 64 == 0 and 1 <= c.SK <= 64
        assert c.ahead * c.BK % 128 == 0, "the prefetch counts in lines of 128 bytes"


def loop_length(cubin: bytes) -> int:
    """Instructions of the shortest loop that multiplies matrices."""
    import triton
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(cubin)
        f.flush()
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
        lines = subprocess.run([tool, "-c", f.name], capture_output=True, text=True, check=True).stdout.splitlines()
    labels = {m[1]: i for i, line in enumerate(lines) if (m := re.match(r"\s*\.?(L_x_\d+):", line))}
    bodies = [lines[labels[m[1]]:i + 1] for i, line in enumerate(lines)
              if (m := re.search(r"BRA.*`\(\.?(L_x_\d+)\)", line)) and labels.get(m[1], i) < i]
    instruction = re.compile(r"\s+/\*[0-9a-f]{4,}\*/")
    return min(sum(bool(instruction.match(line)) for line in body) for body in bodies if any("MMA" in b for b in body))


def check_compiles(cap: int, some: bool = False) -> None:
    """Nothing spills, all fits, weights come 16 bytes at a time, and no instruction converts them: at most so many
    instructions a weight that memory stays the slower one (BENCHMARKS.md)."""
    todo = sorted(configs((cap // 10, cap % 10)))
    for planes, group, c, even in todo[::4] if some else todo:
        ptx, _, stack, shared, cubin = compile_kernel(c, even, cap, True, norm=False, planes=planes, group=group)
        assert stack <= (32 if cap == 80 else 0), f"{c} spills {stack} bytes on sm_{cap}"
        assert shared <= LIMIT[cap], f"{c} wants {shared} bytes of shared memory on sm_{cap}"
        assert re.search(r"cp\.async\.cg|ld\.global\S*\.v4\.b32", ptx), f"{c} does not read 16 bytes a thread"
        cost = loop_length(cubin) / (c.BN * c.BK * (2 if group else 1) / (32 * c.warps))
        print(f"sm_{cap} {'int4' if group else 'int8'} {planes} {group} {tuple(c)} {cost:.2f}")
        assert not even or c.BK < 128 or cost < (7 if group == 64 else 5 if group else 3), f"{c}: {cost} a weight"
    for M in (1, 10, 60):
        c = Config(*integer_config(M, 12288, 4096, 2, 0, CARDS[cap // 10, cap % 10], (cap // 10, cap % 10)))
        assert compile_kernel(c, True, cap, True, norm=False, heads=True, planes=2)[2] == 0, f"{c} spills with heads"


def check_quantize_compiles(cap: int) -> None:
    """Rows up to 13B's longest stay in registers, rotated or not."""
    from triton import compile, next_power_of_2
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    names = quantized.quantize_kernel.arg_names
    for K, (group, planes, rotated), norm in itertools.product((576, 4096, 14336), MODES.values(), (True, False)):
        padded = max(1024, next_power_of_2(K))
        fixed = {"K": K, "PADDED": padded, "PLANES": planes, "GROUP": group, "ROTATED": rotated, "PDL": cap >= 90}
        fixed |= ({} if norm else {"norm_ptr": None}) | ({} if group else {"sums_ptr": None})
        types = {"x_ptr": "*bf16", "norm_ptr": "*bf16", "out_ptr": "*i8", "scale_ptr": "*fp32", "sums_ptr": "*fp32",
                 "groups": "i32", "eps": "fp32", "M": "i32"}
        source = ASTSource(fn=quantized.quantize_kernel, signature={n: types.get(n) if n not in fixed else "constexpr"
                                                                   for n in names},
                           constexprs={(names.index(n),): value for n, value in fixed.items()})
        compiled = compile(source, target=GPUTarget("cuda", cap, 32), options={"num_warps": min(8, padded // 512)})
        assert compiled.metadata.shared <= LIMIT[cap] and ".local" not in compiled.asm["ptx"], (K, group, rotated)


def test_compiles_sm90():
    in_child("check_compiles(90, True)", False, __file__)


def test_compiles_sm86():
    in_child("check_compiles(86); check_quantize_compiles(86)", False, __file__)


def test_compiles_sm80_sm89():
    in_child("check_compiles(80, True); check_compiles(89, True); check_quantize_compiles(90)", False, __file__)
