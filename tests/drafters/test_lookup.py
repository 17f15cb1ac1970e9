"""lookup.py: the chains against plain Python, the kernel against its twin, the text against plain decoding."""
import os
import random
import tempfile

import pytest
import tiny
import torch
from triton_tools import LIMIT, in_child

from draft import Eagle2, Vanilla
from drafters.lookup import CONFIDENCE, RULES, Lookup, Retrieval, retrieve_kernel
from engine import Engine
from sampling import Sampling
from tree import State


def plain(text: list[int], length: int, rule: str) -> tuple[list[int], int]:
    """The chain that a rule makes of a text, ~0 where there is none, and the length of the match."""
    n, nothing = len(text), [~0] * length
    if rule == "longest":
        best, at = 0, None
        for end in range(1, n):  # the match is text[:end]'s end; the latest of the longest wins
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
    """Behind the text lies something else."""
    tokens = torch.tensor(text + [text[-1]] * (slots + 1 - len(text)))
    return State(tokens, torch.tensor(len(text)), torch.zeros(1), torch.tensor(1), torch.tensor(False), slots)


def texts(count: int, seed: int = 0) -> list[list[int]]:
    """Random ones of few tokens, so that there are matches of all lengths; some repeat a passage."""
    draw, made = random.Random(seed), []
    for _ in range(count):
        text = [draw.randrange(draw.choice([2, 4, 9])) for _ in range(draw.randint(1, 60))]
        if draw.random() < 0.3:
            start = draw.randrange(len(text))
            text += text[start:start + draw.randint(1, 25)]
        made.append(text)
    return made


@pytest.mark.parametrize("rule", RULES)
def test_chain(rule: str) -> None:
    """The first match taken for the latest, the end matched with itself, a chain that runs past the text, a match
    counted too long: 2,000 texts."""
    seen = set()
    for i, text in enumerate(texts(2000)):
        length = 1 + i % 16
        retrieval, tokens = Retrieval(length, rule), torch.empty(length + 1, dtype=torch.int64)
        scores = torch.empty(length)
        retrieval.write(state_of(text, 128), tokens, scores)
        chain, match = plain(text, length, rule)
        assert tokens.tolist() == [text[-1], *chain], (text, length)
        odds = 1.0 if match else 0.0
        for i, score in enumerate(scores.exp().tolist()):
            odds *= CONFIDENCE[min(match + i, len(CONFIDENCE)) - 1]
            assert score == pytest.approx(odds, rel=1e-4)
        seen.add(match)
    assert len(seen) == RULES[rule] + 1, "not all lengths of a match have occurred"


def check_kernel() -> None:
    """In Triton's interpreter: blocks of a long text, and all rules."""
    long = [random.Random(5).randrange(3) for _ in range(2500)]
    for rule in RULES:
        for text in [*texts(25, 7), long, long[:1024], long[:1025], long[:1], [1, 1]]:
            for length in (1, 10, 16):
                made = []
                for write in (Retrieval(length, rule).write_torch, Retrieval(length, rule).write_triton):
                    made.append((torch.full((length + 1,), -9), torch.zeros(length)))
                    write(state_of(text, 2600), *made[-1])
                assert all(map(torch.equal, *made)), (rule, text, length)


def test_kernel() -> None:
    in_child("check_kernel()", True, __file__)


def check_compiles() -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    for cap in (86, 89, 90):
        for rule, scored in (("longest", True), ("pld", False)):
            types = {"text": "*i64", "length": "*i64", "tokens": "*i64", "scores": "*fp32", "table": "*fp32"}
            fixed = {"K": 10, "MAX_MATCH": RULES[rule], "LATEST_MATCH": rule == "longest", "WHOLE_CHAIN": rule == "pld",
                     "BLOCK": 1024, "PDL": cap >= 90} | ({} if scored else {"scores": None})
            names = retrieve_kernel.arg_names
            signature = {n: "constexpr" if n in fixed else types[n] for n in names}
            source = ASTSource(fn=retrieve_kernel, signature=signature, constexprs={
                (names.index(n),): value for n, value in fixed.items()})
            kernel = triton.compile(source, target=GPUTarget("cuda", cap, 32), options={"num_warps": 8})
            assert kernel.metadata.shared <= LIMIT[cap]


def test_compiles() -> None:
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = folder
        try:
            in_child("check_compiles()", False, __file__)
        finally:
            del os.environ["TRITON_CACHE_DIR"]


SAMPLINGS = [Sampling(), Sampling(0.8, top_p=0.9, seed=4), Sampling(1.0, seed=-3)]


@pytest.mark.parametrize("seed", range(6))
def test_text_is_vanillas(seed: int) -> None:
    """A blank node accepted, a chain at the wrong depth, a retrieved node kept without its parent: alone, and among
    EAGLE-2's candidates in trees of all sizes, with a stop id and at the end of the context."""
    model, head = tiny.pair(seed, [0.03, 0.1, 0.3][seed % 3])
    ids = tiny.prompt(seed, 4 + 3 * seed)
    shapes = [(8, 3, 3), (2, 1, 1), (64, 8, 10), (20, 2, 5)]
    drafters = [Lookup(length=1 + 3 * seed, rule=list(RULES)[seed % 3])] + [
        Eagle2(head, model, *shape, Retrieval(3 + seed)) for shape in shapes]
    for how in SAMPLINGS:
        wanted = sum(Engine(model, Vanilla(), 90, frozenset([3])).generate(ids, 100, how), [])
        for drafter in drafters:
            assert sum(Engine(model, drafter, 90, frozenset([3])).generate(ids, 100, how), []) == wanted


def test_a_text_that_repeats_itself_is_drafted_in_full() -> None:
    """A chain that stops where the text ends, or begins a place off: what repeats gains all of it and one more."""
    model, ids = tiny.target(5), tiny.prompt(1, 6)
    model.layers = model.layers[:0]  # the next token depends on the last one alone: a cycle within 24 tokens
    cycles = [len(new) for new in Engine(model, Lookup(length=10), 300).generate(ids, 200)]
    assert cycles[-5:-1] == [11] * 4 and sum(cycles) == 200


def test_retrieval_helps_eagle2_where_the_text_repeats_itself() -> None:
    """Retrieved candidates that are never verified, or that push out better ones: on a text that comes back, far fewer
    cycles, with the same number of nodes."""
    model, head = tiny.pair(3, 0.3)
    model.layers, head = model.layers[:0], tiny.head(model)  # a head that knows nothing
    counts = [len(list(Engine(model, Eagle2(head, model, 8, 3, 3, retrieval), 300).generate(tiny.prompt(2, 6), 200)))
              for retrieval in (None, Retrieval(7))]
    assert counts[1] < counts[0] / 2


def test_bad_sizes() -> None:
    for bad in ({"length": 0}, {"length": 17}, {"length": 3, "rule": "none"}):
        with pytest.raises(ValueError, match="chain"):
            Retrieval(**bad)

