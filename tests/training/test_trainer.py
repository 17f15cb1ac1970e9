"""training/dialogues.py, training/trainer.py and train.py: the dialogues, an unrolled step, resuming, the saved head.

Models of a few thousand weights on the CPU. One bug no run of training shows: an unrolled head that sees other keys,
positions or tokens than in drafting. It learns well, and drafts badly.
"""
import argparse
import itertools
import json
import logging
import math
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
import torch.nn.functional as F
from helpers import BOS, END, EOS, USER, Letters, exact, marked, read, tiny_command
from recorder import Recorder
from safetensors.torch import load_file
from torch import Tensor

import train
from draft import Eagle2, EagleHead
from drafters.heads import load_head
from formats.config import Config
from formats.eagle import save_head, save_vocab
from model import Llama
from ops.attention import causal_mask
from tokenizer import Tokenizer
from training import dialogues, evaluation, trainer
from training.commands import quieten
from training.dialogues import OPENERS, Script, sample, write_dialogues
from training.evaluation import evaluate, held_out_prompts
from training.trainer import Trainer
from tree import State

CPU = torch.device("cpu")
PLAIN = SimpleNamespace(has_chat_template=False, stop_ids=frozenset([END]), bos_id=BOS)


def turns(row: list[int], template: Letters | SimpleNamespace, end: int) -> tuple[list[list[int]], list[list[int]]]:
    """The ids of the user turns and of the answers in a row of marked tokens. Asserts that the template stands between
    them and is not marked as answer. template.between is what it writes after an answer's `end`. A user turn that the
    end of the row cuts off is left out. The last answer may be incomplete."""
    runs = [[t if of_answer else ~t for t in run] for of_answer, run in itertools.groupby(row, lambda t: t >= 0)]
    asked = []
    answers = []
    for i in range(0, len(runs) - 1, 2):
        before = template.head if i == 0 else template.between
        if i and runs[i - 1][-1] != end:
            before = [end, *before]  # the answer was cut short, so the template writes its end
        assert runs[i][:len(before)] == before and runs[i][-len(template.tail):] == template.tail
        asked.append(runs[i][len(before):-len(template.tail)])
        answers.append(runs[i + 1])
    return asked, answers


def assert_as_rendered(row: list[int], asked: list[list[int]], answers: list[list[int]], tokenizer, end: int) -> None:
    """The row up to its last answer must be what the chat template makes of the turns before."""
    messages = []
    for i, ids in enumerate(asked):
        messages.append({"role": "user", "content": tokenizer.decode(ids)})
        if i < len(asked) - 1:
            answer = answers[i][:-1] if answers[i][-1] == end else answers[i]
            messages.append({"role": "assistant", "content": tokenizer.decode(answer)})
    prompt = tokenizer.chat(messages)
    assert [t if t >= 0 else ~t for t in row[:len(prompt)]] == prompt
    assert row[len(prompt) - 1] < 0 <= row[len(prompt)]


# ----- Dialogues -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_template_stands_around_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a template token is missing, doubled or taken from the model; if an answer's end is not learned, or a
    user turn is learned; if turns never end, or end one token too late."""
    monkeypatch.setattr(dialogues, "MAX_USER", 5)
    monkeypatch.setattr(dialogues, "MAX_ANSWER", 9)
    write_dialogues(tiny.target(dtype=torch.float32), Script(Letters(), CPU), tmp_path / "d", 96, 150, 96)
    rows, lengths, ends = read(tmp_path / "d", 150).tolist(), set(), set()
    assert len(rows) == 96
    for row in rows:
        asked, answers = turns(row, Letters, END)
        assert_as_rendered(row, asked, answers, Letters(), END)
        assert len(asked) > 2 and all(len(ids) <= max(map(len, OPENERS)) + 5 for ids in asked)
        assert not any({EOS, END} & set(ids[:-1]) for ids in asked + answers)
        lengths |= {len(ids) for ids in answers}
        ends |= {ids[-1] for ids in answers[:-1]}
    assert lengths == set(range(1, 10)) and {EOS, END} < ends  # ended by either stop id, or cut short


@pytest.mark.slow
def test_dialogues_are_what_the_model_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a cache slot or mask is off by one, dialogues see each other, or a bucket of slots is entered too late.
    The dialogues must be the greedy choices of a forward without a cache."""
    monkeypatch.setattr(dialogues, "sample", lambda logits, temperature, answering: logits.argmax(-1))
    monkeypatch.setattr(dialogues, "MAX_USER", 5)
    model, checked = tiny.target(), 0
    write_dialogues(model, Script(Letters(), CPU), tmp_path / "d", 96, 140, 96)
    assert model.kv is None
    for row in read(tmp_path / "d", 140).tolist():
        best = tiny.logits(model, [t if t >= 0 else ~t for t in row]).argmax(-1).tolist()
        assert all(t < 0 or t == best[i - 1] for i, t in enumerate(row))
        checked += row[129] >= 0  # chosen by the first row of the second bucket
    assert checked > 10


