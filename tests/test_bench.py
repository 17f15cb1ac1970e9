"""bench.py and its parts in benchmarks/ (race, engines, report, plots, workload), on a CPU: the numbers belong to the
texts that were written, and all methods answer the same prompts.
"""
import argparse
import importlib.util
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from helpers import SHAPE, operations, tiny_checkpoint

import bench
from app.answer import Run, run
from benchmarks import contestants, race, workload
from benchmarks.engines import gpt_fast_decoder, transformers_decoder
from benchmarks.race import Contestant
from benchmarks.race import race as take_turns
from benchmarks.report import compare_results, read_result, report
from benchmarks.widen import SHAPES
from benchmarks.workload import Prompt, Subject
from draft import Vanilla
from drafters import methods
from drafters.medusa import MedusaHeads
from drafters.speculate import Speculate, load_draft_model
from engine import Engine
from formats.questions import Question, read_questions
from model import load_model
from ops import graphs
from sampling import Sampling, gumbel_noise
from tokenizer import Tokenizer

QUESTIONS = [{"question_id": 81, "category": "chat", "turns": ["How old is the moon?", "And the sun?"]},
             {"question_id": "b", "category": "coding", "turns": ["Sort a list."]}]
# What gpt_fast_decoder relies on in gpt-fast's model.py: names, layouts, and RoPE that rotates neighbours.
STAND_IN = '''
from dataclasses import dataclass
import torch
from torch import nn

@dataclass
class ModelArgs:
    block_size: int
    vocab_size: int
    n_layer: int
    n_head: int
    dim: int
    intermediate_size: int
    n_local_heads: int
    rope_base: float
    norm_eps: float

class Layer(nn.Module):
    def __init__(self, a):
        super().__init__()
        size = a.dim // a.n_head
        self.heads, self.attention, self.feed_forward = (a.n_head, a.n_local_heads), nn.Module(), nn.Module()
        self.attention.wqkv = nn.Linear(a.dim, (a.n_head + 2 * a.n_local_heads) * size, bias=False)
        self.attention.wo = nn.Linear(a.dim, a.dim, bias=False)
        for name, (i, o) in {"w1": (a.dim, a.intermediate_size), "w3": (a.dim, a.intermediate_size),
                             "w2": (a.intermediate_size, a.dim)}.items():
            setattr(self.feed_forward, name, nn.Linear(i, o, bias=False))
        self.attention_norm, self.ffn_norm = nn.RMSNorm(a.dim, a.norm_eps), nn.RMSNorm(a.dim, a.norm_eps)

    def forward(self, x, turn, at, seen):
        h, k = self.heads
        y = self.attention.wqkv(self.attention_norm(x)).unflatten(-1, (h + 2 * k, -1))
        qk = torch.view_as_complex(y[:, :, :h + k].unflatten(-1, (-1, 2)).contiguous())
        qk = torch.view_as_real(qk * turn[:, None]).flatten(-2)
        self.kv[:, :, :, at] = torch.stack((qk[:, :, h:], y[:, :, h + k:])).transpose(2, 3)
        y = nn.functional.scaled_dot_product_attention(qk[:, :, :h].transpose(1, 2), *self.kv, seen, enable_gqa=True)
        x = x + self.attention.wo(y.transpose(1, 2).flatten(2))
        y, f = self.ffn_norm(x), self.feed_forward
        return x + f.w2(nn.functional.silu(f.w1(y)) * f.w3(y))

class Transformer(nn.Module):
    def __init__(self, a):
        super().__init__()
        self.a, self.tok_embeddings = a, nn.Embedding(a.vocab_size, a.dim)
        self.layers = nn.ModuleList(Layer(a) for _ in range(a.n_layer))
        self.norm, self.output = nn.RMSNorm(a.dim, a.norm_eps), nn.Linear(a.dim, a.vocab_size, bias=False)

    def setup_caches(self, batch, length):
        a, self.length = self.a, length
        for layer in self.layers:
            layer.kv = torch.zeros(2, batch, a.n_local_heads, length, a.dim // a.n_head, dtype=self.output.weight.dtype)
        size = a.dim // a.n_head
        angles = torch.outer(torch.arange(a.block_size), a.rope_base ** (-torch.arange(0, size, 2) / size))
        self.turn = torch.polar(torch.ones_like(angles), angles)

    def forward(self, tokens, at):
        x, seen = self.tok_embeddings(tokens), torch.arange(self.length) <= at[:, None]
        for layer in self.layers:
            x = layer(x, self.turn[at], at, seen)
        return self.output(self.norm(x))
'''


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture
def arguments(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., argparse.Namespace]:
    """Parses command lines with bench.py's own parser; --shape tiny exists."""
    monkeypatch.setitem(SHAPES, "tiny", SHAPE)
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps(q) + "\n" for q in QUESTIONS))

    def arguments(*words: object) -> argparse.Namespace:
        monkeypatch.setattr(sys, "argv", ["bench.py", *map(str, (
            "--checkpoint", checkpoint, "--questions", tmp_path / "asked.jsonl", "--device", "cpu",
            "--max_new_tokens", 12, *words))])
        return bench.parse_args()
    return arguments


