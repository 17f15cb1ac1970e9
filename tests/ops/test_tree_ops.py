"""tree_kernels.py without a GPU: Triton's interpreter against tree.py, draft.py and generate.py, and its compiler.

The interpreter accepts what the compiler refuses and the compiler computes nothing, so each kernel meets both. They
exclude one another in one process: one test runs this file again in the interpreter, another as a script, which
compiles what the launchers launch for three GPUs. `TRITON_INTERPRET=1 pytest tests/test_tree_kernels.py` shows the
interpreter's cases singly.
"""
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import sampling
import tree
from ops import tree as tree_kernels

if __name__ != "__main__":
    import pytest
    import tiny
    from hypothesis import example, given, settings
    from hypothesis import strategies as st
from draft import Eagle2
from drafters.eagle1 import Eagle1
from engine import Engine
from ops.tree import accept_commit, argmax, catch_up, compact, grow, gumbel_noise, rerank, top_children
from tree import Candidates, Level, State, Tree, accept, best_first, build_tree, start_tree

INTERPRETER = os.environ.get("TRITON_INTERPRET") == "1"
CPU = torch.device("cpu")
SHARED = {86: 101376, 89: 101376, 90: 232448}  # bytes of shared memory a block may have


def compile_launches() -> list[dict]:
    """Call every launcher with kernels that compile what they are launched with instead of running it."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    results, tools = [], Path(triton.__file__).parent / "backends/nvidia/bin"
    types = {torch.int64: "*i64", torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16",
             torch.bool: "*i1"}

    def compile_for(kernel, gpu: int, args: tuple, num_warps: int = 4, **_) -> None:
        args = *args, gpu >= 90  # PDL
        signature, constants, attributes = {}, {}, {}
        for i, (parameter, value) in enumerate(zip(kernel.params, args, strict=True)):
            pointer = isinstance(value, Tensor)
            one = not pointer and value == 1 and not parameter.do_not_specialize
            if parameter.is_constexpr or value is None or one:
                signature[parameter.name], constants[i,] = "constexpr", value
                continue
            signature[parameter.name] = types[value.dtype] if pointer else "i32"
            if pointer or (value % 16 == 0 and not parameter.do_not_specialize):
                attributes[i,] = [["tt.divisibility", 16]]
        source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
        made = triton.compile(source, target=GPUTarget("cuda", gpu, 32), options={"num_warps": num_warps})
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(made.asm["cubin"])
            file.flush()
            usage = subprocess.run([tools / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True)
        registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage.stdout).groups()
        results.append({"kernel": kernel.__name__, "gpu": gpu, "registers": int(registers), "stack": int(stack),
                        "shared": made.metadata.shared, "constants": str(constants)})

    class Compiled:
        def __init__(self, kernel) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: tuple):
            return lambda *args, **options: [compile_for(self.kernel, gpu, args, **options) for gpu in SHARED]

    for name in [name for name in vars(tree_kernels) if name.endswith("_kernel")]:
        setattr(tree_kernels, name, Compiled(getattr(tree_kernels, name)))
    launch_all()
    return results


def launch_all() -> None:
    """Every launcher, in the shapes it is used with: Llama-2's, Llama-3's and a chain."""
    count = torch.tensor(0)
    state = State(torch.zeros(100, dtype=torch.int64), count, torch.zeros(1), count, count > 0, 0)
    for vocab, k, depth, nodes, dtype in ((32000, 10, 6, 60, torch.bfloat16), (128256, 10, 6, 64, torch.float16),
                                          (40, 1, 8, 9, torch.float32)):
        root, candidates = start_tree(k, depth, CPU)
        level = grow(torch.zeros(1, vocab, dtype=dtype), root, candidates, 0, k)
        grow(torch.zeros(k, vocab, dtype=dtype), level, candidates, 1, k)
        for noise in (None, torch.zeros(vocab)):
            grow(torch.zeros(k, vocab, dtype=dtype), level, candidates, 1, k, torch.arange(vocab), noise)
        made = rerank(state, candidates, nodes - 1, depth)
        tokens, _ = top_children(torch.zeros(k, vocab, dtype=dtype), k)
        chosen = argmax(torch.zeros(nodes, vocab, dtype=dtype))
        stop_ids, report = tokens.new_zeros(k % 4), tokens.new_zeros(depth + 3)
        path = accept_commit(made, chosen, state, stop_ids, count, depth, report)
        for size in (128, 80)[:k]:
            kv, features = torch.zeros(2, 2, 2, 100, size, dtype=dtype), torch.zeros(nodes, 8 * size, dtype=dtype)
            compact(kv, count, path, features, features[:depth + 1])
            gumbel_noise(count, path, vocab)
        catch_up(state, depth + 1, torch.zeros(2, (depth - 1) * k, dtype=torch.int64))


if __name__ == "__main__":
    print(json.dumps(compile_launches()))
    sys.exit()


def run(*command: str, interpret: bool = False) -> str:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_INTERPRET": "1"} if interpret else {}
    made = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True)
    assert made.returncode == 0, made.stdout[-8000:] + made.stderr[-3000:]
    return made.stdout


def test_compiles() -> None:
    """What only the interpreter accepts; spilled registers; more shared memory than an RTX 3090 has."""
    results = json.loads(run(__file__).splitlines()[-1])
    assert {r["kernel"] for r in results} == {n for n in vars(tree_kernels) if n.endswith("_kernel")}
    for result in results:
        assert result["stack"] == 0 and result["shared"] <= SHARED[result["gpu"]], result


def test_imports_without_triton() -> None:
    """A machine without a GPU that cannot even start."""
    folder = str(Path(tree_kernels.__file__).parents[1])
    run("-c", f"import sys; sys.modules['triton'] = None; sys.path.insert(0, {folder!r}); import tree_kernels")


@pytest.mark.skipif(INTERPRETER, reason="this is that process")
def test_in_the_interpreter() -> None:
    """Everything below."""
    run("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", "not compiles", __file__, interpret=True)


interpreted = pytest.mark.skipif(not INTERPRETER, reason="runs in test_in_the_interpreter")


def rows(kind: str, n: int, vocab: int, seed: int = 0) -> Tensor:
    """Logits [n, vocab] with something wrong with them."""
    random = torch.Generator().manual_seed(seed)
    x = 4 * torch.randn(n, vocab, generator=random)
    if kind == "ties":
        x = torch.where(x > 6, 1.0, x * 0)  # zeros of both signs, and few ones
    elif kind == "excluded":
        x[:, 3:] = -torch.inf
    elif kind == "certain":
        x[:, vocab // 2] = 200.0
    elif kind == "negative":
        x -= 1000
    return x


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["random", "ties", "excluded", "certain", "negative"])
def test_top_children(kind: str, dtype: torch.dtype) -> None:
    """A tie to the higher id, a token of the padding, the last block or the last row forgotten, a sum without its
    block's peak, log p above 0 or nan where whole blocks are excluded."""
    for n, vocab, k in ((1, 3000, 10), (5, 1025, 3), (16, 12, 10), (2, 1024, 1), (1, 1, 1)):
        logits = rows(kind, n, vocab).to(dtype)
        tokens, log_p = top_children(logits, k)
        order = logits.float().sort(descending=True, stable=True)
        assert torch.equal(tokens, order.indices[:, :k])
        exact = logits.double().log_softmax(-1).gather(1, tokens)
        assert log_p.dtype == torch.float32 and (log_p <= 0).all()
        torch.testing.assert_close(log_p.double(), exact.clamp(max=0), rtol=1e-6, atol=2e-6)