def test_file_resumes(tmp_path: Path) -> None:
    """Fails if rows are lost, doubled, rewritten or shifted when writing stops, also within a row, and goes on."""
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
    assert path.read_bytes() == whole  # the file has enough rows already


@pytest.mark.parametrize("bos", [BOS, None])
def test_no_template(bos: int | None, tmp_path: Path) -> None:
    """Fails if a base model is refused, its text is cut into turns, or its one forced token is learned."""
    plain = SimpleNamespace(**vars(PLAIN) | {"bos_id": bos})
    write_dialogues(tiny.target(dtype=torch.float32), Script(plain, CPU), tmp_path / "d", 8, 60, 8)
    rows = read(tmp_path / "d", 60)
    assert (rows[:, 0] == ~(END if bos is None else bos)).all() and (rows[:, 1:] >= 0).all()
    assert held_out_prompts(rows) == [[END if bos is None else bos]] * 8


def test_sample() -> None:
    """Fails if rows get each other's temperature, the noise is not Gumbel's, or unlikely tokens are kept in a user turn
    or excluded in an answer."""
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


@pytest.mark.slow
def test_script_on_the_demo_tokenizer(demo: Path) -> None:
    """Fails if, with a real tokenizer, the template's pieces are cut off by one token, its system prompt is lost, an
    opener merges with the token before it, or a turn has the temperature of another kind."""
    tokenizer = Tokenizer(demo)
    end, script, batch = tokenizer.bpe.token_to_id("<|im_end|>"), Script(tokenizer, CPU), 400
    head, tail = tokenizer.render([{"role": "user", "content": "@"}]).split("@")
    template = SimpleNamespace(head=tokenizer.encode(head), tail=tokenizer.encode(tail),
                               between=tokenizer.encode("\n<|im_start|>user\n"))
    words = tokenizer.encode(" river house green after music")
    pool = torch.tensor([*words, end])
    assert len(words) == 5 and template.tail[0] == end
    state = script.start(batch, 0)
    columns = []
    for _ in range(150):
        temperature, answering = state.temperature, state.answering
        assert (temperature[~answering] == 1).all()
        assert {round(t, 3) for t in temperature[answering].tolist()} <= {0.0, 0.7, 1.0}
        columns.append(script.step(state, pool[torch.randint(len(pool), (batch,))]))
    openings = {tuple(tokenizer.encode(o.strip())) for o in OPENERS}
    found = set()
    for row in torch.stack(columns, 1).tolist():
        asked, answers = turns(row, template, end)
        assert_as_rendered(row, asked, answers, tokenizer, end)
        first = held_out_prompts(torch.tensor([row]))[0]
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


