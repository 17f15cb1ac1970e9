"""training/peers.py: which prediction is compared with which feature, what is written, what is held out.

Models of a few thousand weights on the CPU. One bug no run of training shows: a prediction that is compared with the
target's distribution at another position. It would be learned well, and would draft badly.
"""
import argparse
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import tiny
import torch
import torch.nn.functional as F
from helpers import exact, marked, read, tiny_command
from safetensors.torch import load_file
from torch import Tensor

from drafters.medusa import load_medusa
from drafters.speculate import load_draft_model
from formats.weights import read_tensors
from model import Llama, load_model, rope_table
from training import dialogues
from training import peers as peers_module
from training.peers import Peers, PeerTrainer, agreement

V = tiny.SHAPE["vocab_size"]


def settings(folder: Path, **changes) -> argparse.Namespace:
    values = {"checkpoint": folder, "medusa": folder / "medusa", "draft_model": folder / "draft", "heads": 4,
              "draft_layers": 2, "int8": False, "length": 32, "batch": 8, "decay": 0.8, "places": 128, "lr": 0.02,
              "steps": 200, "minutes": math.inf}
    return argparse.Namespace(**values | changes)


def counting() -> Llama:
    """A target that counts: token t + 1 follows token t, and the first token follows the last."""
    model = tiny.target(3, torch.bfloat16)
    rows = torch.linalg.qr(torch.randn(32, 32, generator=torch.Generator().manual_seed(1)))[0]
    rows = rows[:V].contiguous().bfloat16()
    for layer in model.layers:
        layer.wo.weight.data.zero_()
        layer.w2.weight.data.zero_()
    model.norm.weight.data.fill_(1)
    model.embed.weight.data, model.lm_head.weight.data = rows, 3 * rows.roll(1, 0)
    return model


def counted(rows: int, length: int) -> Tensor:
    """[rows, length] texts of such a target, marked. Each begins with a random token. A third of the tokens belongs to
    no answer."""
    random = torch.Generator().manual_seed(2)
    tokens = (torch.randint(V, (rows, 1), generator=random) + torch.arange(length)) % V
    return torch.where(torch.rand(tokens.shape, generator=random) < 1 / 3, ~tokens, tokens)


def train_on(trainer: PeerTrainer, data: Tensor, steps: range) -> Tensor:
    """Take these steps. Returns the agreements, [steps, 1 + heads]."""
    agreements = []
    for trainer.step in steps:
        torch.manual_seed(trainer.step)
        agreements.append(trainer.train_step(data[torch.randint(len(data), (trainer.args.batch,))])[1])
    trainer.step = steps.stop
    return torch.stack(agreements)


# ----- What is learned --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("heads, shape", [(4, {}), (1, {"model_type": "qwen3"}), (3, {"num_key_value_heads": 4})])
def test_loss_place_by_place(heads: int, shape: dict, tmp_path: Path) -> None:
    """Fails if a prediction is compared with another position's distribution, tokens outside answers count, a head gets
    another head's weights or a wrong weight in the loss, or the draft model sees more or less than the text before."""
    model, data = tiny.target(**shape), marked(2, 14)
    trainer = exact(PeerTrainer(model, settings(tmp_path, length=14, heads=heads, places=1000)))
    total, agreements = trainer.train_step(data)
    peers = trainer.module
    rows = 14 - heads - 1
    expected = 0.0
    draft = tiny.target(**shape)
    draft.layers, draft.norm, draft.rope = peers.layers, peers.norm, trainer.rope
    for ahead in range(heads + 1):
        losses, agree = [], []
        for row in data:
            ids = torch.where(row < 0, ~row, row).tolist()
            features, own = tiny.features(model, ids), tiny.features(draft, ids)
            for p in range(rows):
                if row[p + ahead + 1] < 0:
                    continue
                predicted = own[p]
                if ahead:
                    x = features[p]
                    predicted = x + F.silu(peers.blocks[ahead - 1] @ x + peers.bias[0, ahead - 1])
                target, logits = model.lm_head(features[p + ahead]), model.lm_head(predicted)
                losses.append(F.cross_entropy(logits, target.softmax(-1)).item())
                agree.append(bool(logits.argmax() == target.argmax()))
        expected += 0.8 ** max(ahead - 1, 0) * sum(losses) / len(losses)
        assert agreements[ahead].item() == pytest.approx(sum(agree) / len(agree))
    assert total.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_heads_learn_their_offsets(tmp_path: Path) -> None:
    """Fails if a head or the draft model learns another offset than its own. Trained on a target that counts, written
    and loaded again, the heads must know the token 2, 3, 4 and 5 positions on, and the draft model the next one."""
    model = counting()
    tiny.save_target(model, tmp_path)
    trainer = PeerTrainer(model, settings(tmp_path, steps=120, lr=0.1))
    agreements = train_on(trainer, counted(64, 32), range(120))
    assert agreements[0, 1:].max() < 0.3 and agreements[-1].min() > 0.98
    trainer.export()
    heads, draft = load_medusa(tmp_path / "medusa", model), load_draft_model(tmp_path / "draft", model)
    tokens = torch.arange(30) % V
    features = tiny.features(model, tokens.tolist())
    guesses = model.lm_head(heads(features)).argmax(-1)
    for head in range(4):
        assert torch.equal(guesses[head], (tokens + head + 2) % V)
    draft.rope = rope_table(draft.cfg, 30).bfloat16()
    best = draft.lm_head(tiny.features(draft, tokens.tolist())).argmax(-1)
    assert (best == (tokens + 1) % V).float().mean() > 0.9
    agreed, overlap = agreement(model, draft, heads, counted(9, 32)[5:])
    assert min(agreed) > 0.95 and overlap > 0.8


