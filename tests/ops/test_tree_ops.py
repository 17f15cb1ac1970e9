"""ops/tree.py and ops/topk.py in Triton's interpreter (tests/triton_tools.py), against tree.py, draft.py and
sampling.py. What Triton's compiler makes of them is in test_tree_ops_aot.py."""
import pytest
import tiny
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from triton_tools import interpreted, not_interpreted

import sampling
import tree
from draft import Eagle2
from drafters.eagle1 import Eagle1
from engine import Engine
from ops import tree as tree_kernels
from ops.topk import argmax, merge_lists, top_children
from ops.tree import accept_commit, catch_up, compact, grow, gumbel_noise, rerank
from tree import Candidates, Level, State, Tree, accept, best_first, build_tree, start_tree

CPU = torch.device("cpu")


@pytest.mark.slow
@not_interpreted
@pytest.mark.xdist_group("interpreter")
def test_in_the_interpreter(interpreter) -> None:
    """Fails if one of the tests below fails."""
    interpreter(__file__)


def rows(kind: str, n: int, vocab: int, seed: int = 0) -> Tensor:
    """Logits [n, vocab], random or of a difficult kind."""
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
@pytest.mark.parametrize("kind, dtype", [
    ("random", torch.float32), ("random", torch.bfloat16), ("random", torch.float16), ("ties", torch.float32),
    ("excluded", torch.float16), ("certain", torch.bfloat16), ("negative", torch.float32)])
def test_top_children(kind: str, dtype: torch.dtype) -> None:
    """Fails if a tie goes to the higher id, if a token of the padding wins, if the last block or row is forgotten, if a
    block's sum is not scaled by its peak, or if log p is above 0, or NaN where whole blocks are excluded."""
    for n, vocab, k in ((1, 3000, 10), (4, 1025, 3), (3, 12, 10), (2, 1024, 1), (1, 1, 1)):
        logits = rows(kind, n, vocab).to(dtype)
        tokens, log_p = top_children(logits, k)
        order = logits.float().sort(descending=True, stable=True)
        assert torch.equal(tokens, order.indices[:, :k])
        exact = logits.double().log_softmax(-1).gather(1, tokens)
        assert log_p.dtype == torch.float32 and (log_p <= 0).all()
        torch.testing.assert_close(log_p.double(), exact.clamp(max=0), rtol=1e-6, atol=2e-6)


@interpreted
def test_top_children_of_a_view() -> None:
    """Fails if rows are taken for contiguous though the logits are columns of a wider matrix."""
    logits = rows("random", 3, 1100)
    assert torch.equal(top_children(logits[:, :1050], 4)[0], top_children(logits[:, :1050].contiguous(), 4)[0])


@interpreted
@pytest.mark.parametrize("kind", ["random", "ties", "one list", "one each"])
def test_merge_lists(kind: str) -> None:
    """Fails if a list is not read, or not far enough, if a tie goes to a later list, if the last lists are those of the
    next row, or if a block's sum is not scaled by its peak."""
    random = torch.Generator().manual_seed(0)
    for n, blocks, k in ((3, 70, 10), (2, 33, 9), (2, 129, 2), (2, 3, 7), (2, 65, 1), (1, 1, 10)):
        values = torch.randn(n, blocks, 16, generator=random)
        if kind == "ties":
            values = values.round()
        elif kind == "one list":  # all the best, in the last list
            values[:, -1] += 100
        elif kind == "one each":
            values[:, :, 0] += 100
        order = values.sort(dim=-1, descending=True, stable=True)
        bits = (order.values + 0).view(torch.int32)  # -0 + 0 is 0
        bits ^= (bits >> 31) & 0x7FFFFFFF
        index = torch.arange(blocks)[:, None] * 16 + order.indices
        keys = (bits.long() << 32 | (0x7FFFFFFF - index))[:, :, :k].contiguous()
        peaks = order.values[:, :, 0].contiguous()
        sums = (values - peaks[:, :, None]).exp().sum(-1)
        ids = torch.arange(16 * blocks) * 3
        for some in (None, ids):
            tokens, log_p = merge_lists(keys, peaks, sums, some)
            best = values.flatten(1).sort(descending=True, stable=True).indices[:, :k]
            assert torch.equal(tokens, best if some is None else ids[best])
            exact = values.double().flatten(1).log_softmax(-1).gather(1, best)
            assert (log_p <= 0).all()
            torch.testing.assert_close(log_p.double(), exact, rtol=1e-6, atol=2e-5)


