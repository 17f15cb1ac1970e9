"""benchmarks/widen_block.py: a small block head in a large shape drafts what it did before."""
import argparse
import json
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from torch import Tensor

from benchmarks import shape
from benchmarks.widen import FIELDS, SHAPES, widen_model
from benchmarks.widen_block import widen_block
from drafters.block import Block, BlockHead, BoundBlock
from drafters.head_check import run_blocks
from engine import Engine
from model import Llama
from quant.linear import is_quantized
from sampling import Sampling

V, C = tiny.SHAPE["vocab_size"], tiny.SHAPE["hidden_size"]
SHAPE = dict(zip(FIELDS, (V + 9, 80, 128, 4, 12, 3, 16)))
KEPT = [i for i in range(V) if i not in (3, 11)][::-1]  # ids of the small model that the wide one has
IDS = [20, 3, 9, 14, 1, 11, 7, 22, 16, 5, 0, 18, 2]  # a draft vocabulary
EPS = 0.05  # cannot be forgotten
HEADS = {"all tokens": {}, "draft vocabulary": {"ids": IDS}, "Markov": {"markov": "vanilla"},
         "Markov, draft vocabulary": {"markov": "vanilla", "ids": IDS},
         "fill in, sees all": {"anchor_first": False, "causal": False, "taps": (1, 2)},
         "other heads": {"head_dim": 4, "num_attention_heads": 6, "num_key_value_heads": 3, "layers": 1}}


def widened(model: Llama, head: BlockHead, kept: list[int], seed: int = 1, sizes: dict[str, int] = SHAPE
            ) -> tuple[Llama, BlockHead]:
    random = torch.Generator().manual_seed(seed)
    return (widen_model(model, sizes, kept, dtype=torch.float64, generator=random),
            widen_block(head, model.cfg, sizes, kept, dtype=torch.float64, generator=random))


def guesses(model: Llama, head: BlockHead, ids: list[int]) -> tuple[Tensor, Tensor]:
    """The rows of a block behind each token but the first, and their logits, [blocks * b, any]. With a Markov head as
    if the first tokens of the text were those before the rows."""
    bound, n = BoundBlock(head, model), len(ids)
    anchors, slots = torch.arange(1, n), torch.arange(n)
    tokens = torch.tensor(ids)
    head.allocate_cache(n + len(anchors) * head.cfg.block_size)
    model.allocate_rope(n)
    bound.add_context(model.forward_with_taps(tokens[None], slots, taps=head.cfg.taps)[1][0], slots)
    x = run_blocks(bound, tokens, anchors)
    logits = bound.read_logits(x)
    if head.markov:
        logits = logits + bound.markov_logits(tokens[torch.arange(len(x)) % n], x, None)[0]
    return x, logits


@pytest.mark.parametrize("kind", HEADS)
def test_same_guesses(kind: str) -> None:
    """Fails if a tap, the constant channel, a norm, a sliding window, a draft token or a row of the Markov head gets
    lost or mixed up, or if padding is ever drafted."""
    model = tiny.target(rms_norm_eps=EPS)
    head = tiny.block(model, rms_norm_eps=EPS, **HEADS[kind])
    head.cfg = replace(head.cfg, windows=(5, None)[:len(head.layers)])
    big, big_head = widened(model, head, KEPT)
    ids = tiny.prompt(3, 20, len(KEPT))
    ours_x, ours = guesses(big, big_head, ids)
    theirs_x, theirs = guesses(model, head, [KEPT[i] for i in ids])
    assert torch.allclose(ours_x[:, :C], theirs_x, atol=1e-9) and not ours_x[:, C + 1:].any()
    if head.vocab is None:
        assert big_head.vocab is None and ours.shape[1] == V + 9
        assert ours.softmax(-1)[:, len(KEPT):].max() < 1e-30
        ours, columns = ours[:, :len(KEPT)], KEPT
    else:
        drafted = [KEPT[i] for i in big_head.vocab.tolist()]
        assert drafted == [i for i in IDS if i in KEPT]
        columns = [IDS.index(i) for i in drafted]
    assert torch.allclose(ours, theirs[:, columns], atol=1e-9) and theirs.std() > 0.5
    assert big_head.cfg.draft_vocab_size == (V + 9 if head.vocab is None else len(columns))
    assert big_head.layers[0].k_norm.eps == EPS > big_head.norm.eps


