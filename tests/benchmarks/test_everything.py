"""benchmarks.everything: its commands are ones that our tools take, and each result lands where the tables look."""
import json
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import bench
from benchmarks import cycle, everything
from benchmarks.environment import commit_of
from benchmarks.result_files import NAMES, read_results
from benchmarks.result_files import add as add_to
from quant.linear import MODES

HERE = {"device": "a GPU", "torch": "2", "triton": "3", "commit": "abc1234", "date": "2026-01-01"}
RAW = {"contexts": [{"speed": {}}], "device": "a GPU, torch 2, triton 3, commit abc1234, 2026-01-01, ", "arguments": {
    "shape": "None", "quantize": "None", "dtype": "bfloat16", "checkpoint": "a/demo"}}


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Runs the program in a folder where all models are and every command writes RAW, except those named in `fail`.
    `asked` collects the commands."""
    for name in everything.commands("question.jsonl").values():
        for word in shlex.split(name):
            if word.endswith(".jsonl"):
                (tmp_path / word).parent.mkdir(parents=True, exist_ok=True)
                (tmp_path / word).touch()
            elif "/" in word:
                (tmp_path / word).mkdir(parents=True, exist_ok=True)
    results = tmp_path / "results"
    results.mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(everything, "gpu_problem", lambda device: None)
    monkeypatch.setattr(everything, "environment", lambda device: HERE)
    monkeypatch.setattr(everything, "RESULTS", results)
    monkeypatch.setattr(everything, "add", lambda file, name, commit: add_to(file, name, commit, results))

    def main(*words: str, fail: str = "nothing", asked: list | None = None, raw: dict = RAW) -> int:
        def run(command: list[str]) -> subprocess.CompletedProcess:
            text = shlex.join(command)
            if asked is not None:
                asked.append(text)
            if fail in text:
                return subprocess.CompletedProcess(command, 3)
            Path(command[-1]).write_text(json.dumps(raw))
            return subprocess.CompletedProcess(command, 0)

        monkeypatch.setattr(everything.subprocess, "run", run)
        monkeypatch.setattr(sys, "argv", ["everything", *words])
        return everything.main()
    return main


def test_commands(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Fails if a command has an option that its program does not take, a result that no table shows, or weights of
    another format than its name says."""
    found = everything.commands("a b.jsonl")
    assert {*found} == {*NAMES}
    asking = {"cycle-demo-mt-bench", "methods-demo-block"}
    assert {*found} - {*everything.commands(None)} == asking
    assert all(shlex.split(found[name])[-1] == "a b.jsonl" for name in asking)
    for name, command in found.items():
        words = shlex.split(command)
        program, words = (cycle, words[2:]) if words[0] == "-m" else (bench, words[1:])
        assert name.startswith("cycle") == (program is cycle)
        monkeypatch.setattr(sys, "argv", [name, *words, "--device", "cpu"])
        mode = name.rpartition("-")[2]
        assert program.parse_args().quantize == (mode if mode in MODES else None)


def test_goes_on_where_it_stopped(program: Callable[..., int], tmp_path: Path, capsys) -> None:
    """Fails if a result is measured twice, kept from another commit, or lost when a later command fails."""
    asked = []
    assert program(fail="llama-3-8b", asked=asked) == 1
    known = read_results(tmp_path / "results")
    wanted = {*everything.commands(None)}
    assert {*known} == wanted - {"cycle-llama-3-8b-bf16"} and len(asked) == len(wanted)
    assert "cycle-llama-3-8b-bf16: the command ended with exit status 3" in capsys.readouterr().out
    asked.clear()
    assert program("--mt_bench", "question.jsonl", asked=asked) == 0
    assert ["llama-3-8b" in text or "question.jsonl" in text for text in asked] == [True] * 3
    assert capsys.readouterr().out.count(": there already") == len(wanted) - 1
    assert program("--commit", "fedcba9", "--only", "methods-demo", asked=asked) == 0
    assert read_results(tmp_path / "results")["methods-demo"]["environment"]["commit"] == "fedcba9"
    assert program("--only", "methods-demo", asked=asked) == 0 and len(asked) == 5
    asked.clear()
    assert program("--commit", "fedcba9", asked=asked) == 0 and len(asked) == len(wanted)


def test_what_is_missing(program: Callable[..., int], tmp_path: Path, capsys) -> None:
    """Fails if a model that is not there ends the run, or is not named."""
    (tmp_path / everything.SMALL_CODER).rmdir()
    assert program() == 0
    out = capsys.readouterr().out
    assert f"methods-coder-bf16: left out, there is no {everything.SMALL_CODER}" in out
    assert "cycle-demo-mt-bench: left out, it needs --mt_bench FILE" in out
    assert "methods-coder-gguf" in read_results(tmp_path / "results")
    assert program("--only", "cycle-demo-mt-bench") == 0
    assert capsys.readouterr().out == "cycle-demo-mt-bench: left out, it needs --mt_bench FILE\n"


def test_a_method_that_failed(program: Callable[..., int], tmp_path: Path, capsys) -> None:
    """Fails if a result that lacks a method, with which bench.py ends as with others, is kept as measured."""
    assert program("--only", "methods-demo", raw=RAW | {"failed": {"eagle2": "out of memory"}}) == 1
    assert capsys.readouterr().out == "methods-demo: not kept, because eagle2 failed: out of memory\n"
    assert not read_results(tmp_path / "results")


def test_results_are_no_changes(tmp_path: Path) -> None:
    """Fails if a new result in benchmarks/results makes the code count as changed, or if a change of the code does not.
    """
    results = tmp_path / "benchmarks/results"
    results.mkdir(parents=True)

    def git(*words: str) -> None:
        subprocess.run(["git", "-C", tmp_path, "-c", "user.name=a", "-c", "user.email=a@b", *words], check=True)

    git("init", "--quiet")
    for file in (tmp_path / "bench.py", results / "a.json"):
        file.write_text("old")
    git("add", ".")
    git("commit", "--quiet", "--message=first")
    commit = commit_of(tmp_path)
    (results / "a.json").write_text("new")
    assert commit_of(tmp_path) == commit != "unknown" and " " not in commit
    (tmp_path / "bench.py").write_text("new")
    assert commit_of(tmp_path) == f"{commit} and uncommitted changes"


@pytest.mark.parametrize("commit", ["unknown", "abc1234 and uncommitted changes"])
def test_no_commit(commit: str, program: Callable[..., int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if figures can be stored that belong to no commit."""
    monkeypatch.setattr(everything, "environment", lambda device: HERE | {"commit": commit})
    with pytest.raises(ValueError, match="commit first, or name it with --commit"):
        program()
    assert program("--commit", "abc1234") == 0
