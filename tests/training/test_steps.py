"""What a training step does to the weights, and how the dialogues are drawn: nothing here shows in a loss that falls.

    python -m pytest tests/training/test_steps.py
"""
import argparse
import math
import sys
from pathlib import Path

import pytest
import tiny
import torch
from conftest import ROOT
from helpers import Letters, marked
from torch import Tensor, nn

import train
from model import Llama
from training import dialogues, steps
from training.commands import options, read_options
from training.dialogues import Script, read_openers
from training.steps import in_parts, places_in_part, soft_cross_entropy, unrolled_attention
from training.trainer import Trainer, new_head

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model() -> Llama:
    return tiny.target(dtype=torch.bfloat16)


def make(model: Llama, **changes: object) -> Trainer:
    values = {"length": 16, "batch": 2, "unroll": 2, "decay": 0.8, "places": 64, "regression": 0.0, "lr": 0.05,
              "steps": 400, "minutes": math.inf, "out": Path("head")}
    torch.manual_seed(0)
    return Trainer(model, argparse.Namespace(**values | changes))


def pull(trainer: Trainer, gradient: float) -> None:
    """Take a step at the peak rate, of a loss that has this gradient at every weight."""
    parameters = list(trainer.module.parameters())
    trainer.losses = lambda *inputs: (gradient * sum(p.sum() for p in parameters), [torch.zeros(())])
    trainer.schedule = lambda: 1.0
    trainer.train_step(marked(2, 16))


def test_optimizers(model: Llama) -> None:
    """Fails if Muon loses its weight decay, without which learning stalls after hours, if vectors are decayed, or if
    their rate is the matrices'."""
    trainer = make(model)
    (muon,), (adam,) = (optimizer.param_groups for optimizer in trainer.optimizers)
    assert [type(optimizer) for optimizer in trainer.optimizers] == [torch.optim.Muon, torch.optim.AdamW]
    assert muon["weight_decay"] == 0.1 and muon["momentum"] == 0.95 and muon["adjust_lr_fn"] == "match_rms_adamw"
    assert adam["weight_decay"] == 0 and adam["betas"] == (0.9, 0.95)
    assert muon["initial_lr"] == 0.05 and adam["initial_lr"] == pytest.approx(0.01)
    found = {id(p) for group in (muon, adam) for p in group["params"]}
    assert found == {id(p) for p in trainer.module.parameters()} and all(p.ndim == 2 for p in muon["params"])
    before = [p.detach().clone() for p in trainer.module.parameters()]
    pull(trainer, 0.0)  # without a gradient, what is left is the decay
    for old, new in zip(before, trainer.module.parameters()):
        assert torch.allclose(new, old * (1 - 0.05 * 0.1 * (old.ndim == 2)), atol=1e-7)


class Spy:
    """Takes the place of the optimizers."""
    def __init__(self, module: nn.Module) -> None:
        self.parameters = list(module.parameters())
        self.param_groups: list[dict] = []

    def step(self) -> None:
        self.norm = torch.cat([p.grad.flatten() for p in self.parameters]).norm().item()

    def zero_grad(self) -> None:
        for p in self.parameters:
            p.grad = None


def test_clipping(model: Llama) -> None:
    """Fails if one step with a huge gradient outweighs the steps after it (gradients are clipped to a norm of 1), if
    smaller ones are changed, or if gradients of one step are left for the next."""
    trainer = make(model)
    trainer.optimizers = [Spy(trainer.module)]
    size = sum(p.numel() for p in trainer.module.parameters())
    for norm in (1e5, 0.5, 0.25):
        pull(trainer, norm / size**0.5)
        assert trainer.optimizers[0].norm == pytest.approx(min(norm, 1), rel=1e-3)


def test_rates(model: Llama) -> None:
    """Fails if the schedule does not reach both optimizers, or reaches them twice."""
    trainer = make(model)
    for trainer.step in (0, 49, 300):
        share = trainer.schedule()
        trainer.train_step(marked(2, 16))
        assert [group["lr"] for optimizer in trainer.optimizers for group in optimizer.param_groups] == pytest.approx(
            [0.05 * share, 0.01 * share])
    trainer.step, trainer.args.steps = 100, 200  # half-way
    assert trainer.schedule() == pytest.approx(0.02 + 0.98 * 0.5)


