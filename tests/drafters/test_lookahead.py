"""lookahead.py: a plain Python twin proposes and learns the same, and the text is the one of decoding token by token.

Triton's interpreter needs a process of its own: one test runs the cases of the kernel there. They can be seen singly
with `TRITON_INTERPRET=1 pytest tests/test_lookahead.py -k accepted`.
"""
import os
import random
import subprocess
import sys
from types import SimpleNamespace

import pytest
import tiny
import torch
from conftest import all_cores
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import tree
from draft import Vanilla
from drafters.lookahead import Lookahead
from engine import Engine
from model import Llama
from ops import tree as tree_kernels
from ops.attention import tree_mask
from sampling import Sampling
from tree import State, Tree

INTERPRETER = os.environ.get("TRITON_INTERPRET") == "1"
SHAPES = [(7, 5, 7), (1, 2, 1), (5, 2, 4), (12, 3, 2), (1, 5, 4), (4, 4, 17), (15, 5, 1), (7, 9, 1)]  # W, N, G
SAMPLINGS = [Sampling(), Sampling(temperature=0.7, top_p=0.9, seed=1), Sampling(temperature=1.0, top_k=5, seed=2**40),
             Sampling(temperature=1.5, seed=-3)]


def cycle_by_cycle(engine: Engine, ids: list[int], count: int, sampling: Sampling = Sampling()) -> list[list[int]]:
    return list(engine.generate(ids, count, sampling))


def write(engine: Engine, ids: list[int], count: int, sampling: Sampling = Sampling()) -> list[int]:
    return sum(cycle_by_cycle(engine, ids, count, sampling), [])


def gained(cycles: list[list[int]]) -> float:
    """Mean of the cycles after prefill."""
    return sum(map(len, cycles[1:])) / len(cycles[1:])


def text_state(ids: list[int]) -> State:
    zero = torch.zeros((), dtype=torch.int64)
    return State(tokens=torch.tensor(ids + [0] * 20), length=zero + len(ids), features=torch.zeros(1, 1),
                 committed=zero.clone(), done=zero > 0, width=0)


def drafter(vocab_size: int, *shape: int) -> Lookahead:
    model = SimpleNamespace(cfg=SimpleNamespace(vocab_size=vocab_size),
                            embed=SimpleNamespace(weight=torch.zeros(vocab_size, 1)))
    return Lookahead(model, *shape)


# ----- A plain twin ----------------------------------------------------------------------------------------------


class Twin:
    """Lookahead with lists: the window by level, the pool by first token, oldest first."""

    def __init__(self, levels: list[list[int]], guesses: int) -> None:
        self.levels, self.guesses, self.pool = levels, guesses, {}
        self.counts = dict.fromkeys(("refreshed", "evicted", "met"), 0)

    def propose(self, newest: int) -> tuple[list[int], list[list[int]]]:
        """The tokens of the lookahead branch, and the chains."""
        self.levels[0][0] = newest
        return sum(self.levels, []), self.pool.get(newest, [])

    def learn(self, chosen: list[int]) -> None:
        columns = list(zip(*self.levels, chosen))
        self.counts["met"] += len({column[0] for column in columns}) < len(columns)
        for first, *rest in columns:
            known = self.pool.setdefault(first, [])
            if rest in known:
                known.remove(rest)
                self.counts["refreshed"] += 1
            elif len(known) == self.guesses:
                del known[0]
                self.counts["evicted"] += 1
            known.append(rest)
        self.levels = [*self.levels[1:], list(chosen)]


