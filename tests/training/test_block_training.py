"""training/block.py: the rows of a block and their loss against a plain recomputation, learning, and the command.

Models of a few thousand weights on the CPU. A head that is trained on other positions or context than it drafts with
learns well, and drafts badly.
"""
import argparse
import contextlib
import itertools
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
import torch.nn.functional as F
from helpers import Letters, marked, tiny_command
from plain_blocks import PlainBlock
from torch import Tensor

import train
from drafters.block import Block, BlockHead
from drafters.heads import load_head
from engine import Engine
from formats.block import open_block
from model import Llama, load_model, rope_table
from training import block, memory
from training.attention import seen
from training.block import BlockTrainer, block_attention, distill_block, initialise, unused_token
from training.dialogues import Script

CPU = torch.device("cpu")
V = tiny.SHAPE["vocab_size"]


@pytest.fixture(autouse=True)
def letters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block, "Tokenizer", lambda path: Letters())


def settings(tmp_path: Path, **changes) -> argparse.Namespace:
    values = {"length": 32, "batch": 8, "unroll": 4, "decay": 0.8, "anchors": 8, "lr": 0.05, "steps": 200,
              "minutes": math.inf, "out": tmp_path / "head", "held_out": 0, "draft_vocab": 12, "head_layers": None,
              "mlp": None, "kv_heads": None, "block_size": 4, "markov_rank": 6, "checkpoint": tmp_path}
    return argparse.Namespace(**values | changes)


@pytest.mark.slow
@pytest.mark.parametrize("case", [{}, {"markov_rank": 0, "head_layers": 1}, {"block_size": 2, "draft_vocab": V},
                                  {"head_layers": 3, "mlp": 20, "kv_heads": 4}])
def test_rows_are_what_drafting_computes(case: dict, tmp_path: Path) -> None:
    """Fails if a row is trained at another place, on other context or other rows than it drafts with, or if the Markov
    head is given another token. Recomputes the loss in plain Python: fails if it is of other tokens, is not
    renormalised over the draft vocabulary, or if rows count that lie behind the end of an answer."""
    model = tiny.target(num_hidden_layers=8)
    data, args = marked(3, 20), settings(tmp_path, length=20, **case)
    made = BlockTrainer(model, args, data.int())
    tiny.randomise(made.module, 1, torch.float64)
    made.module.requires_grad_(True)
    made.module.tap_scale = torch.linspace(0.5, 2, len(made.module.tap_scale), dtype=torch.float64)
    made.rope = rope_table(made.layer_config, 20).double()
    made.amp = contextlib.nullcontext()
    tokens = torch.where(data < 0, ~data, data)
    anchors = torch.tensor([[1, 5, 9], [2, 8, 13], [4, 3, 11]])
    features, taps = model.forward_with_taps(tokens, torch.arange(20), taps=made.taps)
    total, agreements = made.block_losses(tokens, data >= 0, features, taps, anchors)
    state, ids = made.published()
    plain = PlainBlock({name: t.detach() for name, t in state.items()}, made.module.cfg, ids, model)
    ids, size = plain.ids.tolist(), made.module.cfg.block_size
    losses, hits, counts = [[] for _ in range(size)], [0] * size, [0] * size
    for b, row in enumerate(anchors.tolist()):
        logits = (features[b] @ model.lm_head.weight.T).tolist()
        context = [plain.add_context(taps[b, p], p) for p in range(20)]
        for a in row:
            for j, h in enumerate(plain.rows(int(tokens[b, a]), a, context[:a])):
                if data[b, a + j + 1] < 0:
                    break
                counts[j] += 1
                own = plain.lm_head @ h
                if made.module.markov:
                    own = own + plain.markov(int(tokens[b, a + j]), h, h)[0]
                target = logits[a + j]
                if int(tokens[b, a + j + 1]) not in ids:
                    continue
                p = torch.tensor([target[i] for i in ids], dtype=torch.float64).softmax(0)
                losses[j].append(-float(p @ own.log_softmax(0)))
                hits[j] += ids[int(own.argmax())] == max(ids, key=target.__getitem__)
    expected = sum(0.8**j * sum(losses[j]) / max(counts[j], 1) for j in range(size))
    assert total.item() == pytest.approx(expected, rel=1e-4) and sum(counts) > 8
    assert agreements.tolist() == pytest.approx([hit / max(n, 1) for hit, n in zip(hits, counts)])
    total.backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in made.module.parameters())