@torch.no_grad()
def drafted(head: EagleHead, model: Llama, ids: list[int], place: int, depth: int) -> Tensor:
    """What the drafter, with its KV cache, predicts for features place + 1 to place + depth: [depth, C]. Token place +
    1 is the newest committed one, and the drafted tokens are those of the text."""
    drafter = Eagle2(head, model, draft_depth=depth, topk=1)
    head.allocate_cache(64)
    features, tokens = tiny.features(model, ids), torch.tensor(ids + [0] * depth)
    pending = torch.cat((features[place:place + 1], features.new_zeros(depth, features.shape[1])))
    state = State(tokens, torch.tensor(place + 2), pending, torch.tensor(1), torch.tensor(False), 64)
    if place:
        slots, mask = torch.arange(place), causal_mask(torch.tensor(0), place, place)
        drafter.prefill(state, features[:place], slots, mask)
    predicted = [drafter.extend(state)[0]]
    for level in range(1, depth):
        slot = torch.tensor([place + level])  # of the chain's node `level`, which sees the chain up to itself
        inputs = drafter.bound.read_logits(predicted[-1], False)[1]
        mask = causal_mask(slot[0], 1, 64)
        predicted.append(drafter.bound.predict(tokens[slot + 1], inputs, None, slot, slot, mask))
    return torch.cat(predicted)


@pytest.mark.slow
@pytest.mark.parametrize("unroll, shape", [(4, {}), (1, {}), (6, {"num_key_value_heads": 1, "head_dim": 12})])
def test_unrolled_is_what_drafting_does(unroll: int, shape: dict, tmp_path: Path) -> None:
    """Fails if the head is trained on other positions, keys, tokens or features than it drafts with, or towards another
    position's target. Any of these, off by one, costs acceptance, and no other test shows it. Recomputes the loss too.
    """
    model, data = tiny.target(**shape), marked(2, 14)
    args = settings(tmp_path, length=14, unroll=unroll, regression=0.7)
    trainer = exact(Trainer(model, args))
    original = trainer.unrolled
    predictions = []
    trainer.unrolled = lambda *inputs: predictions.append(original(*inputs)) or predictions[-1]
    total, agreements = trainer.train_step(data)
    rows = 14 - unroll - 1
    expected = 0.0
    assert len(predictions) == unroll and predictions[0].shape == (2, rows, 32)
    tokens = torch.where(data < 0, ~data, data).tolist()
    truth = torch.stack([torch.stack([drafted(trainer.module, model, ids, s, unroll) for s in range(rows)])
                         for ids in tokens])  # [2, rows, unroll, C]
    features = torch.stack([tiny.features(model, ids) for ids in tokens])
    for j in range(1, unroll + 1):
        predicted = truth[:, :, j - 1]
        error = (predictions[j - 1] - predicted).norm(dim=-1) / predicted.norm(dim=-1)
        assert error.max() < 1e-5, j  # the attention weights are rounded to float32
        of_answer = data[:, j + 1:j + 1 + rows] >= 0  # of the token after feature s + j, which is to be learned
        predicted, feature = predicted[of_answer], features[:, j:j + rows][of_answer]
        target, logits = model.lm_head(feature), model.lm_head(predicted)
        loss = F.cross_entropy(logits, target.softmax(-1)) + 0.7 * F.smooth_l1_loss(predicted, feature)
        expected += 0.8 ** (j - 1) * loss.item()
        agree = (logits.argmax(-1) == target.argmax(-1)).double().mean()
        assert agreements[j - 1].item() == pytest.approx(agree.item())
    assert total.item() == pytest.approx(expected, rel=1e-5)