@pytest.mark.parametrize("shape", SHAPES)
@torch.inference_mode()
def test_twin(shape: tuple[int, int, int]) -> None:
    """A level or column that is shifted wrongly, an N-gram in the pool twice or under another token, the wrong one
    pushed out: by a newer one, by one that is there already, by several of one token at once."""
    (window, ngram, guesses), vocab, draw = shape, 3, random.Random(str(shape))
    ours, levels = drafter(vocab, *shape), ngram - 1
    state, hidden = text_state([2, 0, 1]), levels * window
    ours.reset(state)
    twin = Twin(ours.window.tolist(), guesses)
    for step in range(1000):
        state.tokens[2] = newest = draw.choice(range(vocab))
        made, (row, chains) = ours.propose(state), twin.propose(newest)
        assert made.tokens[0] == newest and (~made.tokens[1:hidden]).tolist() == row[1:]
        blank = [[-1] * levels] * (guesses - len(chains))
        assert made.tokens[hidden:].reshape(guesses, levels).tolist() == blank + chains
        steady = step // 50 % 2  # now and then what is chosen hardly changes
        chosen = [0 if steady and draw.random() < 0.8 else draw.choice(range(vocab)) for _ in range(ours.num_nodes)]
        ours.learn(state, made, torch.tensor(chosen))
        twin.learn(chosen[hidden - window:hidden])
        assert ours.window.tolist() == twin.levels
        for token in range(vocab):
            known = twin.pool.get(token, [])
            assert ours.pool[token].tolist() == [[-1] * levels] * (guesses - len(known)) + known
    assert twin.counts["met"] or window == 1
    assert min(twin.counts["refreshed"], twin.counts["evicted"]) > 20 or vocab ** levels <= guesses, twin.counts


@pytest.mark.parametrize("shape", SHAPES)
def test_rows(shape: tuple[int, int, int]) -> None:
    """A row that sees the future, the other branch or another chain, or stands in another place: harmless to the text,
    not to what is guessed. Written out row by row."""
    window, ngram, guesses = shape
    ours, state = drafter(9, *shape), text_state([3, 1, 4])
    ours.reset(state)
    made, levels = ours.propose(state), ngram - 1
    rows = [("window", level, column) for level in range(levels) for column in range(window)]
    rows += [("chain", chain, step) for chain in range(guesses) for step in range(levels)]
    assert len(rows) == len(made.tokens) == ours.num_nodes <= 64
    mask = tree_mask(torch.tensor(2), made.ancestors[:, None], 2 + 64)
    assert mask[:, :2].all() and not mask[:, 2 + len(rows):].any()
    for i, (kind, a, b) in enumerate(rows):
        for j, (other, c, d) in enumerate(rows):
            if kind == "chain":
                sees = (other, c, d) == ("window", 0, 0) or (other == kind and c == a and d <= b)
            else:
                sees = other == kind and (d <= b if c == 0 else d == b and c <= a)
            assert mask[i, 2 + j] == sees, (rows[i], rows[j])
        assert made.depth[i] == (b + 1 if kind == "chain" else a + b)
        assert made.parents[i] == (i - 1 if kind == "chain" and b else 0)
    assert ours.noise_depth == made.depth.max() and ours.max_depth == levels


def test_refuses() -> None:
    """More rows than the mask has bits, or a shape with nothing to guess, noticed much later or never."""
    for shape in ((7, 5, 10), (15, 5, 7), (64, 2, 1), (0, 5, 7), (7, 5, 0), (7, 1, 7), (-9, 5, 20), (-9, -1, -7)):
        with pytest.raises(ValueError, match="Lookahead: ") as error:
            drafter(9, *shape)
        assert "\n" not in str(error.value)
    assert drafter(9, 9, 5, 7).num_nodes == 64 and drafter(9, 63, 2, 1).num_nodes == 64


def test_reset() -> None:
    """A window of ids that are not the prompt's, of one part of it alone, or another one each time; what is left of
    an earlier text."""
    ours, ids = drafter(5000, 7, 5, 7), list(range(1000, 1040))
    ours.reset(text_state(ids))
    first = ours.window.clone()
    assert set(first.flatten().tolist()) <= set(ids) and len(first.unique()) > 14
    assert first.min() < 1010 and first.max() >= 1030
    ours.learn(text_state(ids), ours.propose(text_state(ids)), torch.arange(56))
    assert (ours.pool >= 0).any()
    ours.reset(text_state(ids))
    assert torch.equal(ours.window, first) and (ours.pool == -1).all()
    ours.reset(text_state([7]))
    assert (ours.window == 7).all()


