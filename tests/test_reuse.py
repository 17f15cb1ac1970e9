"""generate(reuse=True): cache entries kept from the last text save time and change nothing, for any drafter and however
the last text ended."""
import random
from collections.abc import Callable

import pytest
import tiny
import torch
from helpers import FLAGS, GREEDY, SAMPLINGS, arguments, as_on_a_gpu, cycle_by_cycle, slow_but, write

import engine as engine_module
import generate
from draft import Drafter, Eagle2, Vanilla
from drafters.medusa import MedusaHeads, save_medusa
from drafters.methods import METHODS, make_drafter
from engine import Engine
from model import Llama
from sampling import Sampling

SLOTS = 160


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Llama, Drafter]]:
    """Makes a method's drafter and its target, fp32. Medusa's heads and the draft model are right now and then."""
    model, head = tiny.pair(0, 0.1, torch.float32)
    folder = tiny.save_target(model, tmp_path_factory.mktemp("checkpoint") / "target")
    tiny.save_head(head, folder / "eagle")
    tiny.save_head3(tiny.pair3(0, 0.1, torch.float32)[1], folder / "eagle3")
    tiny.save_block(tiny.block(model), folder / "block")
    save_medusa(MedusaHeads(model.cfg.hidden_size, 4), folder / "medusa")
    small = tiny.save_target(tiny.pair(0, 0.05, torch.float32)[0], folder / "small")

    def make(method: str) -> tuple[Llama, Drafter]:
        words = {".": small, "medusa": folder / "medusa"}
        args = generate.parse_args(arguments(folder, *(str(words.get(word, word)) for word in FLAGS[method])))
        return model, make_drafter(method, args, model, SLOTS)
    return make


