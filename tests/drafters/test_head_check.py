"""drafters/head_check.py: the guesses of a head against a plain builder's, and when one variant is better than another.
"""
from dataclasses import replace

import pytest
import tiny
import torch
from plain_blocks import PlainBlock
from plain_trees import Builder, PlainHead, PlainHead3

from drafters.head_check import STEPS, Answer, Variant, compare, is_clear, right_guesses
from model import Llama


def plain_guesses(builder: Builder, start: int) -> list[list[bool]]:
    """The same, row by row: what the head guesses after each token of the text, and after its own hidden states."""
    text, right = builder.text, []
    outputs, seen = builder.outputs, [builder.entries[:i + 1] for i in range(len(builder.entries))]
    for step in range(STEPS):
        places = [i for i in range(len(text) - 2 - step) if i + 2 + step >= start]
        right.append([builder.head.rankings([outputs[i]], 0.0)[0][0][0] == text[i + 2 + step] for i in places])
        rows = [builder.head.run(text[i + 2 + step], outputs[i], i + 1 + step, seen[i])
                for i in range(len(text) - 3 - step)]
        outputs = [output for _, output in rows]
        seen = [[*before, row] for before, (row, _) in zip(seen, rows, strict=False)]
    return right


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["eagle", "eagle3", "eagle3, two layers, norm_output"])
def test_guesses(kind: str) -> None:
    """Fails if a guess is read one place off, from features where the head has its own, with the wrong position or
    entries of other rows; or if tokens of the question count."""
    model = tiny.target(4, num_hidden_layers=3)
    model.allocate_rope(64)
    answers = [Answer(tiny.prompt(seed, 20 + seed), 5 + 2 * seed) for seed in range(3)]
    if kind == "eagle":
        model, head = tiny.pair(4, 0.03)
        model.allocate_rope(64)
        plain = PlainHead(tiny.published(head), head.cfg, model)
    else:
        head = tiny.head3(model, wide=(True, False), norm_output=True) if "," in kind else tiny.head3(model)
        plain = PlainHead3(head.state_dict(), head.cfg, None, model)
    expected = [[] for _ in range(STEPS)]
    for ids, start in answers:
        hidden = model.forward_with_taps(torch.tensor([ids]), torch.arange(len(ids)), taps=head.bind(model).taps)[1][0]
        features = hidden if kind == "eagle" else torch.stack([plain.join(row) for row in hidden])
        for step, right in enumerate(plain_guesses(Builder(plain, ids, features), start)):
            expected[step] += right
    found = right_guesses(head, model, answers)
    assert [right.tolist() for right in found] == expected and 0 < sum(map(sum, expected)) < sum(map(len, expected))


@pytest.mark.slow
def test_variants_are_told_apart() -> None:
    """Fails if the fields that are tried do not reach the head, or if the best one is not first: answers that the head
    itself has guessed are right for its own fields alone."""
    model = tiny.target(2, num_hidden_layers=5)
    model.allocate_rope(64)
    head = tiny.head3(model, taps=(0, 2, 4))
    ids = tiny.prompt(3, 5)
    while len(ids) < 60:  # a text in which each token is the head's first guess
        hidden = model.forward_with_taps(torch.tensor([ids]), torch.arange(len(ids)), taps=(0, 2, 4))[1][0]
        plain = PlainHead3(head.state_dict(), head.cfg, None, model)
        builder = Builder(plain, [*ids, 0], torch.stack([plain.join(row) for row in hidden]))
        ids.append(plain.rankings([builder.outputs[len(ids) - 2]], 0.0)[0][0][0])
    variants = compare(head, {"taps": ((1, 2, 4), (0, 2, 4)), "rope_theta": (1e4, 1e2)}, model, [Answer(ids, 8)])
    assert variants[0].fields == {"taps": (0, 2, 4), "rope_theta": 1e4} and variants[0].shares[0] == 1
    assert len(variants) == 4 and variants[1].shares[0] < 0.9 and is_clear(variants[0], variants[-1])


def test_what_is_clear() -> None:
    """Fails if a difference that chance explains decides, or one that it does not is not enough."""
    def variant(right: int, of: int) -> Variant:
        return Variant({}, [torch.arange(of) < right])

    assert is_clear(variant(60, 100), variant(50, 100))  # 10 guesses that only the first has right
    assert not is_clear(variant(53, 100), variant(50, 100)) and not is_clear(variant(50, 100), variant(50, 100))
    a, b = Variant({}, [torch.arange(100) % 2 == 0]), Variant({}, [torch.arange(100) % 2 == 1])
    assert not is_clear(a, b) and not is_clear(b, a)


BLOCKS = {"anchor first": {}, "fill in, sees all": {"anchor_first": False, "causal": False},
          "markov": {"markov": "rnn", "ids": [9, 3, 4, 17, 22, 0, 1, 8, 12, 11, 10, 20, 5, 6]},
          "two rows": {"block_size": 2, "markov": "vanilla"}, "windows": {}}