@pytest.mark.slow
def test_learns(learnable: tuple[Llama, Tensor], tmp_path: Path) -> None:
    """Fails if training does not lower the loss, or if the saved head drafts much worse than it learned to."""
    torch.manual_seed(1)  # else the head starts from what the tests before left
    model, data = learnable
    args = settings(tmp_path, draft_vocab=V)
    made = BlockTrainer(model, args, data)
    first = made.predict(data[:32].long())[0].item()
    made.run(data, tmp_path / "work")
    last, agreements = made.predict(data[:32].long())
    assert last.item() < 0.7 * first and agreements[0] > 0.5
    head = load_head(args.out, model)
    assert isinstance(head, BlockHead) and not open_block(args.out, model.cfg).doubts
    cycles = []
    for seed in range(4):
        cycles += list(Engine(model, Block(head, model, 24), 96).generate(tiny.prompt(seed, 6), 50))[1:]
    assert sum(map(len, cycles)) / len(cycles) > 2


@pytest.mark.slow
def test_anchors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if anchors lie where no answer follows although there are others, at the first token, or so late that the
    block reaches beyond the dialogue; or if there are more or fewer than --anchors."""
    model, data = tiny.target(dtype=torch.bfloat16, num_hidden_layers=8), marked(8, 32)
    made = BlockTrainer(model, settings(tmp_path, anchors=5), data.int())
    found = []
    monkeypatch.setattr(made, "block_losses", lambda *inputs: found.append(inputs[-1]))
    for _ in range(20):
        made.predict(data)
    anchors = torch.stack(found)  # [20, B, A]
    assert anchors.shape == (20, 8, 5) and anchors.min() >= 1 and anchors.max() + 4 < 32
    after = (data >= 0)[torch.arange(8)[:, None], anchors + 1]
    enough = (data[:, 2:28] >= 0).sum(1) >= 5
    assert enough.any() and after[:, enough].all()


def test_unused_token() -> None:
    """Fails if the mask token is one that the template or the end of a text uses, or one that the model lacks."""
    added = {i: SimpleNamespace(special=special) for i, special in ((5, True), (9, True), (11, False), (14, True))}
    letters = Letters()
    letters.added = added
    used = {*Script(letters, CPU).forced.flatten().tolist(), *letters.stop_ids}
    assert unused_token(letters, 14) == max(i for i in (5, 9) if i not in used)
    letters.added = {}
    assert unused_token(letters, 14) == 13


def test_memory(tmp_path: Path) -> None:
    """Fails if the estimate forgets the rows of the blocks or the context."""
    model, data = tiny.target(dtype=torch.bfloat16, num_hidden_layers=8), marked(8, 32).int()
    needs = [sum(memory.training_need(BlockTrainer(model, settings(tmp_path, anchors=anchors), data), 8))
             for anchors in (2, 8, 20)]
    assert needs[0] < needs[1] < needs[2]


# ----- The command -------------------------------------------------------------------------------------------------


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable]:
    yield from tiny_command(train.main, tmp_path, monkeypatch)


@pytest.mark.slow
def test_command(command, capsys: pytest.CaptureFixture) -> None:
    """Fails if a run leaves no evaluated head, cannot be resumed, or writes the dialogues again."""
    words = ("--kind", "block", "--draft_vocab", 12, "--block_size", 3, "--markov_rank", 4)
    folder = command(*words, "--steps", 3)
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith("tokens per step 1.00 -> 1.") and ", tokens/s " in lines[-1]
    assert lines[-1].endswith("(2 held-out prompts, a tree of 8 nodes and 3 levels)"), "the block's, not the default's"
    assert {p.name for p in (folder / "block").iterdir()} == {"model.safetensors", "config.json", "measured.json",
                                                              "acceptance.json"}
    found = open_block(folder / "block", load_model(folder).cfg)
    assert not found.doubts and found.config.anchor_first and found.config.causal and len(found.ids) == 12
    curve = json.loads((folder / "block/acceptance.json").read_text())
    assert all(row[2] == row[-1] for row in curve["gained"])
    command(*words, "--steps", 4, "--eval_prompts", 0)
    assert "resuming at step 3" in capsys.readouterr().out
    with pytest.raises(ValueError, match="--length 7 leaves no room"):
        command(*words, "--length", 7)
    with pytest.raises(ValueError, match="--norms is no option of --kind block"):
        command(*words, "--norms")


def test_gradient_of_attention() -> None:
    """Fails if a gradient gets lost between a row's weights for the context and those for its block: against plain
    attention over both."""
    layer = tiny.block(tiny.target()).layers[0].double().requires_grad_(True)
    heads, key_heads, size = layer.num_heads, layer.num_kv_heads, layer.head_dim
    random = torch.Generator().manual_seed(0)
    x, keys, values, given = (torch.randn(shape, generator=random, dtype=torch.float64) for shape in (
        (1, 2, 3, 32), (1, key_heads, 9, size), (1, key_heads, 9, size), (1, 2, 3, heads * size)))
    rope = torch.stack((torch.ones(1, 2, 3, size), torch.zeros(1, 2, 3, size))).double()
    before = (torch.arange(9) < torch.tensor([[4], [7]])).repeat_interleave(3, 0)[None]
    y = block_attention(layer, x, rope, seen(before, heads, torch.float64), keys, values)
    q, k, v = layer.wqkv(x).unflatten(-1, (-1, size)).split((heads, key_heads, key_heads), -2)
    q, k = layer.q_norm(q), layer.k_norm(k)
    plain = []
    for anchor, end in enumerate((4, 7)):
        for j, h in itertools.product(range(3), range(heads)):
            own = h * key_heads // heads
            every = torch.cat((keys[0, own, :end], k[0, anchor, :j + 1, own]))
            value = torch.cat((values[0, own, :end], v[0, anchor, :j + 1, own]))
            plain.append((every @ q[0, anchor, j, h] * size**-0.5).softmax(0) @ value)
    plain = torch.cat(plain).view(y.shape)
    found, wanted = (torch.autograd.grad((out * given).sum(), layer.wqkv.weight, retain_graph=True)[0]
                     for out in (y, plain))
    assert torch.allclose(y, plain, atol=1e-5) and (found - wanted).norm() < 1e-4 * wanted.norm()


def test_markov_rows() -> None:
    """Fails if the Markov head's rows are added to other tokens than its own where there are the prompt's rows."""
    torch.manual_seed(0)
    h, rows, before, feature = torch.randn(5, 8), torch.randn(7, 8), torch.arange(5), torch.randn(5, 8)
    markov = SimpleNamespace(w1=torch.nn.Embedding(9, 3), w2=torch.nn.Linear(3, 4, bias=False))
    loss, _ = distill_block(markov, rows, h, before, feature)
    logits = h @ rows.T
    logits[:, 3:] += markov.w2(markov.w1(before))
    assert torch.allclose(loss, F.cross_entropy(logits, (feature @ rows.T).softmax(-1), reduction="none"), atol=1e-5)


def test_first_norm() -> None:
    """Fails if a new head's last norm is not the target's."""
    model = tiny.target(num_hidden_layers=8)
    head = tiny.block(model)
    initialise(head, model)
    assert torch.equal(head.norm.weight, model.norm.weight) and not (model.norm.weight == 1).all()