def turns(seed: int, text: list[int]) -> list[list[int]]:
    """Prompts that share nothing, a part or all of a text."""
    new, n = tiny.prompt(seed, 9), len(text)
    other = [(text[i] + 1) % 24 for i in range(n)]
    return [text + new, text, text[:-1], [*text[:-1], other[-1]], [*text[:n // 2], other[n // 2], *new], text[:n // 2],
            text[:16], text[:17], text[:1], [*other[:1], *text[1:]], new]


@pytest.mark.parametrize("ahead, how", [(False, SAMPLINGS[2]), (True, GREEDY)], ids=["cpu", "running ahead"])
@pytest.mark.parametrize("method", slow_but(1, METHODS))
def test_second_turn(method: str, ahead: bool, how: Sampling, make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a reused slot was written by another token, another feature or a rejected draft, or if an entry of the
    head, a draft model's key, a feature or a pool is left from the last text. Compared cycle by cycle, since fewer
    drafts would be accepted long before texts differ."""
    monkeypatch.setattr(engine_module, "PREFILL_CHUNK", 16)
    model, drafter = make(method)
    first, reused, count = tiny.prompt(5, 23), [], 8
    engine, fresh = (Engine(model, drafter, SLOTS) for _ in range(2))
    if ahead:
        as_on_a_gpu(engine)
    text = first + write(fresh, first, 18, how)
    for number, prompt in enumerate(turns(1, text)):
        expected = cycle_by_cycle(fresh, prompt, count, how)
        assert cycle_by_cycle(engine, first, 18, how) and engine.reused == 0
        assert list(engine.generate(prompt, count, how, reuse=True)) == expected, number
        reused.append(engine.reused)
    held = len(text) - drafter.max_depth - 2
    half = len(text) // 2
    assert reused == [held, held, held, held, min(half - 1, held), half - 1, 15, 16, 0, 0, 0]


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_a_whole_conversation(method: str, make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if errors add up from turn to turn, or if a text is continued wrongly that ended by a stop id, its length,
    its reader or the context."""
    monkeypatch.setattr(engine_module, "PREFILL_CHUNK", 16)
    model, drafter = make(method)
    stop = frozenset(tiny.prompt(3, 2))
    for start in (Engine, lambda *how: as_on_a_gpu(Engine(*how))):
        engine, ids, dice = start(model, drafter, SLOTS, stop), [], random.Random(method)
        talks = []
        for turn in range(5):
            ids = ids[:dice.randint(len(ids) // 2, len(ids)) if turn % 3 == 2 else len(ids)]
            ids = ids + tiny.prompt(turn, dice.randint(1, 20))
            found, limit = [], dice.choice((3, 25, 300))
            for new in engine.generate(ids, limit, reuse=True):
                found.append(new)
                if dice.random() < 0.03:
                    break
            talks.append((ids, limit, found, engine.reused))
            ids = (ids + sum(found, []))[:SLOTS - 30]
        for ids, limit, found, _ in talks:
            assert cycle_by_cycle(Engine(model, drafter, SLOTS, stop), ids, limit)[:len(found)] == found
        assert sum(reused for *_, reused in talks) > 40


@pytest.mark.slow
@pytest.mark.parametrize("method", ["vanilla", "eagle2", "medusa", "speculate"])
def test_only_new_rows_are_run(method: str, make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if the whole prompt is processed although `reused` says otherwise, or if the default reuses anything. (The
    engine rounds rows up to 16.)"""
    model, drafter = make(method)
    engine, rows, forward = Engine(model, drafter, SLOTS), [], model.forward_with_taps
    monkeypatch.setattr(model, "forward_with_taps",
                        lambda tokens, *rest: rows.append(tokens.shape[1]) or forward(tokens, *rest))
    ids = tiny.prompt(2, 50)
    text = ids + write(engine, ids, 30)
    for reuse, count in ((True, 5 + drafter.max_depth + 2), (False, len(text) + 5)):
        rows.clear()
        cycles = list(engine.generate(text + [1, 2, 3, 4, 5], 8, reuse=reuse))
        assert rows == [-(-count // 16) * 16] + [drafter.num_nodes] * (len(cycles) - 1)
        assert engine.reused == len(text) + 5 - count
        write(engine, ids, 30)


@pytest.mark.slow
@pytest.mark.parametrize("reuse, ahead", [(False, True), (True, False), (True, True)])
def test_abandoned(reuse: bool, ahead: bool, make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if many texts that were abandoned half-way change a later one, in its tokens or in its drafts."""
    monkeypatch.setattr(engine_module, "PREFILL_CHUNK", 16)
    dice = random.Random(1)
    for method in ("eagle2+lookup", "lookahead", "speculate+lookup"):
        model, drafter = make(method)
        engine = Engine(model, drafter, SLOTS)
        if ahead:
            as_on_a_gpu(engine)
        kept, base = [], tiny.prompt(9, 40)
        for _ in range(67 if reuse and ahead else 20):
            cut = dice.randint(1, 40)
            generator = engine.generate(base[:cut] + tiny.prompt(dice.randint(1, 99), dice.randint(0, 9)), 60,
                                        dice.choice(SAMPLINGS), reuse)
            for _ in range(dice.randint(0, 4)):
                next(generator)
            kept.append(generator)  # alive, as in a notebook
        prompt = base[:30] + [1]
        found = list(engine.generate(prompt, 40, SAMPLINGS[1], reuse))
        assert found == cycle_by_cycle(Engine(model, drafter, SLOTS), prompt, 40, SAMPLINGS[1])


class Interrupt(Exception):
    pass


@pytest.mark.parametrize("start", [Engine, lambda *how: as_on_a_gpu(Engine(*how))], ids=["cpu", "as on a GPU"])
def test_ended_before_a_chunk(start: Callable[..., Engine], make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a prompt goes on after what is called before each of its chunks has raised, or if the next text is
    wrong."""
    monkeypatch.setattr(engine_module, "PREFILL_CHUNK", 16)
    model, drafter = make("eagle2")
    engine, prompt, chunks = start(model, drafter, SLOTS), tiny.prompt(4, 60), []

    def end_at_third() -> None:
        chunks.append(1)
        if len(chunks) == 3:
            raise Interrupt

    list(engine.generate(prompt[:20], 5, reuse=True))
    engine.before_chunk = end_at_third
    with pytest.raises(Interrupt):
        list(engine.generate(prompt, 5, reuse=True))
    engine.before_chunk = lambda: None
    assert len(chunks) == 3
    expected = cycle_by_cycle(Engine(model, drafter, SLOTS), prompt, 15)
    assert list(engine.generate(prompt, 15, reuse=True)) == expected


@pytest.mark.slow
@pytest.mark.parametrize("method", ["eagle2", "speculate+lookup"])
def test_interrupted_anywhere(method: str, make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a text is wrong after Ctrl-C in the middle of a prefill or a cycle, when some layers' caches had been
    written and others not."""
    monkeypatch.setattr(engine_module, "PREFILL_CHUNK", 16)
    model, drafter = make(method)
    engine, fresh, ids = (Engine(model, drafter, SLOTS), Engine(model, drafter, SLOTS), tiny.prompt(4, 30))
    after, copy = [0], torch.Tensor.index_copy_

    def index_copy(self: torch.Tensor, *rest: object) -> torch.Tensor:
        after[0] -= 1
        if after[0] == 0:
            raise Interrupt
        return copy(self, *rest)

    dice = random.Random(2)
    for turn in range(15):
        prompt = ids + tiny.prompt(turn % 4, turn % 7)
        expected = cycle_by_cycle(fresh, prompt, 15)
        list(engine.generate(ids + [3], 15, reuse=True))
        after[0] = dice.randint(1, 40)
        with monkeypatch.context() as patch, pytest.raises(Interrupt):
            patch.setattr(torch.Tensor, "index_copy_", index_copy)
            list(engine.generate(prompt, 100, reuse=True))
        assert list(engine.generate(prompt, 15, reuse=True)) == expected


@pytest.mark.slow
def test_who_may_go_on(make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a generator goes on in the caches of a newer text, or if a text is reused although something wrote over
    it: another engine, a larger one, compiling, a look at some scores."""
    model, drafter = make("eagle2")
    engine, ids = Engine(model, drafter, SLOTS), tiny.prompt(1, 20)
    other = Engine(model, Vanilla(), SLOTS)
    actions = {
        "newer": lambda: next(engine.generate(ids, 30)), "reusing": lambda: next(engine.generate(ids, 30, reuse=True)),
        "other engine": lambda: write(other, ids, 5), "scores": lambda: engine.top2_gap(ids),
        "compiling": lambda: engine.compile(rows=(3,))}
    for name, action in actions.items():
        old = engine.generate(ids, 30)
        next(old)
        action()
        with pytest.raises(RuntimeError, match="newer generate"):
            next(old)
        list(engine.generate(ids + [1], 5, reuse=True))
        assert bool(engine.reused) == (name in ("newer", "reusing")), name
    old = engine.generate(ids, 30)
    next(old)
    with pytest.raises(ValueError, match="max_seq_len"):
        next(engine.generate([1] * SLOTS, 5))
    assert next(old)  # a prompt that is refused ends nothing
    def fail(*_: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(engine, "captured", fail)
        next(engine.generate(ids, 5))
    with pytest.raises(RuntimeError, match="newer generate"):
        next(old)
    old = engine.generate(ids, 30)
    next(old)
    Engine(model, Eagle2(drafter.head, model), 2 * SLOTS)  # takes larger caches
    with pytest.raises(RuntimeError, match="newer generate"):
        next(old)
    fresh = cycle_by_cycle(engine, ids, 20)
    assert cycle_by_cycle(engine, ids, 20) == fresh
    finished = engine.generate(ids, 2)
    assert len(sum(finished, [])) == 2
    write(engine, ids, 5)
    assert next(finished, None) is None  # a finished one ends as always
