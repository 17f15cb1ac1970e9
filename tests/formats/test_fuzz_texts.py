"""Damaged files of conversations, prompts, answers and results: each is read, or one line says why not.

    python -m pytest tests/formats/test_fuzz_texts.py
"""
import json
import random
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
from damage import damaged_json, damaged_lines, fuzz

from app import batch
from app.chat import Chat
from app.chat_file import write_messages
from benchmarks import summary
from benchmarks.report import compare_results, read_result
from benchmarks.result_files import RESULTS, add, read_results
from formats.questions import read_questions
from sampling import Sampling
from tokenizer import Tokenizer


def write_lines(path: Path, lines: list[dict]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


class Says:
    """In place of the keyboard: lines that are typed one after the other, then the end."""
    is_terminal = True

    def __init__(self, *lines: str) -> None:
        self.lines = [*lines, None]

    def read(self, _: str) -> str | None:
        return self.lines.pop(0)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny.save_tokenizer(folder)
    (folder / "config.json").write_text("{}")
    return Tokenizer(folder)


def test_saved_chat(tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Fails if /load ends the chat, or loses the conversation where it refuses the file, or if what it loaded cannot be
    shown or saved again."""
    path = tmp_path / "chat.json"
    before = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi."}]
    write_messages(path, [{"role": "system", "content": "Be brief."}, *before, *before])

    def load() -> None:
        chat = Chat(SimpleNamespace(max_seq_len=999), tokenizer, Sampling(), 4)
        chat.messages = list(before)
        chat.run(Says(f"/load {path}"))
        line = capsys.readouterr().err
        if line.startswith("error: "):
            assert chat.messages == before and line.count("\n") == 1
            raise ValueError(line)
        chat.run(Says("/stats", "/undo", f"/save {tmp_path / 'copy.json'}", "/reset"))
        assert "error" not in capsys.readouterr().err

    fuzz(path, 150, damaged_json, load)


@pytest.mark.slow
def test_prompts_and_answers(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Fails if a line of --prompt_file, or what --output holds already, raises anything but one line to print. What is
    not whole in --output must stay as it was, or be cut off where a crash cut off the last line."""
    prompts, output = tmp_path / "prompts.jsonl", tmp_path / "output.jsonl"
    write_lines(prompts, [{"prompt": "Hello"}, {"id": "b", "turns": ["One", "Two"]}, {"question_id": 9, "prompt": "a"},
                          {"id": 3, "messages": [{"role": "user", "content": "Why?"}]}])
    tasks = batch.read_tasks(prompts)
    settings = {"model": "model.safetensors", "method": "eagle2", "max_new_tokens": 8, "temperature": 0.0}
    answer = {"text": "yes", "new_tokens": 5, "gained": [2, 2], "decode_s": 0.5, "mean_gained": 2.0}
    write_lines(output, [{"id": task.id, **({"turns": [answer, answer]} if task.id == "b" else answer),
                          "asked": task.digest, "settings": settings} for task in tasks])

    def answer_all() -> None:
        refused = []
        for task in batch.read_tasks(prompts):
            try:
                batch.respond(task.content, False, tokenizer, lambda ids: {"text": "yes"})
            except ValueError as error:
                refused.append(str(error))
        if refused:
            raise ValueError(refused[0])

    def resume() -> None:
        whole = output.read_bytes()
        with output.open("ab+", buffering=0) as file:
            try:
                batch.summary(batch.resume(file, output, tasks, settings)[1])
            finally:
                kept = output.read_bytes()
                assert kept == whole or (whole.startswith(kept) and b"\n" not in whole[len(kept):])

    fuzz(prompts, 120, damaged_lines, answer_all)
    fuzz(output, 200, damaged_lines, resume)


def test_questions(tmp_path: Path) -> None:
    """Fails if bench.py's --questions are not refused cleanly."""
    path = tmp_path / "questions.jsonl"
    write_lines(path, [{"question_id": 1, "category": "chat", "turns": ["One", "Two"]}, {"turns": ["Three"]}])
    fuzz(path, 80, damaged_lines, read_questions, path)


def speeds(median: float) -> dict:
    spread = {"median": median, "q1": median - 1, "q3": median + 1, "runs": [median - 1, median + 1]}
    return {"tokens_per_sec": spread, "with_prefill": spread, "prefill_ms": 2.0, "cycle_ms": 1.5, "mean_gained": 2.5,
            "histogram": [0, 1, 4]}


def result(commit: str) -> dict:
    """What bench.py writes, of two methods."""
    split = {"draft": 0.1, "verify": 0.5, "other": 0.1, "cycle": 0.7}
    measured = [{"method": name, "temperature": 0.0, **speeds(speed), "by_category": {c: speeds(speed) for c in "ab"},
                 "split_ms": split, "accept_by_depth": [0.8], "distinct4": 0.9, "steady": True, "same": 1,
                 "gaps": [{"prompt": 0, "token": 1, "gap": 0.01}], "texts": [[1, 2], [3]], "gained": [[2], [1]],
                 "runs": [{"prefill_s": [0.1], "decode_s": [0.2]}] * 2}
                for name, speed in (("vanilla", 100.0), ("eagle2", 250.0))]
    environment = {"device": "a CPU", "torch": "2", "triton": "3", "commit": commit, "date": "2026-01-01"}
    return {"command": "python bench.py --checkpoint x", "note": "x, batch 1", "settings": {"runs": "2"},
            "methods": {name: {"prepare_s": 1.0, "nodes": 8, "max_depth": 1, "rejection": False, "own_gb": 0.1,
                               "split_ms": {"0.0": split}} for name in ("vanilla", "eagle2")},
            "prompts": [{"question": "1", "turn": 1, "category": c, "ids": [1, 2]} for c in "ab"], "memory_gb": 1.5,
            "failed": {"lookup": "out of memory"}, "measured": measured, "before": environment, "after": environment}


@pytest.mark.slow
def test_results_to_compare_with(tmp_path: Path) -> None:
    """Fails if --against accepts a file that cannot be compared with after the race, or raises anything else."""
    path = tmp_path / "old.json"
    path.write_text(json.dumps(result("abc")))

    def load() -> None:
        old = read_result(path)
        compare_results(old, result("def"))
        compare_results(result("def"), old)

    fuzz(path, 300, damaged_json, load)


@pytest.mark.slow
def test_kept_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """Fails if a damaged file in benchmarks/results/, or one that is added there, ends in a traceback."""
    kept = tmp_path / "methods-demo.json"
    kept.write_bytes((RESULTS / kept.name).read_bytes())
    new = tmp_path / "new.json"
    new.write_text(json.dumps(result("abc")))
    monkeypatch.setattr(summary, "read_results", partial(read_results, tmp_path))
    monkeypatch.setattr(summary, "add", partial(add, folder=tmp_path / "added"))
    (tmp_path / "added").mkdir()

    def run(*words: object) -> None:
        monkeypatch.setattr(sys, "argv", ["summary", *map(str, words)])
        code = summary.main()
        err = capsys.readouterr().err
        if code == 2:
            raise ValueError(err)

    fuzz(kept, 120, damaged_json, run)
    fuzz(new, 120, damaged_json, run, "--add", new, "methods-demo")


def test_draws_repeat() -> None:
    """Fails if the same seed does not give the same damage: then a failure could not be found again."""
    data = json.dumps(result("abc")).encode()
    assert [damaged_json(data, random.Random(i)) for i in range(50)] == [
        damaged_json(data, random.Random(i)) for i in range(50)]
