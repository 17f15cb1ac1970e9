"""What training measures, prints and keeps: held-out dialogues, the curve, speeds, and how much memory it takes."""
import argparse
import itertools
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from helpers import marked

from app.memory import dequantized
from quant.linear import quantize_linears
from training import evaluation, memory, trainer
from training.eagle3 import Eagle3Trainer
from training.trainer import Trainer

pytestmark = pytest.mark.filterwarnings("ignore:Mismatch dtype")  # as training.commands.quieten leaves it out


def settings(tmp_path: Path, **changes) -> argparse.Namespace:
    values = {"length": 32, "batch": 8, "unroll": 4, "decay": 0.8, "places": 128, "lr": 0.05, "steps": 80,
              "minutes": math.inf, "out": tmp_path / "head", "held_out": 0, "draft_vocab": 12, "regression": 0.0}
    values |= dict.fromkeys(("head_layers", "norms", "mlp", "kv_heads", "share_lm_head", "init", "openers"))
    return argparse.Namespace(**values | changes)


def test_measure(tmp_path: Path) -> None:
    """Fails if the agreement is measured on other dialogues than those held out, on other places each time, or not at
    all where fewer are held out than a batch has."""
    model, data = tiny.target(dtype=torch.bfloat16, num_hidden_layers=4), marked(8, 32).int()
    made = Eagle3Trainer(model, settings(tmp_path, places=20), data[:5], data[5:])
    found = [made.measure(tmp_path) for _ in range(2)]
    torch.manual_seed(0)
    loss, agreement = made.gradients(data[5:][[0, 1, 2] * 2 + [0, 1]].long())
    assert torch.equal(*found) and torch.equal(found[0], agreement)
    assert made.curve[-1]["loss"] == round(loss.item(), 4)


def test_stale_curve(tmp_path: Path) -> None:
    """Fails if what a killed run measured after its last save stays in the curve: these steps are taken again."""
    model, data = tiny.target(dtype=torch.bfloat16, num_hidden_layers=4), marked(8, 32).int()
    made = Eagle3Trainer(model, settings(tmp_path), data, data)
    for made.step in (100, 200):
        made.measure(tmp_path)
        if made.step == 100:
            made.save(tmp_path)
    again = Eagle3Trainer(model, settings(tmp_path), data, data)
    again.resume(tmp_path)
    assert [row["step"] for row in again.curve] == [100]


def test_run_reports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a line tells of more than its last 100 steps, or if the state is saved at every step once the first
    pause is over."""
    clock = itertools.count()
    monkeypatch.setattr(trainer, "time", SimpleNamespace(perf_counter=lambda: float(next(clock))))
    made = Trainer(tiny.target(dtype=torch.bfloat16), settings(tmp_path, steps=200))
    monkeypatch.setattr(made, "train_step", lambda batch: (torch.tensor(float(made.step >= 100)), torch.zeros(1)))
    losses, saved = [], []
    monkeypatch.setattr(made, "report", lambda work, loss, *rest: losses.append(loss) or "")
    monkeypatch.setattr(made, "save", lambda work: saved.append(made.step))
    made.run(torch.zeros(8, 32, dtype=torch.int32), tmp_path)
    assert losses == [0, 1] and 2 < len(saved) < 30


def test_speeds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if the tokens of all prompts are divided by the seconds of another number of them."""
    answers = iter([SimpleNamespace(gained=[3], decode_s=1.0), SimpleNamespace(gained=[5], decode_s=3.0)] * 2)
    first = SimpleNamespace(gained=[0], decode_s=99)  # the one that captures
    monkeypatch.setattr(evaluation, "run", lambda engine, ids, count: first if count == 2 else next(answers))
    for name in ("load_head", "read_curve", "Engine"):
        monkeypatch.setattr(evaluation, name, lambda *inputs: None)
    monkeypatch.setattr(evaluation, "tree_drafter", lambda *inputs: SimpleNamespace(num_nodes=8, max_depth=3))
    line = evaluation.compare_speeds(tiny.target(), None, [[1], [2]], frozenset())
    assert line.startswith("tokens per step 4.00 -> 4.00, tokens/s 2 -> 2 ")


def test_some_memory_is_left(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """Fails if all of the free memory is counted on, of which a tenth is lost between blocks."""
    model = tiny.target(dtype=torch.bfloat16)
    monkeypatch.setattr(memory, "free_bytes", lambda device: 1000)
    for each, fits in ((125, 4), (112, 8)):
        assert memory.fit("--batch", 8, lambda count, each=each: each * count, model, "it") == fits


def test_dense_weights_count() -> None:
    """Fails if the weights that a quantised target makes dense, one by one, are forgotten."""
    model = tiny.target(dtype=torch.bfloat16)
    dense = memory.target_passing(model, 8)
    quantize_linears(model, "int8")
    assert memory.target_passing(model, 8) == dense + dequantized(model.cfg, torch.bfloat16)
