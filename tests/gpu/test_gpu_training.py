"""Training on a GPU: every parameter of a head learns.

    python -m pytest tests/gpu/test_gpu_training.py -q
"""
import argparse
import math
from pathlib import Path

import pytest
import tiny
import torch

import train
from training import block, steps
from training.trainer import Trainer

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
SHAPE = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 7, "num_attention_heads": 4,
         "num_key_value_heads": 2, "vocab_size": 64}


DATA = torch.randint(63, (16, 48), generator=torch.Generator().manual_seed(0))


def make(kind: str, device: str, folder: Path, **changes) -> Trainer:
    """A trainer of an untrained head for a tiny target in fp32."""
    values = {"length": 48, "batch": 8, "unroll": 3, "decay": 0.8, "places": 512, "lr": 0.01, "steps": 10, "anchors": 8,
              "minutes": math.inf, "out": folder, "held_out": 0, "draft_vocab": 64, "regression": 0.0,
              "checkpoint": folder}
    values |= dict.fromkeys(("head_layers", "norms", "mlp", "kv_heads", "share_lm_head", "init", "block_size",
                             "markov_rank"))
    args = argparse.Namespace(**values | changes)
    model = tiny.target(dtype=torch.float32, **SHAPE).to(device)
    torch.manual_seed(0)
    return train.KINDS[kind](model, args, DATA.int())


@pytest.mark.parametrize("kind, changes, compiled", [
    ("eagle", {}, False), ("eagle3", {}, True), ("eagle3", {"head_layers": 2, "norms": True, "kv_heads": 4}, False),
    ("block", {"head_layers": 2}, False)])
def test_every_parameter_learns(kind: str, changes: dict, compiled: bool, tmp_path: Path,
                                monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a step trains something else than the same step on a CPU in fp32: our kernels have no backward pass, and
    autograd does not say so where one of them stands in the way. Or if the graph of a step keeps what it was captured
    with, or loses what one of several parts adds to a gradient."""
    monkeypatch.setattr(steps, "LOGITS", 4000)  # several parts, the last one smaller
    monkeypatch.setattr(block, "unused_token", lambda *_: 63)
    monkeypatch.setattr(block, "Tokenizer", lambda _: None)
    gradients = {}
    start = None
    for device in ("cpu", "cuda"):
        trainer = make(kind, device, tmp_path, **changes)
        if start is None:
            tiny.randomise(trainer.module, 1, torch.float32)
            trainer.module.requires_grad_(True)
            start = {name: t.clone() * (0.5 if t.ndim == 2 else 1) for name, t in trainer.module.state_dict().items()}
        trainer.module.load_state_dict(start)
        trainer.amp = torch.autocast(device, enabled=False)
        trainer.rope = trainer.rope.float()
        monkeypatch.setattr(torch, "rand_like", lambda x: torch.linspace(0, 0.9, x.numel(), device=x.device).view_as(x))
        with torch.compiler.set_stance("default" if compiled else "force_eager"):
            trainer.gradients(DATA.to(device).flip(0))
            trainer.gradients(DATA.to(device))
        gradients[device] = {name: p.grad for name, p in trainer.module.named_parameters()}
    for name, wanted in gradients["cpu"].items():
        found = gradients["cuda"][name]
        assert found is not None, name
        assert (found.cpu() - wanted).norm() <= 1e-3 * wanted.norm() + 1e-6, name


def test_same_places_when_resumed(tmp_path: Path) -> None:
    """Fails if a step that is the first of its process draws other places than one that is only replayed."""
    trainer = make("eagle3", "cuda", tmp_path, places=20)
    results = []
    with torch.compiler.set_stance("force_eager"):
        for seed in (5, 6, 5):
            torch.manual_seed(seed)
            results.append(trainer.gradients(DATA.cuda())[0])
    assert torch.equal(results[0], results[2]) and not torch.equal(results[0], results[1])