@pytest.mark.slow
def test_draft_model_learns(tmp_path: Path) -> None:
    """Fails if the loss has the wrong sign, the optimizers miss a parameter, or the target, embedding or lm_head is
    trained too. At first two of five layers know little of what all five predict."""
    model = tiny.pair(3, 0.1, torch.bfloat16, num_hidden_layers=5)[0]
    before = {name: t.clone() for name, t in model.state_dict().items()}
    trainer = PeerTrainer(model, settings(tmp_path, steps=80, lr=0.1))
    start = {name: t.clone() for name, t in trainer.module.state_dict().items()}
    data = torch.tensor([tiny.prompt(seed, 32) for seed in range(16)])
    agreements = train_on(trainer, data, range(80))[:, 0]
    assert agreements[:5].mean() < 0.6 and agreements[-10:].mean() > 0.75
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert not [name for name, t in trainer.module.state_dict().items() if torch.equal(t, start[name])]


@pytest.mark.slow
def test_begins_with_the_target(tmp_path: Path) -> None:
    """Fails if the layers are out of order, shared with the target, or used differently, or if new heads are not the
    identity."""
    model, ids = tiny.target(5, torch.float32, num_hidden_layers=3), tiny.prompt(1, 20)
    peers = Peers(model, 2, 3)
    model.rope = rope_table(model.cfg, 20)
    features = tiny.features(model, ids)
    assert torch.allclose(peers.draft(model.embed(torch.tensor([ids])), model.rope)[0], features, atol=1e-5)
    assert torch.equal(peers.medusa(features), features.expand(2, 20, 32))
    mine, theirs = dict(peers.named_parameters()), dict(model.named_parameters())
    assert all(p.requires_grad and p.data_ptr() != theirs[n].data_ptr() for n, p in mine.items() if n in theirs)
    fewer = Peers(model, 2, 1)
    assert len(fewer.layers) == 1 and torch.equal(fewer.layers[0].w2.weight, model.layers[0].w2.weight)