@interpreted
def test_top_children_of_a_view() -> None:
    """Rows taken to be next to each other though the logits are columns of a padded matrix."""
    logits = rows("random", 3, 1100)
    assert torch.equal(top_children(logits[:, :1050], 4)[0], top_children(logits[:, :1050].contiguous(), 4)[0])


@interpreted
@pytest.mark.parametrize("kind", ["random", "ties", "excluded"])
def test_argmax(kind: str) -> None:
    """As above, for verification."""
    for n, vocab in ((1, 1), (2, 2049), (64, 40), (3, 5000)):
        logits = rows(kind, n, vocab).bfloat16()
        assert torch.equal(argmax(logits), logits.float().sort(descending=True, stable=True).indices[:, 0])


def bit_rows(bits: Tensor, width: int) -> Tensor:
    """bits [N, words] -> bool [N, width]."""
    slot = torch.arange(width)
    return (bits[:, slot // 64] >> (slot % 64)) & 1 == 1


@interpreted
@pytest.mark.parametrize("kind, k, levels", [("random", 1, 8), ("certain", 2, 4), ("excluded", 7, 3), ("ties", 10, 8),
                                             ("random", 10, 2)])
def test_grow(kind: str, k: int, levels: int) -> None:
    """Children under another row's score, candidates at another level's place, the frontier unstable at a tie, masks
    across the border of the two words. The log-probabilities are top_children's: all the rest must be equal."""
    level, candidates = start_tree(k, levels, CPU)
    parents, seen, used = level.index, torch.zeros(1, 8 * k, dtype=torch.bool), 0
    for depth in range(levels):
        logits = rows(kind, 1 if depth == 0 else k, 40, seed=depth)
        tokens, log_p = top_children(logits, k)
        scores = (level.scores[:, None] + log_p).flatten()
        level = grow(logits, level, candidates, depth, k)
        added = slice(used, used + len(scores))
        assert torch.equal(candidates.tokens[added], tokens.flatten())
        assert torch.equal(candidates.scores[added], scores)
        assert torch.equal(candidates.parents[added], parents.repeat_interleave(k))
        best = best_first(scores, k)
        seen = seen[best // k] | (torch.arange(8 * k) == depth * k + torch.arange(k)[:, None])
        parents = used + best
        assert torch.equal(level.tokens, tokens.flatten()[best])
        assert torch.equal(level.scores, scores[best])
        assert torch.equal(level.index, parents)
        assert torch.equal(level.parent_rows, best // k)
        assert torch.equal(bit_rows(level.visible, 8 * k), seen)
        used += len(scores)
    assert used == len(candidates.tokens)


@interpreted
def test_grow_where_children_are_impossible() -> None:
    """-inf scores: all tie, and nan or an index out of range must not come of adding to them."""
    _, candidates = start_tree(3, 3, CPU)
    level = Level(torch.zeros(3, dtype=torch.int64), torch.tensor([-1.0, -torch.inf, -torch.inf]), torch.arange(3),
                  torch.arange(3), torch.zeros(3, 2, dtype=torch.int64))
    logits = torch.tensor([[0.0, -torch.inf, -torch.inf, -torch.inf]]).expand(3, 4).contiguous()
    level = grow(logits, level, candidates, 1, 3)
    assert level.scores.tolist() == [-1.0, -torch.inf, -torch.inf]
    assert level.index.tolist() == [3, 4, 5] and level.tokens.tolist() == [0, 1, 2]


def text_state(tokens: list[int], slots: int = 100, done: bool = False) -> State:
    text = torch.full((slots,), -7)
    text[:len(tokens)] = torch.tensor(tokens)
    return State(text, torch.tensor(len(tokens)), torch.zeros(1), torch.tensor(5), torch.tensor(done), slots)


@interpreted
@given(st.data())
@settings(max_examples=15)
def test_rerank(data) -> None:
    """An unstable choice, a parent's number off by the root, depth or bits wrong at the deepest level, padding kept."""
    k, max_depth = data.draw(st.sampled_from([(1, 1), (1, 8), (2, 3), (3, 8), (10, 1), (10, 3), (10, 8)]))
    random = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))
    step = data.draw(st.sampled_from([0.0, 0.5, 5.0, torch.inf]))
    parents, scores = [-1] * k, []
    for _ in range(1, max_depth):
        first, size = max(0, len(parents) - k * k), min(len(parents), k * k)
        fed = first + torch.randperm(size, generator=random)[:k]
        parents += fed.repeat_interleave(k).tolist()
    fall = torch.randint(0, 3, (len(parents),), generator=random) * step  # many ties
    noise = torch.rand(len(parents), generator=random)
    fall = torch.where(noise < 0.3, noise, fall.nan_to_num(0, posinf=torch.inf))
    for parent, less in zip(parents, fall.tolist(), strict=True):
        scores.append((0.0 if parent < 0 else scores[parent]) - less)
    n = data.draw(st.integers(1, min(63, len(parents))))
    tokens = torch.randint(0, 99, (len(parents),), generator=random)
    candidates = Candidates(tokens, torch.tensor(scores), torch.tensor(parents))
    state = text_state([4, 8, 1234])
    expected = tree.rerank(state, candidates, n, max_depth)
    for made, wanted in zip(rerank(state, candidates, n, max_depth), expected, strict=True):
        assert torch.equal(made, wanted)


CHAIN, STAR = [0, *range(63)], [0] * 64


@st.composite
def trees(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    """(tokens, parents) of 1 to 64 nodes; siblings differ, cousins often do not."""
    size = draw(st.integers(1, 64))
    parents = [0] + [draw(st.integers(max(0, i - draw(st.sampled_from([1, 3, 64]))), i - 1)) for i in range(1, size)]
    return [parents[1:i].count(parents[i]) for i in range(size)], parents


@interpreted
@given(trees(), st.data())
@example(([0] * 64, CHAIN), None)
@example((list(range(64)), STAR), None)
@settings(max_examples=120)
def test_accept_commit(drawn: tuple[list[int], list[int]], data) -> None:
    """Bit 63, the bonus token of another node, a stop id inside the path, the limit in the middle of it, both at
    once, a cycle after the end that changes anything."""
    draw = (lambda strategy: data.draw(strategy)) if data else None
    tokens, parents = drawn
    depths = build_tree(torch.tensor(tokens), torch.tensor(parents), 63).depth
    max_depth = int(depths.max()) + (draw(st.integers(0, 2)) if draw else 0)
    made = build_tree(torch.tensor(tokens), torch.tensor(parents), max_depth)
    next_tokens = [next((tokens[i] for i in range(len(tokens)) if i and parents[i] == node), 3)
                   if not draw or draw(st.integers(0, 5)) else draw(st.integers(0, 5)) for node in range(len(tokens))]
    stop_ids = torch.tensor(draw(st.sampled_from([[], [], [0], [3], [1, 2, 3]])) if draw else [], dtype=torch.int64)
    limit = torch.tensor(3 + (draw(st.integers(1, 9)) if draw else 99))
    done = bool(draw and draw(st.integers(0, 7)) == 7)
    ours, theirs = text_state([5, 6, tokens[0]], done=done), text_state([5, 6, tokens[0]], done=done)
    report = torch.full((max_depth + 3,), -1)
    expected_report = report.clone()
    path = accept_commit(made, torch.tensor(next_tokens), ours, stop_ids, limit, max_depth, report)
    assert torch.equal(path, accept(made, torch.tensor(next_tokens), max_depth)[0])
    tree.accept_commit(made, torch.tensor(next_tokens), theirs, stop_ids, limit, max_depth, expected_report)
    if done:
        theirs.tokens = text_state([5, 6, tokens[0]]).tokens  # PyTorch's writes past the end, where nobody reads
    for name in ("tokens", "length", "committed", "done"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
        assert getattr(ours, name).dtype == getattr(theirs, name).dtype
    assert torch.equal(report, expected_report)


@interpreted
@pytest.mark.parametrize("size", [4, 5])
@pytest.mark.parametrize("path", [[0], [0, 0, 0], [0, 1, 2], [0, 2, 3, 5, 9, 9, 9, 9, 9], [0, 60, 61, 62, 63]])
def test_compact(path: list[int], size: int) -> None:
    """A row overwritten before it was read, a head or layer left out, the padding of the head dimension."""
    kv, features, base = torch.randn(3, 2, 1, 2, 80, size), torch.randn(64, 11), torch.tensor(7)
    expected, path = kv.clone(), torch.tensor(path)
    expected.index_copy_(4, base + torch.arange(len(path)), kv.index_select(4, base + path))
    kept = torch.full((len(path), 11), torch.nan)
    compact(kv, base, path, features, kept)
    assert torch.equal(kept, features[path])
    assert torch.equal(kv, expected)


@interpreted
@pytest.mark.parametrize("seed", [0, -1, 2**31, 2**32 + 1, 2**63 - 1, -2**63])
def test_gumbel_noise(seed: int) -> None:
    """Another noise on a GPU than what the tests of sampling.py are about: a signed shift, a tail cut off."""
    places = torch.tensor([0, 7, 2**31 + 5])
    noise = gumbel_noise(torch.tensor(seed), places, 3000)
    torch.testing.assert_close(noise, sampling.gumbel_noise(torch.tensor(seed), places, 3000), rtol=1e-5, atol=1e-5)


@interpreted
def test_best_of_some_tokens() -> None:
    """A place in the draft's vocabulary taken for a token."""
    logits, ids = rows("random", 5, 1100), torch.randperm(5000)[:1100].sort().values
    noise = torch.randn(5000)
    for given, shifted in ((None, logits), (noise, logits + noise[ids])):
        assert torch.equal(tree_kernels.best_tokens(logits, 4, ids, given), tree.best_tokens(logits, 4, ids, given))
        assert torch.equal(tree.best_tokens(logits, 4, ids, given), ids[shifted.topk(4).indices])
        trees = []
        for steps in (tree, tree_kernels):
            level, candidates = start_tree(4, 2, CPU)
            level = steps.grow(logits[:1], level, candidates, 0, 4, ids, given)
            trees.append((steps.grow(logits[1:], level, candidates, 1, 4, ids, given).tokens, candidates.tokens))
        for ours, theirs in zip(*trees, strict=True):
            assert torch.equal(ours, theirs) and torch.isin(ours, ids).all()
    every = rows("random", 5, 5000)  # of all tokens: noise needs no list
    assert torch.equal(tree_kernels.best_tokens(every, 4, None, noise), (every + noise).topk(4).indices)


@interpreted
def test_catch_up() -> None:
    """A place or a token off by one, a slot of another tree's node."""
    random = torch.Generator().manual_seed(0)
    for n, fed in ((1, 0), (7, 3), (9, 50)):
        length, committed = torch.tensor(60 - n), torch.tensor(max(1, n - 2))
        state = State(torch.randint(99, (61,), generator=random), length, torch.zeros(1), committed, length > 99, 0)
        where = torch.randint(40, (2, fed), generator=random)
        first = int(length - committed) - 1
        wanted = (state.tokens[first + 1:first + 1 + n], torch.arange(first, first + n), committed[None] - 1,
                  length + where)
        for step in (tree.catch_up, catch_up):
            for ours, theirs in zip(step(state, n, where), wanted, strict=True):
                assert torch.equal(ours, theirs)


class FusedEagle2(Eagle2):
    """Eagle2 whose tree is grown by the kernels, and compared with what tree.py grows."""
    trees = 0

    def propose(self, state: State) -> Tree:
        made = []
        for self.steps in (tree, tree_kernels):
            made.append(super().propose(state))
        for ours, theirs in zip(*made, strict=True):
            assert torch.equal(ours, theirs)
        self.trees += 1
        return made[1]


@interpreted
@pytest.mark.parametrize("shape", [(2, 1, 1), (9, 8, 1), (12, 3, 3), (64, 6, 10)])
def test_cycle(shape: tuple[int, int, int]) -> None:
    """The kernels put together in the wrong order, or one's output read as another thing: same trees, same text."""
    model, head = tiny.pair()
    ids, stop = tiny.prompt(0, 9), frozenset([7])
    expected = list(Engine(model, Eagle2(head, model, *shape), 128, stop).generate(ids, 5))
    drafter = FusedEagle2(head, model, *shape)
    engine = Engine(model, drafter, 128, stop)
    engine.tree_ops = tree_kernels
    assert list(engine.generate(ids, 5)) == expected
    assert drafter.trees == len(expected) - 1 > 0


@interpreted
def test_cycle_of_eagle1() -> None:
    """The fixed tree gives the kernels what they can read: the same drafts, so the same cycles."""
    model, head = tiny.pair(noise=0.05)
    engines = [Engine(model, Eagle1(head, model), 128) for _ in range(2)]
    engines[1].tree_ops = engines[1].drafter.tree_ops = tree_kernels
    ours, theirs = (list(engine.generate(tiny.prompt(0, 9), 12)) for engine in engines)
    assert ours == theirs and max(map(len, ours)) > 2
