"""quant/draft_rows.py: the rows of an lm_head that are drafted from, and the prompt's own tokens among them."""
import json
from pathlib import Path

import pytest
import tiny
import torch
from torch import Tensor

from draft import Drafter, Eagle2, Vanilla
from drafters.block import Block
from drafters.eagle1 import Eagle1
from drafters.eagle3 import PLAIN
from drafters.heads import load_head
from engine import Engine
from formats.eagle3 import save_eagle3
from model import Llama
from ops import cpu_integers
from ops.quantized import Quantized, dequantize, to_tiles
from quant import draft_rows
from quant.draft_rows import DraftRows
from quant.linear import drafting_rows, quantize_weight
from sampling import Sampling
from tree import State, Tree

LISTED = torch.arange(0, 576, 3)  # 192 of 1,000 tokens


def values(weight: Tensor | Quantized) -> Tensor:
    return dequantize(weight, torch.float32) if isinstance(weight, Quantized) else weight


@pytest.mark.parametrize("tiled", [False, True])
@pytest.mark.parametrize("mode", [None, "int8", "int4"])
def test_rows_are_the_tokens(mode: str | None, tiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a row is not its token's, in rows or in the order of a CPU's kernels; if a token of the prompt that is
    not listed is left out, or one is twice there; if text behind the prompt counts, or what an older prompt left."""
    monkeypatch.setattr(draft_rows, "PROMPT_ROWS", 64)
    lm_head = torch.randn(1008, 256, generator=torch.Generator().manual_seed(0))
    weight = quantize_weight(lm_head, mode) if mode else lm_head
    expected = values(weight).clone()
    rows = DraftRows(weight, LISTED, False)
    x = torch.randn(3, 256, generator=torch.Generator().manual_seed(1))
    integers = mode == "int8" and not tiled and cpu_integers.is_supported()
    if integers:
        cpu_integers.integer_linear(x, rows.weights[0])
    if mode and tiled:
        to_tiles(weight)
        to_tiles(rows.weights[0])
    for prompt in ([7, 3, 700, 1000, 7], list(range(400, 800)), []):
        tokens = torch.tensor([*prompt, 901, 902, 904])
        rows.add_prompt(tokens, torch.tensor(len(prompt)))
        ids = rows.ids.tolist()
        own = [t for t in dict.fromkeys(reversed(prompt)) if t not in LISTED]
        assert ids[:min(64, len(own))] == own[:64]
        assert len({*ids}) == len(ids) == 256 and ids[64:] == LISTED.tolist()
        assert not {901, 902, 904} & {*ids}
        assert torch.equal(values(rows.weights[0]), expected[rows.ids])
        if integers:  # FBGEMM keeps a copy
            assert torch.allclose(cpu_integers.integer_linear(x, rows.weights[0]), x @ expected[rows.ids].T, atol=2)


@pytest.mark.parametrize("mode", [None, "int8", "int4"])
def test_rows_of_a_quantised_head(mode: str | None) -> None:
    """Fails if rows that a prompt brings are in another format than the listed ones, where the head is quantised."""
    lm_head = torch.randn(1008, 256, generator=torch.Generator().manual_seed(0))
    weight = quantize_weight(lm_head, mode) if mode else lm_head
    rows = DraftRows(weight, LISTED, True)
    rows.add_prompt(torch.tensor([7, 3, 700]), torch.tensor(3))
    assert {7, 700} <= {*rows.ids[:rows.prompt_rows].tolist()} and rows.prompt_rows == 512
    assert torch.equal(values(rows.weights[0]), values(drafting_rows(weight, rows.ids, True)))


def test_all_tokens_in_another_order(tmp_path: Path) -> None:
    """Fails if a draft vocabulary that has every token, in an order of its own, is taken for that of the target's rows.
    """
    model = tiny.target()
    mixed = torch.randperm(tiny.SHAPE["vocab_size"], generator=torch.Generator().manual_seed(0)).tolist()
    shared = tiny.head3(model, ids=mixed, names=[name for name in PLAIN if name != "lm_head.weight"])
    for head, ids in ((shared, shared.vocab), (tiny.head3(model), None)):
        folder = tmp_path / str(ids is None)
        save_eagle3(head.cfg, head.state_dict(), ids, folder)
        if ids is None:
            (folder / "draft_vocab.json").write_text(json.dumps(mixed))
        loaded = load_head(folder, model)
        rows = loaded.bind(model)
        own = (loaded if ids is None else model).lm_head.weight
        assert loaded.vocab is None and rows.ids is None and torch.equal(rows.lm_head, own)


def test_without_prompt_rows() -> None:
    """Fails if a head that has rows of its own, or a list of nearly all tokens, or one that is not to follow a prompt,
    gets rows of other tokens."""
    lm_head = torch.randn(192, 16)
    for vocab, rows, with_prompt in ((None, lm_head, True), (LISTED, lm_head, True),
                                 (torch.arange(150), lm_head[:150], True), (torch.arange(64), lm_head[:64], False)):
        made = DraftRows(lm_head, vocab, False, with_prompt)
        made.add_prompt(torch.tensor([191]), torch.tensor(1))
        assert made.ids is vocab or torch.equal(made.ids, vocab)
        assert torch.equal(made.weights[0], rows)


def trees_of(drafter: Drafter) -> list[Tensor]:
    """The tokens of all trees that it will propose."""
    propose, trees = drafter.propose, []

    def proposed(state: State) -> Tree:
        tree = propose(state)
        trees.append(tree.tokens.clone())
        return tree

    drafter.propose = proposed
    return trees


def make(kind: str, model: Llama, listed: Tensor) -> Eagle1 | Eagle2 | Block:
    """A drafter whose head lists these tokens. "markov of the list": its Markov head knows those of LISTED alone."""
    if kind == "eagle3":
        head = tiny.pair3(4, vocab_size=1000)[1]
        head.vocab, head.lm_head = listed, None
        return Eagle2(head, model, 16, 4, 4)
    if kind in ("eagle", "eagle2"):
        head = tiny.pair(4, 0.1, vocab_size=1000)[1]
        head.vocab = listed
        return (Eagle1 if kind == "eagle" else Eagle2)(head, model)
    head = tiny.block(model, markov=None if kind == "block" else "vanilla")
    head.vocab = listed
    if kind == "markov of the list":
        w2 = head.markov.w2.weight.data
        w2[torch.isin(torch.arange(1000), LISTED, invert=True)] = 0
        head.markov.w2.weight.data = w2[listed]
    return Block(head, model)


@pytest.mark.parametrize("kind", ["eagle", "eagle2", "eagle3", "block", "markov", "markov of the list"])
def test_drafts_as_from_one_list(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a head drafts the prompt's tokens in another way than listed ones, or the text is not vanilla's: the
    trees must be those of a head whose list has the prompt's tokens too. The second prompt must not see the first."""
    monkeypatch.setattr(draft_rows, "PROMPT_ROWS", 64)
    model = tiny.pair(4, 0.1, vocab_size=1000)[0]
    drafter = make(kind, model, LISTED)
    engine = Engine(model, drafter, 96)
    for seed, temperature in ((1, 0.0), (2, 0.0), (3, 1.0)):
        ids = tiny.prompt(seed, 9, 1000)
        trees = trees_of(drafter)
        found = list(engine.generate(ids, 20, Sampling(temperature)))
        assert {*ids} <= {*drafter.bound.ids.tolist()}
        with monkeypatch.context() as patch:
            patch.setattr(draft_rows, "PROMPT_ROWS", 0)
            other = make(kind, model, drafter.bound.ids.sort().values)
        others = trees_of(other)
        assert list(Engine(model, other, 96).generate(ids, 20, Sampling(temperature))) == found
        for one, another in zip(trees, others, strict=True):
            assert torch.equal(one, another)
        plain = Engine(model, Vanilla(), 96).generate(ids, 20, Sampling(temperature))
        assert sum(found, []) == sum(plain, [])
