"""What a GPU runs and a CPU does not: masks that stay bits. Here it runs on a CPU, with the kernels' twins: the layer
takes another branch for a TreeMask than for the same mask as bool, and both must compute the same.
"""
import pytest
import tiny
import torch
from helpers import SAMPLINGS, as_on_a_gpu, cycle_by_cycle

import draft as draft_module
import engine as engine_module
from draft import Drafter, Eagle2, Vanilla
from engine import Engine
from formats.config import Config
from model import Llama
from ops.attention import TreeMask
from tree import build_tree

# No size is another's: 6 query heads of 10 elements on a hidden size of 32, two for each key. A large epsilon shows.
LAYERS = {"num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 10, "rms_norm_eps": 0.05}
FAMILIES = {"llama": {}, "qwen2": {}, "qwen3": {"model_type": "qwen3"}, "one key head": {"num_key_value_heads": 1},
            "a key for each head": {"num_key_value_heads": 6}}


def family(name: str) -> Llama:
    """A tiny model of this family, float64. Qwen2 has biases of q, k and v, Qwen3 norms of q and k."""
    cfg = Config.from_dict(tiny.SHAPE | LAYERS | FAMILIES[name])
    model = Llama(cfg, qkv_bias=name == "qwen2")
    tiny.randomise(model, 3, torch.float64)
    return model


@pytest.mark.parametrize("name", FAMILIES)
@torch.inference_mode()
def test_bits_and_bools(name: str) -> None:
    """Fails if, for a mask that stays bits, biases or the norms of q and k are left out or swapped, an epsilon is
    another, keys go to other slots or unrotated, or a row sees other slots. The masks: causal, one row, a tree, a tree
    of two words."""
    model = family(name)
    model.allocate_cache(200)
    model.kv.normal_(generator=torch.Generator().manual_seed(1))  # what lies in the slots that nobody may see
    before = model.kv.clone()
    parents = torch.tensor([0, 0, 0, 1, 1, 2, 4])
    tree = build_tree(torch.tensor(tiny.prompt(5, 7)), parents, 3)
    far = torch.tensor([[1, 1 << 5], [3, 0], [1 << 40 | 5, -1 << 63]])  # also the nodes 69, 40 and 127
    base = torch.tensor(30)
    causal = TreeMask(base, None), torch.arange(30, 35), torch.arange(30, 35)
    one = TreeMask(base, torch.ones(1, 1, dtype=torch.int64)), base[None], base[None]
    branches = TreeMask(base, tree.ancestors), base + tree.depth, base + torch.arange(7)
    words = TreeMask(base, far), torch.tensor([90, 91, 97]), torch.tensor([30, 31, 99])
    for mask, positions, slots in (causal, one, branches, words):
        tokens = torch.tensor([tiny.prompt(len(slots), len(slots))])
        found = []
        for form in (mask, mask.dense(len(slots), 200)):
            model.kv.copy_(before)
            found.append((model(tokens, positions, slots, form), model.kv.clone()))
        (features, kv), (expected, expected_kv) = found
        assert torch.allclose(features, expected, atol=1e-9) and torch.allclose(kv, expected_kv, atol=1e-9)
        assert expected.std() > 0.5 and not torch.equal(kv[..., slots, :], before[..., slots, :])


@pytest.mark.slow
@pytest.mark.parametrize("name, how", list(zip(FAMILIES, SAMPLINGS)))
def test_texts(name: str, how, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if an engine whose masks stay bits, and whose host runs ahead as on a GPU, writes another text than one on
    a CPU, or accepts other drafts."""
    model = family(name)
    head = tiny.head(model, qkv_bias=name == "qwen2")
    ids = tiny.prompt(1, 70)

    def cycles(drafter: Drafter, start=lambda engine: engine) -> list[list[int]]:
        return cycle_by_cycle(start(Engine(model, drafter, 128)), ids, 40, how)

    head3 = tiny.head3(model, wide=(True, False))
    drafters = Vanilla(), Eagle2(head, model, 24, 4, 5), Eagle2(head3, model, 24, 4, 5)
    expected = [cycles(drafter) for drafter in drafters]
    assert all(sum(text, []) == sum(expected[0], []) for text in expected)
    for module in (engine_module, draft_module):
        monkeypatch.setattr(module, "tree_mask", lambda base, bits, width, **_: TreeMask(base, bits))
        monkeypatch.setattr(module, "causal_mask", lambda first, rows, width: TreeMask(first, None))
    monkeypatch.setattr(engine_module, "SHORT_CHUNK", 16)
    monkeypatch.setattr(engine_module, "PREFILL_CHUNK", 48)
    found = [cycles(drafter, as_on_a_gpu) for drafter in drafters]
    assert found == expected