@pytest.fixture
def gpt_fast(tmp_path: Path) -> Path:
    (tmp_path / "clone").mkdir()
    (tmp_path / "clone/model.py").write_text(STAND_IN)
    return tmp_path / "clone"


def clockwork(order: list, *, fails: str = "", error: Exception | None = None, stops: int = 10**9,
              seconds: float = 1.0) -> dict[str, Contestant]:
    """Contestants that write two cycles, of 1 and 2 tokens, in `seconds` each, and append every call to `order`.
    fails: the one that raises `error` or runs out of memory. stops: Ctrl-C comes after this number of calls."""
    def decode(ids: list[int], new_tokens: int, sampling: Sampling, name: str) -> Run:
        order.append((name, sampling.temperature, ids[0], sampling.seed))
        if len(order) > stops:
            raise KeyboardInterrupt
        if name == fails:
            raise error or torch.OutOfMemoryError("out of\n memory")
        return Run([1, 2, 3, 4], [1, 2], 0.5, 2 * seconds)
    return {name: Contestant(partial(decode, name=name), None if name == "other" else object())
            for name in ("vanilla", "b", "other")}


PROMPTS = [Prompt("1", 1, "x", [7]), Prompt("2", 1, "y", [8])]


def run_race(*, runs: int = 2, **how) -> tuple[list, dict, dict]:
    order, result = [], {"failed": {}}
    args = argparse.Namespace(runs=runs, temperature=[0.0, 1.0], max_new_tokens=9)
    return order, result, take_turns(clockwork(order, **how), PROMPTS, args, result)


def test_methods_take_turns() -> None:
    """Fails if all runs of one method come first, on a GPU that is still cool; if the seed depends on the method or the
    run; if a greedy engine is asked to sample."""
    order, result, runs = run_race()
    once = [(name, t, prompt, seed) for t in (0.0, 1.0) for name in ("vanilla", "b", "other")
            for seed, prompt in enumerate((7, 8)) if name != "other" or t == 0]
    assert order == once * 2 and result == {"failed": {}}
    assert {t: {name: [len(each) for each in group] for name, group in part.items()} for t, part in runs.items()} == {
        0.0: {"vanilla": [2, 2], "b": [2, 2], "other": [2, 2]}, 1.0: {"vanilla": [2, 2], "b": [2, 2]}}


def test_a_method_that_fails_leaves_the_others(capsys) -> None:
    """Fails if one method's error ends the race with a traceback, or if its incomplete run is counted."""
    order, result, runs = run_race(fails="b")
    assert [name for name, *_ in order].count("b") == 1 and result["failed"] == {"b": "out of memory"}
    assert list(runs[0.0]) == ["vanilla", "other"] and len(runs[1.0]["vanilla"]) == 2
    assert capsys.readouterr().err.splitlines() == ["b failed, the others go on: out of memory"]


@pytest.mark.parametrize("error, said", [
    (ImportError("no sentencepiece"), "no sentencepiece"), (OSError("gone"), "gone"), (RuntimeError(), "RuntimeError")])
def test_what_ends_one_method(error: Exception, said: str) -> None:
    """Fails if another engine that lacks a package or a file ends the race, or if an error without words is told by
    nothing."""
    _, result, runs = run_race(fails="b", error=error)
    assert result["failed"] == {"b": said} and list(runs[0.0]) == ["vanilla", "other"]


def test_interrupted() -> None:
    """Fails if Ctrl-C loses the complete runs, or if the incomplete run is counted."""
    order, result, runs = run_race(runs=3, stops=10 + 3)  # in the second run, at b's second prompt
    assert [len(group) for part in runs.values() for group in part.values()] == [1] * 5
    assert result["interrupted"].startswith("run 2 of 3 at temperature 0 and every")
    assert [len(result["unfinished"][name]) for name in ("vanilla", "b")] == [2, 1]