class Unread(TorchDispatchMode):
    """Fails where the host reads a value, or a shape depends on one."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function.__name__ not in ("_local_scalar_dense.default", "nonzero.default"), function
        return function(*args, **(kwargs or {}))


def test_state_stays_on_the_device() -> None:
    """A value that the host reads or a tensor that takes the place of another: not in a CUDA graph."""
    ours, state = drafter(9, 7, 5, 7), text_state([3, 1, 4])
    places = ours.window.data_ptr(), ours.pool.data_ptr()
    chosen = torch.arange(56) % 9
    with pytest.raises(AssertionError, match="scalar"), Unread():
        int(chosen[0])
    with Unread():
        ours.reset(state)
        ours.learn(state, ours.propose(state), chosen)
    assert places == (ours.window.data_ptr(), ours.pool.data_ptr())


# ----- What is accepted ------------------------------------------------------------------------------------------


def accepted_cases() -> list[tuple[Tree, Tensor, int, list[int]]]:
    """Trees, the target's choices, the deepest that may be accepted, and what must be committed."""
    cases, draw = [], random.Random(0)
    for shape in SHAPES * 4:
        ours, state, window, levels = drafter(9, *shape), text_state([3, 1, 4]), shape[0], shape[1] - 1
        ours.reset(state)
        for chain in range(draw.randint(0, shape[2])):
            ours.pool[4, -1 - chain] = torch.tensor(draw.choices((5, 6), (4, 1), k=levels))
        made = ours.propose(state)
        shown = made.tokens ^ (made.tokens >> 63)  # a target that repeats itself would confirm these, were they drafts
        following = shown.clone()
        for row in range(1, len(shown)):
            following[row] = draw.choices((5, 6, 8), (16, 3, 1))[0] if draw.random() < 0.9 else shown[row]
        following[0] = draw.choice((5, 5, 6, int(shown[1])))
        best = [int(following[0])]
        for chain in range(shape[2]):
            out, at = [int(following[0])], levels * window + chain * levels
            for row in range(at, at + levels):
                if made.tokens[row] != out[-1]:
                    break
                out.append(int(following[row]))
            best = max(best, out, key=len)
        cases.append((made, following, levels, best))
    blank = drafter(9, 7, 5, 7).propose(text_state([0]))  # a window of zeros, an empty pool, and zeros chosen
    return [*cases, (blank, torch.zeros(56, dtype=torch.int64), 4, [0])]


def check_accepted(accept_commit) -> None:
    lengths = set()
    for made, following, levels, best in accepted_cases():
        state, report = text_state([3, 1, int(made.tokens[0])]), torch.full((levels + 3,), -1)
        path = accept_commit(made, following, state, torch.tensor([8]), torch.tensor(99), levels, report)
        end = best.index(8) + 1 if 8 in best else len(best)
        assert report[2:2 + report[0]].tolist() == best[:end]
        assert state.tokens[3:3 + end].tolist() == best[:end] and state.length == 3 + end
        assert (made.tokens[path] >= 0).all()
        lengths.add(len(best))
    assert lengths >= {1, 2, 3, 5}


@pytest.mark.skipif(INTERPRETER, reason="the kernel's turn")
def test_accepted() -> None:
    """A row of the window or an empty one taken for a draft, when the token it stands for is the target's choice; not
    the longest of the chains."""
    check_accepted(tree.accept_commit)
    for made, following, levels, best in accepted_cases():
        path, count, out = tree.accept(made, following, levels)
        assert out[:count + 1].tolist() == best and (made.tokens[path] >= 0).all()


@pytest.mark.skipif(not INTERPRETER, reason="runs in test_accepted_in_the_interpreter")
def test_accepted_by_the_kernel() -> None:
    """The same on a GPU."""
    check_accepted(tree_kernels.accept_commit)


@pytest.mark.skipif(INTERPRETER, reason="this is that process")
def test_accepted_in_the_interpreter() -> None:
    """test_accepted_by_the_kernel, where Triton is interpreted."""
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "by_the_kernel", __file__]
    made = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert made.returncode == 0 and "1 passed" in made.stdout, made.stdout[-4000:] + made.stderr[-2000:]


# ----- The engine ------------------------------------------------------------------------------------------------


