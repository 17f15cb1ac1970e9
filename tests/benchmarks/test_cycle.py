"""benchmarks/cycle.py, workload.py and ops/graphs.py on a CPU: the parts are those of a cycle, the text is the small
model's. Where a test compares times it counts operations instead, which do not depend on how busy the machine is.
"""
import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from helpers import CPU, SHAPE, STOPS, bits_of, operations, tiny_checkpoint

import generate
from app.answer import Run, run
from benchmarks import cycle, shape, workload
from benchmarks.cycle import cycle_parts, speed_of
from benchmarks.widen import SHAPES
from benchmarks.workload import freeze
from draft import Eagle2, Vanilla
from drafters import tree_size
from drafters.tree_size import NODES
from engine import Engine
from formats.questions import read_questions
from model import Llama, load_model
from ops import graphs
from sampling import Sampling
from tokenizer import Tokenizer


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture
def arguments(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., argparse.Namespace]:
    """Parses command lines with benchmarks/cycle.py's own parser; --shape tiny exists."""
    monkeypatch.setitem(SHAPES, "tiny", SHAPE)
    (tmp_path / "asked.jsonl").write_text("".join(cycle.QUESTIONS.read_text().splitlines(keepends=True)[:3]))

    def arguments(*words: object) -> argparse.Namespace:
        monkeypatch.setattr(sys, "argv", ["cycle.py", *map(str, (
            "--checkpoint", checkpoint, "--questions", tmp_path / "asked.jsonl", "--device", "cpu", *words))])
        return cycle.parse_args()
    return arguments


def engines(stop_ids: frozenset[int] = frozenset(), slots: int = 96) -> dict[str, Engine]:
    model, head = tiny.pair(3, 0.1)
    return {"vanilla": Engine(model, Vanilla(), slots, stop_ids),
            "eagle2": Engine(model, Eagle2(head, model, 20, 4, 4), slots, stop_ids)}


def check_numbers(part: dict, context: int) -> None:
    """What must hold between the numbers of one context. Times are numbers of operations."""
    assert part["context"] == context and context + 6 <= part["timed_at"] <= context + 6 + 4
    names = [p["part"] for p in part["parts"]]
    assert [name.split(",")[0] for name in names] == [
        "draft: extend", *(f"draft: expansion {level}" for level in range(1, 4)), "rerank", "verify",
        "accept and compact"]
    assert part["sum_ms"] == sum(p["ms"] for p in part["parts"]) and all(p["ms"] > 0 for p in part["parts"])
    assert part["cycle_ms"] == part["sum_ms"] + 1, "its parts, and one operation for the slot of the root"
    verify = part["parts"][-2]
    assert part["cycle_ms"] > verify["ms"] and part["verify_ratio"] == verify["ms"] / part["vanilla_ms"] > 0.5
    assert part["cycle_ratio"] == part["cycle_ms"] / part["vanilla_ms"] > 1.5
    fast = part["speed"]["eagle2"]
    assert fast["mean_gained"] > 1.5 and part["speed"]["vanilla"]["mean_gained"] == 1, "the head guesses well"
    assert part["efficiency"] == pytest.approx(part["cycle_ms"] / fast["cycle_ms"])
    assert part["between_ms"] == fast["cycle_ms"] - part["cycle_ms"]
    layer = 64 * (64 + 2 * 32 + 64 + 3 * 64) + 2 * 64
    slot = 2 * 4 * 8  # of one layer's keys and values
    assert verify["gb"] == pytest.approx(4e-9 * (3 * layer + 200 * 64 + 3 * slot * part["timed_at"]))
    level, fc = 4e-9 * (layer - 64 + 200 * 64 + slot * part["timed_at"]), 4e-9 * 64 * 64  # one norm less; half of fc
    wanted = level + 2 * fc, level + fc, level + fc, level  # of fc also what the next level reads
    assert [p["gb"] for p in part["parts"]] == [*map(pytest.approx, wanted), 0, verify["gb"], 0]


