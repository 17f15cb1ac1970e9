"""Training: the dialogues it learns from, what an unrolled step sees, stopping and going on, and the saved head.

Models of a few thousand weights on the CPU. The one thing that no run of training would show is an unrolled head
that sees other keys, positions or tokens than when it drafts: it learns well, and drafts badly.
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
from helpers import BOS, END, EOS, Letters, marked, read, tiny_command
from recorder import Recorder
from safetensors.torch import load_file
from torch import Tensor

import train
from draft import Eagle2, EagleHead, load_head
from formats.config import Config
from formats.eagle import save_head, save_vocab
from model import Llama, rope_table
from ops.attention import causal_mask
from tokenizer import Tokenizer
from train import evaluate, held_out_prompts
from training import dialogues, trainer
from training.dialogues import OPENERS, Script, sample, write_dialogues
from training.trainer import Trainer
from tree import State

CPU = torch.device("cpu")
PLAIN = SimpleNamespace(has_chat_template=False, stop_ids=frozenset([END]), bos_id=BOS)


def turns(said: list[int], template: Letters | SimpleNamespace, end: int) -> tuple[list[list[int]], list[list[int]]]:
    """The ids of the user's turns and of the answers in a row, which must have the template between them, and must
    have it unmarked. `between` is what the template writes after an answer's `end`. A user's turn that the row cuts
    off is left out; the last answer need not be complete."""
    runs = [[s if own else ~s for s in run] for own, run in itertools.groupby(said, lambda s: s >= 0)]
    runs, asked, answers = [list(run) for run in runs], [], []
    for i in range(0, len(runs) - 1, 2):
        before = template.head if i == 0 else template.between
        if i and runs[i - 1][-1] != end:
            before = [end, *before]  # the template ends an answer that was cut short; the answer did not
        assert runs[i][:len(before)] == before and runs[i][-len(template.tail):] == template.tail
        asked.append(runs[i][len(before):-len(template.tail)])
        answers.append(runs[i + 1])
    return asked, answers


def assert_as_rendered(said: list[int], asked: list[list[int]], answers: list[list[int]], tokenizer, end: int) -> None:
    """The row up to its last answer is what the chat template makes of the turns before."""
    messages = []
    for i, ids in enumerate(asked):
        messages.append({"role": "user", "content": tokenizer.decode(ids)})
        if i < len(asked) - 1:
            answer = answers[i][:-1] if answers[i][-1] == end else answers[i]
            messages.append({"role": "assistant", "content": tokenizer.decode(answer)})
    prompt = tokenizer.chat(messages)
    assert [s if s >= 0 else ~s for s in said[:len(prompt)]] == prompt
    assert said[len(prompt) - 1] < 0 <= said[len(prompt)]


# ----- Dialogues -------------------------------------------------------------------------------------------------


def test_template_stands_around_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A template token missing, doubled or taken from the model; an answer's end not learned, or a user's turn
    learned; turns that never end, or end with a token left over."""
    monkeypatch.setattr(dialogues, "MAX_USER", 5)
    monkeypatch.setattr(dialogues, "MAX_ANSWER", 9)
    write_dialogues(tiny.target(dtype=torch.float32), Script(Letters(), CPU), tmp_path / "d", 96, 150, 96)
    rows, lengths, ends = read(tmp_path / "d", 150).tolist(), set(), set()
    assert len(rows) == 96
    for said in rows:
        asked, answers = turns(said, Letters, END)
        assert_as_rendered(said, asked, answers, Letters(), END)
        assert len(asked) > 2 and all(len(ids) <= max(map(len, OPENERS)) + 5 for ids in asked)
        assert not any({EOS, END} & set(ids[:-1]) for ids in asked + answers)
        lengths |= {len(ids) for ids in answers}
        ends |= {ids[-1] for ids in answers[:-1]}
    assert lengths == set(range(1, 10)) and {EOS, END} < ends  # ended by either stop id, or cut short


