"""tree.py and sampling.py against plain Python and transformers: ancestors, masks, acceptance, reranking, noise, and
the distribution that sampled texts follow."""
import math
from functools import partial

import pytest
import torch
from helpers import bits_of
from hypothesis import example, given
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

import sampling
from ops.attention import TreeMask
from sampling import gumbel_noise, perturb, process
from tree import Candidates, State, Tree, accept, best_children, best_first, build_tree, rerank


def rooted(token: int) -> State:
    """A text of one token, for a tree to grow on."""
    one = torch.tensor(1)
    return State(torch.tensor([token]), one, torch.zeros(1), one, one == 0, 1)


# A tree by hand:   0 -> 1, 2, 3      1 -> 4      3 -> 5      4 -> 6
PARENTS = [0, 0, 0, 0, 1, 3, 4]
DEPTH = [0, 1, 1, 1, 2, 2, 3]
ANCESTORS = [0b1, 0b11, 0b101, 0b1001, 0b10011, 0b101001, 0b1010011]
SEES = ["1......",
        "11.....",
        "1.1....",
        "1..1...",
        "11..1..",
        "1..1.1.",
        "11..1.1"]


def seen(mask: Tensor) -> list[str]:
    return ["".join("1" if bit else "." for bit in row) for row in mask.tolist()]


def path_of(parents: list[int], node: int) -> list[int]:
    """From the root to `node`, both included."""
    path = [node]
    while path[0] != 0:
        path.insert(0, parents[path[0]])
    return path


@st.composite
def trees(draw: st.DrawFn, max_nodes: int = 128) -> tuple[list[int], list[int]]:
    """(tokens, parents): any shape of 1 to 128 nodes, siblings with different tokens, cousins often with equal ones."""
    size = draw(st.integers(1, max_nodes))
    parents = [0] + [draw(st.integers(max(0, i - draw(st.sampled_from([1, 3, 128]))), i - 1)) for i in range(1, size)]
    children = [0] * size
    tokens = [draw(st.integers(0, 5))]
    for parent in parents[1:]:
        tokens.append(children[parent])
        children[parent] += 1
    shift = draw(st.integers(0, 3))
    return [tokens[0], *((token + shift) % 128 for token in tokens[1:])], parents


CHAIN = ([0] * 128, [0, *range(127)])
STAR = (list(range(128)), [0] * 128)
SHORT = ([0] * 64, [0, *range(63)])  # the longest that needs one word


def test_typed_tree() -> None:
    """Fails if a depth, an ancestor bit or a mask is off by one: a node that does not see itself, or sees a sibling."""
    made = build_tree(torch.arange(7), torch.tensor(PARENTS), 3)
    assert made.depth.tolist() == DEPTH
    assert made.ancestors.tolist() == [[word] for word in ANCESTORS]
    assert seen(TreeMask(torch.tensor(3), made.ancestors).dense(7, 12)) == ["111" + row + ".." for row in SEES]
    assert seen(TreeMask(torch.tensor(2), None).dense(3, 6)) == ["111...", "1111..", "11111."]


@given(trees(), st.integers(0, 9), st.integers(0, 5))
@example(CHAIN, 1, 0)
@example(STAR, 0, 3)
@example(SHORT, 2, 1)
def test_build_and_mask(drawn: tuple[list[int], list[int]], base: int, extra: int) -> None:
    """Fails if the bound on depth stops too early, if bit 63, the sign, or the second word is lost, or if the mask is
    shifted against the prefix."""
    tokens, parents = drawn
    paths = [path_of(parents, node) for node in range(len(parents))]
    depth = [len(path) - 1 for path in paths]
    made = build_tree(torch.tensor(tokens), torch.tensor(parents), max(depth) + extra)
    assert made.depth.tolist() == depth
    assert list(map(bits_of, made.ancestors.tolist())) == [sum(1 << node for node in path) for path in paths]
    width = base + len(parents) + extra
    expected = [[slot < base or slot - base in path for slot in range(width)] for path in paths]
    assert TreeMask(torch.tensor(base), made.ancestors).dense(len(parents), width).tolist() == expected


def walk(tokens: list[int], parents: list[int], next_tokens: list[int]) -> list[int]:
    """Acceptance by hand: from the root on, follow the child that the target chose."""
    path = [0]
    while True:
        children = [i for i in range(1, len(tokens)) if parents[i] == path[-1] and tokens[i] == next_tokens[path[-1]]]
        if not children:
            return path
        path.append(children[0])


