"""Engines of different models that share a draft model or a head, and so its cache; and that every slot in use is read.

    python -m pytest tests/test_shared_caches.py
"""
from collections.abc import Callable

import pytest
import tiny
import torch
from helpers import Scripted, cycle_by_cycle, vanilla
from torch import Tensor

from draft import Drafter, Eagle2, Vanilla
from drafters.speculate import Speculate
from engine import Engine
from model import Llama
from tree import State, Tree


def pairs() -> tuple[Llama, Llama, list[tuple[Drafter, Drafter]]]:
    """Two targets, and for each a drafter that drafts with the same weights as the other's: a head, a draft model."""
    (one, head), (other, _) = tiny.pair(0, 0.1), tiny.pair(5, 0.1)
    draft = tiny.target(9, num_hidden_layers=1)
    return one, other, [(Eagle2(head, one, 12, 3, 3), Eagle2(head, other, 12, 3, 3)),
                        (Speculate(draft, one, 4), Speculate(draft, other, 4))]


@pytest.mark.slow
@pytest.mark.parametrize("kind", [0, 1])
def test_another_models_drafter(kind: int) -> None:
    """Fails if a text goes on, or is reused, after another target's engine wrote to the draft model's or the head's
    cache: nothing but fewer accepted drafts would show it."""
    one, other, drafters = pairs()
    engine, rival = (Engine(model, drafter, 160) for model, drafter in zip((one, other), drafters[kind]))
    ids = tiny.prompt(1, 30)
    text = ids + sum(cycle_by_cycle(engine, ids, 20), [])
    expected = cycle_by_cycle(engine, text + [1], 20)
    cycle_by_cycle(engine, ids, 20)
    assert list(engine.generate(text + [1], 20, reuse=True)) == expected and engine.reused > 20
    old = engine.generate(ids, 20)
    next(old)
    cycle_by_cycle(rival, tiny.prompt(2, 40), 20)
    with pytest.raises(RuntimeError, match="newer generate"):
        next(old)
    assert list(engine.generate(text + [1], 20, reuse=True)) == expected and engine.reused == 0


@pytest.mark.slow
def test_a_target_that_drafts_for_another() -> None:
    """Fails if a text goes on in the target's cache, or is reused, after another engine drafted with this target: it
    would be another text."""
    one, other = tiny.target(0), tiny.target(5)
    engine, rival = Engine(one, Vanilla(), 160), Engine(other, Speculate(one, other, 4), 160)
    ids = tiny.prompt(1, 30)
    text = ids + sum(cycle_by_cycle(engine, ids, 20), [])
    old = engine.generate(ids, 20)
    next(old)
    cycle_by_cycle(rival, tiny.prompt(2, 60), 20)
    with pytest.raises(RuntimeError, match="newer generate"):
        next(old)
    cycle_by_cycle(engine, ids, 20)
    cycle_by_cycle(rival, tiny.prompt(2, 60), 20)
    assert sum(engine.generate(text + [1], 20, reuse=True), []) == vanilla(one, text + [1], 20)


def reads_all(engine: Engine) -> list[tuple[int, int]]:
    """Let an engine compute each tree and each verification twice: once reading all slots. Both must be the same.
    Returns a list that gets the root's slot and the slots that were read, cycle by cycle."""
    verify, propose = engine.verify, engine.drafter.propose
    seen = []

    def twice(function: Callable, *inputs: object) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        width, engine.state.width = engine.state.width, engine.slots
        whole = function(*inputs)
        engine.state.width = width
        return function(*inputs), whole

    def proposing(state: State) -> Tree:
        tree, whole = twice(propose, state)
        assert all(map(torch.equal, tree, whole))
        return tree

    def verifying(base: Tensor, tree: Tree) -> tuple[Tensor, Tensor]:
        found, whole = twice(verify, base, tree)
        assert torch.allclose(found[0], whole[0], atol=1e-9)
        seen.append((int(base), engine.state.width))
        return found

    engine.verify = verifying
    if not isinstance(engine.drafter, Scripted):  # it makes another tree each time
        engine.drafter.propose = proposing
    return seen


@pytest.mark.slow
@pytest.mark.parametrize("length", [70, 120])
def test_every_slot_in_use_is_read(length: int) -> None:
    """Fails if, on a CPU, a cycle reads fewer slots than its tree or its drafts are in: where slot 128 lies among them,
    a node would not see its own ancestors."""
    model, head = tiny.pair(3, 0.1)
    ids = tiny.prompt(4, length)
    text = vanilla(model, ids, 20)
    for drafter in (Eagle2(head, model, 64, 8, 10), Scripted(ids + text, 60, 8, seed=2)):
        engine = Engine(model, drafter, 160)
        seen = reads_all(engine)
        assert sum(cycle_by_cycle(engine, ids, 20), []) == text
        assert all(base + drafter.num_nodes <= width for base, width in seen) and len(seen) > 3