def test_dialogues_are_what_the_model_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache slot or mask that is one off, dialogues that see one another, a bucket of slots entered too late: what
    was written must be the greedy choice of the plainest forward."""
    monkeypatch.setattr(dialogues, "sample", lambda logits, temperature, answering: logits.argmax(-1))
    monkeypatch.setattr(dialogues, "MAX_USER", 5)
    model, checked = tiny.target(), 0
    write_dialogues(model, Script(Letters(), CPU), tmp_path / "d", 96, 140, 96)
    assert model.kv is None
    for said in read(tmp_path / "d", 140).tolist():
        best = tiny.logits(model, [s if s >= 0 else ~s for s in said]).argmax(-1).tolist()
        assert all(s < 0 or s == best[i - 1] for i, s in enumerate(said))
        checked += said[129] >= 0  # chosen by the first row of the second bucket
    assert checked > 10


def test_file_resumes(tmp_path: Path) -> None:
    """Rows lost, doubled, rewritten or shifted when writing stops and goes on: also in the middle of a row."""
    model, script = tiny.target(dtype=torch.float32), Script(Letters(), CPU)
    write_dialogues(model, script, tmp_path / "once", 10, 40, 4)
    whole = (tmp_path / "once").read_bytes()
    assert len(whole) == 4 * 40 * 10 and len(set(read(tmp_path / "once", 40)[:, -30:].unique(dim=0))) == 10
    path = tmp_path / "twice"
    write_dialogues(model, script, path, 4, 40, 4)
    assert path.read_bytes() == whole[:4 * 40 * 4]
    path.write_bytes(whole[:4 * 40 * 4 + 50])
    write_dialogues(model, script, path, 10, 40, 4)
    assert path.read_bytes() == whole
    write_dialogues(model, script, path, 7, 40, 4)
    assert path.read_bytes() == whole  # enough already


@pytest.mark.parametrize("bos", [BOS, None])
def test_no_template(bos: int | None, tmp_path: Path) -> None:
    """A base model refused, or its text cut into turns, or the only forced token learned."""
    plain = SimpleNamespace(**vars(PLAIN) | {"bos_id": bos})
    write_dialogues(tiny.target(dtype=torch.float32), Script(plain, CPU), tmp_path / "d", 8, 60, 8)
    rows = read(tmp_path / "d", 60)
    assert (rows[:, 0] == ~(END if bos is None else bos)).all() and (rows[:, 1:] >= 0).all()
    assert held_out_prompts(rows) == [[END if bos is None else bos]] * 8


def test_sample() -> None:
    """Temperatures mixed up between rows, noise that is not Gumbel's, a user's tail that is kept or an answer's cut."""
    torch.manual_seed(0)
    p = torch.tensor([0.5, 0.3, 0.192, 0.008])
    n = 20000
    logits = p.log().repeat(4 * n, 1)
    temperature = torch.tensor([0.0, 0.7, 1.0, 1.0]).repeat_interleave(n)
    answering = torch.tensor([True, True, True, False]).repeat_interleave(n)
    drawn = F.one_hot(sample(logits, temperature, answering), 4).view(4, n, 4).double().mean(1)
    warm, cut = p ** (1 / 0.7), torch.where(p < 0.02 * 0.5, 0, p)
    expected = torch.stack((torch.tensor([1.0, 0, 0, 0]), warm / warm.sum(), p, cut / cut.sum()))
    assert (drawn - expected).abs().max() < 0.015
    assert (drawn[expected == 0] == 0).all() and drawn[2, 3] > 0.005


def test_script_on_the_demo_tokenizer(demo: Path) -> None:
    """The template's pieces cut one token off on a real tokenizer, its system prompt lost, an opener that merges with
    what stands before it; temperatures of the wrong turn."""
    tokenizer = Tokenizer(demo)
    end, script, batch = tokenizer.bpe.token_to_id("<|im_end|>"), Script(tokenizer, CPU), 400
    head, tail = tokenizer.render([{"role": "user", "content": "@"}]).split("@")
    template = SimpleNamespace(head=tokenizer.encode(head), tail=tokenizer.encode(tail),
                               between=tokenizer.encode("\n<|im_start|>user\n"))
    words = tokenizer.encode(" river house green after music")
    pool = torch.tensor([*words, end])
    assert len(words) == 5 and template.tail[0] == end
    state, columns = script.start(batch, 0), []
    for _ in range(150):
        warm, answering = state["temperature"], state["answering"]
        assert (warm[~answering] == 1).all() and {round(t, 3) for t in warm[answering].tolist()} <= {0.0, 0.7, 1.0}
        columns.append(script.step(state, pool[torch.randint(len(pool), (batch,))]))
    openings = {tuple(tokenizer.encode(o.strip())) for o in OPENERS}
    found = set()
    for said in torch.stack(columns, 1).tolist():
        asked, answers = turns(said, template, end)
        assert_as_rendered(said, asked, answers, tokenizer, end)
        first = held_out_prompts(torch.tensor([said]))[0]
        assert first == tokenizer.chat([{"role": "user", "content": tokenizer.decode(asked[0])}])
        free = next(i for i in range(len(asked[0]) + 1) if set(asked[0][i:]) <= set(words))
        assert free == 0 or tuple(asked[0][:free]) in openings
        found.add(tuple(asked[0][:free]))
    assert () in found and len(found) > len(OPENERS) // 2