def test_speeds() -> None:
    """Fails if the token of prefill counts as decoded; if speeds are means of ratios, or contain prefill where they
    must not; if the seconds of all runs are divided by the cycles of one."""
    runs = [[Run([1, 2, 3, 4], [3], 1.0, s), Run([5, 6, 7], [1, 1], 2.0, s)] for s in (0.5, 2.0, 1.0)]
    numbers = race.speeds(runs)
    assert numbers["tokens_per_sec"] == {"median": 2.5, "q1": 1.875, "q3": 3.75, "runs": [5.0, 1.25, 2.5]}
    assert numbers["with_prefill"]["runs"] == [7 / 4, 1.0, 7 / 5] and numbers["prefill_ms"] == 1500
    assert numbers["mean_gained"] == 5 / 3 and numbers["cycle_ms"] == pytest.approx(2000 / 3)
    assert numbers["histogram"] == [0, 2, 0, 1]
    assert race.spread([3.0]) == {"median": 3.0, "q1": 3.0, "q3": 3.0, "runs": [3.0]}
    nothing = race.speeds([[Run([1], [], 1.0, 0.0)]])  # a text of one token, which prefill chose
    assert nothing["tokens_per_sec"]["median"] == nothing["mean_gained"] == 0


def test_distinct4() -> None:
    """Fails if repetition within a text is missed, or if two texts that share 4-grams count as repetition."""
    assert race.distinct4([[1, 2, 3, 4, 5], [1, 2, 3, 4], [7]]) == 1
    assert race.distinct4([[1] * 13]) == 0.1 and race.distinct4([[1]]) == 0


@pytest.mark.parametrize("t", [0.0, 1.0])
def test_gap_where_texts_differ(t: float) -> None:
    """Fails if the gap is not that of vanilla's scores after the last common token, with that text's own noise."""
    model, prompts = tiny.target(3), [Prompt("1", 1, "x", tiny.prompt(4, 12)), Prompt("2", 1, "y", tiny.prompt(5, 12))]
    vanilla = Engine(model, Vanilla(), 64)
    base = [run(vanilla, p.ids, 12, Sampling(t, seed=i)) for i, p in enumerate(prompts)]
    other = [base[0], base[1]._replace(tokens=[*base[1].tokens[:3], base[1].tokens[3] ^ 1, *base[1].tokens[4:]],
                                       gained=[3, 1, 3, 4])]
    vanilla.state.seed.fill_(99)
    vanilla.state.sampling = Sampling(1 - t)  # as another text left it
    known = {"max_depth": 3, "rejection": False, "split_ms": {str(t): "split"}}
    entry = race.summarise("x", t, {"vanilla": [base] * 2, "x": [other] * 2}, prompts, vanilla, known)
    logits = tiny.logits(model, prompts[1].ids + base[1].tokens[:3])[-1:].float()
    if t:
        logits = logits + gumbel_noise(torch.tensor(1), torch.tensor([15]), model.cfg.vocab_size)
    best = logits[0].topk(2).values
    assert entry["gaps"] == [{"prompt": 1, "token": 3, "gap": pytest.approx((best[0] - best[1]).item(), rel=1e-4)}]
    assert (entry["same"], entry["steady"], entry["split_ms"]) == (1, True, "split")
    assert entry["by_category"]["y"]["mean_gained"] == 11 / 4 and entry["by_category"]["x"]["mean_gained"] == 1
    assert entry["accept_by_depth"] == [3 / 15, 3 / 15, 1 / 15] and entry["mean_gained"] == 22 / 15
    unsteady = race.summarise("x", t, {"vanilla": [base] * 2, "x": [base, other]}, prompts, vanilla, known)
    assert not unsteady["steady"] and unsteady["same"] == 2
    own = race.summarise("x", t, {"vanilla": [base], "x": [other]}, prompts, vanilla, known | {"rejection": True})
    assert own["same"] == (None if t else 1), "a method with its own draws is compared only when greedy"


