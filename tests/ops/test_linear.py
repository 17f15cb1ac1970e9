"""ops/linear.py: its numbers in Triton's interpreter against float64, and its machine code from a compiler without a
GPU (tests/triton_tools.py)."""
import ctypes
import itertools
import mmap
import re
import sys

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
    compile_linear,
    interpreted,
    largest,
    not_interpreted,
)

from ops.embed_rope import rope_store_torch
from ops.linear import (
    MAX_ROWS,
    MAX_TILES,
    NORM_ROWS,
    counters,
    linear,
    linear_config,
    linear_torch,
    linear_triton,
    rms_norm,
)
from ops.tiling import Tiling


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
    """Arguments of `linear`. eps is large, and the rows of x have different scales, so that a wrong rstd shows."""
    g = torch.Generator().manual_seed(M * 1000 + N + K)
    make = lambda *shape: torch.randn(shape, generator=g)  # noqa: E731
    x = make(M, K) * torch.linspace(0.2, 1, M)[:, None]
    tensors = [x, make(N, K) / K**0.5, make(N) if bias else None, make(K) if norm else None,
               make(M, N // 2 if gated else N) if residual else None]
    x, weight, b, n, r = (t if t is None else t.to(dtype) for t in tensors)
    return x, weight, b, None if n is None else (n, 0.3), r, gated


def check(args: tuple, config: Tiling | None = None) -> Tensor:
    out, wanted = linear_triton(*args, config=config), reference(*args)
    error = ((out.double() - wanted).abs() / (1 + wanted.abs())).max().item()
    limit = 4e-3 if out.dtype == torch.float16 else 4e-6
    assert out.dtype == args[0].dtype and out.shape == wanted.shape, (out.dtype, out.shape)
    assert error < limit, f"{args[0].shape} x {args[1].shape}, gated {args[-1]}, {config}: error {error}"
    return out


@pytest.mark.slow
@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_rows(dtype: torch.dtype) -> None:
    """Fails if some number of rows, an N that is no multiple of a tile, or a K that is a multiple of 16 only (or of 64)
    gives wrong sums, with K whole or split. The two dtypes meet each number of rows with another K."""
    for M, K in zip(ROWS, itertools.cycle((208, 320) if dtype == torch.float32 else (320, 208))):
        BM = 1 if M == 1 else 16 if M <= 16 else 64
        for N, config in (26, None), (50, Tiling(BM, 32, 64, 1, 4, 3)), (26, Tiling(BM, 16, 128, 3, 4, 3)):
            check(problem(M, N, K, dtype, gated=M % 2 == 0), config)


@pytest.mark.slow
@interpreted
def test_options() -> None:
    """Fails if some combination of bias, norm, residual and gate is computed in the wrong order or left out."""
    for bias, norm, residual, gated in itertools.product((False, True), repeat=4):
        for config in (Tiling(1, 8, 64, 1, 4, 1, unroll=3), Tiling(1, 8, 64, 2, 4, 1), Tiling(16, 16, 64, 1, 4, 1),
                       Tiling(16, 16, 64, 2, 4, 1), Tiling(32, 16, 64, 2, 4, 1)):
            M = {1: 1, 16: 5, 32: 17}[config.BM]  # from 17 rows on the norm has a kernel of its own
            check(problem(M, 22, 112, torch.float32, bias, norm, residual, gated), config)


@pytest.mark.slow
@interpreted
def test_splits() -> None:
    """Fails if a launch leaves the counters in a state that the next one cannot use, if a split without blocks (seven
    splits of five blocks) adds something, or if the same call gives other bits. The layers of a model share the
    counters, with different numbers of splits."""
    for SK in (2, 3, 7, 2, 64, 3):
        config = Tiling(16, 64 if SK == 64 else 32, 64, SK, 4, 3)  # 64 splits of two tiles would take too long
        args = problem(10, 50, 272, torch.float32, gated=SK == 3)
        assert check(args, config).equal(check(args, config)), SK
    counts = counters(torch.device("cpu"))
    assert counts.any() and not (counts % 64).any(), "a counter is no multiple of 64 between two launches"
    counts.fill_(2**31 - 64)  # about to wrap around
    for SK in (3, 3, 2):
        check(args, config._replace(SK=SK))


@pytest.mark.slow
@interpreted
def test_heads() -> None:
    """Fails if halves of a head are paired wrongly, if angles are another token's or element's, if values are rotated,
    if slots or heads are mixed up, or if a ragged last tile writes into another head. Compares with the separate
    steps."""
    shapes = (1, 4, 2, 16), (5, 3, 1, 24), (33, 2, 2, 32)
    for (M, H, K, D), norm, SK in itertools.product(shapes, (True, False), (1, 2)):
        x, weight, bias, norms, _, _ = problem(M, (H + 2 * K) * D, 112, torch.float32, norm=norm)
        g = torch.Generator().manual_seed(M)
        angles, slots = 6 * torch.rand(M, D // 2, generator=g).repeat(1, 2), torch.randperm(40, generator=g)[:M]
        rope, kv = torch.stack((angles.cos(), angles.sin())), torch.zeros(2, K, 40, D)
        wanted = kv.clone()
        q = rope_store_torch(linear_torch(x, weight, bias, norms), rope, slots, wanted)
        config = Tiling(1 if M == 1 else 16 if M <= 16 else 64, 32, 64, SK, 4, 3)
        out = linear_triton(x, weight, bias, norms, rope_cache=(rope, slots, kv), config=config)
        torch.testing.assert_close(out, q.flatten(1), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(kv, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@interpreted
def test_model_shapes() -> None:
    """Fails if the demo model's layers come out wrong with the tilings that `linear_config` gives. 100 rows of their
    weights are enough tiles."""
    for M, N, K in (10, 960, 576), (1, 576, 576), (60, 576, 1536):
        check(problem(M, 100, K, torch.float32, bias=False), linear_config(M, N, K, CARDS[86], (8, 6)))


@interpreted
def test_strided() -> None:
    """Fails if x or the residual is read as contiguous though its rows are parts of wider ones."""
    x, weight, bias, norm, residual, gated = problem(7, 50, 64, torch.float32)
    wide = torch.cat((x, x), 1)[:, :64], weight, bias, norm, torch.cat((residual, residual), 1)[:, :50], gated
    check(wide)


def before_a_wall(t: Tensor) -> Tensor:
    """A copy of t that ends where a page begins that the process may not read."""
    pages = -(-t.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, pages + mmap.PAGESIZE)
    wall = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + pages
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(wall), mmap.PAGESIZE, 0) == 0
    return torch.frombuffer(memory, dtype=t.dtype, count=t.numel(), offset=pages - t.nbytes).view(t.shape).copy_(t)


@pytest.mark.slow
@interpreted
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs mprotect")
def test_bounds() -> None:
    """Fails if a ragged tile reads behind the end of a tensor: on a GPU an illegal access, here a crash."""
    for gated in (False, True):
        x, weight, bias, norm, residual, _ = problem(5, 50, 208, torch.float32, gated=gated)
        norm = before_a_wall(norm[0]), norm[1]
        args = *(before_a_wall(t) for t in (x, weight, bias)), norm, before_a_wall(residual), gated
        check(args, Tiling(16, 32, 128, 2, 4, 3))


@pytest.mark.slow
@not_interpreted
@pytest.mark.xdist_group("interpreter")
def test_in_the_interpreter(interpreter) -> None:
    """Fails if one of the tests above fails."""
    interpreter(__file__)


@pytest.mark.parametrize("gated", [False, True])
def test_twin(gated: bool) -> None:
    """Fails if the PyTorch twin computes something else than its formula."""
    args = problem(9, 50, 80, torch.float64, gated=gated)
    torch.testing.assert_close(linear_torch(*args), reference(*args))


def test_twin_rounds_like_a_llama_layer() -> None:
    """Fails if the twin differs in one bit from a model of nn.Linear: fusing must not change a CPU's tokens."""
    x, weight, _, norm, residual, _ = problem(9, 64, 80, torch.bfloat16, gated=True)
    gate, up = F.linear(F.rms_norm(x, (80,), *norm), weight).chunk(2, -1)
    assert linear_torch(x, weight, None, norm, residual, True).equal(residual + F.silu(gate) * up)


def test_cpu_uses_the_twin() -> None:
    """Fails if a CPU tensor is sent to the kernel."""
    args = problem(9, 50, 80, torch.bfloat16)
    assert linear(*args).equal(linear_torch(*args))


class OnGPU(Tensor):
    """A tensor that says it is on a GPU."""
    is_cuda = True


@interpreted
def test_norm_of_strided_rows() -> None:
    """Fails if rows that lie apart are normed as if they lay side by side, as a block head's guesses do."""
    x, weight = torch.randn(130, 3, 64).half(), torch.rand(64).half()  # fp32 would take a CPU's kernel
    with torch.no_grad():
        found = rms_norm(x.as_subclass(OnGPU)[:, 1], weight, 1e-5).as_subclass(Tensor)
    torch.testing.assert_close(found, F.rms_norm(x[:, 1], (64,), weight, 1e-5), rtol=2e-3, atol=2e-3)


@interpreted
def test_large_fp16() -> None:
    """Fails if a product of a norm that fp16 cannot hold makes everything infinite."""
    for rows in (1, 8, 17):
        x, norm, w = torch.randn(rows, 64).half(), torch.ones(64).half(), torch.randn(32, 64).half() / 8
        x[:, 7], norm[7] = 9000, 8
        args = x, w, None, (norm, 1e-6)
        torch.testing.assert_close(linear_triton(*args), linear_torch(*args), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("rows", [3, MAX_ROWS + 1])
@pytest.mark.parametrize("trained", ["x", "norm"])
def test_what_is_trained_gets_gradients(rows: int, trained: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a kernel, which has no backward pass, computes what autograd follows: training would go on, and what is
    before it would never be trained."""
    class ReachedKernel(Exception):
        pass

    def kernel(*args, **kwargs) -> None:
        raise ReachedKernel

    monkeypatch.setattr("ops.linear.linear_triton", kernel)
    monkeypatch.setattr("ops.linear.norm_triton", kernel)
    w = torch.randn(48, 32).bfloat16()
    given = {"x": torch.randn(rows, 32).bfloat16(), "norm": (1 + torch.rand(32)).bfloat16()}
    twin = {name: t.double() for name, t in given.items()}
    leaf, wanted = (tensors[trained].requires_grad_(True) for tensors in (given, twin))
    x, norm = given["x"].as_subclass(OnGPU), (given["norm"], 1e-5)
    linear(x, w, norm=norm, gated=True).sum().backward()
    linear_torch(twin["x"], w.double(), norm=(twin["norm"], 1e-5), gated=True).sum().backward()
    assert (leaf.grad - wanted.grad).norm() < 0.02 * wanted.grad.norm()
    assert rms_norm(x, *norm).requires_grad
    for call in (lambda: linear(x, w, norm=norm), lambda: rms_norm(x, *norm)):
        with torch.no_grad(), pytest.raises(ReachedKernel):
            call()


def tilings(arch: int) -> list[tuple[Tiling, bool]]:
    """All that the listed models ask for: (tiling, whether BK divides K)."""
    found = set()
    for (N, K), M in itertools.product(itertools.chain(*SHAPES.values()), (1, 10, 30, 60)):
        tiling = linear_config(M, N, K, CARDS[arch], divmod(arch, 10))
        found.add((tiling, K % tiling.BK == 0))
    return sorted(found)


@pytest.mark.parametrize("arch", CARDS)
def test_config(arch: int) -> None:
    """Fails if a tiling does not hold all rows, wants more splits or counters than there are, or prefetches less than a
    line."""
    for (N, K), M in itertools.product(itertools.chain(*SHAPES.values()), range(1, MAX_ROWS + 1)):
        c = linear_config(M, N, K, CARDS[arch], divmod(arch, 10))
        assert M <= c.BM and c.BN % 2 == 0 and c.BK % 16 == 0
        tiles = -(-N // c.BN)
        assert 1 <= c.SK <= 64 and (c.SK == 1 or c.SK <= K // c.BK and tiles <= MAX_TILES)
        assert c.ahead * c.BK >= 64, "less than a line to prefetch"


@pytest.mark.slow
@not_interpreted
@pytest.mark.parametrize("arch", cards("linear"))
def test_compiles(arch: int) -> None:
    """Fails if a tiling does not compile, spills, wants more shared memory than there is, reads its weights in pieces
    of less than 16 bytes a thread, or is put in the wrong order by the compiler. On sm_80 and sm_89,
    which get the code of sm_86: every second tiling."""
    pytest.importorskip("triton")
    for tiling, even in largest(tilings(arch))[::1 if arch in (86, 90) else 2]:
        made = compile_linear(tiling, even, arch, True, norm=tiling.BM <= NORM_ROWS)
        assert_fits(made, arch, tiling)
        wide = re.search(r"cp\.async\.cg|ld\.global\S*\.v4\.b32", made.ptx)
        assert wide, f"{tiling} does not read 16 bytes a thread"
        check_order(made.ptx, arch)
        check_pipeline(made.ttgir, tiling)


@pytest.mark.slow
@not_interpreted
@pytest.mark.parametrize("arch", [86, 90])
def test_heads_compile(arch: int) -> None:
    """Fails if the wqkv of a listed model, with RoPE and the cache write, spills or wants too much shared memory."""
    pytest.importorskip("triton")
    wanted = set()
    for (N, K), M in itertools.product(((12288, 4096), (6144, 4096), (960, 576)), (1, 10, 60)):
        tiling = linear_config(M, N, K, CARDS[arch], divmod(arch, 10))
        wanted.add((tiling, K % tiling.BK == 0))
    for tiling, even in largest(wanted):
        assert_fits(compile_linear(tiling, even, arch, True, tiling.BM <= NORM_ROWS, heads=True), arch, tiling)


def check_pipeline(ttgir: str, tiling: Tiling) -> None:
    """Fails if Triton 3.6 or 3.7 breaks the pipeline. Tensor cores that go on while the loop turns need one buffer more
    than there are loads in flight, for every operand: Triton forgets it for a block that is also loaded into registers.
    And with many stages and three loads it waits for all loads but one, which is no pipeline."""
    buffers = [int(n) for n in re.findall(r"ttg\.local_alloc :.*memdesc<(\d+)x\d+x\d+xbf16", ttgir)]
    if tiling.BM == 1 or tiling.stages < 3 or "ttng.warp_group_dot" not in ttgir:
        return
    pending = max(map(int, re.findall(r"pendings = (\d+)", ttgir)))
    waits = [int(n) for n in re.findall(r"async_wait .*num = (\d+)", ttgir)]
    assert pending == 0 or buffers[:2] == [tiling.stages] * 2, f"{tiling}: {buffers} buffers, {pending} products"
    assert max(waits) >= 2 * (tiling.stages - 2), f"{tiling}: waits for all but {max(waits)} loads"


def check_order(ptx: str, arch: int) -> None:
    """Fails if on Hopper anything but a prefetch precedes the wait for the previous kernel; older cards have no such
    instruction."""
    if arch < 90:
        assert "griddepcontrol" not in ptx
        return
    early = ptx[:ptx.index("griddepcontrol.wait")]
    assert "griddepcontrol.launch_dependents" in early and "prefetch.global.L2" in early
    assert not re.search(r"ld\.global|cp\.async|st\.global|atom", early), "reads or writes before its turn"


@pytest.mark.slow
@not_interpreted
def test_other_branches_compile() -> None:
    """Fails if the kernel does not compile without options and in fp16, or spills with a residual."""
    pytest.importorskip("triton")
    for tiling in Tiling(1, 4, 1024, 1, 4, 1), Tiling(16, 64, 128, 4, 4, 4), Tiling(64, 64, 64, 4, 4, 4):
        compile_linear(tiling, False, 86, options=False, norm=False, dtype="fp16")
        assert compile_linear(tiling, True, 86, options=True, norm=False).spilled == 0, f"{tiling} spills"