def vanilla(model: Llama, ids: list[int], count: int, sampling: Sampling = Sampling(), max_seq_len: int = 256,
            stop_ids: frozenset[int] = frozenset()) -> list[int]:
    return write(Engine(model, Vanilla(), max_seq_len, stop_ids), ids, count, sampling)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_equals_vanilla(shape: tuple[int, int, int], sampling: Sampling) -> None:
    """A text that changes with the drafter: a guess accepted in another place, keys of the wrong rows kept, noise of a
    place too deep to have any."""
    total = []
    for seed in range(3):
        model = tiny.pair(seed, 0.1)[0] if seed else tiny.target(seed)
        ids = tiny.prompt(seed, 1 + 6 * seed)
        cycles = cycle_by_cycle(Engine(model, Lookahead(model, *shape), 256), ids, 60, sampling)
        assert sum(cycles, []) == vanilla(model, ids, 60, sampling)
        total += cycles[1:]
    assert max(map(len, total)) > 1 or sampling.temperature  # otherwise nothing is compared


def test_stops_and_limits() -> None:
    """Tokens after a stop id within a chain, a limit overrun, a context overrun."""
    model = tiny.pair(3, 0.0)[0]
    ids = tiny.prompt(3, 5)
    text = vanilla(model, ids, 60)
    for place in (0, 1, 5, 6, 20, 41):
        engine = Engine(model, Lookahead(model), 128, frozenset([text[place]]))
        assert write(engine, ids, 60) == text[:text.index(text[place]) + 1]
    engine = Engine(model, Lookahead(model), 128)
    for count in (1, 2, 3, 17, 40, 41, 42, 43, 60):
        assert write(engine, ids, count) == text[:count]
    for room in (1, 2, 7, 41):
        assert write(Engine(model, Lookahead(model), 5 + room), ids, 999) == text[:room]


def test_after_the_end() -> None:
    """A text that goes on, or a failure, in the cycles that a GPU runs ahead."""
    model, ids = tiny.pair(3, 0.0)[0], tiny.prompt(3, 5)
    engine = Engine(model, Lookahead(model), 128)
    state = engine.prefill(ids, 20, Sampling())
    for _ in range(40):
        engine.cycle()
    assert state.done and state.length == 25
    assert state.tokens[5:25].tolist() == vanilla(model, ids, 20)


def test_gains_on_what_repeats() -> None:
    """Guesses that are verified in another place than they were made for, or never found again: of a text that goes
    round in circles nearly every guess is right."""
    for seed in range(4):
        model = tiny.pair(seed, 0.0)[0]  # each token depends on the last one alone
        cycles = cycle_by_cycle(Engine(model, Lookahead(model), 256), tiny.prompt(seed, 5), 200)
        assert gained(cycles) > 3.5 and {len(cycle) for cycle in cycles[-12:-2]} == {5}


@pytest.mark.parametrize("sampling", SAMPLINGS[:2])
def test_prompts_do_not_mix(sampling: Sampling) -> None:
    """The pool or the window of one prompt seen in the next: the same text, other gains."""
    model = tiny.pair(2, 0.1)[0]
    first, second = tiny.prompt(1, 30), tiny.prompt(2, 6)
    fresh, used = (Engine(model, Lookahead(model), 256) for _ in range(2))
    expected = cycle_by_cycle(fresh, second, 60, sampling)
    write(used, first, 100, sampling)
    abandoned = used.generate(first, 60)
    for _ in range(5):
        next(abandoned)
    assert cycle_by_cycle(used, second, 60, sampling) == expected
    assert torch.equal(used.drafter.pool, fresh.drafter.pool)
    assert torch.equal(used.drafter.window, fresh.drafter.window)


def test_demo(demo_model: Llama, demo_prompts: list[list[int]]) -> None:
    """Whatever only a vocabulary of 49,152 shows; guesses that are worse than they could be. Over 128 tokens of eight
    prompts it gains 1.51 a cycle, over these 1.56."""
    engine, ids = Engine(demo_model, Lookahead(demo_model), 256), demo_prompts[3]
    with all_cores():
        cycles = cycle_by_cycle(engine, ids, 40)
        assert sum(cycles, []) == vanilla(demo_model, ids, 40)
    assert gained(cycles) > 1.4
