"""What block drafters need of ops/tree.py, ops/markov.py and ops/context.py, in Triton's interpreter
(tests/triton_tools.py), against tree.py and model.py. What Triton's compiler makes of it is in
test_block_ops_aot.py."""
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from triton_tools import interpreted, not_interpreted, run_without_triton

import tree
from model import apply_rope
from ops import markov as markov_kernels
from ops import tree as tree_kernels
from ops.context import store_context_torch, store_context_triton
from ops.markov import grow_markov_torch, grow_markov_triton
from ops.topk import top_children
from tree import Candidates, empty_candidates, start_tree


@pytest.mark.slow
def test_imports_without_triton() -> None:
    """Fails if importing needs Triton: then a machine without a GPU could not even start."""
    run_without_triton("import ops.context")


@pytest.mark.slow
@not_interpreted
@pytest.mark.xdist_group("interpreter")
def test_in_the_interpreter(interpreter) -> None:
    """Fails if one of the tests marked `interpreted` fails."""
    interpreter(__file__)


# ----- grid: the best nodes of each depth ----------------------------------------------------------------------------


def block_logits(kind: str, depths: int, vocab: int) -> Tensor:
    """Logits [depths, vocab], random or of a difficult kind."""
    x = 3 * torch.randn(depths, vocab, generator=torch.Generator().manual_seed(depths * vocab))
    if kind == "same":  # in all rows: paths tie if they have the same ranks in another order
        x[:] = x[0].clone()
    elif kind == "flat":  # all tokens of a row tie
        x[:] = 0
    elif kind == "steps":  # few values, among them zeros of both signs
        x = (x / 2).trunc()
    elif kind == "excluded":
        x[:, 3:] = -torch.inf
    elif kind == "certain":
        x[:, vocab // 2] = 200.0
    return x


def grids(logits: Tensor, n: int, k: int, ids: Tensor | None = None, noise: Tensor | None = None) -> list[Candidates]:
    """What the kernels and tree.grid store, in candidates that end with a retrieved chain."""
    made = [empty_candidates(len(logits) * n, logits.device, retrieved=5) for _ in range(2)]
    tree_kernels.grid(logits, made[0], n, k, ids, noise)
    tree.grid(logits, made[1], n, k, ids, noise)
    return made


SHAPES = [(7, 4, 7), (59, 10, 2), (1, 1, 1), (1, 4, 2), (7, 1, 7), (15, 10, 15), (31, 4, 7), (63, 10, 7), (63, 1, 2),
          (127, 4, 7), (127, 10, 1)]  # n, k, D


@interpreted
@pytest.mark.parametrize("kind", ["random", "same", "flat", "steps", "excluded", "certain"])
def test_grid(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a pair that can be kept is not compared, if a tie goes to a later pair, if a depth gets the tokens or
    parents of another, if an entry is not -inf where there is no node, or if the retrieved chain is overwritten. Both
    sides take top_children's log-probabilities, so everything must be equal."""
    monkeypatch.setattr(tree, "best_children", lambda logits, scores, k: top_children(logits, k))
    for n, k, depths in SHAPES if kind in ("random", "same") else SHAPES[:2]:
        ours, theirs = grids(block_logits(kind, depths, 40), n, k)
        assert torch.equal(ours.tokens, theirs.tokens)
        assert torch.equal(ours.scores, theirs.scores)
        assert torch.equal(ours.parents, theirs.parents)


@interpreted
def test_grid_of_some_tokens() -> None:
    """Fails if a row gets the noise of another row, if noise is read at a column and not at its token, if a column is
    taken for a token, or if log p is not of the whole row."""
    random = torch.Generator().manual_seed(0)
    logits, noise = 3 * torch.randn(7, 1300, generator=random), torch.randn(9, 5000, generator=random)
    some = torch.randperm(5000, generator=random)[:1300].sort().values
    for ids, added in ((None, None), (None, noise[:, :1300]), (some, None), (some, noise)):
        ours, theirs = grids(logits, 31, 4, ids, added)
        assert torch.equal(ours.tokens, theirs.tokens) and torch.equal(ours.parents, theirs.parents)
        torch.testing.assert_close(ours.scores, theirs.scores, rtol=1e-6, atol=2e-5)


# ----- grow_markov: a level below a Markov head ----------------------------------------------------------------------


@interpreted
@pytest.mark.parametrize("rank, vocab, k, dtype, programs", [
    (5, 100, 3, torch.float32, 256), (130, 300, 10, torch.float32, 256), (64, 300, 10, torch.float16, 1),
    (16, 128, 1, torch.float16, 256)])
def test_grow_markov(rank: int, vocab: int, k: int, dtype: torch.dtype, programs: int, monkeypatch: pytest.MonkeyPatch
                     ) -> None:
    """Fails if a row gets another token's W1, if columns beyond the rank or rows beyond the vocabulary count, if the
    second half of a rank is left out, if noise is read at a column, or if W2's row is that of another token."""
    monkeypatch.setattr(markov_kernels, "PROGRAMS", programs)  # with 1: blocks of 256 tokens
    random = torch.Generator().manual_seed(vocab + rank)
    w1, w2 = (torch.randn(n, rank, generator=random).to(dtype) for n in (500, vocab))
    logits, noise = torch.randn(3, vocab, generator=random) * rank**0.5, torch.randn(500, generator=random)
    ids = torch.randperm(500, generator=random)[:vocab].sort().values
    for some, added in ((None, None), (ids, None), (ids, noise), (None, noise[:vocab])):
        made = []
        for grow, *weights in ((grow_markov_triton, w1, w2), (grow_markov_torch, w1.float(), w2.float())):
            level, candidates = start_tree(k, 3, logits.device)
            level = level._replace(tokens=level.tokens + 7)
            for depth in range(3):
                level = grow(logits[depth:depth + 1], *weights, level, candidates, depth, k, some, added)
            made.append((*level, *candidates[:3]))
        for ours, theirs in zip(*made, strict=True):  # in fp32 the order of a sum shows
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)


# ----- store_context: keys and values of all layers ------------------------------------------------------------------

STORES = {"torch": store_context_torch, "triton": store_context_triton}


def context(T: int, L: int, K: int, D: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """rows, rope, slots, kv, k_norms for store_context, of random numbers."""
    random = torch.Generator().manual_seed(T * D)
    rows, kv, k_norms, angles = (torch.randn(shape, generator=random)
                                 for shape in ((T, L * 2 * K * D), (L, 2, K, 40, D), (L, D), (40, D // 2)))
    rope = torch.stack((angles.cos(), angles.sin())).repeat(1, 1, 2)
    return rows.to(dtype), rope.to(dtype), torch.randperm(40, generator=random)[:T], kv.to(dtype), k_norms.to(dtype)


CONTEXTS = [(1, 1, 1, 8), (2, 5, 1, 24), (3, 2, 2, 64), (7, 2, 1, 24), (20, 1, 2, 128), (2, 5, 8, 8)]  # T, L, K, D


@pytest.mark.parametrize("implementation", ["torch", pytest.param("triton", marks=interpreted)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])  # bf16: the interpreter does not round it
def test_store_context(implementation: str, dtype: torch.dtype) -> None:
    """Fails if a layer's keys get another layer's norm, if a head lands in another layer, among the values, or in
    another slot, if a row is rotated by the angles of its row instead of its slot, if a step is not rounded, if values
    change, or if a slot that was not named changes."""
    for T, L, K, D in CONTEXTS:
        rows, rope, slots, kv, k_norms = context(T, L, K, D, dtype)
        wanted = kv.clone()
        for layer, both in enumerate(rows.chunk(L, 1)):
            keys, values = both.view(T, 2 * K, D).split(K, 1)
            keys = F.rms_norm(keys, (D,), k_norms[layer], 1e-5)
            wanted[layer, 0][:, slots] = apply_rope(keys[None], rope[:, slots])[0].transpose(0, 1)
            wanted[layer, 1][:, slots] = values.transpose(0, 1)
        STORES[implementation](rows, rope, slots, kv, k_norms, 1e-5)
        exact = implementation == "torch" or dtype == torch.float16  # in fp32 the order of a sum of squares shows
        torch.testing.assert_close(kv, wanted, rtol=0, atol=0 if exact else 2e-6)
        assert torch.equal(kv[:, 1], wanted[:, 1])  # values are copied


@pytest.mark.parametrize("implementation", ["torch", pytest.param("triton", marks=interpreted)])
def test_store_context_copies_odd_values(implementation: str) -> None:
    """Fails if a value passes through arithmetic: infinity times 0 is NaN, and -0 loses its sign."""
    rows, rope, slots, kv, k_norms = context(2, 2, 1, 8, torch.float32)
    odd = torch.tensor([torch.inf, -torch.inf, torch.nan, -0.0, 0.0, 1e-45, 3e38, -1.0])
    rows.view(2, 2, 2, 8)[:, :, 1] = odd
    STORES[implementation](rows, rope, slots, kv, k_norms, 1e-5)
    assert (kv[:, 1, 0][:, slots].view(torch.int32) == odd.view(torch.int32)).all()