@pytest.mark.slow
def test_second_turns(checkpoint: Path, tmp_path: Path) -> None:
    """Fails if a second question is asked without the first answer, or with an answer that plain decoding does not
    give; if a prompt contains turns of another question; if a category is lost."""
    tokenizer, model = Tokenizer(checkpoint), load_model(checkpoint, "cpu", torch.float32)
    questions = [Question("81", "chat", ["One?", "Two?", "Three?"]), Question("b", "all", ["Four?"])]
    prompts = workload.ask(model, tokenizer, questions, 10)
    assert [(p.question, p.turn, p.category) for p in prompts] == [
        ("81", 1, "chat"), ("81", 2, "chat"), ("81", 3, "chat"), ("b", 1, "all")]
    engine, said = Engine(model, Vanilla(), 400, tokenizer.stop_ids), []
    for prompt, question in zip(prompts, ("One?", "Two?", "Three?")):
        said.append({"role": "user", "content": question})
        assert prompt.ids == tokenizer.chat(said)
        answer = sum(engine.generate(prompt.ids, 10), [])
        said.append({"role": "assistant", "content": tokenizer.decode(answer)})
    assert prompts[3].ids == tokenizer.chat([{"role": "user", "content": "Four?"}])
    model.free_cache()
    with pytest.raises(ValueError, match="question 81, turn 1: its .* do not fit the model's context of 512: leave it"):
        workload.ask(model, tokenizer, [Question("81", "chat", ["One? " * 200])], 10)


def test_a_window_limits_prompts() -> None:
    """Fails if a prompt is taken that fits the model's context, but not its sliding window."""
    model = SimpleNamespace(cfg=SimpleNamespace(max_position_embeddings=512, context_limit=64))
    tokenizer = SimpleNamespace(dialogue=lambda texts: [1] * 60)
    with pytest.raises(ValueError, match="do not fit the model's context of 64"):
        workload.ask(model, tokenizer, [Question("81", "chat", ["One?"])], 10)
    assert len(workload.ask(model, tokenizer, [Question("81", "chat", ["One?"])], 4)) == 1