def check_accept(tokens: list[int], parents: list[int], next_tokens: list[int], max_depth: int) -> None:
    expected = walk(tokens, parents, next_tokens)
    made = build_tree(torch.tensor(tokens), torch.tensor(parents), max_depth)
    path, accepted, out = accept(made, torch.tensor(next_tokens), max_depth)
    padded = expected + [expected[-1]] * (max_depth + 1 - len(expected))
    assert int(accepted) == len(expected) - 1
    assert path.tolist() == padded
    assert out.tolist() == [next_tokens[node] for node in padded]


@pytest.mark.slow
@given(trees(), st.data())
def test_accept_random(drawn: tuple[list[int], list[int]], data: st.DataObject) -> None:
    """Fails if a node is accepted though its parent was not, if a path is too short or long by one, or if the bonus
    token is another node's."""
    tokens, parents = drawn
    max_depth = max(len(path_of(parents, node)) for node in range(len(parents))) - 1 + data.draw(st.integers(0, 3))
    children = [[i for i in range(1, len(tokens)) if parents[i] == node] for node in range(len(tokens))]
    next_tokens = []
    for node in range(len(tokens)):  # mostly a child's token, or the walk would end at once
        own = [tokens[child] for child in children[node]]
        right = st.sampled_from(own) if own and data.draw(st.integers(0, 5)) else st.integers(0, 127)
        next_tokens.append(data.draw(right))
    check_accept(tokens, parents, next_tokens, max_depth)


@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("short", [1, 2, 63, 64])
def test_accept_long_chain(size: int, short: int) -> None:
    """Fails if the last node of a full tree is wrongly refused or accepted: its bit is the sign of an int64."""
    right = size - short
    tokens = [node % 2 for node in range(size)]
    next_tokens = [(node + 1) % 2 if node < right else 9 for node in range(size)]
    check_accept(tokens, CHAIN[1][:size], next_tokens, size - 1)
    check_accept(list(range(size)), [0] * size, [right] * size, 1)


def test_root_never_judged() -> None:
    """Fails if the root is compared with the target's choice after it (parents[0] = 0): every cycle would then commit
    one token only."""
    check_accept([5, 7], [0, 0], [7, 3], 1)  # the target chose 7, not 5, after the root 5


@pytest.mark.slow
@given(st.data())
def test_rerank(data: st.DataObject) -> None:
    """Fails if a child is kept without its parent where scores tie exactly or were rounded to bf16 (a defect of the
    reference), or if nodes are not in level order."""
    size = data.draw(st.integers(1, 120))
    parents, scores = [], []
    step = data.draw(st.sampled_from([0.0, 0.25, 1.0]))  # few different values, many ties
    for i in range(size):
        parents.append(data.draw(st.integers(-1, i - 1)))
        above = 0.0 if parents[i] < 0 else scores[parents[i]]
        score = above - step * data.draw(st.integers(0, 2)) - data.draw(st.sampled_from([0.0, 0.0, 0.3, 0.011]))
        scores.append(min(above, torch.tensor(score, dtype=torch.bfloat16).item()))
    keep = data.draw(st.integers(1, min(size, 63)))
    kept = sorted(sorted(range(size), key=lambda i: (-scores[i], i))[:keep])
    assert all(parents[i] < 0 or parents[i] in kept for i in kept)
    made = rerank(rooted(1000), Candidates(torch.arange(size), torch.tensor(scores), torch.tensor(parents)), keep, size)
    assert made.tokens.tolist() == [1000, *kept]
    assert made.parents.tolist() == [0] + [0 if parents[i] < 0 else 1 + kept.index(parents[i]) for i in kept]
    assert (made.parents[1:] < torch.arange(1, keep + 1)).all()
    again = build_tree(made.tokens, made.parents, size)
    assert all(torch.equal(a, b) for a, b in zip(made, again, strict=True))