@pytest.mark.slow
def test_stopped_and_resumed(tmp_path: Path) -> None:
    """Fails if stopping and resuming loses weights or momentum of one of the two."""
    model, data = counting(), counted(64, 32)
    tiny.save_target(model, tmp_path)
    args = settings(tmp_path, steps=8, places=40)
    whole, half = PeerTrainer(model, args), PeerTrainer(model, args)
    train_on(whole, data, range(8))
    train_on(half, data, range(4))
    half.save(tmp_path)
    again = PeerTrainer(model, args)
    again.resume(tmp_path)
    train_on(again, data, range(again.step, 8))
    for (name, a), b in zip(whole.module.state_dict().items(), again.module.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


# ----- What is written ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("shape", [{}, {"model_type": "qwen3", "tie_word_embeddings": True}, {"head_dim": 12}])
def test_round_trip(int8: bool, shape: dict, tmp_path: Path) -> None:
    """Fails if a layer, norm or head is lost or takes another's place, if the embedding is in the file, if the config
    has another shape, or if the int8 weights are not near the original ones."""
    model = tiny.target(dtype=torch.bfloat16, num_hidden_layers=4, **shape)
    tiny.save_target(model, tmp_path)
    trainer = PeerTrainer(model, settings(tmp_path, heads=3, int8=int8))
    tiny.randomise(trainer.module, 5, torch.float32)
    trainer.export()
    trainer.export()  # overwrites the files that are there
    peers, ids = trainer.module, tiny.prompt(3, 24)
    heads, draft = load_medusa(tmp_path / "medusa", model), load_draft_model(tmp_path / "draft", model)
    assert draft.cfg == peers.cfg and draft.cfg.num_layers == 2
    assert draft.embed is model.embed and draft.lm_head is model.lm_head
    tensors, metadata = read_tensors(tmp_path / "draft/model.safetensors")
    assert not [name for name in tensors if "embed" in name or "lm_head" in name]
    assert metadata["embedding"] == "target" and metadata.get("mode") == ("int8" if int8 else None)
    assert torch.equal(heads.weight[0], torch.stack(tuple(peers.blocks)).bfloat16())
    assert torch.equal(heads.bias, peers.bias.bfloat16()) and heads.weight.shape == (1, 3, 32, 32)
    if not int8:
        saved = load_file(tmp_path / "draft/model.safetensors")
        assert saved.keys() == {name for name in peers.state_dict() if name.startswith(("layers.", "norm."))}
        assert all(torch.equal(t, peers.state_dict()[name].bfloat16()) for name, t in saved.items())
    draft.rope = rope_table(draft.cfg, 24).bfloat16()
    loaded = tiny.features(draft, ids).float()
    expected = peers.draft(model.embed(torch.tensor([ids])).float(), rope_table(peers.cfg, 24))[0]
    assert ((loaded - expected).norm(dim=-1) / expected.norm(dim=-1)).median() < (0.06 if int8 else 0.04)


def test_loader_refuses(tmp_path: Path) -> None:
    """Fails if another target's draft model is accepted, or an ordinary model is refused."""
    model = tiny.target(dtype=torch.bfloat16)
    tiny.save_target(model, tmp_path)
    PeerTrainer(model, settings(tmp_path)).export()
    for shape in ({"hidden_size": 64}, {"vocab_size": 25}):
        with pytest.raises(ValueError, match=str(tmp_path / "draft")):
            load_draft_model(tmp_path / "draft", tiny.target(dtype=torch.bfloat16, **shape))
    with pytest.raises(ValueError, match="lacks embed.weight"):
        load_model(tmp_path / "draft")
    assert load_draft_model(tmp_path, model).embed is not model.embed
    with pytest.raises(FileNotFoundError):
        load_draft_model(tmp_path / "nowhere", model)


def test_agreement(tmp_path: Path) -> None:
    """Fails if tokens outside answers count, a position is missing or too many, or a head gets another's agreement."""
    model = tiny.target(dtype=torch.float32, num_hidden_layers=3)
    tiny.save_target(model, tmp_path)
    trainer = PeerTrainer(model, settings(tmp_path, heads=2))
    tiny.randomise(trainer.module, 6, torch.float32)
    trainer.export()
    heads, draft = load_medusa(tmp_path / "medusa", model), load_draft_model(tmp_path / "draft", model)
    data = marked(3, 18)
    hits = [0] * 3
    counts = [0] * 3
    overlap = 0.0
    agreed, shared = agreement(model, draft, heads, data)
    for row in data.tolist():
        ids = [~t if t < 0 else t for t in row]
        p, q = tiny.logits(model, ids), tiny.logits(draft, ids)
        predictions = (q, *model.lm_head(heads(tiny.features(model, ids))))
        for ahead, predicted in enumerate(predictions):
            for i in range(18 - ahead - 1):
                if row[i + ahead + 1] >= 0:
                    counts[ahead] += 1
                    hits[ahead] += int(predicted[i].argmax() == p[i + ahead].argmax())
                    if ahead == 0:
                        overlap += torch.minimum(p[i].softmax(-1), q[i].softmax(-1)).sum().item()
    assert agreed == pytest.approx([a / b for a, b in zip(hits, counts)])
    assert shared == pytest.approx(overlap / counts[0], rel=1e-4)


# ----- The command ---------------------------------------------------------------------------------------------------


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable]:
    yield from tiny_command(peers_module.main, tmp_path, monkeypatch)


