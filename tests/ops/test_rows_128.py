"""Trees of 65 to 128 nodes: the kernels of ops/ for so many rows in Triton's interpreter, against float64 and tree.py,
and what Triton's compiler makes of them without a GPU (tests/triton_tools.py)."""
import itertools
import re
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from triton_tools import (
    CARDS,
    SHAPES,
    Compiled,
    assert_fits,
    cards,
    compile_ahead,
    compile_linear,
    interpreted,
    largest,
    not_interpreted,
)

import tree
from ops import tree as tree_kernels
from ops.attention import TreeMask, attention_config, attention_kernel, tree_attention_torch, tree_attention_triton
from ops.device import triton
from ops.embed_rope import rope_store_torch
from ops.linear import MAX_ROWS, MAX_TILES, linear_torch, linear_triton
from ops.quantized import Quantized, dequantize, pack, quantize_rows
from ops.tiling import Tiling, integer_config, linear_config
from ops.tree import accept_commit_kernel, rerank_kernel
from tree import Candidates, State, Tree, build_tree

MODES = {"bf16": (0, 0), "int8": (2, 0), "int8dyn": (1, 0), "int4": (2, 128), "int4 of 64": (2, 64)}  # planes, group
ROWS = (65, 100, 128)

pytestmark = pytest.mark.filterwarnings("ignore:(divide by zero|invalid value)")  # numpy, of splits that see nothing


@pytest.mark.slow
@not_interpreted
@pytest.mark.xdist_group("interpreter")
def test_in_the_interpreter(interpreter) -> None:
    """Fails if one of the tests below that are marked `interpreted` fails."""
    interpreter(__file__)