def test_rerank_bf16_levels() -> None:
    """Fails if a tree that is grown as EAGLE-2 does it, from bf16 logits with very probable tokens, loses a parent."""
    random = torch.Generator().manual_seed(0)
    for _ in range(200):
        logits = (torch.randn(4, 12, generator=random) * 30).bfloat16()
        tokens, first = best_children(logits[:1], torch.zeros(1), 3)
        more_tokens, more = best_children(logits[1:], first[0], 3)
        scores = torch.cat((first[0], more.flatten()))
        parents = [-1] * 3 + [0] * 3 + [1] * 3 + [2] * 3
        tokens = torch.cat((tokens[0], more_tokens.flatten()))
        made = rerank(rooted(0), Candidates(tokens, scores, torch.tensor(parents)), 6, 2)
        kept = sorted(sorted(range(12), key=lambda i: (-scores[i], i))[:6])
        assert all(parents[i] < 0 or parents[i] in kept for i in kept)
        assert made.tokens.tolist()[1:] == tokens[kept].tolist()


def test_best_children() -> None:
    """Fails if scores are in half precision, are above the parent's by rounding, or come from a softmax over k tokens
    instead of all."""
    random = torch.Generator().manual_seed(0)
    logits = (5 * torch.randn(50, 40, generator=random)).bfloat16()
    above = -torch.rand(50, generator=random)
    tokens, scores = best_children(logits, above, 7)
    exact = logits.double().log_softmax(-1)
    assert scores.dtype == torch.float32
    assert torch.allclose(scores.double(), above[:, None] + exact.gather(1, tokens), atol=1e-5)
    assert torch.equal(exact.gather(1, tokens), exact.sort(descending=True).values[:, :7])
    certain = torch.full((1000, 40), -60.0)
    certain[:, 3] = torch.linspace(0, 90, 1000)  # p = 1 up to rounding
    assert (best_children(certain, torch.zeros(1000), 1)[1] <= 0).all()
    assert best_first(torch.tensor([1.0, 2.0, 1.0, 2.0, 0.0]), 4).tolist() == [1, 3, 0, 2]