@pytest.mark.slow
def test_command_from_start_to_end(command, capsys: pytest.CaptureFixture) -> None:
    """Fails if a finished run starts over, other results are overwritten, EAGLE's training state is taken for the
    peers', or --steps 0 trains."""
    folder = command("--steps", 3, "--heads", 2)
    out = capsys.readouterr().out
    assert "resuming" not in out and "held-out dialogues: draft model 1.000" in out  # of two layers, as is the target
    assert {p.name for p in (folder / "training").iterdir()} == {"dialogues.bin", "dialogues.length", "peers"}
    assert {p.name for p in (folder / "draft_model").iterdir()} == {"model.safetensors", "config.json"}
    assert json.loads((folder / "medusa/config.json").read_text())["medusa_num_heads"] == 2


    def same(first: list[dict[str, Tensor]]) -> bool:
        return all(torch.equal(t, now[name]) for p, then in zip(files, first) for now in [load_file(p)]
                   for name, t in then.items())
    files = [p for name in ("medusa", "draft_model") for p in (folder / name).glob("*.safetensors")]
    first = [load_file(p) for p in files]
    command("--steps", 3, "--heads", 2)
    assert "resuming at step 3" in capsys.readouterr().out and same(first)
    with pytest.raises(ValueError, match="medusa is there already"):
        command("--steps", 3, "--work", folder / "other")
    with pytest.raises(ValueError, match="draft_model is there already"):
        command("--steps", 3, "--work", folder / "other", "--medusa", folder / "m")
    assert not (folder / "other").exists()
    command("--steps", 0)
    assert "held-out" in capsys.readouterr().out and same(first)
    (folder / "draft_model/model.safetensors").write_bytes(b"of others")
    with pytest.raises(ValueError, match="draft_model is there already"):
        command("--steps", 4, "--heads", 2)


def test_too_short(command, tmp_path: Path) -> None:
    """Fails if heads that look beyond all dialogues are trained on nothing."""
    with pytest.raises(ValueError, match="--heads 47 does not fit into dialogues of --length 48: it takes 1 to 46"):
        command("--heads", 47)
    assert not (tmp_path / "model/training").exists()


@pytest.mark.parametrize("says, kind, shown", [
    ("CUDA out of memory. Tried", ValueError, "^out of memory: use a --batch below 4, or a --generate_batch below 10$"),
    ("shapes", RuntimeError, "^shapes$")])
def test_out_of_memory(says: str, kind: type[Exception], shown: str, command, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a GPU that is too small ends in a traceback, or a mistake in the code does not."""
    def full(args: argparse.Namespace) -> None:
        raise RuntimeError(says)
    monkeypatch.setattr(peers_module, "train", full)
    with pytest.raises(kind, match=shown):
        command()


def test_more_layers_than_the_model(command) -> None:
    """Fails if a draft model silently gets fewer layers than were asked for."""
    with pytest.raises(ValueError, match="--draft_layers 3: the model has 2"):
        command("--draft_layers", 3)


def test_no_answers(command, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if training begins, or an evaluation divides, with no answer to learn from."""
    monkeypatch.setattr(dialogues.Script, "step", lambda self, turns, sampled: ~torch.full_like(sampled, 1))
    for words in (("--steps", 2), ("--steps", 0)):
        with pytest.raises(ValueError, match="dialogues.bin: no dialogue has an answer to learn from"):
            command(*words)


@pytest.mark.slow
def test_interrupted_and_held_out(command, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """Fails if Ctrl-C loses what was learned, held-out dialogues are trained on, or trained ones are evaluated."""
    step, seen = PeerTrainer.train_step, []

    def interrupted(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        seen.append(batch)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return step(self, batch)
    monkeypatch.setattr(PeerTrainer, "train_step", interrupted)
    with pytest.raises(SystemExit) as stopped:
        command("--steps", 30, "--int8")
    assert stopped.value.code == 130 and "stopped at step 1" in capsys.readouterr().err
    run, measure = PeerTrainer.run, peers_module.agreement
    monkeypatch.setattr(PeerTrainer, "run", lambda self, data, work: seen.append(data) or run(self, data, work))
    monkeypatch.setattr(peers_module, "agreement", lambda *args: seen.append(args[-1]) or measure(*args))
    folder = command("--steps", 0, "--eval_prompts", 99)
    rows = read(folder / "training/dialogues.bin", 48)
    assert torch.equal(seen[-1].long(), rows[:10])
    command("--steps", 3, "--work", folder / "training", "--medusa", folder / "m", "--draft_model", folder / "d")
    trained_on = next(t for t in seen if len(t) > 10)
    assert torch.equal(trained_on.long(), rows[10:]) and {tuple(r) for r in rows[:10].tolist()}.isdisjoint(
        tuple(r) for t in seen if len(t) == 4 for r in t.tolist())
