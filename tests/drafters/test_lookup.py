"""drafters/lookup.py: chains against plain Python, the kernel against its twin, the text against plain decoding."""
import random

import pytest
import tiny
import torch
from triton_tools import assert_fits, compile_ahead, interpreted, not_interpreted

from draft import Eagle2, Vanilla
from drafters.block import Block
from drafters.lookup import CONFIDENCE, RULES, Lookup, Retrieval, retrieve_kernel
from engine import Engine
from sampling import Sampling
from tree import State


def plain(text: list[int], length: int, rule: str) -> tuple[list[int], int]:
    """The chain that a rule finds in a text, ~0 where there is no token, and the length of the match."""
    n, nothing = len(text), [~0] * length
    if rule == "longest":
        best, at = 0, None
        for end in range(1, n):  # the match ends before `end`; of equally long ones the latest wins
            match = 0
            while match < min(RULES[rule], end) and text[end - 1 - match] == text[n - 1 - match]:
                match += 1
            if match and match >= best:
                best, at = match, end
        return ([text[at + i % (n - at)] for i in range(length)], best) if at else (nothing, 0)
    for match in range(RULES[rule], 0, -1):
        for start in range(n - match):
            end = start + match
            if text[start:end] != text[-match:]:
                continue
            if rule == "pld" and (end + length > n or end >= n - match):
                continue
            chain = text[end:end + length]
            return chain + nothing[len(chain):], match
    return nothing, 0


def state_of(text: list[int], slots: int) -> State:
    """The state after a text. Its newest token also fills the slots behind it, which must not be read."""
    tokens = torch.tensor(text + [text[-1]] * (slots + 1 - len(text)))
    return State(tokens, torch.tensor(len(text)), torch.zeros(1), torch.tensor(1), torch.tensor(False), slots)


def texts(count: int, seed: int = 0) -> list[list[int]]:
    """Random texts of few different tokens, so that matches of all lengths occur. Some repeat a passage."""
    draw = random.Random(seed)
    made = []
    for _ in range(count):
        text = [draw.randrange(draw.choice([2, 4, 9])) for _ in range(draw.randint(1, 60))]
        if draw.random() < 0.3:
            start = draw.randrange(len(text))
            text += text[start:start + draw.randint(1, 25)]
        made.append(text)
    return made


@pytest.mark.slow
@pytest.mark.parametrize("rule", RULES)
def test_chain(rule: str) -> None:
    """Fails if the first match is taken for the latest, the end of the text matches itself, a chain runs past the text,
    or a match counts as too long. 2,000 texts."""
    seen = set()
    for i, text in enumerate(texts(2000)):
        length = 1 + i % 16
        retrieval, tokens = Retrieval(length, rule), torch.empty(length + 1, dtype=torch.int64)
        scores = torch.empty(length)
        retrieval.write(state_of(text, 128), tokens, scores)
        chain, match = plain(text, length, rule)
        assert tokens.tolist() == [text[-1], *chain], (text, length)
        odds = 1.0
        for i, score in enumerate(scores.exp().tolist()):
            odds *= CONFIDENCE[min(match + i, len(CONFIDENCE)) - 1] if chain[i] >= 0 else 0.0
            assert score == pytest.approx(odds, rel=1e-4)
        seen.add(match)
    assert len(seen) == RULES[rule] + 1, "not all lengths of a match have occurred"


@interpreted
def test_kernel() -> None:
    """Fails if the kernel finds another chain than its twin: with any rule, and in texts of several blocks."""
    long = [random.Random(5).randrange(3) for _ in range(2500)]
    lengths = (1, 10, 16)
    for rule in RULES:
        cases = [(text, lengths[i % 3]) for i, text in enumerate(texts(25, 7))]
        cases += [(text, n) for text in (long, long[:1024], long[:1025], long[:1], [1, 1]) for n in lengths]
        for text, length in cases:
            made = []
            for write in (Retrieval(length, rule).write_torch, Retrieval(length, rule).write_triton):
                made.append((torch.full((length + 1,), -9), torch.zeros(length)))
                write(state_of(text, 2600), *made[-1])
            assert all(map(torch.equal, *made)), (rule, text, length)


@pytest.mark.slow
@not_interpreted
@pytest.mark.xdist_group("interpreter")
def test_in_the_interpreter(interpreter) -> None:
    """Fails if test_kernel fails, in Triton's interpreter."""
    interpreter(__file__)