@pytest.mark.slow
def test_command_line(arguments, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything at once, in operations instead of milliseconds. Fails if the JSON describes another run, if the parts
    do not add up to the cycle, or if a table does not say what it is of."""
    monkeypatch.setattr(graphs, "elapsed", operations)
    arguments("--shape", "tiny", "--contexts", 60, 40, "--max_new_tokens", 12, "--rounds", 2, "--rows",
              "--json", tmp_path / "out.json")
    cycle.main()
    result, out = json.loads((tmp_path / "out.json").read_text()), capsys.readouterr().out
    assert result["read_gb_s"] == 1e3 * 4e-9 * 2**26 and result["copy_gb_s"] == 2 * result["read_gb_s"]
    assert 0.1 < result["memory_gb"] < 60
    for part, context in zip(result["contexts"], (60, 40), strict=True):
        check_numbers(part, context)
        assert list(part["rows_ms"]) == [str(rows) for rows in cycle.ROWS]
        assert list(part["speed"]) == ["vanilla", "eagle2"] and [len(text) for text in part["texts"]] == [12] * 3
        assert all(s["tokens_per_sec"] > 0 for s in part["speed"].values())
    lines, tables = out.splitlines(), 0
    assert max(map(len, lines)) <= 100
    for i in range(2, len(lines)):
        if lines[i].startswith("| -"):
            above = " ".join("\n".join(lines[:i - 2]).split("\n\n")[-1].split())
            assert "cpu, 1 threads" in above and torch.__version__ in above and "float32" in above
            assert "tiny is a shape: its cost, with the text and acceptance of checkpoint" in above
            tables += 1
    assert tables == 2 * 3 + 1


@pytest.mark.slow
def test_head_in_int8(arguments, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if nobody is told that the head has another format than the model."""
    monkeypatch.setattr(graphs, "elapsed", operations)
    for weights, said in (("int8", True), ("stored", False)):
        result = {}
        cycle.measure_all(arguments("--draft_weights", weights, "--contexts", 40, "--max_new_tokens", 8, "--rounds", 1),
                          result)
        assert result["device"].endswith(" The draft head is in int8.") == said


@pytest.mark.slow
@pytest.mark.parametrize("mode, per_weight", [("int8", 1), ("int8dyn", 1), ("int4", 0.5)])
@pytest.mark.parametrize("shape", [("--shape", "tiny"), ()])
def test_quantized(mode: str, per_weight: float, shape: tuple, arguments, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if weights are quantised before they are widened, if GB counts bytes that are no longer read, or if the
    result does not name the weight format."""
    monkeypatch.setattr(graphs, "elapsed", operations)
    args, result = arguments(*shape, "--quantize", mode, "--contexts", 40, "--max_new_tokens", 8, "--rounds", 1,
                             *(["--group", 64] if mode == "int4" else [])), {}
    cycle.measure_all(args, result)
    part = result["contexts"][0]
    assert f"weights {mode}" in result["device"]
    if shape:
        rows = 64 + 2 * 32 + 64 + 2 * 64  # of a layer's matrices that read 64 columns; w2 reads as many
        columns, scales = (256, 4 * 4) if mode == "int4" else (64, 4)  # filled up, bytes a row
        layer = (rows + 64) * (columns * per_weight + scales) + 4 * 2 * 64
        assert part["parts"][-2]["gb"] == pytest.approx(1e-9 * (
            3 * layer + 200 * (64 + 4) + 4 * 3 * 2 * 4 * 8 * part["timed_at"]))


@pytest.mark.slow
def test_tree_that_fits(arguments, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if --tree auto measures another tree than the one it chose."""
    monkeypatch.setattr(graphs, "elapsed", operations)
    monkeypatch.setattr("drafters.tree_size.measure", lambda *inputs: [1.0] * 9)
    args, result = arguments("--tree", "auto", "--contexts", 40, "--max_new_tokens", 8, "--rounds", 1), {}
    with pytest.raises(FileNotFoundError, match="acceptance.json"):
        cycle.measure_all(args, result)
    (args.checkpoint / "eagle/acceptance.json").write_text(json.dumps(
        {"nodes": NODES, "topk": 10, "gained": [[1, 2] + [2] * 6, [1, 3] + [3] * 6] + [[1, 2] + [2] * 6] * 6}))
    cycle.measure_all(args, result)
    assert [p["part"] for p in result["contexts"][0]["parts"]] == [
        "draft: extend, 3 rows", "draft: expansion 1, 10 rows", "rerank", "verify, 16 rows", "accept and compact"]


@pytest.mark.slow
def test_parts_are_those_of_a_cycle() -> None:
    """Fails if a part is forgotten, or is timed on a state that the cycle never sees. Drafting and verifying alone, on
    a frozen engine, must give the tree and the choices of that engine's own cycle."""
    engine = engines()["eagle2"]
    length = freeze(engine, tiny.prompt(0, 20), 12)
    assert 32 <= length <= 36 and engine.state.done
    text, tree, trees = engine.state.tokens[:length].clone(), engine.drafter.propose(engine.state), []
    features, chosen = engine.verify(engine.state.length - 1, tree)
    for buffer in engine.drafter.candidates[:3]:  # tokens, scores and parents
        buffer.fill_(-1)
    engine.commit = lambda *inputs: trees.append(inputs)
    assert len(cycle_parts(engine)) == 1 + 3 + 3 and len(trees) > 2
    for base, again, *verified in trees:
        assert int(base) == length - 1 and all(torch.equal(a, b) for a, b in zip(again, tree))
        assert torch.equal(verified[0], features) and torch.equal(verified[1], chosen)
    assert int(engine.state.length) == length and torch.equal(engine.state.tokens[:length], text)


def test_rows_are_those_of_a_chain() -> None:
    """Fails if a node sees other nodes than in a draft, or slots beyond the cache."""
    engine, seen = engines()["eagle2"], {}
    length = freeze(engine, tiny.prompt(0, 20), 12)
    engine.verify = lambda base, tree: seen.update({len(tree.tokens): (int(base), tree)})
    assert list(tree_size.verify_by_rows(engine, cycle.ROWS)) == list(seen) == list(cycle.ROWS)
    for rows, (base, tree) in seen.items():
        assert base == length - 1 and tree.depth.tolist() == list(range(rows)) and base + rows <= engine.slots
        assert [bin(bits_of(words)).count("1") for words in tree.ancestors.tolist()] == list(range(1, rows + 1))


def test_a_frozen_cycle_does_all_its_work() -> None:
    """Fails if a frozen cycle commits tokens, or does less work than the cycle of a running text."""
    for engine in engines().values():
        freeze(engine, tiny.prompt(1, 20), 5)
        still = operations(engine.cycle)
        engine.state.done.fill_(False)
        engine.limit.fill_(96)
        length = int(engine.state.length)
        assert operations(engine.cycle) == still and int(engine.state.length) > length


def test_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if the time is that of all calls, is in seconds, or is not the median of the rounds."""
    assert 5 <= graphs.timed(lambda: time.sleep(0.005), CPU) < 50
    taken, called = iter([9.0, 3.0, 6.0, 60.0, 0.3, 8.0, 5.0, 7.0]), []
    monkeypatch.setattr(graphs, "elapsed", lambda function, calls, device: called.append(calls) or next(taken))
    assert graphs.timed(lambda: None, CPU) == 2.0
    assert graphs.timed(lambda: None, CPU, 5, 3, 1) == 7.0 and called == [3] * 5 + [1] * 3


def test_timed_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if all calls of a graph count as one, or if anything but a replay is timed. The clock moves only with
    replays, 2 ms for each call in the graph."""
    class Graph:
        def replay(self) -> None:
            clock.append(2.0 * self.calls)

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            self.at = None

        def record(self) -> None:
            self.at = sum(clock)

        def elapsed_time(self, end: "Event") -> float:
            assert "synchronized" in events
            return end.at - self.at

        def synchronize(self) -> None:
            events.append("synchronized")

    @contextmanager
    def graph(captured: Graph, pool: object) -> Iterator[None]:
        assert calls[-1:] == ["call"] and events == ["idle"], "compile before the capture"
        before = len(calls)
        yield
        captured.calls = len(calls) - before

    for name, fake in (("CUDAGraph", Graph), ("Event", Event), ("graph", graph),
                       ("synchronize", lambda: events.append("idle"))):
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr("ops.graphs.graph_memory", lambda: SimpleNamespace(pool=object))
    for unroll in (1, 10):
        clock, calls, events = [], [], []
        assert graphs.timed(partial(calls.append, "call"), torch.device("cuda"), unroll) == 2.0
        assert len(calls) == 1 + unroll and len(clock) == 1 + 5 * 30 // unroll


def test_speed_of() -> None:
    """Fails if the token of prefill counts as decoded, if speeds are means of ratios, or if not the median round
    counts. """
    runs = [[Run([1, 2, 3, 4], [3], 9.0, s), Run([5, 6], [1], 9.0, s)] for s in (0.5, 3.0, 1.0)]
    assert speed_of(runs) == {"tokens_per_sec": 2.0, "mean_gained": 2.0, "cycle_ms": 1000.0}


@pytest.mark.slow
def test_run() -> None:
    """Fails if cycles or tokens are not those that the engine yields, if sampling is ignored, or if decoding's time
    contains the prompt's."""
    for engine in engines().values():
        for sampling in (Sampling(), Sampling(1.0, seed=3)):
            ids = tiny.prompt(2, 10)
            cycles, original = list(engine.generate(ids, 20, sampling)), engine.prefill
            engine.prefill = lambda *inputs, original=original: (time.sleep(0.2), original(*inputs))[1]
            start = time.perf_counter()
            result = run(engine, ids, 20, sampling)
            assert result.prefill_s > 0.2 and 0 < result.decode_s < time.perf_counter() - start - 0.2
            engine.prefill = original
            assert result[:2] == (sum(cycles, []), [len(new) for new in cycles[1:]]) and sum(result.gained) == 19


def test_choose_kept_ids() -> None:
    """Fails if a used id is dropped, if the others are not the lowest, if an id comes twice, or if too many are
    kept."""
    assert shape.choose_kept_ids({7, 2, 90}, 100, 6) == [0, 1, 2, 3, 7, 90]
    assert shape.choose_kept_ids({0, 5}, 6, 9) == list(range(6)), "a larger vocabulary moves nothing"
    assert shape.choose_kept_ids({8, 3}, 10, 2) == [3, 8]
    with pytest.raises(ValueError, match="3 different ids, the shape has 2"):
        shape.choose_kept_ids({1, 2, 3}, 10, 2)


def contexts(args: argparse.Namespace, model: Llama, tokenizer: Tokenizer) -> list[workload.Prompt]:
    questions = [question.turns[0] for question in read_questions(args.questions)]
    return [workload.Prompt("", 1, "", ids) for n in sorted(args.contexts)
            for ids in workload.fill_context(tokenizer, questions, n)]


def texts(args: argparse.Namespace) -> tuple[list[list[int]], list[int]]:
    """Answers to all prompts in the checkpoint's ids, and how many cycles each took. Ids of a widened model are
    translated by their embeddings."""
    subject = workload.load(args, partial(contexts, args))
    model, prompts, stop, *_ = subject
    [head] = workload.load_weights("eagle2", args, subject).values()
    small = load_model(args.checkpoint, "cpu", torch.float32).embed.weight
    known = {tuple(row): i for i, row in enumerate(small.tolist())}
    ids = [known.get(tuple(row)) for row in model.embed.weight[:, :small.shape[1]].tolist()]
    assert sorted(ids[i] for i in stop) == STOPS
    engine = Engine(model, Eagle2(head, model, 8, 3, 3), 128, stop)
    runs = [(prompt.ids, run(engine, prompt.ids, 12)) for prompt in prompts]
    return [[ids[i] for i in prompt + result.tokens] for prompt, result in runs], [len(r.gained) for _, r in runs]


@pytest.mark.slow
def test_cut_vocabulary_keeps_the_text(arguments) -> None:
    """Fails if ids that only the answers use are cut, or if prompts or stops are not translated: prompt, text and stops
    are the small model's, although the wide one has a third fewer ids."""
    words = ("--contexts", 50, 40, "--max_new_tokens", 12)
    (wide, cycles), plain = texts(arguments(*words, "--shape", "tiny")), texts(arguments(*words))
    assert wide == plain[0] and len(wide) == 6
    assert max(sum(cycles), sum(plain[1])) < 0.6 * 6 * 11, "the draft head must still guess well with fewer ids"
    assert len({i for text in wide for i in text if i >= SHAPE["vocab_size"]}) > 5


def test_larger_vocabulary_needs_no_answers(arguments, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if ids change, or answers are written to find them, where the wide vocabulary holds all ids."""
    monkeypatch.setitem(SHAPES, "tiny", SHAPE | {"vocab_size": 320})
    monkeypatch.setattr(shape, "Engine", None)
    wide, plain = (workload.load(args, partial(contexts, args)) for args in (
        arguments("--contexts", 40, *more) for more in (("--shape", "tiny"), ())))
    assert wide[1:3] == plain[1:3] and wide.model.cfg.vocab_size == 320


def test_prompts_of_a_context(checkpoint: Path) -> None:
    """Fails if a prompt has another length, if the template around it is cut, or if the question is not at its end."""
    tokenizer, questions = Tokenizer(checkpoint), ["How old is the moon?", "Name a river."]
    for length in (40, 200):
        for ids, question in zip(workload.fill_context(tokenizer, questions, length), questions, strict=True):
            whole = tokenizer.chat([{"role": "user", "content": question}])
            assert len(ids) == length and ids[:3] == whole[:3] and ids[-6:] == whole[-6:]
            assert tokenizer.decode(ids).endswith(question + tokenizer.decode(whole).partition(question)[2])
    text = tokenizer.decode(ids)
    assert text.count(questions[0]) >= 3 and questions[0] + "\n\n" + questions[1] in text
    tokenizer.has_chat_template = False
    assert [len(ids) for ids in workload.fill_context(tokenizer, questions, 30)] == [30, 30]
    tokenizer.has_chat_template = True
    alone = workload.fill_context(tokenizer, questions, 0)
    assert alone == [tokenizer.chat([{"role": "user", "content": text}]) for text in questions]
    with pytest.raises(ValueError, match="--contexts 5: the chat template alone takes"):
        workload.fill_context(tokenizer, questions, 5)


@pytest.mark.slow
def test_startup(arguments) -> None:
    """Fails if the time does not end at the first text, if the parts of it are not those of that process, or if a
    process that fails counts as a fast start."""
    starts = cycle.startup_seconds(arguments())
    assert list(starts) == ["cold", "warm"]
    for first_text, *parts in map(dict.values, starts.values()):
        assert 0.1 < sum(parts) < first_text < 300
    with pytest.raises(ValueError, match="generate.py ended with exit code 2"):
        cycle.startup_seconds(arguments("--draft", "no/such/head"))


def test_what_is_started(arguments, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if another model, head or format is started than the one that is measured."""
    asked = []
    monkeypatch.setattr(cycle.subprocess, "Popen", lambda command, **how: asked.extend(map(str, command)) or 1 / 0)
    given = arguments("--startup", "--quantize", "int4", "--group", 64, "--draft_vocab", 0, "--draft", "a/head",
                      "--draft_weights", "stored")
    with pytest.raises(ZeroDivisionError):
        cycle.startup_seconds(given)
    started = vars(generate.parse_args(asked[2:]))
    same = ("checkpoint", "method", "draft", "draft_vocab", "draft_weights", "quantize", "group", "dtype", "device")
    assert {name: started[name] for name in same} == {name: vars(given)[name] for name in same}


@pytest.mark.parametrize("words, message", [
    (("--startup", "--shape", "llama-2-7b"), "leave out --shape"), (("--max_new_tokens", 1), "2 or more"),
    (("--rounds", 0), "1 or more"),
    (("--shape", "7b"), "invalid choice"), (("--tree", 8, 3), "--tree takes nodes"),
    (("--tree", "auto", 3, 3), "--tree takes nodes"), (("--json", "no/such/x.json"), "there is no such folder")])
def test_refused(words: tuple, message: str, arguments, capsys) -> None:
    """Fails if bad input is found only after the model is loaded."""
    with pytest.raises(SystemExit) as exit:
        arguments(*words)
    assert exit.value.code == 2 and message in capsys.readouterr().err