def test_questions_of_another_form(tmp_path: Path) -> None:
    """Fails if a bad file gives a traceback, or if a file without ids and categories is refused."""
    path = tmp_path / "asked.jsonl"
    for text in ("What?", '{"turn": "What?"}', '{"turns": []}', "[1]", '{"turns": "What?"}', '{"turns": [1]}'):
        path.write_text('{"turns": ["Why?"]}\n' + text)
        with pytest.raises(ValueError, match='asked.jsonl: each line should be .* with "turns".*line 2 is not'):
            read_questions(path)
    path.write_text("")
    with pytest.raises(ValueError, match="no questions"):
        read_questions(path)
    path.write_text('{"turns": ["Why?"]}\n{"question_id": 7, "category": "qa", "turns": ["a", "b"]}')
    assert read_questions(path) == [("1", "all", ["Why?"]), ("7", "qa", ["a", "b"])]
    assert len({q.category for q in read_questions(bench.QUESTIONS)}) == 6, "the default file"


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(), ("--shape", "tiny")])
def test_command_line(shape: tuple, arguments, gpt_fast: Path, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
                      ) -> None:
    """Everything at once. Fails if methods write different texts, at either temperature or in the wide model; if the
    numbers in the file are not those of its texts; if a method without weights is not reported or stops the others; if
    a run differs from itself with --against."""
    monkeypatch.setattr(graphs, "elapsed", operations)
    out, both = tmp_path / "out.json", ("--methods", "eagle,medusa,eagle2", "--runs", 2, "--temperature", 0, 1, *shape)
    arguments(*both, "--transformers", "--gpt_fast", gpt_fast, "--json", out)
    assert bench.main() == 0
    result, (printed, error) = json.loads(out.read_text()), capsys.readouterr()
    assert read_result(out) == result and printed.strip() == report(result).strip()
    assert list(result["failed"]) == ["medusa"] and "medusa failed" in error and "medusa failed" in printed
    assert [(p["question"], p["turn"]) for p in result["prompts"]] == [("81", 1), ("81", 2), ("b", 1)]
    names = ["vanilla", "eagle", "eagle2"]
    others = [f"transformers, {cache} cache (greedy)" for cache in ("dynamic", "static")] + ["gpt-fast (greedy)"]
    assert [(e["method"], e["temperature"]) for e in result["measured"]] == [
        *((name, 0) for name in names + others), *((name, 1) for name in names)]
    for e in result["measured"]:
        assert e["same"] == 3 and not e["gaps"] and e["steady"] and len(e["runs"]) == 2
        assert [1 + sum(gained) for gained in e["gained"]] == [len(text) for text in e["texts"]]
        assert e["mean_gained"] == sum(map(sum, e["gained"])) / sum(map(len, e["gained"])) >= 1
        for times, speed in zip(e["runs"], e["tokens_per_sec"]["runs"]):
            assert speed == pytest.approx(sum(map(sum, e["gained"])) / sum(times["decode_s"]))
        if e["method"] in names:
            split, depth = e["split_ms"], result["methods"][e["method"]]["max_depth"]
            assert split["cycle"] == split["draft"] + split["verify"] + split["other"] > split["verify"] > 0
            assert (split["draft"] > 0) == (depth > 0) and split["other"] > 0
            assert 1 + sum(e["accept_by_depth"]) == pytest.approx(e["mean_gained"])
    assert result["measured"][1]["mean_gained"] > 1.5, "the head guesses well"
    assert ("is a shape: its cost" in printed) == bool(shape) and printed.startswith("`python bench.py --checkpoint")
    arguments(*both, "--against", out)
    assert bench.main() == 0
    printed = capsys.readouterr().out
    assert "differs: True -> False" in printed and printed.count("differs") == 2, "the two options for other engines"


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(), ("--shape", "tiny")])
def test_quantized(shape: tuple, arguments, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if the head does not belong to the quantised target, or if the result does not name the weight format."""
    monkeypatch.setattr(graphs, "elapsed", operations)
    args, result = arguments("--methods", "eagle2", "--quantize", "int8", "--runs", 1, *shape), {}
    bench.bench(args, result)
    assert [e["same"] for e in result["measured"]] == [3, 3] and "weights int8" in result["note"]
    assert result["measured"][1]["mean_gained"] > 1.5 and "Draft heads" not in result["note"]
    args, result = arguments("--methods", "eagle2", "--draft_weights", "int8", "--runs", 1, *shape), {}
    bench.bench(args, result)
    assert [e["same"] for e in result["measured"]] == [3, 3] and result["note"].endswith(" Draft heads are in int8.")
    assert result["measured"][1]["mean_gained"] > 1.5


@pytest.mark.slow
def test_interrupted_command_line(arguments, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if Ctrl-C loses the complete runs, the file or the exit code."""
    monkeypatch.setattr(graphs, "elapsed", operations)
    calls = []

    def interrupted(*inputs) -> Run:
        calls.append(inputs)
        if len(calls) == stop:
            raise KeyboardInterrupt
        return run(*inputs)

    monkeypatch.setattr(contestants, "run", interrupted)
    stop = 1
    arguments("--methods", "eagle", "--json", tmp_path / "out.json")
    assert bench.main() == 130 and "interrupted; missing: everything" in capsys.readouterr().err
    calls.clear()
    stop = 2 + 6 + 4  # two warm-ups, a complete run of two methods, part of the next run
    assert bench.main() == 130
    result, (out, error) = json.loads((tmp_path / "out.json").read_text()), capsys.readouterr()
    assert "missing: run 2 of 5 at temperature 0" in error and "temperature 0, 1 run " in out
    assert [len(e["runs"]) for e in result["measured"]] == [1, 1]


def test_against() -> None:
    """Fails if a change within the spread is reported as beyond it, or the reverse; if different settings are not
    listed."""
    def result(speeds: list[float], device: str, nodes: int) -> dict:
        entries = [{"method": "vanilla", "temperature": 0.0, "tokens_per_sec": race.spread([10.0, 11.0])},
                   {"method": "eagle2", "temperature": 0.0, "tokens_per_sec": race.spread(speeds)}]
        return {"measured": entries, "prompts": [{"ids": [1]}], "settings": {"runs": "2"},
                "before": {"device": device, "date": device}, "methods": {"eagle2": {"nodes": nodes, "max_depth": 3}}}

    rows = compare_results(result([20.0, 24.0], "A", 8), result([25.0, 26.0], "B", 9)).splitlines()
    assert [cell.strip() for cell in rows[3].split("|")[1:-1]] == ["eagle2", "0", "22.0", "25.5", "1.159", "yes"]
    assert rows[2].split("|")[-2].strip() == "no" and rows[4:] == [
        "", "device differs: A -> B", "eagle2: nodes differs: 8 -> 9"]
    old = result([20.0, 24.0], "A", 8)
    assert "yes" not in compare_results(old, result([23.0, 30.0], "A", 8))
    old["measured"].append({"method": "gone", "temperature": 1.0, "tokens_per_sec": race.spread([5.0])})
    old["methods"]["gone"] = {"nodes": 4, "max_depth": 3}
    lines = compare_results(old, result([23.0, 30.0], "A", 8)).splitlines()
    assert lines[4].split("|")[1:4] == [" gone    ", " 1           ", " 5.0          "] and len(lines) == 5


@pytest.mark.slow
def test_pictures(tmp_path: Path) -> None:
    """Fails if a picture cannot be drawn without vanilla, categories, drafts or a second temperature, or if its width
    is not 1600 pixels."""
    pytest.importorskip("matplotlib")
    from benchmarks.plots import draw
    numbers = race.speeds([[Run([1, 2, 3], [2], 1.0, 1.0)]] * 2)
    entry = {**numbers, "by_category": {"x": numbers, "y": numbers}, "accept_by_depth": [0.5, 0.2], "runs": [1, 1],
             "split_ms": {"draft": 1.0, "verify": 2.0, "other": -0.1, "cycle": 2.9}}
    plain = entry | {"accept_by_depth": [], "by_category": {"x": numbers}}
    known = {name: {"nodes": 2} for name in ("vanilla", *map(str, range(12)))} | {"other": {}}
    other = {"split_ms": None, "accept_by_depth": []}
    many = [entry | {"method": name, "temperature": t} for t in (0.0, 1.0) for name in known if name.isdecimal()]
    many += [entry | {"accept_by_depth": [], "method": "vanilla", "temperature": t} for t in (0.0, 1.0)]
    many.append(entry | other | {"method": "other", "temperature": 0.0})
    for measured, count in ((many, 4), ([plain | {"method": "vanilla", "temperature": 0.0}], 2),
                            ([entry | {"method": "1", "temperature": 0.5}], 4),
                            ([plain | other | {"method": "other", "temperature": 0.0}], 1)):
        paths = draw({"measured": measured, "methods": known}, tmp_path / str(count))
        assert len(paths) == count
        for path in paths:
            header = path.read_bytes()[:24]
            assert header[1:4] == b"PNG" and int.from_bytes(header[16:20]) == 1600


def wide_subject(arguments, *words: object) -> tuple[argparse.Namespace, Subject]:
    args = arguments("--shape", "tiny", *words)
    questions = read_questions(args.questions)
    return args, workload.load(args, lambda model, tokenizer: workload.ask(model, tokenizer, questions, 12))


@pytest.mark.slow
@pytest.mark.parametrize("vocab_size", [200, 320])
def test_widened_medusa(vocab_size: int, arguments, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if Medusa heads guess differently in the wide model than in the small one: with the lm_head or projections
    of their own, in a vocabulary that is cut or padded."""
    monkeypatch.setitem(SHAPE, "vocab_size", vocab_size)
    model, prompts, *_, wide = wide_subject(arguments)[1]
    ids = prompts[0].ids
    back = [wide.kept_ids[i] for i in ids]
    wide.small.allocate_cache(64)
    model.allocate_cache(64)
    small_f, wide_f = tiny.features(wide.small, back)[0], tiny.features(model, ids)[0]
    for own in (None, 300):
        heads = MedusaHeads(32, 3, 2, own)
        tiny.randomise(heads, 5, torch.float32)
        widened = wide.medusa(heads)
        logits = [h(f) @ ((m.lm_head.weight if own is None else h.projections).mT) for h, f, m in (
            (heads, small_f, wide.small), (widened, wide_f, model))]
        kept = wide.kept_ids
        torch.testing.assert_close(logits[1][..., :len(kept)], logits[0][..., kept], rtol=1e-3, atol=1e-3)
        assert vocab_size == 200 or (logits[1][..., 300:] < logits[0].amin() - 100).all()


@pytest.mark.slow
def test_widened_draft_model(checkpoint: Path, arguments, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a draft model keeps the small model's ids: then the target, as its own draft model, would be
    rejected."""
    for vocab_size in (200, 320):
        monkeypatch.setitem(SHAPE, "vocab_size", vocab_size)
        args, subject = wide_subject(arguments, "--speculate", checkpoint, "--methods", "speculate")
        weights = workload.load_weights("speculate", args, subject)
        [draft] = weights.values()
        assert draft.cfg.vocab_size == vocab_size
        engine = Engine(subject.model, Speculate(draft, subject.model), 300)
        runs = [run(engine, p.ids, 30) for p in subject.prompts]
        assert sum(sum(r.gained) for r in runs) / sum(len(r.gained) for r in runs) > 4
    assert load_draft_model(checkpoint, subject.widening.small).cfg.vocab_size == 300
    assert workload.load_weights("lookup", args, subject) == {}
    [head] = workload.load_weights("eagle", args, subject).values()
    assert head.cfg.hidden_size == SHAPE["hidden_size"]


@pytest.mark.slow
def test_what_methods_expect(arguments) -> None:
    """Fails if make_drafter does not find the widened head under its option: it would load the small model's."""
    args, subject = wide_subject(arguments)
    for name in ("eagle", "eagle2"):
        weights = workload.load_weights(name, args, subject)
        [head] = weights.values()
        assert methods.make_drafter(name, args, subject.model, 64, weights).head is head


@pytest.mark.slow
@pytest.mark.parametrize("changes", [
    {}, {"num_key_value_heads": 4}, {"tie_word_embeddings": True, "rope_theta": 50.0, "rms_norm_eps": 1.0}],
    ids=["gqa", "mha", "tied"])
def test_other_engines_write_our_text(changes: dict, gpt_fast: Path) -> None:
    """Fails if a weight is in the wrong place, if rows are not reordered for the other RoPE, if prefill is off by one,
    or if a stop id is ignored."""
    model, stop = tiny.target(3, torch.float32, **changes), frozenset([7])
    ours, lengths = Engine(model, Vanilla(), 96, stop), set()
    others = [transformers_decoder(model, stop, "dynamic"), transformers_decoder(model, stop, "static"),
              gpt_fast_decoder(model, stop, gpt_fast)]
    for seed in range(4):
        ids = tiny.prompt(seed, 20 + seed)
        text = sum(ours.generate(ids, 25), [])
        lengths.add(len(text))
        for decode in others:
            theirs = decode(ids, 25)
            assert theirs.tokens == text and theirs.gained == [1] * (len(text) - 1)
            assert theirs.prefill_s > 0 and (theirs.decode_s > 0 or len(text) == 1)
    assert len(lengths) > 1, "no text ended with a stop id"


@pytest.mark.slow
def test_other_engines_share_our_weights(gpt_fast: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if more is copied than q, k and v for gpt-fast: a second 13B would not fit."""
    model, taken = tiny.target(), {}
    model.allocate_cache(64)
    original = torch.nn.Module.load_state_dict
    monkeypatch.setattr(torch.nn.Module, "load_state_dict", lambda self, tensors, **how: (
        taken.update(tensors), original(self, tensors, **how))[1])
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    for decoder in (partial(transformers_decoder, cache="dynamic"), partial(gpt_fast_decoder, folder=gpt_fast)):
        taken.clear()
        decoder(model, frozenset())
        copies = {name for name, t in taken.items() if t.untyped_storage().data_ptr() not in own}
        assert copies <= {f"layers.{i}.attention.wqkv.weight" for i in range(2)} and len(taken) > 15


def test_models_that_others_lack_are_refused(gpt_fast: Path) -> None:
    """Fails if a model that the other engine computes wrongly is not refused with one clear line."""
    for decoder in (partial(transformers_decoder, cache="dynamic"), partial(gpt_fast_decoder, folder=gpt_fast)):
        for changes in ({"model_type": "qwen3"}, {"model_type": "phi3", "partial_rotary_factor": 0.5},
                        {"model_type": "smollm3", "no_rope_layers": [1, 0]}):
            model = tiny.target(**changes)
            model.allocate_cache(64)
            with pytest.raises(ValueError, match="for Llamas"):
                decoder(model, frozenset())
    (gpt_fast / "model.py").write_text(STAND_IN.replace("forward(self, tokens, at)", "forward(self, mask, tokens, at)"))
    with pytest.raises(ValueError, match="check out its commit"):
        gpt_fast_decoder(tiny.target(), frozenset(), gpt_fast)
    (gpt_fast / "model.py").write_text(STAND_IN)
    model = tiny.target(head_dim=16)
    model.allocate_cache(64)
    with pytest.raises(ValueError, match="whose heads make up"):
        gpt_fast_decoder(model, frozenset(), gpt_fast)


@pytest.mark.parametrize("words, message", [
    (("--max_new_tokens", 1), "2 or more"), (("--runs", 0), "1 or more"),
    (("--gpt_fast", "no/such/clone"), "no model.py"),
    (("--shape", "7b"), "invalid choice"), (("--methods", "eagle,eagle9"), "eagle9 is no method: there are vanilla"),
    (("--temperature", -1), "--temperature must be 0, or 0.000001"),
    (("--temperature", 1e-9), "--temperature must be 0, or 0.000001"), (("--json", "."), "a folder, where a file"),
    (("--transformers", "--temperature", 1), "add --temperature 0"),
    (("--transformers", "--quantize", "int8"), "without --quantize"), (("--json", "no/such/x.json"), "no such folder"),
    (("--plots", __file__), "a file, where a folder should be"),
    (("--methods", "lookup", "--draft_vocab", 9), "--draft_vocab is for the methods eagle, eagle2")])
def test_refused(words: tuple, message: str, arguments, capsys) -> None:
    """Fails if bad input is found only after the model is loaded."""
    with pytest.raises(SystemExit) as exit:
        arguments(*words)
    assert exit.value.code == 2 and message in capsys.readouterr().err


def test_saved_before_printed(arguments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if the results are lost where nobody reads what is printed."""
    def closed(result: dict) -> str:
        raise BrokenPipeError
    monkeypatch.setattr(bench, "bench", lambda args, result: result.update(methods={"vanilla": {}}, measured=[1]))
    monkeypatch.setattr(bench, "report", closed)
    arguments("--json", tmp_path / "out.json")
    with pytest.raises(BrokenPipeError):
        bench.main()
    assert json.loads((tmp_path / "out.json").read_text())["measured"] == [1]


def test_weights_are_named(checkpoint: Path) -> None:
    """Fails if figures of quantised weights do not say so."""
    for quantize, name, said in (("int4", "", "bfloat16, weights int4."), (None, "", "bfloat16."),
                                 (None, "model.safetensors", "bfloat16, weights model.")):
        args = argparse.Namespace(quantize=quantize, checkpoint=checkpoint / name, dtype="bfloat16", shape=None)
        assert workload.describe_subject(args) == said


def test_plots(arguments, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if --plots draws nothing, or somewhere else."""
    plots = pytest.importorskip("benchmarks.plots")
    monkeypatch.setattr(bench, "bench", lambda args, result: result.update(measured=[1]))
    monkeypatch.setattr(bench, "report", lambda result: "tables")
    monkeypatch.setattr(plots, "draw", lambda result, folder: [folder / "a.png", folder / f"{result['measured']}.png"])
    arguments("--plots", tmp_path)
    assert bench.main() == 0 and capsys.readouterr().out == f"tables\npictures: {tmp_path}/a.png {tmp_path}/[1].png\n"


def test_nothing_measured(arguments, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a script takes a run in which every method failed for one that measured."""
    monkeypatch.setattr(bench, "bench", lambda args, result: None)
    arguments()
    assert bench.main() == 2


def test_what_against_compares(arguments, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if an option by which numbers differ is not among the settings that --against compares."""
    def stop(args: argparse.Namespace, result: dict) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(bench, "prepare", stop)
    args, result = arguments("--quantize", "int4", "--group", 64, "--temperature", 0, 0, 1), {}
    with pytest.raises(KeyboardInterrupt):
        bench.bench(args, result)
    assert args.temperature == [0, 1]
    named = {"quantize": "int4", "group": "64", "dtype": "float32", "device": "cpu", "max_new_tokens": "12",
             "runs": "5", "shape": "None", "questions": str(args.questions), "checkpoint": str(args.checkpoint)}
    assert {name: result["settings"][name] for name in named} == named


def test_bad_files(arguments, tmp_path: Path) -> None:
    """Fails if a bad --against file gives a traceback, or is found only after everything is measured."""
    (tmp_path / "old.json").write_text("[]")
    words = {"method": "x", "temperature": 0.0, "tokens_per_sec": {"median": 1.0, "q1": 1.0, "q3": 1.0, "runs": ["1"]}}
    numbers = race.speeds([[Run([1, 2], [1], 1.0, 1.0)]])
    entry = numbers | words | {"by_category": {"x": numbers}, "split_ms": None, "accept_by_depth": [], "same": 1,
                               "gaps": [], "texts": [[1]], "steady": True, "distinct4": 1.0,
                               "runs": [{"prefill_s": [1.0], "decode_s": [1.0]}]}
    whole = {"command": "x", "note": "x", "settings": {}, "prompts": [{"ids": [1]}], "methods": {}, "failed": {},
             "memory_gb": 1.0, "before": dict.fromkeys(("device", "torch", "triton", "commit", "date"), "x")}
    (tmp_path / "texts.json").write_text(json.dumps(whole | {"measured": [entry]}))
    for old, message in (("old.json", "not what bench.py --json writes"), ("gone.json", "No such file"),
                         ("texts.json", "not what bench.py --json writes")):
        arguments("--against", tmp_path / old)
        with pytest.raises((ValueError, OSError), match=message):
            bench.main()


@pytest.mark.parametrize("name, words", [("transformers", ("--transformers",)), ("matplotlib", ("--plots", "x"))])
def test_not_installed(name: str, words: tuple, arguments, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a missing package is found only after everything is measured, or without saying what to install."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        arguments(*words)
    assert f"{name} is not installed; pip install" in capsys.readouterr().err
