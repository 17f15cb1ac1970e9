"""app/trace.py: a trace that viewers open, with every phase at its place, and an engine that is the same afterwards."""
import gzip
import json
import sys
from pathlib import Path

import pytest
import tiny
from helpers import tiny_checkpoint

import engine as engine_module
import generate
from app import trace
from app.trace import CYCLES, LAUNCHED, PHASES, REPLAYED, covered, means, table, write_trace
from draft import Eagle2, Vanilla
from engine import Engine
from sampling import Sampling


def ranges(path: Path) -> dict[str, list[tuple[float, float]]]:
    """The named ranges of a trace: (beginning, end) of each."""
    found = {}
    for e in json.loads(path.read_text())["traceEvents"]:
        if e.get("cat") == "user_annotation":
            found.setdefault(e["name"], []).append((e["ts"], e["ts"] + e["dur"]))
    return found


def parts(engine: Engine) -> dict:
    """The engine's attributes, without those that a text changes."""
    return {name: part for name, part in vars(engine).items() if name not in ("text", "sequence", "written", "reused")}


@pytest.mark.slow
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=1.0, seed=3)])
def test_phases(sampling: Sampling, tmp_path: Path) -> None:
    """Fails if a phase is missing, counted twice or outside of its cycle, if a stop id ends the trace, or if the engine
    stays changed: its methods still record, or it no longer stops."""
    model, head = tiny.pair(3, 0.1)
    engine = Engine(model, Eagle2(head, model, 12, 3, 3), 128, frozenset(range(24)))
    ids = tiny.prompt(4, 9)
    before = parts(engine)
    stop_ids = engine.stop_ids.clone()
    own = {**vars(engine.drafter)}
    text = write_trace(engine, ids, sampling, tmp_path / "trace.json")
    found = ranges(tmp_path / "trace.json")
    assert {name: len(each) for name, each in found.items() if name in (*PHASES, LAUNCHED, REPLAYED)} == {
        "prefill": 1, "draft": CYCLES, "verify": CYCLES, "accept and commit": CYCLES, LAUNCHED: CYCLES}
    cycles = sorted(found[LAUNCHED])
    for (start, end), *inside in zip(cycles, *(sorted(found[name]) for name in PHASES[1:])):
        places = [start, *(place for part in inside for place in part), end]
        assert places == sorted(places)
    assert found["prefill"][0][1] <= cycles[0][0]
    assert all(name in text for name in (*PHASES, LAUNCHED, "trace.json", "perfetto")) and REPLAYED not in text
    assert "GPU" not in text and f"({(tmp_path / 'trace.json').stat().st_size / 1e6:.1f} MB)" in text
    assert parts(engine) == before and vars(engine.drafter) == own and engine.stop_ids.equal(stop_ids)
    assert len(list(engine.generate(ids, 20, sampling))) == 1, "every token is a stop"


@pytest.mark.slow
def test_graphs_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, with a stand-in for capturing. Fails if the trace lacks replayed cycles, which are how decoding
    runs, or if the engine's graphs are lost."""
    monkeypatch.setattr(engine_module, "capture", lambda function: function)
    engine = Engine(tiny.target(1), Vanilla(), 128)
    ids = tiny.prompt(4, 9)
    engine.graphs = {}
    text = [*engine.generate(ids, 9)]
    graphs = {**engine.graphs}
    shown = write_trace(engine, ids, Sampling(), tmp_path / "trace.json")
    found = ranges(tmp_path / "trace.json")
    assert len(found[LAUNCHED]) == len(found[REPLAYED]) == len(found["draft"]) == CYCLES
    assert max(found[LAUNCHED])[1] <= min(found[REPLAYED])[0] and REPLAYED in shown
    assert engine.graphs == graphs and len(graphs) == 1 and [*engine.generate(ids, 9)] == text


def test_a_full_context(tmp_path: Path) -> None:
    """Fails if means are divided by 0 cycles where a prompt leaves room for only one token."""
    engine = Engine(tiny.target(1), Vanilla(), 16)
    shown = write_trace(engine, tiny.prompt(1, 15), Sampling(), tmp_path / "trace.json")
    assert "prefill" in shown and LAUNCHED not in shown


def event(cat: str, ts: float, dur: float, name: str = "", correlation: int | None = None) -> dict:
    args = {} if correlation is None else {"args": {"correlation": correlation}}
    return {"ph": "X", "cat": cat, "ts": ts, "dur": dur, "name": name, **args}


def test_time_on_the_gpu() -> None:
    """Fails if kernels count for the phase in which they run instead of the earlier one that launched them, if kernels
    that overlap count twice, or if only the first kernel of a graph counts."""
    events = [event("user_annotation", 0, 100, "draft"), event("user_annotation", 100, 100, "verify"),
              event("user_annotation", 300, 50, "draft"), event("user_annotation", 0, 200, LAUNCHED),
              event("user_annotation", 400, 10, REPLAYED), event("user_annotation", 0, 999, "another"),
              event("cuda_runtime", 10, 5, "cudaLaunchKernel", 1), event("cuda_driver", 20, 5, "cuLaunchKernelEx", 2),
              event("cuda_runtime", 150, 5, "cudaLaunchKernel", 3), event("cuda_runtime", 160, 5, "cudaEventRecord"),
              event("cuda_runtime", 405, 5, "cudaGraphLaunch", 4), event("kernel", 120, 1000, "a", 1),
              event("kernel", 620, 1000, "b", 2), event("gpu_memcpy", 2000, 4000, "c", 3),
              event("kernel", 7000, 500, "d", 4), event("kernel", 8000, 500, "e", 4), event("kernel", 9000, 1, "f", 9),
              {"ph": "M", "name": "process_name", "args": {}}]
    found = means(events)
    assert {name: (times, round(host, 9), round(gpu, 9)) for name, (times, host, gpu) in found.items()} == {
        "draft": (2, 0.075, 0.75), "verify": (1, 0.1, 4.0), LAUNCHED: (1, 0.2, 5.5), REPLAYED: (1, 0.01, 1.0)}
    lines = table(found, True).splitlines()
    assert "GPU" in lines[0] and lines[1].split() == ["draft", "2", "0.075", "0.750"] and len(lines) == 5
    assert covered([(5, 6), (0, 4), (1, 2), (3, 5)]) == 6 and covered([]) == 0


@pytest.mark.slow
def test_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """Fails if a .gz is not compressed, if the trace replaces the answer, or if a missing folder is found only after
    all the work."""
    words = ["generate.py", "--checkpoint", str(tiny_checkpoint(tmp_path / "c")), "--device", "cpu", "--prompt", "Hi",
             "--max_new_tokens", "5", "--json", "--profile"]
    for name, message in (("no/x.json", "no such folder"), ("c", "a folder")):
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
            patch.setattr(generate, "load_engine", None)
            patch.setattr(sys, "argv", [*words, str(tmp_path / name)])
            generate.main()
        assert end.value.code == 2 and message in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", [*words, str(tmp_path / "x.json.gz")])
    generate.main()
    out, err = capsys.readouterr()
    assert json.loads(out.splitlines()[-1])["new_tokens"] == 5 and "accept and commit" in err
    assert json.loads(gzip.decompress((tmp_path / "x.json.gz").read_bytes()))["traceEvents"]
    monkeypatch.setattr(trace.Path, "write_bytes", lambda path, data: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(SystemExit) as end:
        generate.main()
    assert end.value.code == 2 and capsys.readouterr().err.endswith("error: disk full\n")