@not_interpreted
@pytest.mark.parametrize("arch", [86, 89, 90])
def test_compiles(arch: int) -> None:
    """Fails if the kernel does not compile for a GPU, spills, or wants too much shared memory."""
    pytest.importorskip("triton")
    types = {"text": "*i64", "length": "*i64", "tokens": "*i64", "scores": "*fp32", "table": "*fp32"}
    for rule in ("longest", "pld"):
        constants = {"K": 10, "MAX_MATCH": RULES[rule], "LATEST_MATCH": rule == "longest", "WHOLE_CHAIN": rule == "pld",
                     "BLOCK": 1024, "PDL": arch >= 90}
        if rule == "pld":
            constants["scores"] = None
        assert_fits(compile_ahead(retrieve_kernel, arch, types, constants, warps=8), arch, rule)


SAMPLINGS = [Sampling(), Sampling(0.8, top_p=0.9, seed=4), Sampling(1.0, seed=-3)]


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2, 5])
def test_text_is_vanillas(seed: int) -> None:
    """Fails if a blocked node is accepted, a chain has the wrong depth, or a retrieved node is kept without its parent:
    alone, and among EAGLE-2's candidates in trees of all sizes, with a stop id and at the end of the context."""
    model, head = tiny.pair(seed, [0.03, 0.1, 0.3][seed % 3])
    ids = tiny.prompt(seed, 4 + 3 * seed)
    shapes = [(8, 3, 3), (2, 1, 1), (64, 8, 10), (20, 2, 5)]
    drafters = [Lookup(length=1 + 3 * seed, rule=list(RULES)[seed % 3])] + [
        Eagle2(head, model, *shape, Retrieval(3 + seed, list(RULES)[i % 3])) for i, shape in enumerate(shapes)]
    for how in SAMPLINGS:
        wanted = sum(Engine(model, Vanilla(), 90, frozenset([3])).generate(ids, 100, how), [])
        for drafter in drafters:
            assert sum(Engine(model, drafter, 90, frozenset([3])).generate(ids, 100, how), []) == wanted


@pytest.mark.parametrize("kind", ["eagle2", "block", "markov"])
def test_a_chain_that_is_cut_short(kind: str) -> None:
    """Fails if a node without a token is verified where a chain ends before its length, as the rule hf lets it: its
    token is none of the model's."""
    model, head = tiny.pair(3, 0.3)
    retrieval = Retrieval(10, "hf")
    if kind == "eagle2":
        drafter = Eagle2(head, model, 60, 6, 10, retrieval)
    else:
        block = tiny.block(model, markov="vanilla" if kind == "markov" else None)
        drafter = Block(block, model, 60, 10, retrieval=retrieval)
    ids = [1, 2, 3, 4] * 2 + [1, 2]
    engine = Engine(model, drafter, 90)
    state = engine.prefill(ids, 60, Sampling())
    trees = []
    while not state.done:
        trees.append(drafter.propose(state).tokens)
        engine.cycle()
    assert all((tokens >= 0).all() for tokens in trees) and len(trees) > 3
    assert state.tokens[:70].tolist() == ids + sum(Engine(model, Vanilla(), 90).generate(ids, 60), [])


def test_a_text_that_repeats_itself_is_drafted_in_full() -> None:
    """Fails if a chain stops where the text ends, or starts one position off: a text that repeats itself must gain the
    whole chain and the bonus token."""
    model, ids = tiny.target(5), tiny.prompt(1, 6)
    model.layers = model.layers[:0]  # the next token depends on the last one only: it repeats within 24 tokens
    cycles = [len(new) for new in Engine(model, Lookup(length=10), 300).generate(ids, 200)]
    assert cycles[-5:-1] == [11] * 4 and sum(cycles) == 200


@pytest.mark.slow
def test_retrieval_helps_eagle2_where_the_text_repeats_itself() -> None:
    """Fails if retrieved candidates are never verified, or push out better ones: on a text that repeats itself, the
    same number of nodes must need far fewer cycles."""
    model, head = tiny.pair(3, 0.3)
    model.layers, head = model.layers[:0], tiny.head(model)  # a head that knows nothing
    counts = [len(list(Engine(model, Eagle2(head, model, 8, 3, 3, retrieval), 300).generate(tiny.prompt(2, 6), 200)))
              for retrieval in (None, Retrieval(7))]
    assert counts[1] < counts[0] / 2


def test_bad_sizes() -> None:
    """Fails if a chain of an impossible length, or an unknown rule, is accepted."""
    for bad in ({"length": 0}, {"length": 17}, {"length": 3, "rule": "none"}):
        with pytest.raises(ValueError, match="chain"):
            Retrieval(**bad)