def tiling(mode: str, M: int, N: int, K: int, arch: int) -> Tiling:
    """The Tiling that such a card gets for weights [N, K] in this mode."""
    planes, group = MODES[mode]
    if not planes:
        return linear_config(M, N, K, CARDS[arch], divmod(arch, 10))
    return integer_config(M, N, -(-K // 256) * 128 if group else K, planes, group, CARDS[arch], divmod(arch, 10))


# ----- Linear layers -------------------------------------------------------------------------------------------------


def weights(mode: str, N: int, K: int) -> Quantized | Tensor:
    """Random weights of that shape."""
    (planes, group), g = MODES[mode], torch.Generator().manual_seed(N + K)
    if not planes:
        return torch.randn(N, K, generator=g) / K**0.5
    if not group:
        q = torch.randint(-127, 128, (N, K), generator=g, dtype=torch.int8)
        return Quantized(q, (0.5 + torch.rand(N, generator=g)) / 1000, 0, planes, planes == 1)
    data = pack(torch.randint(-8, 8, (N, K), generator=g))
    scale = torch.randn(data.shape[1] * 2 // group, N, 2, generator=g) / 1000
    return Quantized(data, scale.bfloat16(), group, planes)


def separate_steps(x: Tensor, weight: Quantized | Tensor, norm: tuple[Tensor, float] | None, **options: object
                   ) -> Tensor:
    """What the kernel computes, by the twin in float64: integer weights get the norm's result as integers."""
    if norm is not None:
        x = torch.nn.functional.rms_norm(x, x.shape[1:], *norm)
    if isinstance(weight, Quantized):
        q, scale = quantize_rows(x, weight.planes, weight.rotated)
        x, weight = q * scale, dequantize(weight, torch.float64)[:, :x.shape[1]]
    options = {name: value.double() if isinstance(value, Tensor) else value for name, value in options.items()}
    return linear_torch(x.double(), weight.double(), **options)


def assert_near(out: Tensor, wanted: Tensor, mode: str, what: object) -> None:
    """The limit for integers allows for an activation, of 127 or 32512 steps, that rounds to the next step."""
    limit = 2e-6 if mode == "bf16" else 2e-3 if mode == "int8dyn" else 2e-5
    error = ((out.double() - wanted).norm() / wanted.norm()).item()
    assert out.shape == wanted.shape and error < limit, f"{mode}, {what}: error {error}"


@pytest.mark.slow
@interpreted
@pytest.mark.parametrize("mode", MODES)
def test_rows(mode: str) -> None:
    """Fails if rows beyond the 64th are lost, read out of the other plane or written where there are none, if N is no
    multiple of a tile, or if K is a multiple of neither a block nor two groups (36 groups of 64 are more than one piece
    of the offsets)."""
    for M, K in zip(ROWS, (320, 576, 2304 if MODES[mode][1] == 64 else 208), strict=True):
        x, weight = torch.randn(M, K, generator=torch.Generator().manual_seed(M)), weights(mode, 140, K)
        x[M - 1] = 0
        config = tiling(mode, M, 140, K, 86)._replace(SK=2 if M == 100 else 1)
        out = linear_triton(x, weight, config=config)
        assert_near(out, separate_steps(x, weight, None), mode, (M, config))
        assert not out[M - 1].any()


@pytest.mark.slow
@interpreted
@pytest.mark.parametrize("mode", MODES)
def test_options(mode: str) -> None:
    """Fails if norm, bias, gate, residual, or RoPE and the cache write take another row's or another tile's part."""
    M, K, H, D, g = 70, 256, 4, 24, torch.Generator().manual_seed(7)
    x, bias, norm = torch.randn(M, K, generator=g), torch.randn(144, generator=g), (torch.rand(K, generator=g), 0.1)
    weight, residual = weights(mode, 144, K), torch.randn(M, 72, generator=g)
    for SK in (1, 2):
        config = tiling(mode, M, 144, K, 90)._replace(SK=SK, BK=64)
        out = linear_triton(x, weight, bias, norm, residual, True, config=config)
        assert_near(out, separate_steps(x, weight, norm, bias=bias, residual=residual, gated=True), mode, config)
        angles, slots = 6 * torch.rand(M, D // 2, generator=g).repeat(1, 2), torch.randperm(130, generator=g)[:M]
        rope, kv = torch.stack((angles.cos(), angles.sin())), torch.zeros(2, 1, 130, D)
        wanted = kv.double()
        q = rope_store_torch(separate_steps(x, weight, norm, bias=bias), rope.double(), slots, wanted)
        out = linear_triton(x, weight, bias, norm, rope_cache=(rope, slots, kv), config=config)
        assert out.shape == (M, H * D)
        assert_near(out, q.flatten(1), mode, config)
        assert_near(kv, wanted, mode, config)


@pytest.mark.parametrize("arch", CARDS)
@pytest.mark.parametrize("mode", MODES)
def test_tilings(mode: str, arch: int) -> None:
    """Fails if a tiling does not hold all rows, has blocks that hold a part of a piece of a group, has more splits or
    counters than there are, leaves most of a wave of programs idle, or if some number of rows gets another one."""
    group = MODES[mode][1]
    for N, K in itertools.chain(*SHAPES.values()):
        c = tiling(mode, MAX_ROWS, N, K, arch)
        assert {tiling(mode, M, N, K, arch) for M in range(65, MAX_ROWS)} == {c} and c.BM == MAX_ROWS
        columns, tiles = -(-K // 256) * 128 if group else K, -(-N // c.BN)
        assert columns % c.BK == 0 and (not group or group % c.BK == 0)
        assert 1 <= c.SK <= min(64, columns // c.BK) and (c.SK == 1 or tiles <= MAX_TILES)
        assert c.ahead * c.BK % (128 if MODES[mode][0] else 64) == 0, "the prefetch counts in lines of 128 bytes"
        programs = tiles * c.SK
        if K >= 4096:
            assert programs / CARDS[arch] > 0.7


@pytest.mark.slow
@not_interpreted
@pytest.mark.parametrize("arch", cards("128 rows", (86, 89, 90)))
@pytest.mark.parametrize("mode", list(MODES)[:4])
def test_linear_compiles(mode: str, arch: int) -> None:
    """Fails if a tiling for 128 rows spills, wants more shared memory than there is, reads its weights in pieces of
    less than 16 bytes a thread, or on Hopper lets no load run ahead of the tensor cores."""
    pytest.importorskip("triton")
    planes, group = MODES[mode]
    wanted = {(tiling(mode, 128, N, K, arch), heads)
              for N, K, heads in ((22016, 4096, False), (4096, 11008, False), (6144, 4096, True))}
    for c, heads in largest(wanted):
        made = compile_linear(c, True, arch, True, norm=False, heads=heads, planes=planes, group=group)
        assert_fits(made, arch, c)
        assert re.search(r"cp\.async\.cg|ld\.global\S*\.v4\.b32", made.ptx), f"{c} does not read 16 bytes a thread"
        if arch == 90:
            check_pipeline(made, c, loads=5 if group else 2)


def check_pipeline(made: Compiled, c: Tiling, loads: int) -> None:
    """Fails if the loop waits for other loads than its oldest, or if tensor cores that go on while it turns read what
    the next load overwrites (see test_linear.check_pipeline)."""
    waits = [int(n) for n in re.findall(r"async_wait .*num = (\d+)", made.ttgir)]
    pending = max(int(n) for n in re.findall(r"pendings = (\d+)", made.ttgir))
    buffers = [int(n) for n in re.findall(r"ttg\.local_alloc :.*memdesc<(\d+)x\d+x\d+x", made.ttgir)]
    assert max(waits) >= loads * (c.stages - 2), f"{c}: waits for all but {max(waits)} loads"
    assert pending == 0 or buffers[:2] == [c.stages] * 2, f"{c}: {buffers} buffers, {pending} products"


# ----- Attention -----------------------------------------------------------------------------------------------------


def random_tree(nodes: int, seed: int = 0) -> Tree:
    """A random tree whose siblings have different tokens; no path is longer than about 15."""
    g = torch.Generator().manual_seed(seed)
    parents = [0] + [int(torch.randint(max(0, i - 40), i, (), generator=g)) for i in range(1, nodes)]
    tokens = [parents[1:i].count(parents[i]) for i in range(nodes)]
    return build_tree(torch.tensor(tokens), torch.tensor(parents), nodes)


@interpreted
@pytest.mark.parametrize("T, G, base", [(65, 3, 0), (128, 1, 63)])
def test_attention(T: int, G: int, base: int) -> None:
    """Fails if a row beyond the 64th or a bit of the second word is lost, with the tiles and splits that 65 to 128
    tokens get. The slots that no bit can name hold NaN."""
    torch.manual_seed(T + base)
    D, S, bits = 16, base + 128 + 20, random_tree(T).ancestors
    q, kv, start = torch.randn(T, G, D), torch.randn(2, 1, S, D), torch.tensor(base)
    kv[:, :, base + 128:] = torch.nan
    for words, NS in ((bits, 3), (None, 2)):
        wanted = tree_attention_torch(q.double(), kv.double().nan_to_num(0), start, words)
        out = tree_attention_triton(q, kv, start, words, config=(128, 64, NS, 8, 2))
        torch.testing.assert_close(out.double(), wanted, rtol=0, atol=3e-6)


def test_what_a_row_sees() -> None:
    """Fails if the twin's mask of 128 nodes shows a row anything but the prefix and its ancestors."""
    made, base = random_tree(128), 5
    assert made.ancestors.shape == (128, 2)
    for row, seen in enumerate(TreeMask(torch.tensor(base), made.ancestors).dense(128, 140).tolist()):
        above, node = {base + row}, row
        while node:
            node = int(made.parents[node])
            above.add(base + node)
        assert {slot for slot, sees in enumerate(seen) if sees} == {*range(base), *above}


def test_attention_splits() -> None:
    """Fails if 65 to 128 tokens are taken for a prefill, whose slots are not split, or a longer chunk is not."""
    for T, G, K in itertools.product((65, 100, 128), (1, 4), (8, 32)):
        for arch, sms in CARDS.items():
            BM, _, NS, *_ = attention_config(T, G, K, 128, torch.bfloat16, sms, divmod(arch, 10))
            programs = NS * K * -(-T * G // BM)
            assert NS == 8 or sms / 2 < programs <= sms or NS == 1 and programs > sms / 2
    assert attention_config(129, 1, 32, 128, torch.bfloat16, 132, (9, 0))[2] == 1


@pytest.mark.slow
@not_interpreted
@pytest.mark.parametrize("arch", cards("128 rows", (86, 89, 90)))
def test_attention_compiles(arch: int) -> None:
    """Fails if attention of 128 rows with two words of bits spills or wants too much shared memory."""
    pytest.importorskip("triton")
    sms = CARDS[86 if arch == 89 else arch]  # with as many splits, sm_89 gets the code of sm_86
    for H, K, D in ((32, 32, 128), (32, 8, 128), (9, 3, 64)):
        BM, BN, NS, warps, stages = attention_config(128, H // K, K, D, torch.bfloat16, sms, divmod(arch, 10))
        types = dict.fromkeys(attention_kernel.arg_names, "*bf16") | {"base": "*i64", "bits": "*i64", "S": "i32"}
        types |= {"parts": "*fp32", "logs": "*fp32"}
        constants = {"T": 128, "H": H, "K": K, "D": D, "DP": triton.next_power_of_2(D), "WORDS": 2, "WINDOW": 0,
                     "EARLY": arch >= 90, "BM": BM, "BN": BN, "NS": NS, "PDL": arch >= 90}
        assert NS > 1
        assert_fits(compile_ahead(attention_kernel, arch, types, constants, warps, stages), arch, (H, K, D))


# ----- Trees ---------------------------------------------------------------------------------------------------------


def state_of(tokens: list[int]) -> State:
    text = torch.full((300,), -7)
    text[:len(tokens)] = torch.tensor(tokens)
    return State(text, torch.tensor(len(tokens)), torch.zeros(1), torch.tensor(5), torch.tensor(False), 300)


@interpreted
@pytest.mark.parametrize("n, count, max_depth, step", [(64, 64, 8, 0.5), (100, 900, 8, 0.0), (126, 126, 126, 0.0),
                                                       (127, 2032, 16, 0.5), (127, 500, 3, 5.0)])
def test_rerank(n: int, count: int, max_depth: int, step: float) -> None:
    """Fails if a tie is decided differently, if a parent's number, a depth or a bit of either word is wrong, or if
    padding is kept. A third of the scores are ties; 126 nodes are a chain."""
    g = torch.Generator().manual_seed(n + count)
    parents, scores, depths = [], [], []
    for i in range(count):
        parent = i - 1 if max_depth == 126 else int(torch.randint(-1, i, (), generator=g)) if i else -1
        if parent >= 0 and depths[parent] == max_depth:
            parent = -1
        parents.append(parent)
        depths.append(depths[parent] + 1 if parent >= 0 else 1)
        fall = step * int(torch.randint(0, 3, (), generator=g))
        scores.append((scores[parent] if parent >= 0 else 0.0) - fall)
    tokens = torch.randint(0, 99, (count,), generator=g)
    candidates, state = Candidates(tokens, torch.tensor(scores), torch.tensor(parents)), state_of([4, 8, 1234])
    wanted = tree.rerank(state, candidates, n, max_depth)
    assert wanted.ancestors.shape == (n + 1, 2)
    for ours, theirs in zip(tree_kernels.rerank(state, candidates, n, max_depth), wanted, strict=True):
        assert torch.equal(ours, theirs)


def shapes() -> Iterator[Tree]:
    """A chain, a star and random trees, of 65 to 128 nodes."""
    yield build_tree(torch.zeros(128, dtype=torch.int64), (torch.arange(128) - 1).clamp(min=0), 127)
    yield build_tree(torch.arange(128), torch.zeros(128, dtype=torch.int64), 1)
    for seed, nodes in enumerate((65, 66, 100, 127, 128, 128)):
        yield random_tree(nodes, seed)


@interpreted
def test_accept_commit() -> None:
    """Fails if a wrong node in either word blocks no descendant or another's, if the path loses nodes of a word, if
    the bonus token is another node's, or if a stop id or the limit is overlooked."""
    reached, g = set(), torch.Generator().manual_seed(3)
    for made, turn in itertools.product(shapes(), range(4)):
        nodes, max_depth = len(made.tokens), int(made.depth.max())
        target = int(torch.randint(nodes // 2, nodes, (), generator=g))  # the target model writes the way down to here
        chosen = torch.full((nodes,), 777)
        node = target
        while node:
            chosen[made.parents[node]] = made.tokens[node]
            node = int(made.parents[node])
        if turn == 1:  # but for one node of it
            chosen[made.parents[torch.randint(1, nodes, (), generator=g)]] = 778
        stop_ids = torch.tensor([[], [777], [0], [1, 2]][turn], dtype=torch.int64)
        limit = torch.tensor(3 + (5 if turn == 3 else 200))
        ours, theirs = state_of([5, 6, 1]), state_of([5, 6, 1])
        reports = torch.full((2, max_depth + 3), -1)
        path = tree_kernels.accept_commit(made, chosen, ours, stop_ids, limit, max_depth, reports[0])
        wanted = tree.accept_commit(made, chosen, theirs, stop_ids, limit, max_depth, reports[1])
        assert torch.equal(path, wanted) and torch.equal(reports[0], reports[1])
        for name in ("tokens", "length", "committed", "done"):
            assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
        reached.add(int(path[-1]) // 64)
        assert turn or path[-1] == target
    assert reached == {0, 1}  # the last nodes are in both words


@pytest.mark.slow
@not_interpreted
@pytest.mark.parametrize("arch", [86, 90])
def test_tree_kernels_compile(arch: int) -> None:
    """Fails if one of the two does not compile for 128 nodes, the largest grid of candidates (on sm_90 alone, for it
    takes long) and paths of 16."""
    pytest.importorskip("triton")
    for kernel, warps, constants in ((accept_commit_kernel, 4, {"PATH": 32, "STOP_TILE": 4}),
                                     (rerank_kernel, 8, {"MAX_DEPTH": 16, "SIZE": 2048}))[:2 if arch == 90 else 1]:
        types = dict.fromkeys(kernel.arg_names, "*i64") | {"scores": "*fp32", "done": "*i1"}
        types |= dict.fromkeys(("N", "n", "T", "STOPS", "STEPS"), "i32")
        made = compile_ahead(kernel, arch, types, constants | {"WORDS": 2, "PDL": arch >= 90}, warps)
        assert_fits(made, arch, kernel.__name__)