# ----- Training --------------------------------------------------------------------------------------------------


def settings(tmp_path: Path, **changes) -> argparse.Namespace:
    values = {"length": 32, "batch": 8, "unroll": 4, "decay": 0.8, "places": 128, "regression": 0.0, "lr": 0.05,
              "steps": 80, "minutes": math.inf, "out": tmp_path / "head"}
    return argparse.Namespace(**values | changes)


@pytest.fixture(scope="module")
def learnable(tmp_path_factory: pytest.TempPathFactory) -> tuple[Llama, Tensor]:
    """A target in bfloat16, as train.py loads it, and 256 dialogues of 32 tokens."""
    model, path = tiny.pair(3, 0.1, torch.bfloat16)[0], tmp_path_factory.mktemp("dialogues") / "d"
    write_dialogues(model, Script(PLAIN, CPU), path, 256, 32, 256)
    return model, read(path, 32)


def exact(trainer: Trainer) -> Trainer:
    """The same in float64, with a head whose attention is sharp, and without taking the step."""
    tiny.randomise(trainer.head, 1, torch.float64)
    trainer.head.requires_grad_(True)
    trainer.rope, trainer.amp = rope_table(trainer.head.cfg, trainer.args.length).double(), contextlib.nullcontext()
    trainer.optimizers = []
    return trainer


@torch.no_grad()
def drafted(head: EagleHead, model: Llama, ids: list[int], place: int, depth: int) -> Tensor:
    """What the drafter's own code, over its KV cache, guesses for features place + 1, ..., place + depth, [depth, C],
    where token place + 1 is the newest committed one and the text itself is drafted."""
    drafter = Eagle2(head, model, draft_depth=depth, topk=1)
    head.allocate_cache(64)
    features, tokens = tiny.features(model, ids), torch.tensor(ids + [0] * depth)
    pending = torch.cat((features[place:place + 1], features.new_zeros(depth, features.shape[1])))
    state = State(tokens, torch.tensor(place + 2), pending, torch.tensor(1), torch.tensor(False), 64)
    if place:
        slots, mask = torch.arange(place), causal_mask(torch.tensor(0), place, place)
        drafter.prefill(state, features[:place], slots, mask)
    guesses = [drafter.extend(state)[0]]
    for level in range(1, depth):
        slot = torch.tensor([place + level])  # of the chain's node `level`, which sees all of the chain up to itself
        guesses.append(drafter.run_head(tokens[slot + 1], drafter.read_logits(guesses[-1], False)[1], None, slot, slot,
                                    causal_mask(slot[0], 1, 64)))
    return torch.cat(guesses)