@pytest.mark.slow
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("temperature", [0.3, 0.7, 1.0, 1.7])
def test_process_equals_transformers(temperature: float, ties: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if top-p drops the token that crosses the threshold, if filters run in another order, or if the temperature
    comes late."""
    # transformers sorts unstably, which leaves open which of several equal logits top-p drops: make it sort stably
    monkeypatch.setattr(torch, "sort", partial(torch.sort, stable=True))
    random = torch.Generator().manual_seed(int(temperature * 10))
    for top_k in (0, 1, 5, 50, 1000):
        for top_p in (1.0, 0.95, 0.9, 0.5, 0.01):
            for min_p in (0.0, 0.02, 0.3, 1.0):
                logits = 3 * torch.randn(6, 64, generator=random)
                logits = logits.round() if ties else logits
                warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
                warpers += [TopKLogitsWarper(top_k)] if top_k else []
                warpers += [TopPLogitsWarper(top_p)] if top_p < 1 else []
                warpers += [MinPLogitsWarper(min_p)] if min_p else []
                ours = process(logits, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
                assert torch.equal(ours, warpers(None, logits)), (top_k, top_p, min_p)
                assert (ours > -torch.inf).any(1).all()


def choose(logits: Tensor, noise: Tensor, **sampling: float) -> Tensor:
    return perturb(logits, noise, **sampling).argmax(-1)


def test_perturb() -> None:
    """Fails if noise is added before tokens are excluded, if top_k 1 samples, or if logits are not scaled."""
    random = torch.Generator().manual_seed(0)
    logits = torch.randn(2000, 30, generator=random)
    noise = gumbel_noise(torch.tensor(3), torch.arange(2000), 30)
    assert torch.equal(choose(logits, noise, temperature=1.0, top_k=1), logits.argmax(-1))
    chosen = choose(logits, 0.5 * noise, temperature=0.5, top_k=4)
    assert (logits.gather(1, chosen[:, None]) >= logits.topk(4).values[:, -1:]).all()
    assert torch.equal(chosen, (process(logits, 0.5, 4) + noise).argmax(-1))
    assert not torch.equal(chosen, choose(logits, 2 * noise, temperature=2.0, top_k=4))


SEEDS = [0, 1, -1, 42, 2**31, 2**32, 2**32 + 1, 2**63 - 1, -2**63]


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_gumbel_distribution(seed: int) -> None:
    """Fails if the uniform is in the wrong half, if a minus is missing, or if the hash is poor for negative or long
    seeds."""
    noise = gumbel_noise(torch.tensor(seed), torch.arange(400), 1000).double()
    assert not noise.isnan().any()
    assert abs(noise.mean() - 0.5772157) < 5 * (math.pi**2 / 6 / noise.numel()) ** 0.5
    assert abs(noise.var() - math.pi**2 / 6) < 0.03
    for sample in (noise.flatten(), noise[0], noise[399], noise[:, 0], noise[:, 999]):
        assert stats.kstest(sample.numpy(), "gumbel_r").pvalue > 1e-4
    assert (noise > 8).sum() == pytest.approx(noise.numel() * (1 - math.exp(-math.exp(-8))), abs=45)


def test_gumbel_independence() -> None:
    """Fails if neighbouring positions, tokens or seeds share noise: the same choice would come several times in a
    row."""
    positions, vocab = torch.arange(300), 800
    by_seed = {seed: gumbel_noise(torch.tensor(seed), positions, vocab) for seed in SEEDS}
    noise = by_seed[42]
    pairs = [(noise[lag:], noise[:-lag]) for lag in (1, 2, 3, 7, 64)]
    pairs += [(noise[:, lag:], noise[:, :-lag]) for lag in (1, 2, 3, 7, 64)]
    pairs += [(noise[1:, 1:], noise[:-1, :-1]), (noise[1:, :-1], noise[:-1, 1:])]
    pairs += [(by_seed[a], by_seed[b]) for a in SEEDS for b in SEEDS if a < b]
    for a, b in pairs:
        correlation = torch.corrcoef(torch.stack((a.flatten(), b.flatten())))[0, 1]
        assert abs(correlation) < 4.5 / a.numel() ** 0.5
    winners = noise.argmax(1)
    assert len(set(winners.tolist())) > 200  # 300 throws at 800 tokens: 250 different ones expected


def test_gumbel_depends_on_place_alone() -> None:
    """Fails if noise depends on how many rows are drawn together: sampled text would change with the tree's size."""
    seed = torch.tensor(7)
    noise = gumbel_noise(seed, torch.arange(100), 50)
    assert torch.equal(gumbel_noise(seed, torch.tensor([31, 4, 31]), 50), noise[[31, 4, 31]])
    assert torch.equal(gumbel_noise(seed, torch.tensor([99]), 20), noise[99:, :20])


def test_gumbel_extremes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if the ends of the hash's range give nan, a tail cut off at fp32's 2^-24, or -inf, which would make an
    excluded token as good as the only one that is left."""
    for word in (0, 1, 2**31, 2**32 - 1):
        monkeypatch.setattr(sampling, "mix32", lambda x, word=word: torch.full_like(x, word))
        noise = gumbel_noise(torch.tensor(0), torch.arange(2), 3)
        assert noise.isfinite().all()
        assert word > 0 or (noise > 22).all()


# ----- The distribution of what is committed ---------------------------------------------------------------------
#
# The model is a table, the logits after each of 12 tokens, and the drafter is another one. gumbel_noise, choose and
# accept write three tokens cycle by cycle, for many seeds at once. How often each of the 1,728 texts comes out is
# compared with the product of the table's probabilities.

VOCAB, DRAWS = 12, 30_000
SHAPE = torch.tensor([0, 0, 0, 0, 1, 1, 2, 4, 4])  # three children, of which two have children, one of which has two
SHAPE_DEPTH = [0, 1, 1, 1, 2, 2, 2, 3, 3]
RANK = torch.tensor([0, 0, 1, 2, 0, 1, 0, 0, 1])  # a node's place among its siblings
SAMPLING = {"temperature": 0.9, "top_p": 0.95}


def tables() -> tuple[Tensor, Tensor]:
    """Logits [12, 12] of the target and of the drafter: good, not perfect."""
    random = torch.Generator().manual_seed(5)
    target = 1.5 * torch.randn(VOCAB, VOCAB, generator=random)
    return target, target + 0.7 * torch.randn(VOCAB, VOCAB, generator=random)


def draft(root: Tensor, noise: Tensor, guess: Tensor) -> Tree:
    """The drafter sees the noise [4, 12] of the positions to come, as draft.Eagle.noise gives it."""
    tokens = [root]
    for parent, rank in zip(SHAPE[1:].tolist(), RANK[1:].tolist(), strict=True):
        ranking = (guess[tokens[parent]] + noise[SHAPE_DEPTH[parent]]).argsort(descending=True)
        tokens.append(ranking[rank])
    return build_tree(torch.stack(tokens), SHAPE, 3)


def noise_after(length: Tensor, seed: Tensor) -> Tensor:
    return SAMPLING["temperature"] * gumbel_noise(seed, length + torch.arange(4), VOCAB)


def right_cycle(root: Tensor, seed: Tensor, length: Tensor, target: Tensor, guess: Tensor) -> tuple[Tensor, Tensor]:
    noise = noise_after(length, seed)
    made = draft(root, noise, guess)
    _, accepted, out = accept(made, choose(target[made.tokens], noise[made.depth], **SAMPLING), 3)
    return accepted, out


def bonus_of_parents_place(root: Tensor, seed: Tensor, length: Tensor, target: Tensor,
                           guess: Tensor) -> tuple[Tensor, Tensor]:
    """Wrong: below the root, a node's next token is drawn with the noise of the node's own position."""
    noise = noise_after(length, seed)
    made = draft(root, noise, guess)
    wrong = noise[(made.depth - 1).clamp(min=0)]
    _, accepted, out = accept(made, choose(target[made.tokens], wrong, **SAMPLING), 3)
    return accepted, out


def likely_child_taken(root: Tensor, seed: Tensor, length: Tensor, target: Tensor,
                       guess: Tensor) -> tuple[Tensor, Tensor]:
    """Wrong: a drafted child of a probability above 0.35 is accepted without being the target's choice."""
    noise = noise_after(length, seed)
    made = draft(root, noise, guess)
    chosen = choose(target[made.tokens], noise[made.depth], **SAMPLING)
    first = (made.tokens[None] == made.tokens[:, None]).new_zeros(9, 9)
    first[[0, 1, 2, 4], [1, 4, 6, 7]] = True  # each node's best child
    child = torch.where(first.any(1), made.tokens[first.int().argmax(1)], chosen)
    likely = target[made.tokens].softmax(-1).gather(1, child[:, None])[:, 0] > 0.35
    _, accepted, out = accept(made, torch.where(likely, child, chosen), 3)
    return accepted, out


def p_value(cycle, draws: int = DRAWS) -> tuple[float, float]:
    """Chi-square of the first three tokens after token 0, and the share of cycles that accepted 2 or more."""
    target, guess = tables()
    many = torch.vmap(cycle, in_dims=(0, 0, 0, None, None))
    seeds = torch.arange(draws) * 7919 - 10**12
    text = torch.zeros(draws, 16, dtype=torch.int64)  # token 0 is the prompt
    length, deep, rows = torch.ones(draws, dtype=torch.int64), [], torch.arange(draws)
    for _ in range(3):
        accepted, out = many(text[rows, length - 1], seeds, length, target, guess)
        deep.append((accepted >= 2).float().mean())
        for step in range(4):  # spare entries are overwritten by the next cycle, or lie past the third token
            text[rows, length + step] = out[:, step]
        length = length + accepted + 1
    probs = process(target, **SAMPLING).double().softmax(-1)
    joint = probs[0][:, None, None] * probs[:, :, None] * probs[None]  # [first, second, third]
    expected = (draws * joint).flatten()
    counts = torch.bincount((text[:, 1] * VOCAB + text[:, 2]) * VOCAB + text[:, 3], minlength=VOCAB**3).double()
    assert (counts[expected == 0] == 0).all()  # what top-p excludes
    rare = expected < 5  # the chi-square approximation wants 5 a cell: the rare texts share one
    observed = torch.cat((counts[~rare], counts[rare].sum()[None]))
    expected = torch.cat((expected[~rare], expected[rare].sum()[None]))
    return stats.chisquare(observed.numpy(), expected.numpy()).pvalue, float(sum(deep) / 3)


@pytest.mark.slow
def test_distribution() -> None:
    """Fails if sampling through a tree adds a bias, which no comparison of one text with another would show."""
    p, deep = p_value(right_cycle)
    assert deep > 0.1  # depth 2 and 3 took part
    assert p > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("cycle", [bonus_of_parents_place, likely_child_taken])
def test_distribution_sees_wrong_rules(cycle) -> None:
    """Fails if the chi-square test is too weak to see a wrong rule of acceptance."""
    assert p_value(cycle)[0] < 1e-6
