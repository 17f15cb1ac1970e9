"""benchmarks/widen_eagle3.py: a small EAGLE-3 head in a large shape guesses what it did before."""
import pytest
import tiny
import torch
from torch import Tensor

from benchmarks.widen import FIELDS, widen_model
from benchmarks.widen_eagle3 import widen_head3
from draft import Eagle2
from drafters.eagle3 import PLAIN, Eagle3Head
from engine import Engine
from model import Llama
from sampling import Sampling

V = tiny.SHAPE["vocab_size"]
SHAPE = dict(zip(FIELDS, (V + 9, 80, 128, 4, 12, 3, 16)))
KEPT = [i for i in range(V) if i not in (3, 11)]  # ids of the small model that the wide one has


def guesses(model: Llama, head: Eagle3Head, ids: list[int]) -> tuple[Tensor, Tensor]:
    """h and the logits of the first step, and of a second one from the head's own h, [2, rows, any]."""
    bound, n = head.bind(model), len(ids)
    head.allocate_cache(2 * n)
    model.allocate_rope(n)
    position = torch.arange(n)
    tokens = torch.tensor(ids)
    inputs = bound.make_inputs(model.forward_with_taps(tokens[None], position, taps=bound.taps)[1][0])
    found = []
    for step in range(2):
        slot = torch.arange((step + 1) * n)
        mask = torch.where(slot < n, slot <= position[:, None], slot % n == position[:, None])
        h = bound.predict(tokens.roll(-1 - step), inputs, None, position + step, step * n + position, mask)
        logits, inputs = bound.read_logits(h, False)
        found.append((h, logits))
    return tuple(map(torch.stack, zip(*found, strict=True)))


@pytest.mark.parametrize("draft_ids", [None, [20, 3, 9, 14, 1, 11, 7, 22, 16, 5, 0, 18, 2]])
@pytest.mark.parametrize("wide", [(True,), (True, False)])
def test_same_guesses(draft_ids: list[int] | None, wide: tuple[bool, ...]) -> None:
    """Fails if a half of the first layer's input, a tap, the constant channel, a norm or a draft token gets lost or
    mixed up."""
    model = tiny.target(rms_norm_eps=0.05)
    head = tiny.head3(model, ids=draft_ids, wide=wide, rms_norm_eps=0.05)
    random = torch.Generator().manual_seed(1)
    big = widen_model(model, SHAPE, KEPT, dtype=torch.float64, generator=random)
    big_head = widen_head3(head, model.cfg, SHAPE, KEPT, dtype=torch.float64, generator=random)
    drafted = [KEPT[i] for i in big_head.vocab.tolist()]
    assert drafted == [i for i in draft_ids or range(V) if i in KEPT]
    ids = tiny.prompt(3, 40, len(KEPT))
    ours_h, ours = guesses(big, big_head, ids)
    theirs_h, theirs = guesses(model, head, [KEPT[i] for i in ids])
    size = model.cfg.hidden_size
    assert torch.allclose(ours_h[..., :size], theirs_h, atol=1e-9) and not ours_h[..., size + 1:].any()
    rows = [(draft_ids or list(range(V))).index(i) for i in drafted]
    assert torch.allclose(ours, theirs[..., rows], atol=1e-9) and theirs.std() > 0.5


@pytest.mark.slow
def test_same_cycles() -> None:
    """Fails if the widened pair does not commit, cycle by cycle, what the small pair does."""
    model, _ = tiny.pair3(7, 0.03)
    head = tiny.head3(model)
    random = torch.Generator().manual_seed(1)
    big = widen_model(model, SHAPE, dtype=torch.float64, generator=random)
    big_head = widen_head3(head, model.cfg, SHAPE, list(range(V)), dtype=torch.float64, generator=random)
    for sampling in (Sampling(), Sampling(1.0, seed=3)):
        small, wide = (list(Engine(m, Eagle2(h, m, 20, 4, 4), 128).generate(tiny.prompt(1, 12), 40, sampling))
                       for m, h in ((model, head), (big, big_head)))
        assert small == wide


def test_what_does_not_widen() -> None:
    """Fails if a head that would be computed wrongly is widened all the same."""
    model = tiny.target()
    for changes in ({"norm_output": True}, {"norm_before_residual": True}, {"rms_norm_eps": 0.3}, {"taps": ()},
                    {"names": (*PLAIN, "embed.weight")}, {"names": (*PLAIN, "input_norm.weight")},
                    {"names": PLAIN[:2]}, {"wide": (True, True)}, {"names": (*PLAIN, "layers.0.wo.bias")}):
        with pytest.raises(ValueError, match="does not widen an EAGLE-3 head with"):
            widen_head3(tiny.head3(model, **changes), model.cfg, SHAPE, KEPT)