def test_defaults() -> None:
    """Fails if what the documentation measured was trained with other defaults, or ends elsewhere than it should."""
    args = read_options(options("Train."), ["--checkpoint", "x"])
    found = {name: getattr(args, name) for name in ("tokens", "steps", "minutes", "length", "batch", "generate_batch",
                                                    "decay", "places", "lr", "eval_prompts")}
    assert found == {"tokens": 24e6, "steps": math.inf, "minutes": 12, "length": 640, "batch": 32,
                     "generate_batch": 2048, "decay": 0.8, "places": 8192, "lr": 2e-3, "eval_prompts": 80}
    for words, ends in ((("--steps", "30"), (30, math.inf)), (("--minutes", "2.5"), (math.inf, 2.5)), (
            ("--steps", "0"), (0, math.inf)), (("--steps", "9", "--minutes", "3"), (9, 3))):
        args = read_options(options("Train."), ["--checkpoint", "x", *words])
        assert (args.steps, args.minutes) == ends


@pytest.mark.parametrize("words, says", [
    ("--places 0", "must be 1 or more"), ("--batch 0", "must be 1 or more"), ("--generate_batch -1", "must be 1 or"),
    ("--length 2", "must be 3 or more"), ("--steps -1", "must be 0 or more"), ("--minutes nan", "must be 0 or more"),
    ("--eval_prompts -1", "must be 0 or more"), ("--places 1.5", "invalid int value: '1.5'"),
    ("--held_out -1", "must be 0 or more"), ("--mlp -1", "must be 1 or more"), ("--anchors 0", "must be 1 or more"),
    ("--markov_rank -1", "must be 0 or more"), ("--tokens inf", "must be 0 or more, not inf")])
def test_numbers_that_are_refused(words: str, says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
                                  ) -> None:
    """Fails if a number that nothing can be trained with is not refused in one line, before dialogues are written."""
    monkeypatch.setattr(sys, "argv", ["train.py", "--checkpoint", "x", *words.split()])
    with pytest.raises(SystemExit):
        train.parse_args()
    assert f"argument {words.split()[0]}: {says}" in capsys.readouterr().err


def test_no_minutes(model: Llama) -> None:
    """Fails if --minutes 0 ends in a division by zero: it only writes and evaluates what was trained before."""
    assert make(model, minutes=0).progress() == 1 and make(model, minutes=2.0).progress() == 0


def test_new_head(model: Llama) -> None:
    """Fails if an untrained head does not pass on half of the feature, or starts with attention or a norm that is not
    neutral."""
    torch.manual_seed(0)
    head = new_head(model.cfg, CPU)
    half = head.fc.weight[:, 32:]
    assert torch.equal(half, 0.5 * torch.eye(32)) and head.fc.weight[:, :32].std() < 0.03
    assert not head.layer.wo.weight.any() and (head.layer.mlp_norm.weight == 1).all()
    sizes = {name: p.std().item() for name, p in head.layer.named_parameters() if p.ndim == 2 and "wo" not in name}
    assert sizes == pytest.approx({"wqkv.weight": 0.01, "w13.weight": 0.02, "w2.weight": 0.002}, rel=0.1)


# ----- Dialogues -------------------------------------------------------------------------------------------------


def test_temperatures() -> None:
    """Fails if not half of the answers are greedy, a quarter at 0.7 and a quarter at 1, or a user turn is at another
    temperature than 1."""
    batch = 4000
    script = Script(Letters(), CPU)
    turns = script.start(batch, 0)
    assert (turns.temperature == 1).all() and not turns.answering.any()
    for answers in (True, False, True):
        while not (turns.answering == answers).all():
            ends = torch.where(turns.answering == answers, 9, 4)  # 4 ends a turn
            script.step(turns, ends)
        shares = {t: (turns.temperature == t).double().mean().item() for t in (0.0, 0.699999988079071, 1.0)}
        assert sum(shares.values()) == 1
        assert list(shares.values()) == pytest.approx([0.5, 0.25, 0.25] if answers else [0, 0, 1], abs=0.03)