@pytest.mark.parametrize("unroll, shape", [(4, {}), (1, {}), (6, {"num_key_value_heads": 1, "head_dim": 12})])
def test_unrolled_is_what_drafting_does(unroll: int, shape: dict, tmp_path: Path) -> None:
    """The head trained on other positions, keys, tokens or features than it drafts with, or towards another place's
    target: off by one anywhere here costs acceptance and nothing else would tell. Also the loss, recomputed."""
    model, said = tiny.target(**shape), marked(2, 14)
    args = settings(tmp_path, length=14, unroll=unroll, regression=0.7)
    trainer, guesses = exact(Trainer(model, args)), []
    own = trainer.unrolled
    trainer.unrolled = lambda *inputs: guesses.append(own(*inputs)) or guesses[-1]
    total, agreements = trainer.train_step(said)
    rows, expected = 14 - unroll - 1, 0.0
    assert len(guesses) == unroll and guesses[0].shape == (2, rows, 32)
    tokens = torch.where(said < 0, ~said, said).tolist()
    truth = torch.stack([torch.stack([drafted(trainer.head, model, ids, s, unroll) for s in range(rows)])
                         for ids in tokens])  # [2, rows, unroll, C]
    features = torch.stack([tiny.features(model, ids) for ids in tokens])
    for j in range(1, unroll + 1):
        guess, feature, counts = truth[:, :, j - 1], features[:, j:j + rows], said[:, j + 1:j + 1 + rows] >= 0
        error = (guesses[j - 1] - guess).norm(dim=-1) / guess.norm(dim=-1)
        assert error.max() < 1e-5, j  # the attention weights are rounded to float32
        guess, feature = guess[counts], feature[counts]  # it is the token after feature s + j that is to be learned
        target, logits = model.lm_head(feature), model.lm_head(guess)
        loss = F.cross_entropy(logits, target.softmax(-1)) + 0.7 * F.smooth_l1_loss(guess, feature)
        expected += 0.8 ** (j - 1) * loss.item()
        agree = (logits.argmax(-1) == target.argmax(-1)).double().mean()
        assert agreements[j - 1].item() == pytest.approx(agree.item())
    assert total.item() == pytest.approx(expected, rel=1e-5)


