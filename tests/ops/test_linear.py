"""linears.py: its numerics in Triton's interpreter against float64, and its machine code from a compiler without a GPU.

Whether Triton interprets is settled when it is imported, so each of the two runs in a child process of its own.
"""
import ctypes
import itertools
import mmap
import os
import re
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from triton_tools import CARDS, HERE, LIMIT, ROWS, SHAPES, compile_kernel, in_child

from ops import linear as linear_module
from ops.embed_rope import rope_store_torch
from ops.linear import MAX_ROWS, MAX_TILES, NORM_ROWS, linear, linear_config, linear_torch
from ops.linear import Tiling as Config


def reference(x: Tensor, weight: Tensor, bias: Tensor | None, norm: tuple[Tensor, float] | None,
              residual: Tensor | None, gated: bool) -> Tensor:
    x = x.double()
    if norm is not None:
        x = x / (x.square().mean(1, keepdim=True) + norm[1]).sqrt() * (1 if norm[0] is None else norm[0].double())
    y = x @ weight.double().T
    if bias is not None:
        y = y + bias.double()
    if gated:
        half = y.shape[1] // 2
        y = y[:, :half] / (1 + (-y[:, :half]).exp()) * y[:, half:]
    return y if residual is None else y + residual.double()


def problem(M: int, N: int, K: int, dtype: torch.dtype, bias: bool = True, norm: bool = True, residual: bool = True,
            gated: bool = False) -> tuple:
    """Arguments of `linear`. eps is large and x unlike from row to row, so that a wrong rstd shows."""
    g = torch.Generator().manual_seed(M * 1000 + N + K)
    make = lambda *shape: torch.randn(shape, generator=g)  # noqa: E731
    x = make(M, K) * torch.linspace(0.2, 1, M)[:, None]
    tensors = [x, make(N, K) / K**0.5, make(N) if bias else None, make(K) if norm else None,
               make(M, N // 2 if gated else N) if residual else None]
    x, weight, b, n, r = (t if t is None else t.to(dtype) for t in tensors)
    return x, weight, b, None if n is None else (n, 0.3), r, gated


def check(args: tuple, config: Config | None = None) -> Tensor:
    out, wanted = linear_module.linear_triton(*args, config=config), reference(*args)
    error = ((out.double() - wanted).abs() / (1 + wanted.abs())).max().item()
    limit = 4e-3 if out.dtype == torch.float16 else 4e-6
    assert out.dtype == args[0].dtype and out.shape == wanted.shape, (out.dtype, out.shape)
    assert error < limit, f"{args[0].shape} x {args[1].shape}, gated {args[-1]}, {config}: error {error}"
    return out


def check_rows(dtype: torch.dtype) -> None:
    """Every row count, N no multiple of a tile, K a multiple of 16 only and of 64; whole and split."""
    for M, K in itertools.product(ROWS, (208, 320)):
        BM = 1 if M == 1 else 16 if M <= 16 else 64
        for config in (None, Config(BM, 32, 64, 1, 4, 3), Config(BM, 16, 128, 3, 4, 3)):
            check(problem(M, 50, K, dtype, gated=M % 2 == 0), config)


def check_options() -> None:
    for bias, norm, residual, gated in itertools.product((False, True), repeat=4):
        for config in (Config(1, 8, 64, 1, 4, 1), Config(1, 8, 64, 2, 4, 1), Config(16, 16, 64, 1, 4, 1),
                       Config(16, 16, 64, 2, 4, 1), Config(32, 16, 64, 2, 4, 1)):
            M = {1: 1, 16: 5, 32: 17}[config.BM]  # from 17 rows on the norm has a kernel of its own
            check(problem(M, 22, 112, torch.float32, bias, norm, residual, gated), config)


def check_splits() -> None:
    """Splits of all sizes one after another, as the layers of a model take turns at the same counters; seven splits
    of five blocks leave some without any. Twice the same call, twice the same bits."""
    for SK in (2, 3, 7, 2, 64, 3):
        config = Config(16, 32, 64, SK, 4, 3)
        args = problem(10, 50, 272, torch.float32, gated=SK == 3)
        assert check(args, config).equal(check(args, config)), SK
    counts = linear_module.counters(torch.device("cpu"))
    assert counts.any() and not (counts % 64).any(), "a counter was left between two launches' multiples of 64"
    counts.fill_(2**31 - 64)  # about to wrap around
    for SK in (3, 3, 2):
        check(args, config._replace(SK=SK))


def check_heads() -> None:
    """Halves of a head paired wrongly, angles of another token or element, values turned, a slot or head mixed up; a
    ragged last tile that writes into another head. Against what the fused steps are one by one."""
    shapes = (1, 4, 2, 16), (5, 3, 1, 24), (33, 2, 2, 32)
    for (M, H, K, D), norm, SK in itertools.product(shapes, (True, False), (1, 2)):
        x, weight, bias, norms, _, _ = problem(M, (H + 2 * K) * D, 112, torch.float32, norm=norm)
        g = torch.Generator().manual_seed(M)
        angles, slots = 6 * torch.rand(M, D // 2, generator=g).repeat(1, 2), torch.randperm(40, generator=g)[:M]
        rope, kv = torch.stack((angles.cos(), angles.sin())), torch.zeros(2, K, 40, D)
        wanted = kv.clone()
        q = rope_store_torch(linear_torch(x, weight, bias, norms), rope, slots, wanted)
        config = Config(1 if M == 1 else 16 if M <= 16 else 64, 32, 64, SK, 4, 3)
        out = linear_module.linear_triton(x, weight, bias, norms, heads=(rope, slots, kv), config=config)
        torch.testing.assert_close(out, q.flatten(1), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(kv, wanted, rtol=1e-5, atol=1e-5)


def check_model_shapes() -> None:
    """The demo model's layers with the configurations that `linear_config` gives."""
    for M, N, K in (10, 960, 576), (1, 576, 576), (60, 576, 1536):
        check(problem(M, N, K, torch.float32, bias=False))


def check_strided() -> None:
    """Rows cut out of wider ones are what a caller may well pass."""
    x, weight, bias, norm, residual, gated = problem(7, 50, 64, torch.float32)
    wide = torch.cat((x, x), 1)[:, :64], weight, bias, norm, torch.cat((residual, residual), 1)[:, :50], gated
    check(wide)


def before_a_wall(t: Tensor) -> Tensor:
    """A copy of t whose last byte is the last before a page that must not be read."""
    pages = -(-t.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, pages + mmap.PAGESIZE)
    wall = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + pages
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(wall), mmap.PAGESIZE, 0) == 0
    return torch.frombuffer(memory, dtype=t.dtype, count=t.numel(), offset=pages - t.nbytes).view(t.shape).copy_(t)


def check_bounds() -> None:
    """Ragged tiles read nothing that lies behind a tensor: on a GPU that is an illegal access, here it is the end."""
    for gated in (False, True):
        x, weight, bias, norm, residual, _ = problem(5, 50, 208, torch.float32, gated=gated)
        norm = before_a_wall(norm[0]), norm[1]
        args = *(before_a_wall(t) for t in (x, weight, bias)), norm, before_a_wall(residual), gated
        check(args, Config(16, 32, 128, 2, 4, 3))


def test_rows_fp32():
    in_child("check_rows(torch.float32)", True, __file__)


def test_rows_fp16():
    in_child("check_rows(torch.float16)", True, __file__)


def test_options():
    in_child("check_options(); check_strided()", True, __file__)


def test_splits():
    in_child("check_splits()", True, __file__)


def test_heads():
    in_child("check_heads()", True, __file__)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs mprotect")
def test_bounds():
    in_child("check_bounds()", True, __file__)


def test_model_shapes():
    in_child("check_model_shapes()", True, __file__)


@pytest.mark.parametrize("gated", [False, True])
def test_twin(gated: bool):
    args = problem(9, 50, 80, torch.float64, gated=gated)
    torch.testing.assert_close(linear_torch(*args), reference(*args))


def test_twin_rounds_like_a_llama_layer():
    """The twin is what a model of nn.Linear computes, bit for bit: fusing must not change a CPU's tokens."""
    x, weight, _, norm, residual, _ = problem(9, 64, 80, torch.bfloat16, gated=True)
    gate, up = F.linear(F.rms_norm(x, (80,), *norm), weight).chunk(2, -1)
    assert linear_torch(x, weight, None, norm, residual, True).equal(residual + F.silu(gate) * up)


def test_cpu_uses_the_twin():
    args = problem(9, 50, 80, torch.bfloat16)
    assert linear(*args).equal(linear_torch(*args))


def test_without_triton():
    code = ("import sys; sys.modules['triton'] = None\nimport torch, linears\nassert linear_module.triton is None\n"
            "assert linear_module.linear(torch.ones(1, 16), torch.ones(3, 16)).tolist() == [[16] * 3]")
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"PYTHONPATH": str(HERE.parent)})


def configs(cap: tuple[int, int]) -> set[tuple[Config, bool]]:
    """All that the listed models ask for: (configuration, whether BK divides K)."""
    found = set()
    for (N, K), M in itertools.product(itertools.chain(*SHAPES.values()), (1, 10, 30, 60)):
        config = linear_config(M, N, K, CARDS[cap], cap)
        found.add((config, K % config.BK == 0))
    return found


@pytest.mark.parametrize("cap", CARDS)
def test_config(cap: tuple[int, int]):
    for (N, K), M in itertools.product(itertools.chain(*SHAPES.values()), range(1, MAX_ROWS + 1)):
        c = linear_config(M, N, K, CARDS[cap], cap)
        assert M <= c.BM and c.BN % 2 == 0 and c.BK % 16 == 0
        tiles = -(-N // c.BN)
        assert 1 <= c.SK <= 64 and (c.SK == 1 or c.SK <= K // c.BK and tiles <= MAX_TILES)
        assert c.ahead * c.BK >= 64, "less than a line to prefetch"


def check_compiles(cap: int, some: bool = False) -> None:
    todo = sorted(configs((cap // 10, cap % 10)))
    for config, even in todo[::5] if some else todo:
        ptx, ttgir, stack, shared, _ = compile_kernel(config, even, cap, True, norm=config.BM <= NORM_ROWS)
        assert stack == 0, f"{config} spills {stack} bytes on sm_{cap}"
        assert shared <= LIMIT[cap], f"{config} wants {shared} bytes of shared memory on sm_{cap}"
        wide = re.search(r"cp\.async\.cg|ld\.global\S*\.v4\.b32", ptx)
        assert wide, f"{config} does not read 16 bytes a thread"
        check_order(ptx, cap)
        check_pipeline(ttgir, config)
    print(len(todo))


def check_heads_compile(cap: int) -> None:
    """wqkv of the listed models: no spills either with the epilogue of heads."""
    for N, K in ((12288, 4096), (6144, 4096), (960, 576)):
        for M in (1, 10, 60):
            config = linear_config(M, N, K, CARDS[cap // 10, cap % 10], (cap // 10, cap % 10))
            options = dict(options=True, norm=config.BM <= NORM_ROWS, heads=True)
            _, _, stack, shared, _ = compile_kernel(config, K % config.BK == 0, cap, **options)
            assert stack == 0 and shared <= LIMIT[cap], f"{config} spills {stack}, {shared} bytes shared, on sm_{cap}"


def check_pipeline(ttgir: str, config: Config) -> None:
    """Tensor cores that work on while the loop turns need a buffer more than the loads in flight, in every operand
    they read: Triton 3.6 and 3.7 forget it for a block that is also loaded into registers. And with many stages and
    three loads they wait for all but one of them, which is no pipeline."""
    buffers = [int(n) for n in re.findall(r"ttg\.local_alloc :.*memdesc<(\d+)x\d+x\d+xbf16", ttgir)]
    if config.BM == 1 or config.stages < 3 or "ttng.warp_group_dot" not in ttgir:
        return
    pending = max(map(int, re.findall(r"pendings = (\d+)", ttgir)))
    waits = [int(n) for n in re.findall(r"async_wait .*num = (\d+)", ttgir)]
    assert pending == 0 or buffers[:2] == [config.stages] * 2, f"{config}: {buffers} buffers, {pending} products"
    assert max(waits) >= 2 * (config.stages - 2), f"{config}: waits for all but {max(waits)} loads"


def check_order(ptx: str, cap: int) -> None:
    """On Hopper nothing but a prefetch precedes the wait for the kernel before; older cards know no such wait."""
    if cap < 90:
        assert "griddepcontrol" not in ptx
        return
    early = ptx[:ptx.index("griddepcontrol.wait")]
    assert "griddepcontrol.launch_dependents" in early and "prefetch.global.L2" in early
    assert not re.search(r"ld\.global|cp\.async|st\.global|atom", early), "reads or writes before its turn"


def check_plain() -> None:
    """Without options and in fp16: that those branches compile too. And with a residual."""
    for config in Config(1, 4, 1024, 1, 4, 1), Config(16, 64, 128, 4, 4, 4), Config(64, 64, 64, 4, 4, 4):
        compile_kernel(config, False, 86, options=False, norm=False, dtype="fp16")
        assert compile_kernel(config, True, 86, options=True, norm=False)[2] == 0, f"{config} spills"


def test_compiles_sm90():
    in_child("check_compiles(90); check_heads_compile(90)", False, __file__)


def test_compiles_sm86():
    in_child("check_compiles(86); check_plain(); check_heads_compile(86)", False, __file__)


def test_compiles_sm80_sm89():
    in_child("check_compiles(80, some=True); check_compiles(89, some=True)", False, __file__)