def guessed_by(plain: PlainBlock, model: Llama, ids: list[int], length: int, own: int = 1) -> list[int]:
    """A text that begins with `ids`, in which every `own`-th token is the first guess of the head."""
    while len(ids) < length:
        taps = model.forward_with_taps(torch.tensor([ids]), torch.arange(len(ids)), taps=plain.cfg.taps)[1][0]
        context = [plain.add_context(row, place) for place, row in enumerate(taps[:-1])]
        h = plain.rows(ids[-1], len(ids) - 1, context)[0]
        logits = plain.lm_head @ h
        if plain.cfg.markov:
            logits = logits + plain.markov(ids[-1], h, torch.zeros(plain.cfg.markov_rank, dtype=h.dtype))[0]
        ids = [*ids, 5 if len(ids) % own else int(plain.ids[logits.argmax()])]
    return ids


@pytest.mark.slow
@pytest.mark.parametrize("kind", BLOCKS)
def test_guesses_of_blocks(kind: str) -> None:
    """Fails if a block sees the context of another anchor or rows of another block, if a sliding window is another
    layer's or cuts elsewhere, if the layout's shift is left out, or if the Markov head is given another token."""
    model = tiny.target(4, num_hidden_layers=3)
    model.allocate_rope(64)
    head = tiny.block(model, **BLOCKS[kind])
    if kind == "windows":
        head.cfg = replace(head.cfg, windows=(3, 6))
    plain = PlainBlock(head.state_dict(), head.cfg, head.vocab, model)
    answers = [Answer(guessed_by(plain, model, tiny.prompt(seed, 5), 14 + seed, 2), 5 + 2 * seed) for seed in range(3)]
    steps = min(STEPS, head.cfg.block_size - (not head.cfg.anchor_first))
    expected = [[] for _ in range(steps)]
    for ids, start in answers:
        taps = model.forward_with_taps(torch.tensor([ids]), torch.arange(len(ids)), taps=head.cfg.taps)[1][0]
        context = [plain.add_context(row, place) for place, row in enumerate(taps)]
        for anchor in range(start - 1, len(ids) - STEPS):
            state = torch.zeros(head.cfg.markov_rank, dtype=torch.float64)
            for step, h in enumerate(plain.rows(ids[anchor], anchor, context[:anchor])[:steps]):
                logits = plain.lm_head @ h
                if head.cfg.markov:
                    added, state = plain.markov(ids[anchor + step], h, state)
                    logits = logits + added
                expected[step].append(int(plain.ids[logits.argmax()]) == ids[anchor + step + 1])
    found = right_guesses(head, model, answers)
    assert [right.tolist() for right in found] == expected and 0 < sum(map(sum, expected)) < sum(map(len, expected))


@pytest.mark.slow
def test_variants_of_blocks() -> None:
    """Fails if a layout, the causality or taps that are tried do not reach the head: a text that the head itself has
    guessed is right for its own fields alone."""
    model = tiny.target(2, num_hidden_layers=5)
    model.allocate_rope(64)
    head = tiny.block(model, taps=(0, 2, 4), anchor_first=False)
    plain = PlainBlock(head.state_dict(), head.cfg, None, model)
    ids = guessed_by(plain, model, tiny.prompt(3, 5), 45)
    doubts = {"anchor_first": (True, False), "causal": (False, True), "taps": ((1, 3, 5), (0, 2, 4))}
    best, *others = compare(head, doubts, model, [Answer(ids, 5)])
    assert best.fields == {"anchor_first": False, "causal": True, "taps": (0, 2, 4)} and best.shares[0] == 1
    assert len(others) == 7 and all(is_clear(best, other) for other in others)


@pytest.mark.parametrize("size", [2, 3])
def test_short_blocks_and_answers(size: int) -> None:
    """Fails if an answer of fewer tokens than are compared ends in a traceback, or if the layouts of a short block, one
    of which guesses a token more, cannot be compared."""
    model = tiny.target(2, num_hidden_layers=5)
    model.allocate_rope(64)
    head = tiny.block(model, block_size=size, taps=(0, 2, 4))
    plain = PlainBlock(head.state_dict(), head.cfg, None, model)
    answers = [Answer(guessed_by(plain, model, tiny.prompt(3, 5), 40), 5)]
    best, other = compare(head, {"anchor_first": (False, True)}, model, answers)
    assert best.fields == {"anchor_first": True} and best.shares[0] == 1
    assert len(best.right) == len(other.right) == size - 1 and is_clear(best, other)
    short = [Answer(tiny.prompt(seed, 5 + seed), 5) for seed in range(1, 3)]
    assert [len(right) for right in right_guesses(head, model, short + answers)] == size * [len(best.right[0])]
    assert [len(right) for right in right_guesses(head, model, short)] == size * [0]