def cycles(model: Llama, head: BlockHead, ids: list[int], sampling: Sampling) -> tuple[list, list]:
    """The tokens of each cycle, and the tokens and parents of each tree that was drafted."""
    drafter, trees = Block(head, model, 20, 4), []
    propose = drafter.propose
    drafter.propose = lambda state: trees.append(propose(state)) or trees[-1]
    committed = list(Engine(model, drafter, 128).generate(ids, 40, sampling))
    return committed, [(tree.tokens.tolist(), tree.parents.tolist()) for tree in trees]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["all tokens", "Markov, draft vocabulary"])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.0, seed=3)], ids=["greedy", "sampled"])
def test_same_cycles(kind: str, sampling: Sampling) -> None:
    """Fails if the widened pair does not draft the trees and commit, cycle by cycle, the tokens of the small pair."""
    for seed in range(2):
        model = tiny.target(seed)
        head = tiny.block(model, seed + 5, **HEADS[kind])
        (committed, trees), wide = (cycles(*pair, tiny.prompt(seed, 12), sampling)
                                    for pair in ((model, head), widened(model, head, list(range(V)))))
        assert wide == (committed, trees) and max(map(len, committed)) > 1


def test_noise_reaches_nothing() -> None:
    """Fails if another noise changes a single bit, as where a norm sees spare elements of a query, or if most weights
    are zero, which would cost less power than a real head."""
    model = tiny.target()
    head = tiny.block(model, markov="vanilla")
    for sizes in (SHAPE, SHAPE | {"head_dim": 32}):
        found = []
        for seed in (1, 2):
            big, big_head = widened(model, head, list(range(V)), seed, sizes)
            x, logits = guesses(big, big_head, tiny.prompt(3, 20))
            found.append((x, logits[:, :V]))
            for name, weight in big_head.named_parameters():
                assert weight.isfinite().all() and not weight.requires_grad
                assert weight.ndim == 1 or (weight != 0).double().mean() > 0.4, name
        assert all(map(torch.equal, *found))


def test_what_does_not_widen() -> None:
    """Fails if a head that would be computed wrongly is widened all the same, or one whose mask token is gone."""
    model = tiny.target()
    for changes in ({"rms_norm_eps": 0.3}, {"names": ("embed.weight",)}, {"names": ("lm_head.weight",)},
                    {"names": ("layers.0.wqkv.bias",)}, {"markov": "gated"}, {"markov": "rnn"}):
        with pytest.raises(ValueError, match="does not widen a block head with"):
            widen_block(tiny.block(model, **changes), model.cfg, SHAPE, KEPT)
    quantised = tiny.block(model)
    quantised.quantize("int8")
    with pytest.raises(ValueError, match="block head with quantised weights"):
        widen_block(quantised, model.cfg, SHAPE, KEPT)
    with pytest.raises(ValueError, match="cut the mask token of the head, 11"):
        widen_block(tiny.block(model, mask_token=11), model.cfg, SHAPE, KEPT)
    with pytest.raises(ValueError, match="intermediate_size 200 or more"):
        widen_block(tiny.block(model, intermediate_size=200), model.cfg, SHAPE, KEPT)


@pytest.mark.parametrize("quantize, weights, quantised", [
    (None, None, False), ("int8", None, True), (None, "int8", True), ("int8", "stored", False)])
def test_the_mask_token_is_kept(quantize: str | None, weights: str | None, quantised: bool, tmp_path: Path,
                                 monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if --shape cuts the mask token, which no text contains, where the checkpoint or --draft has a block head,
    or does not quantise what it has widened as it is asked to."""
    model = tiny.target(dtype=torch.float32, vocab_size=200)
    head = tiny.block(model, mask_token=199)
    monkeypatch.setitem(SHAPES, "tiny", SHAPE | {"vocab_size": 100})
    args = argparse.Namespace(shape="tiny", device="cpu", dtype="float32", quantize=quantize, group=None,
                              draft_weights=weights, max_new_tokens=5, checkpoint=tmp_path, draft=None)
    assert shape.mask_tokens(args, 200) == set()
    tiny.save_block(head, tmp_path / "block")
    wide = shape.Widening(args, model, [tiny.prompt(1, 9, 200)], frozenset([2]))
    big_head = wide.block(head)
    assert wide.kept_ids[big_head.cfg.mask_token] == 199 and big_head.quantized == quantised
    assert is_quantized(wide.model) == bool(quantize)
    assert sum(Engine(wide.model, Block(big_head, wide.model, 8), 64).generate([1, 5, 2], 9), [])
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "config.json").write_text(json.dumps({"mask_token_id": 150}))
    assert shape.mask_tokens(argparse.Namespace(draft=tmp_path / "elsewhere"), 200) == {150}
    assert shape.mask_tokens(argparse.Namespace(draft=tmp_path / "elsewhere"), 150) == set()