def test_places_are_of_answers(tmp_path: Path) -> None:
    """Fails if the loss looks at positions outside answers although there are enough in answers. As many places as
    there are in answers must give the same loss as all places."""
    model, data = tiny.target(), marked(3, 20)
    count = int((data[:, 2:20] >= 0).sum())
    losses = []
    for places in (1000, count):
        trainer = exact(Trainer(model, settings(tmp_path, length=20, unroll=1, places=places)))
        losses.append(trainer.train_step(data)[0].item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


@pytest.mark.slow
def test_training_learns(learnable: tuple[Llama, Tensor], tmp_path: Path) -> None:
    """Fails if the loss has the wrong sign or no gradient, the optimizers miss parameters, or the target is trained."""
    model, data = learnable
    before = {name: t.clone() for name, t in model.state_dict().items()}
    torch.manual_seed(0)
    trainer = Trainer(model, settings(tmp_path))
    losses = []
    agreements = []
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
    """Fails if the warm-up starts at the full rate, or the rate is still high when the steps or the minutes end."""
    trainer = Trainer(tiny.target(dtype=torch.float32), settings(tmp_path, steps=1000, minutes=10))
    rates = {}
    for at in ((0, 0), (50, 0), (200, 0), (200, 300), (1000, 0), (999, 0), (200, 600), (200, 900)):
        trainer.step, trainer.seconds = at
        rates[at] = trainer.schedule()
    assert rates[0, 0] == pytest.approx(0.01) and 0.45 < rates[50, 0] < 0.55 and 0.85 < rates[200, 0] < 1
    assert rates[200, 300] == pytest.approx(0.51)
    assert all(rates[at] == pytest.approx(0.02, abs=1e-4) for at in ((1000, 0), (999, 0), (200, 600), (200, 900)))


@pytest.mark.slow
def test_stopped_and_resumed(learnable: tuple[Llama, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if stopping loses momentum, step, clock, or the choice of batch and places: the parameters must be those of
    a run that is not stopped. It is stopped in its fifth step, after the state was saved at the end of the fourth."""
    model, data = learnable
    clock = itertools.count(0, 20)  # 20 s pass between two looks, so that each step saves
    monkeypatch.setattr(trainer, "time", SimpleNamespace(perf_counter=lambda: float(next(clock))))

    def begin(name: str, seed: int = 0) -> tuple[Trainer, Path]:
        torch.manual_seed(seed)
        (tmp_path / name).mkdir(exist_ok=True)
        return Trainer(model, settings(tmp_path, steps=7, places=20, out=tmp_path / name / "head")), tmp_path / name

    whole, work = begin("whole")
    whole.run(data, work)
    stopped, work = begin("parts")
    step, calls = stopped.train_step, itertools.count(1)

    def interrupted(batch: Tensor) -> tuple[Tensor, Tensor]:
        result = step(batch)
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
    for a, b in zip(whole.module.parameters(), resumed.module.parameters(), strict=True):
        assert torch.equal(a, b)
    for file in ("head/model.safetensors", "head/config.json"):
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "parts" / file).read_bytes()


# ----- The head, and the whole command ---------------------------------------------------------------------------


def test_save_vocab(tmp_path: Path) -> None:
    """Fails if tokens of the user or the template count, the rarest tokens come first, or tokens that never occur are
    listed."""
    data = torch.tensor([[7, 7, 3, ~5, ~5, ~5, 7], [3, 2, 9, 9, 9, 9, ~1]], dtype=torch.int32)
    for size, ids in ((2, [9, 7]), (3, [9, 7, 3]), (20, [9, 7, 3, 2])):
        save_vocab(data, tmp_path / "head", size)
        assert json.loads((tmp_path / "head/draft_vocab.json").read_text()) == ids


@pytest.mark.parametrize("shape", [
    {}, {"num_key_value_heads": 4}, {"head_dim": 12, "rope_theta": 5e5, "rms_norm_eps": 1e-3}])
def test_head_round_trip(shape: dict, tmp_path: Path) -> None:
    """Fails if rows of q, k, v or of gate, up are swapped, a name is unknown to other engines, or the config describes
    another layer."""
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
    """Fails if a head for Qwen3, Llama 3.1 or Mistral has norms, a RoPE scaling or a window, which the published format
    cannot express."""
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 128}
    for shape in ({"model_type": "qwen3"}, {"rope_scaling": scaling}, {"model_type": "mistral", "sliding_window": 8}):
        head = trainer.new_head(tiny.target(**shape).cfg, CPU)
        assert head.layer.q_norm is None and head.cfg.rope_scaling is None and head.cfg.sliding_window is None
        assert head.cfg.num_layers == 1 and head.cfg.hidden_size == 32


@pytest.mark.slow
def test_evaluate_counts_as_engines_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if the token that prefill chose counts as a cycle, or the result is a mean of means: it is all tokens
    divided by all cycles. A recorded drafter counts the cycles. The number of tokens is known."""
    model, eagle = tiny.pair(0, 0.1)
    folder = tiny.save_head(eagle, tmp_path)
    recorders = []

    def recorded(head: EagleHead, target: Llama, *tree: int) -> Eagle2:
        recorders.append(Recorder(Eagle2(head, target, *tree)))
        return recorders[-1].drafter
    monkeypatch.setattr(evaluation, "tree_drafter", recorded)
    prompts = [tiny.prompt(seed, 5 + 4 * seed) for seed in range(3)]
    mean = evaluate(model, folder, prompts, frozenset(), 0.0, new_tokens=30)
    assert mean == pytest.approx(3 * 29 / len(recorders[0].cycles)) and mean > 2
    assert evaluate(model, folder, [], frozenset(), 0.0) == 0


def test_evaluate_is_not_a_mean_of_means(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails as the test above does, where the two means differ by much. Fails too if the temperature gets lost."""
    seen = []

    def generate(ids: list[int], new_tokens: int, sampling) -> list[list[int]]:
        seen.append((new_tokens, sampling.temperature))
        return [[7], *([0] * n for n in ids)]
    for name in ("load_head", "tree_drafter"):
        monkeypatch.setattr(evaluation, name, lambda *args: None)
    monkeypatch.setattr(evaluation, "Engine", lambda *args: SimpleNamespace(generate=generate))
    model = SimpleNamespace(free_cache=lambda: None)
    assert evaluate(model, None, [[6], [1, 1, 1, 1], [2, 0]], frozenset(), 0.5, 9) == 12 / 7
    assert seen == [(9, 0.5)] * 3


def test_held_out_prompts() -> None:
    """Fails if a prompt contains the answer, template tokens stay negative, or a dialogue without an answer is kept."""
    data = torch.tensor([[~1, ~5, 6, 7, ~8, 9], [~1, ~2, ~3, ~4, ~5, ~6], [~0, 3, 3, 3, 3, 3]])
    assert held_out_prompts(data) == [[1, 5], [0]]


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable]:
    yield from tiny_command(train.main, tmp_path, monkeypatch)


@pytest.mark.slow
def test_command_from_start_to_end(command, capsys: pytest.CaptureFixture) -> None:
    """Fails if a finished run starts over or writes its dialogues again, another head is overwritten, or --steps 0
    trains or refuses to write dialogues where there is a head."""
    folder = command("--steps", 0, "--eval_prompts", 0)
    assert {p.name for p in (folder / "training").iterdir()} == {"dialogues.bin", "dialogues.length"}
    assert not (folder / "eagle").exists()
    data = (folder / "training/dialogues.bin").read_bytes()
    assert len(data) == 4 * 48 * 25
    command("--steps", 3)
    out = capsys.readouterr().out
    assert "resuming" not in out and "tokens per step on 2 held-out dialogues: greedy 1." in out
    assert {p.name for p in (folder / "eagle").iterdir()} == {"model.safetensors", "config.json", "acceptance.json"}
    (folder / "eagle/acceptance.json").unlink()
    first = (folder / "eagle/model.safetensors").read_bytes()
    command("--steps", 3, "--eval_prompts", 0)
    assert "resuming at step 3" in capsys.readouterr().out
    assert (folder / "eagle/model.safetensors").read_bytes() == first
    with pytest.raises(ValueError, match="eagle holds a head already"):
        command("--steps", 3, "--work", folder / "other")
    assert (folder / "eagle/model.safetensors").read_bytes() == first and not (folder / "other").exists()
    for length in (44, 96, 48 * 100):  # 96: two dialogues in a row
        with pytest.raises(ValueError, match="of another --length or another model"):
            command("--steps", 0, "--length", length)
    assert (folder / "training/dialogues.bin").read_bytes() == data
    (folder / "training/dialogues.length").unlink()  # as older versions left them
    command("--steps", 0, "--eval_prompts", 0)
    assert (folder / "training/dialogues.bin").read_bytes() == data
    command("--steps", 0, "--work", folder / "other")
    assert (folder / "other/dialogues.bin").read_bytes() == data == (folder / "training/dialogues.bin").read_bytes()
    assert (folder / "eagle/model.safetensors").read_bytes() == first
    assert "tokens per step" in capsys.readouterr().out and (folder / "eagle/acceptance.json").exists()
    (folder / "eagle/acceptance.json").unlink()
    command("--steps", 0, "--draft_vocab", 12, "--eval_prompts", 0)
    assert capsys.readouterr().out == "" and not (folder / "eagle/acceptance.json").exists()
    assert len(json.loads((folder / "eagle/draft_vocab.json").read_text())) == 12
    assert (folder / "eagle/model.safetensors").read_bytes() == first


@pytest.mark.slow
def test_a_list_by_itself(command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a head that is trained drafts from the whole vocabulary where no one asked for it, if a list of another
    length is replaced when training goes on, or if a head that is only evaluated, or one that learned from too few
    different tokens, gets one."""
    folder = command("--steps", 1, "--draft_vocab", 0, "--eval_prompts", 0)
    monkeypatch.setattr(trainer, "DRAFT_VOCAB", Config.load(folder).vocab_size - 1)
    command("--steps", 1, "--eval_prompts", 0, "--out", tmp_path / "few", "--work", tmp_path / "work", "--tokens", 0,
            "--generate_batch", 2, "--batch", 2)
    assert not (tmp_path / "few/draft_vocab.json").exists()
    monkeypatch.setattr(trainer, "DRAFT_VOCAB", 14)
    listed = folder / "eagle/draft_vocab.json"
    assert not listed.exists()
    command("--steps", 0, "--eval_prompts", 1)
    assert not listed.exists()
    command("--steps", 2, "--eval_prompts", 0)
    assert len(json.loads(listed.read_text())) == 14
    command("--steps", 0, "--draft_vocab", 11, "--eval_prompts", 0)
    command("--steps", 3, "--eval_prompts", 0)
    assert len(json.loads(listed.read_text())) == 11


def test_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if PyTorch's tracebacks about inline assembly are shown, or if other warnings of it are not."""
    shown = []
    logger = logging.getLogger("torch._dynamo")
    monkeypatch.setattr(logger, "filters", [])
    monkeypatch.setattr(logger, "handle", lambda record: logger.filter(record) and shown.append(record.getMessage()))
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        quieten()
        for task in ("mutated", "accessed"):
            logger.warning("Encountered an exception in identify_%s_tensors, assuming every input is mutated", task)
        logger.warning("hit config.recompile_limit (%s)", 64)
        warnings.warn("Mismatch dtype between input and weight: input dtype = c10::BFloat16", stacklevel=1)
        warnings.warn("something else", stacklevel=1)
    assert shown == ["hit config.recompile_limit (64)"] and [str(w.message) for w in warned] == ["something else"]


@pytest.mark.slow
def test_a_head_of_others(command, capsys: pytest.CaptureFixture) -> None:
    """Fails if a resumed training overwrites a head that it did not export, or refuses to go on with its own where the
    head lies in another folder now, the run was killed while it exported, or an older version wrote the state."""
    words = ("--eval_prompts", 0, "--steps")
    folder = command(*words, 1)
    weights = folder / "eagle/model.safetensors"
    own = weights.read_bytes()
    weights.write_bytes(own[:-1] + bytes([own[-1] ^ 1]))
    with pytest.raises(ValueError, match="eagle holds a head already"):
        command(*words, 2)
    assert weights.read_bytes() != own
    (folder / "eagle").rename(folder / "others")
    command(*words, 2)
    (folder / "eagle").rename(folder / "moved")
    command(*words, 3, "--out", folder / "moved")
    (folder / "training/eagle/exported").unlink()
    command(*words, 4, "--out", folder / "others")
    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith("resuming")] == [
        f"resuming at step {step}" for step in (1, 2, 3)]


def test_resumed_with_another_rate(learnable: tuple[Llama, Tensor], tmp_path: Path) -> None:
    """Fails if a resumed training keeps the learning rate of the run before, whatever --lr says."""
    model, data = learnable
    first, second = (Trainer(model, settings(tmp_path, lr=lr, steps=steps)) for lr, steps in ((0.01, 2), (0.05, 4)))
    first.run(data, tmp_path / "work")
    second.resume(tmp_path / "work")
    share = second.schedule()
    second.train_step(data[:8].long())
    rates = [group["lr"] for optimizer in second.optimizers for group in optimizer.param_groups]
    assert second.step == 2 and rates == pytest.approx([0.05 * share, 0.01 * share])


@pytest.mark.slow
def test_held_out_dialogues_are_not_trained_on(command, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if the dialogues of the evaluation were trained on, also where more of them are asked for than are held
    out."""
    seen = {}
    monkeypatch.setattr(Trainer, "run", lambda self, data, work: (
        seen.update(trained=data.long()), save_head(self.module.cfg, self.module.state_dict(), self.args.out)))
    monkeypatch.setattr(train, "evaluate", lambda model, out, prompts, *rest: seen.update(prompts=prompts) or 1.0)
    monkeypatch.setattr(train, "save_curve", lambda model, out, prompts, stop_ids: seen.update(curve=prompts))
    rows = read(command("--steps", 3, "--eval_prompts", 20) / "training/dialogues.bin", 48)
    assert torch.equal(seen["trained"], rows[10:]) and seen["prompts"] == seen["curve"] == held_out_prompts(rows[:10])


@pytest.mark.slow
def test_questions(command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """Fails if a file that is no list of questions is noticed only after training, if a line is cut at a character in
    its text, if a file takes the place of its namesake, if a model needs a chat template to be asked, or if a file of
    too long questions gets figures."""
    monkeypatch.setattr(Letters, "dialogue", lambda self, texts: [BOS, USER, *map(len, texts), END], raising=False)
    monkeypatch.setattr(Letters, "chat", None)
    monkeypatch.setattr(Letters, "has_chat_template", False)
    files = [tmp_path / name / "asked.jsonl" for name in "ab"]
    for path in files:
        path.parent.mkdir()
        path.write_text('{"question": "Why?"}', encoding="utf-8")
    for bad in (files[0], tmp_path / "missing.jsonl"):
        with pytest.raises((ValueError, OSError), match=bad.name):
            command("--steps", 1, "--questions", bad)
        assert not (tmp_path / "model/training").exists()
    files[0].write_text('{"turns": ["two\u2028lines", "more"]}\n' * 3, encoding="utf-8")
    files[1].write_text('{"turns": ["one"]}\n\n' * 6, encoding="utf-8")
    command("--steps", 1, "--questions", *files)
    out = capsys.readouterr().out
    assert f"tokens per step on 2 {files[0]}: " in out and f"tokens per step on 3 {files[1]}: " in out
    monkeypatch.setattr(train, "LONGEST_QUESTION", 3)  # shorter than all of them
    command("--steps", 1, "--questions", files[0])
    out, err = capsys.readouterr()
    assert f"{files[0]}: no prompt to evaluate on" in err and "asked.jsonl" not in out and "held-out dialogues: " in out


@pytest.mark.parametrize("words", [[], ["--kind", "eagle3", "--draft_vocab", 12], ["--out", "elsewhere"]])
def test_nothing_to_evaluate(words: list, command, tmp_path: Path) -> None:
    """Fails if --steps 0 without a head writes dialogues for nothing, or does not say which head is missing."""
    folder = words[1] if "--out" in words else tmp_path / "model" / (words[1] if words else "eagle")
    with pytest.raises(ValueError, match=f"^{folder}: no head to evaluate: name its folder with --out, or its kind"):
        command("--steps", 0, *words)
    assert not (tmp_path / "model/training").exists()