def test_places_are_of_answers(tmp_path: Path) -> None:
    """Places of the template or of the user taken where there are answers enough; all of them gives the same loss."""
    model, said = tiny.target(), marked(3, 20)
    count = int((said[:, 2:20] >= 0).sum())
    losses = []
    for places in (1000, count):
        trainer = exact(Trainer(model, settings(tmp_path, length=20, unroll=1, places=places)))
        losses.append(trainer.train_step(said)[0].item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_training_learns(learnable: tuple[Llama, Tensor], tmp_path: Path) -> None:
    """A loss with the wrong sign or no gradient, an optimizer without the parameters, a target that is trained too."""
    model, data = learnable
    before = {name: t.clone() for name, t in model.state_dict().items()}
    torch.manual_seed(0)
    trainer, losses, agreements = Trainer(model, settings(tmp_path)), [], []
    for step in range(80):
        trainer.step = step
        loss, agreement = trainer.train_step(data[step % 32 * 8:][:8])
        losses.append(loss)
        agreements.append(agreement)
    assert torch.stack(losses[-10:]).mean() < 0.85 * torch.stack(losses[:10]).mean()
    first, last = torch.stack(agreements[:10]).mean(0), torch.stack(agreements[-10:]).mean(0)
    assert (last > first + 0.2).all(), (first, last)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_schedule(tmp_path: Path) -> None:
    """A warm-up from the full rate, or a rate that is still high when the steps or the minutes end."""
    trainer = Trainer(tiny.target(dtype=torch.float32), settings(tmp_path, steps=1000, minutes=10))
    rates = {}
    for at in ((0, 0), (50, 0), (200, 0), (200, 300), (1000, 0), (999, 0), (200, 600), (200, 900)):
        trainer.step, trainer.seconds = at
        rates[at] = trainer.schedule()
    assert rates[0, 0] == pytest.approx(0.01) and 0.45 < rates[50, 0] < 0.55 and 0.85 < rates[200, 0] < 1
    assert rates[200, 300] == pytest.approx(0.51)
    assert all(rates[at] == pytest.approx(0.02, abs=1e-4) for at in ((1000, 0), (999, 0), (200, 600), (200, 900)))


def test_stopped_and_resumed(learnable: tuple[Llama, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Momentum, step, clock, or the choice of batch and places lost when training is stopped: the same parameters must
    come out. Stopped in its fifth step, after the state was saved at the end of the fourth."""
    model, data = learnable
    clock = itertools.count(0, 20)  # 20 s pass at every look, so that each step saves
    monkeypatch.setattr(trainer, "time", SimpleNamespace(perf_counter=lambda: float(next(clock))))

    def begin(name: str, seed: int = 0) -> tuple[Trainer, Path]:
        torch.manual_seed(seed)
        (tmp_path / name).mkdir(exist_ok=True)
        return Trainer(model, settings(tmp_path, steps=7, places=20, out=tmp_path / name / "head")), tmp_path / name

    whole, work = begin("whole")
    whole.run(data, work)
    stopped, work = begin("parts")
    step, calls = stopped.train_step, itertools.count(1)

    def interrupted(said: Tensor) -> tuple[Tensor, Tensor]:
        result = step(said)
        if next(calls) == 5:
            raise KeyboardInterrupt
        return result
    stopped.train_step = interrupted
    with pytest.raises(KeyboardInterrupt):
        stopped.run(data, work)
    assert (work / "head/model.safetensors").exists()
    resumed, work = begin("parts", seed=77)
    resumed.resume(work)
    spent = resumed.seconds
    assert resumed.step == 4 and spent > 60
    resumed.run(data, work)
    assert resumed.step == whole.step == 7 and resumed.seconds > spent
    for a, b in zip(whole.head.parameters(), resumed.head.parameters(), strict=True):
        assert torch.equal(a, b)
    for file in ("head/model.safetensors", "head/config.json"):
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "parts" / file).read_bytes()


# ----- The head, and the whole command ---------------------------------------------------------------------------


def test_save_vocab(tmp_path: Path) -> None:
    """What the user or the template said counted in, the rarest tokens first, tokens that were never said."""
    said = torch.tensor([[7, 7, 3, ~5, ~5, ~5, 7], [3, 2, 9, 9, 9, 9, ~1]], dtype=torch.int32)
    for size, ids in ((2, [9, 7]), (3, [9, 7, 3]), (20, [9, 7, 3, 2])):
        save_vocab(said, tmp_path / "head", size)
        assert json.loads((tmp_path / "head/draft_vocab.json").read_text()) == ids


@pytest.mark.parametrize("shape", [
    {}, {"num_key_value_heads": 4}, {"head_dim": 12, "rope_theta": 5e5, "rms_norm_eps": 1e-3}])
def test_head_round_trip(shape: dict, tmp_path: Path) -> None:
    """Rows of q, k, v or gate, up swapped; names that no other engine knows; a config that describes another layer."""
    model = tiny.target(dtype=torch.bfloat16, **shape)
    head = trainer.new_head(model.cfg, CPU)
    tiny.randomise(head, 5, torch.float32)
    save_head(head.cfg, head.state_dict(), tmp_path / "new/head")
    loaded = load_head(tmp_path / "new/head", model)
    assert loaded.cfg == head.cfg == Config.load(tmp_path / "new/head")
    for (name, a), (other, b) in zip(head.state_dict().items(), loaded.state_dict().items(), strict=True):
        assert name == other and b.dtype == torch.bfloat16 and torch.equal(a.bfloat16(), b)
    names = {"fc.weight", "layers.0.post_attention_layernorm.weight", *(f"layers.0.{part}_proj.weight" for part in (
        "self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "mlp.gate", "mlp.up", "mlp.down"))}
    saved, expected = load_file(tmp_path / "new/head/model.safetensors"), tiny.published(head)
    assert saved.keys() == names and all(torch.equal(saved[n], expected[n].bfloat16()) for n in names)


def test_new_head_ignores_what_heads_lack() -> None:
    """A head for Qwen3 or Llama 3.1 with norms or a RoPE scaling that the published format cannot say."""
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 128}
    for shape in ({"model_type": "qwen3"}, {"rope_scaling": scaling}, {"model_type": "mistral", "sliding_window": 8}):
        head = trainer.new_head(tiny.target(**shape).cfg, CPU)
        assert head.layer.q_norm is None and head.cfg.rope_scaling is None and head.cfg.sliding_window is None
        assert head.cfg.num_layers == 1 and head.cfg.hidden_size == 32


def test_evaluate_counts_as_engines_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The token that prefill chose counted as a cycle, or a mean of means: it is all tokens / all cycles. The cycles
    are counted by a drafter that is looked at, the tokens are known."""
    model, eagle = tiny.pair(0, 0.1)
    folder, recorders = tiny.save_head(eagle, tmp_path), []

    def looked_at(head: EagleHead, target: Llama) -> Eagle2:
        recorders.append(Recorder(Eagle2(head, target)))
        return recorders[-1].drafter
    monkeypatch.setattr(train, "Eagle2", looked_at)
    prompts = [tiny.prompt(seed, 5 + 4 * seed) for seed in range(3)]
    mean = evaluate(model, folder, prompts, frozenset(), 0.0, new_tokens=30)
    assert mean == pytest.approx(3 * 29 / len(recorders[0].cycles)) and mean > 2
    assert evaluate(model, folder, [], frozenset(), 0.0) == 0


def test_evaluate_is_not_a_mean_of_means(monkeypatch: pytest.MonkeyPatch) -> None:
    """As above, where the two differ by much; and the temperature must arrive."""
    seen = []

    def generate(ids: list[int], new_tokens: int, sampling) -> list[list[int]]:
        seen.append((new_tokens, sampling.temperature))
        return [[7], *([0] * n for n in ids)]
    for name in ("load_head", "Eagle2"):
        monkeypatch.setattr(train, name, lambda *args: None)
    monkeypatch.setattr(train, "Engine", lambda *args: SimpleNamespace(generate=generate))
    assert evaluate(SimpleNamespace(), None, [[6], [1, 1, 1, 1], [2, 0]], frozenset(), 0.5, 9) == 12 / 7
    assert seen == [(9, 0.5)] * 3


def test_held_out_prompts() -> None:
    """The answer given away, template tokens left negative, a dialogue without an answer evaluated as it is."""
    data = torch.tensor([[~1, ~5, 6, 7, ~8, 9], [~1, ~2, ~3, ~4, ~5, ~6], [~0, 3, 3, 3, 3, 3]])
    assert held_out_prompts(data) == [[1, 5], [0]]


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable]:
    yield from tiny_command(train.main, tmp_path, monkeypatch)


def test_command_from_start_to_end(command, capsys: pytest.CaptureFixture) -> None:
    """A finished run that starts over or writes its dialogues again, a head of somebody else's overwritten,
    --steps 0 that trains, or that refuses to write dialogues because there is a head."""
    folder = command("--steps", 0)
    assert [p.name for p in (folder / "training").iterdir()] == ["dialogues.bin"] and not (folder / "eagle").exists()
    data = (folder / "training/dialogues.bin").read_bytes()
    assert len(data) == 4 * 48 * 25
    command("--steps", 3)
    out = capsys.readouterr().out
    assert "resuming" not in out and "mean gained on 2 held-out dialogues: greedy 1." in out
    assert {p.name for p in (folder / "eagle").iterdir()} == {"model.safetensors", "config.json", "acceptance.json"}
    (folder / "eagle/acceptance.json").unlink()
    first = (folder / "eagle/model.safetensors").read_bytes()
    command("--steps", 3, "--eval_prompts", 0)
    assert "resuming at step 3" in capsys.readouterr().out
    assert (folder / "eagle/model.safetensors").read_bytes() == first
    with pytest.raises(SystemExit, match="eagle holds a head already"):
        command("--steps", 3, "--work", folder / "other")
    assert (folder / "eagle/model.safetensors").read_bytes() == first and not (folder / "other").exists()
    command("--steps", 0, "--work", folder / "other")
    assert (folder / "other/dialogues.bin").read_bytes() == data == (folder / "training/dialogues.bin").read_bytes()
    assert (folder / "eagle/model.safetensors").read_bytes() == first
    assert "mean gained" in capsys.readouterr().out and (folder / "eagle/acceptance.json").exists()
    (folder / "eagle/acceptance.json").unlink()
    command("--steps", 0, "--draft_vocab", 12, "--eval_prompts", 0)
    assert capsys.readouterr().out == "" and not (folder / "eagle/acceptance.json").exists()
    assert len(json.loads((folder / "eagle/draft_vocab.json").read_text())) == 12
    assert (folder / "eagle/model.safetensors").read_bytes() == first


def test_held_out_dialogues_are_not_trained_on(command, monkeypatch: pytest.MonkeyPatch) -> None:
    """An evaluation on what was learned."""
    seen = {}
    monkeypatch.setattr(Trainer, "run", lambda self, data, work: (
        seen.update(trained=data.long()), save_head(self.head.cfg, self.head.state_dict(), self.args.out)))
    monkeypatch.setattr(train, "evaluate", lambda model, out, prompts, *rest: seen.update(prompts=prompts) or 1.0)
    monkeypatch.setattr(train, "save_curve", lambda model, out, prompts, stop_ids: seen.update(curve=prompts))
    rows = read(command("--steps", 3, "--eval_prompts", 10) / "training/dialogues.bin", 48)
    assert torch.equal(seen["trained"], rows[10:]) and seen["prompts"] == seen["curve"] == held_out_prompts(rows[:10])