@interpreted
@pytest.mark.parametrize("kind", ["random", "ties", "excluded"])
def test_argmax(kind: str) -> None:
    """Fails like test_top_children, with the shapes of verification."""
    for n, vocab in ((1, 1), (2, 2049), (17, 40), (3, 5000)):
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
    """Fails if children get another row's score, if candidates are stored at another level's place, if the next level
    is chosen differently at a tie, or if masks are wrong across the border of the two words. The log-probabilities are
    top_children's, so everything must be equal."""
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
    """Fails if scores of -inf, which all tie, lead to NaN or to an index out of range."""
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
    """Fails if a tie is decided differently, if a parent's number is off by one, if depth or ancestors are wrong at the
    deepest level, or if padding is kept."""
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
    """Fails if bit 63 is lost, if the bonus token is another node's, if a stop id inside the path, the limit in the
    middle of it, or both at once are overlooked, or if a cycle after the end changes anything."""
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
        theirs.tokens = text_state([5, 6, tokens[0]]).tokens  # the twin writes past the end, where nothing is read
    for name in ("tokens", "length", "committed", "done"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
        assert getattr(ours, name).dtype == getattr(theirs, name).dtype
    assert torch.equal(report, expected_report)


@interpreted
@pytest.mark.parametrize("size", [4, 5])
@pytest.mark.parametrize("path", [[0], [0, 0, 0], [0, 1, 2], [0, 2, 3, 5, 9, 9, 9, 9, 9], [0, 60, 61, 62, 63]])
def test_compact(path: list[int], size: int) -> None:
    """Fails if a row is overwritten before it is read, if a head or layer is left out, or if the padding of the head
    dimension is moved too."""
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
    """Fails if a GPU's noise is another than the one that the tests of sampling.py check: by a signed shift, or a tail
    cut off."""
    positions = torch.tensor([0, 7, 2**31 + 5])
    noise = gumbel_noise(torch.tensor(seed), positions, 3000)
    torch.testing.assert_close(noise, sampling.gumbel_noise(torch.tensor(seed), positions, 3000), rtol=1e-5, atol=1e-5)


@interpreted
def test_best_of_some_tokens() -> None:
    """Fails if an index into the head's vocabulary is taken for a token."""
    logits, ids = rows("random", 5, 1100), torch.randperm(5000)[:1100].sort().values
    noise = torch.randn(5000)
    for added, shifted in ((None, logits), (noise, logits + noise[ids])):
        assert torch.equal(tree_kernels.best_tokens(logits, 4, ids, added), tree.best_tokens(logits, 4, ids, added))
        assert torch.equal(tree.best_tokens(logits, 4, ids, added), ids[shifted.topk(4).indices])
        trees = []
        for ops in (tree, tree_kernels):
            level, candidates = start_tree(4, 2, CPU)
            level = ops.grow(logits[:1], level, candidates, 0, 4, ids, added)
            trees.append((ops.grow(logits[1:], level, candidates, 1, 4, ids, added).tokens, candidates.tokens))
        for ours, theirs in zip(*trees, strict=True):
            assert torch.equal(ours, theirs) and torch.isin(ours, ids).all()
    every = rows("random", 5, 5000)  # of all tokens: noise needs no list
    assert torch.equal(tree_kernels.best_tokens(every, 4, None, noise), (every + noise).topk(4).indices)


@interpreted
def test_catch_up() -> None:
    """Fails if a position or a token is off by one, or a slot is that of another node."""
    random = torch.Generator().manual_seed(0)
    for n, fed in ((1, 0), (7, 3), (9, 50)):
        length, committed = torch.tensor(60 - n), torch.tensor(max(1, n - 2))
        state = State(torch.randint(99, (61,), generator=random), length, torch.zeros(1), committed, length > 99, 0)
        scratch = torch.randint(40, (2, fed), generator=random)
        first = int(length - committed) - 1
        wanted = (state.tokens[first + 1:first + 1 + n], torch.arange(first, first + n), committed[None] - 1,
                  length + scratch)
        for step in (tree.catch_up, catch_up):
            for ours, theirs in zip(step(state, n, scratch), wanted, strict=True):
                assert torch.equal(ours, theirs)


class FusedEagle2(Eagle2):
    """An Eagle2 that grows each tree with tree.py and with the kernels, and compares them."""
    trees = 0

    def propose(self, state: State) -> Tree:
        made = []
        for self.tree_ops in (tree, tree_kernels):
            made.append(super().propose(state))
        for ours, theirs in zip(*made, strict=True):
            assert torch.equal(ours, theirs)
        self.trees += 1
        return made[1]


@pytest.mark.slow
@interpreted
@pytest.mark.parametrize("shape", [(2, 1, 1), (9, 8, 1), (12, 3, 3), (64, 3, 10)])
def test_cycle(shape: tuple[int, int, int]) -> None:
    """Fails if the kernels do not fit together: they must give the same trees and the same text as tree.py."""
    model, head = tiny.pair()
    ids, stop = tiny.prompt(0, 9), frozenset([7])
    expected = list(Engine(model, Eagle2(head, model, *shape), 128, stop).generate(ids, 5))
    drafter = FusedEagle2(head, model, *shape)
    engine = Engine(model, drafter, 128, stop)
    engine.tree_ops = tree_kernels
    assert list(engine.generate(ids, 5)) == expected
    assert drafter.trees == len(expected) - 1 > 0


@pytest.mark.slow
@interpreted
def test_cycle_of_eagle1() -> None:
    """Fails if the kernels cannot read what the fixed tree gives them: the cycles must be the same."""
    model, head = tiny.pair(noise=0.05)
    engines = [Engine(model, Eagle1(head, model), 128) for _ in range(2)]
    engines[1].tree_ops = engines[1].drafter.tree_ops = tree_kernels
    ours, theirs = (list(engine.generate(tiny.prompt(0, 9), 12)) for engine in engines)
    assert ours == theirs and max(map(len, ours)) > 2