def test_openers() -> None:
    """Fails if fewer than all openers are used, or if a third of the user turns does not begin without one."""
    script = Script(Letters(), CPU)
    count = len(dialogues.OPENERS)
    assert script.openers == count + count // 2 and len(set(dialogues.OPENERS)) == count > 80
    sequences = script.start(60000, 1).sequence
    assert sequences.unique().tolist() == list(range(script.openers))
    assert (sequences < count // 2).double().mean() == pytest.approx(1 / 3, abs=0.01)
    assert (dialogues.MAX_USER, dialogues.MAX_ANSWER) == (80, 400)


def test_own_openers(tmp_path: Path) -> None:
    """Fails if the openers of a file are not those that user turns begin with, if the file of this repository cannot be
    read, or if a wrong file is not refused by its name."""
    assert read_openers(None) is dialogues.OPENERS
    coding = read_openers(ROOT / "training/coding_openers.json")
    assert len(set(coding)) == len(coding) > 100 and all(opener == opener.strip() for opener in coding)
    file = tmp_path / "openers.json"
    file.write_text('["abc", "de"]')
    script = Script(Letters(), CPU, read_openers(file))
    turns = [[i for i in row if i >= 0] for row in script.forced.tolist()]
    assert script.openers == 3 and [len(turn) - len(turns[0]) for turn in turns[:3]] == [0, 3, 2]
    for wrong in ("", "{}", "[]", '["a", 1]', '["a", " "]', "[" * 100000):
        file.write_text(wrong)
        with pytest.raises(ValueError, match=r"openers\.json: should be a JSON list of texts"):
            read_openers(file)


def test_gradient_of_attention() -> None:
    """Fails if a later step's gradient does not reach the weights of the steps before it: against plain attention."""
    layer = tiny.target(num_hidden_layers=1).layers[0].requires_grad_(True)
    rope = torch.stack((torch.ones(5, 8), torch.zeros(5, 8))).double()
    x, given = (torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(i), dtype=torch.float64) for i in (0, 1))
    keys, values = [], []
    unrolled_attention(layer, x, rope, keys, values)
    y = unrolled_attention(layer, x.flip(0), rope, keys, values)
    q = layer.qkv(x.flip(0), rope)[0].transpose(1, 2)
    first = (q @ keys[0].mT * 8**-0.5).masked_fill(torch.ones(5, 5).tril() == 0, -torch.inf)
    later = (q * keys[1]).sum(-1, keepdim=True) * 8**-0.5
    p = torch.cat((first, later), -1).softmax(-1)
    plain = (p[..., :5] @ values[0] + p[..., 5:] * values[1]).transpose(1, 2).flatten(2)
    found, wanted = (torch.autograd.grad((out * given).sum(), layer.wqkv.weight, retain_graph=True)[0]
                     for out in (y, plain))
    assert torch.allclose(y, plain, atol=1e-5) and (found - wanted).norm() < 1e-4 * wanted.norm()


def test_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a loss that is computed for a few places at a time differs from the loss of all at once, or one of its
    gradients, or if logits of more places are made at once."""
    torch.manual_seed(0)
    given, weight = torch.randn(45, 12, requires_grad=True), torch.rand(45)
    feature, rows = torch.randn(45, 12), torch.randn(100, 12)
    lm_head = nn.Linear(12, 100, bias=False)
    sizes = []

    def loss_of(outputs: Tensor, feature: Tensor) -> tuple[Tensor, Tensor]:
        sizes.append(len(outputs))
        logits, target = lm_head(outputs), feature @ rows.T
        return soft_cross_entropy(logits, target), logits.argmax(-1) == target.argmax(-1)

    outputs = given * 2
    loss, agree = loss_of(outputs, feature)
    (3 * (loss * weight).sum()).backward()
    expected = given.grad, lm_head.weight.grad / 3
    for logits, parts in ((4500, [45]), (4499, [24, 21]), (1600, [16, 16, 13]), (1, [8, 8, 8, 8, 8, 5])):
        monkeypatch.setattr(steps, "LOGITS", logits)
        given.grad = lm_head.weight.grad = None
        sizes.clear()
        total, agreed = in_parts(loss_of, 100, weight, given * 2, feature)
        assert sizes == parts
        assert torch.allclose(total, (loss * weight).sum()) and torch.equal(agreed, agree)
        (3 * total).backward()
        assert torch.allclose(given.grad, expected[0], atol=1e-6), parts
        assert torch.allclose(lm_head.weight.grad, expected[1], atol=1e-6), parts


@pytest.mark.parametrize("tokens", [16896, 32000, 49152, 128256, 151936])
def test_parts_of_one_size(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if the last part of the places that a step takes by default, or of a block head's 32 * 256 * 8, is smaller
    than the others: its loss is compiled once more. Or if a part has more logits than its memory is counted for, or
    less than half as many."""
    monkeypatch.setattr(steps, "LOGITS", 200_000_000)
    for places in (8192, 65536):
        size = places_in_part(places, tokens)
        assert places % size == 0 and size * tokens <= 200_000_000
        assert size == places or 2 * size * tokens > 200_000_000
