"""app/batch.py: every prompt is answered once and as it would be alone, whatever ends a run and where it resumes."""
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT
from helpers import KEYS, tiny_checkpoint

import generate
from app import answer as answer_module
from app import batch
from app.options import Engine
from benchmarks.workload import ask
from formats.questions import Question
from sampling import Sampling

TIMES = {"prefill_s", "decode_s", "tokens_per_sec", "compile_s", "memory_gb"}  # what differs between two runs
PROMPTS = [{"prompt": f"Tell me {n} things about fridges."} for n in range(12)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture
def words(checkpoint: Path, tmp_path: Path) -> list[str]:
    """The words of a command line that answers asked.jsonl in answers.jsonl."""
    return [*map(str, ("--checkpoint", checkpoint, "--eagle2", "--device", "cpu", "--max_new_tokens", 20,
                       "--prompt_file", tmp_path / "asked.jsonl", "--output", tmp_path / "answers.jsonl"))]


@pytest.fixture
def call(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    """Write the prompts, if any are given, and run. Returns (exit code, the answers unless the code is 2, stderr)."""
    def call(prompts: list | None = None, *more: object) -> tuple[int, list[dict], str]:
        if prompts is not None:
            write(tmp_path / "asked.jsonl", prompts)
        monkeypatch.setattr(sys, "argv", ["generate.py", *words, *map(str, more)])
        code = 0
        try:
            generate.main()
        except SystemExit as end:
            code = end.code
        out, err = capsys.readouterr()
        assert out == "" and "Traceback" not in err
        return code, [] if code == 2 else read(tmp_path / "answers.jsonl"), err
    return call


def write(path: Path, prompts: list) -> None:
    path.write_text("".join((p if isinstance(p, str) else json.dumps(p)) + "\n" for p in prompts), encoding="utf-8")


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def timeless(answer: object) -> object:
    """Without what differs between two runs."""
    if isinstance(answer, list):
        return [timeless(part) for part in answer]
    return {k: timeless(v) for k, v in answer.items() if k not in TIMES} if isinstance(answer, dict) else answer


@pytest.mark.slow
def test_all_kinds(call, checkpoint: Path) -> None:
    """Fails if a turn misses the turns before it, if a message's role is lost, if a line has another one's id, if a
    text depends on the text before, or if a line holds anything but --json's object."""
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    turns = ["How old is the moon?", "And the sun?", "Thanks."]
    code, answers, err = call([{"prompt": "Why?"}, "", {"id": "m", "messages": messages},
                               {"question_id": 81, "category": "x", "turns": turns},
                               '{"prompt": "A line\u2028separator"}', {"id": 7, "question_id": 8, "prompt": "Why?"}])
    assert code == 0 and [a["id"] for a in answers] == [1, "m", 81, 5, 7]
    engine = Engine.load(checkpoint, "eagle2", device="cpu")
    chat = engine.tokenizer.chat
    asked = [chat([{"role": "user", "content": "Why?"}]), chat(messages),
             *(p.ids for p in ask(engine.model, engine.tokenizer, [Question("", "", turns)], 20)),
             chat([{"role": "user", "content": "A line\u2028separator"}])]
    found = [answers[0], answers[1], *answers[2]["turns"], answers[3]]
    extra = {"id", "asked", "settings"}
    assert answers[2].keys() == {"turns", *extra} and [len(set(a) & extra) for a in found] == [3, 3, 0, 0, 0, 3]
    for ids, answer in zip(asked, found, strict=True):
        assert answer.keys() - extra == KEYS and answer["method"] == "eagle2"
        assert answer["prompt_tokens"] == len(ids) and answer["tokens"] == sum(engine.generate(ids, 20), [])
        assert answer["text"] == engine.tokenizer.decode(answer["tokens"])
    assert timeless(answers[4])["tokens"] == answers[0]["tokens"]
    tokens = sum(a["new_tokens"] for a in [*found, answers[4]])
    cycles = sum(a["cycles"] for a in [*found, answers[4]])
    assert f"5 prompts, {tokens} tokens, " in err and f" {(tokens - 7) / cycles:.2f} tokens per step" in err


def test_raw(call, checkpoint: Path) -> None:
    """Fails if --raw is ignored and the chat template is put around a raw prompt."""
    code, answers, _ = call([{"prompt": "Once"}, {"turns": ["One", "two"]}, {"messages": [
        {"role": "user", "content": "Hi"}]}], "--raw")
    encode = Engine.load(checkpoint, device="cpu").tokenizer.encode
    first, second = answers[1]["turns"]
    assert code == 1 and "--raw" in answers[2]["error"]
    assert answers[0]["prompt_tokens"] == len(encode("Once")) and first["prompt_tokens"] == len(encode("One"))
    assert second["prompt_tokens"] == len(encode(f"One\n\n{first['text']}\n\ntwo"))


def test_what_fails_alone(call) -> None:
    """Fails if one bad prompt ends the run or is not reported, or if a second run forgets that it failed."""
    bad = [{"prompt": "word " * 600}, {"prompt": " \n"}, {"prompt": 7}, {"prompt": "\ud800"}, {}, {"turns": []},
           {"prompt": "x", "turns": ["x"]}, {"messages": [{"role": "user"}]}, {"turns": ["x", "word " * 600]}]
    code, answers, err = call([*bad, {"prompt": "Why?"}])
    assert code == 1 and [a["id"] for a in answers if "error" in a] == [*range(1, 10)] and answers[9]["text"]
    assert all(a.keys() == {"id", "error", "asked", "settings"} for a in answers[:9])
    for answer, hint in zip(answers, ("--max_seq_len", "not empty", "a text", "UTF-8", "none", "list of texts",
                                      "prompt and turns", "role and content", "--max_seq_len")):
        assert hint in answer["error"] and f"line {answer['id']}: {answer['error']}\n" in err
    again, same, err = call()
    assert again == 1 and same == answers and "10 prompts (9 failed), " in err


@pytest.mark.parametrize("prompts, message", [
    ([], "no prompts"), (["", " "], "no prompts"), ([{"prompt": "x"}, "Hello"], "line 2 is not a JSON object"),
    (["[1]"], "line 1"), ([{"prompt": "x"}, "", '{"prompt": "x"'], "line 3"), (["[" * 100_000], "line 1"),
    ([{"id": 2, "prompt": "x"}, {"prompt": "y"}], "lines 1 and 2 have the same id, 2"),
    ([{"id": "a", "prompt": "x"}, {"question_id": "a", "prompt": "y"}], "lines 1 and 2"),
    ([{"id": None, "prompt": "x"}], "id in line 1"), ([{"id": True, "prompt": "x"}], "id in line 1")])
def test_bad_files(prompts: list, message: str, call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a file that is not a list of prompts is accepted, or is refused only after the model was loaded."""
    monkeypatch.setattr(batch, "load_engine", None)
    code, _, err = call(prompts)
    assert code == 2 and message in err and "asked.jsonl" in err and err.count("\n") == 1
    assert not (tmp_path / "answers.jsonl").exists()


@pytest.mark.parametrize("more, message", [
    (("--prompt", "x"), "not allowed with"), (("--compare",), "--compare"), (("--json",), "--json"),
    (("--profile", "x"), "--profile"), (("--tree_html", "x"), "--tree_html"),
    (("--output", "/no/such/folder/x"), "no such folder"), (("--output", "."), "--output ."),
    (("--output", "/dev/null"), "not a file that a run could go on with"),
    (("--prompt_file", "/no/such/file"), "/no/such/file")])
def test_bad_flags(more: tuple, message: str, call, tmp_path: Path) -> None:
    """Fails if a flag is silently ignored, or if a bad path is found only after all the work."""
    code, _, err = call([{"prompt": "x"}], *more)
    assert code == 2 and message in err and not (tmp_path / "answers.jsonl").exists()


def test_one_without_the_other(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Fails if --prompt_file or --output is accepted without the other, or a command line without any prompt."""
    for words in (["--prompt_file", "x"], ["--prompt", "x", "--output", "y"], ["--output", "y"], []):
        with pytest.raises(SystemExit):
            generate.parse_args(["--checkpoint", str(checkpoint), *words])
        assert "--prompt" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.slow
def test_killed_anywhere(call, words: list[str], tmp_path: Path) -> None:
    """Kills a run with -9, then tears the last line at all kinds of places. Fails if resuming loses an answer, writes
    one twice, or leaves half a line in the middle of the file."""
    asked, output = tmp_path / "asked.jsonl", tmp_path / "answers.jsonl"
    write(asked, PROMPTS)
    long = ("--max_new_tokens", "100")  # so that the kill comes in the midst of an answer
    run = subprocess.Popen([sys.executable, ROOT / "generate.py", *words, *long], stderr=subprocess.DEVNULL,
                           env={**os.environ, "OMP_NUM_THREADS": "1"})  # as here: an answer says how many
    while run.poll() is None and not (output.is_file() and output.read_bytes().count(b"\n") >= 3):
        time.sleep(0.002)
    run.send_signal(signal.SIGKILL)
    run.wait()
    kept = output.read_bytes()
    assert 3 <= kept.count(b"\n") < len(PROMPTS), "killed too late"
    code, answers, err = call(None, *long)
    assert code == 0 and output.read_bytes().startswith(kept[:kept.rindex(b"\n") + 1]) and "12 prompts" in err
    whole = output.read_bytes()
    output.unlink()
    straight = call(None, *long)[1]
    assert timeless(answers) == timeless(straight) and [a["id"] for a in answers] == [*range(1, 13)]
    last = whole.rindex(b"\n", 0, -1) + 1
    zeros, end = b"\0" * 50, len(whole) - last - 1
    for cut, tail in ((0, b""), (0, zeros), (1, b""), (5, zeros), (9, b""), (200, zeros), (end, b""), (end, zeros)):
        output.write_bytes(whole[:last + cut] + tail)
        code, again, err = call(None, *long)
        assert code == 0 and timeless(again) == timeless(straight), cut
        assert output.read_bytes().startswith(whole[:last]) and output.read_bytes().endswith(b"}\n"), cut


def test_nothing_to_do(call, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if the model is loaded for nothing, if a prompt is answered again, or if a new prompt is not answered."""
    _, first, _ = call(PROMPTS[:2])
    with monkeypatch.context() as patch:
        patch.setattr(batch, "load_engine", None)
        code, again, err = call()
        assert code == 0 and again == first and "2 prompts, " in err
    code, more, err = call(PROMPTS[:3])
    assert code == 0 and more[:2] == first and len(more) == 3 and "3 prompts, " in err


@pytest.mark.slow
def test_ctrl_c(call, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if Ctrl-C ends in a traceback or loses an answer."""
    answer = answer_module.generate
    made = []

    def stops(*inputs: object, **options: object) -> dict:
        made.append(inputs)
        if len(made) == 3:
            raise KeyboardInterrupt
        return answer(*inputs, **options)
    monkeypatch.setattr(batch, "generate", stops)
    code, answers, err = call(PROMPTS[:5])
    assert code == 130 and len(answers) == 2 and "2 of 5 prompts are done" in err
    code, answers, _ = call()
    assert code == 0 and [a["id"] for a in answers] == [1, 2, 3, 4, 5]


def test_other_answers_are_left_alone(call, words: list[str], tmp_path: Path, checkpoint: Path) -> None:
    """Fails if one file gets the answers of two models, settings or prompt files, or if somebody's own file is cut."""
    output = tmp_path / "answers.jsonl"
    call(PROMPTS[:2])
    before = output.read_bytes()
    for more, message in ((("--temperature", 0.5), "temperature 0.0 there, 0.5 here"),
                          (("--max_new_tokens", 9), "max_new_tokens 20 there, 9 here"), (("--lookup",), "method"),
                          (("--dtype", "float32"), "dtype None there, 'float32' here")):
        code, _, err = call(None, *more)
        assert code == 2 and message in err and err.count("\n") == 1 and output.read_bytes() == before
    code, _, err = call(PROMPTS[1:3])  # ids are numbers of lines, and now name other prompts
    assert code == 2 and "another prompt with the id 1" in err and output.read_bytes() == before
    for text in (b"my diary", b'{"id": 3, "text": "mine"}', b'{"id": 1}\n', b"[1]", before + before, b"x\n" + before):
        output.write_bytes(text)
        assert call(PROMPTS[:2])[0] == 2 and output.read_bytes() == text
    output.write_bytes(before)
    code, _, err = call(None, "--prompt_file", output)
    assert code == 2 and "same file" in err and output.read_bytes() == before
    weights = checkpoint / "model.safetensors"
    data = weights.read_bytes()
    try:
        weights.write_bytes(data[:-4] + b"\0\0\0\0")
        code, _, err = call(PROMPTS[:2])
        assert code == 2 and "weights" in err
    finally:
        weights.write_bytes(data)


def test_settings(checkpoint: Path) -> None:
    """Fails if the settings in the answers of earlier versions no longer match, so that their runs cannot be resumed;
    or if they depend on how a method is spelled."""
    folder = str(checkpoint)
    words = ["--checkpoint", folder, "--prompt_file", "x", "--output", "y"]
    common = {"model": "model.safetensors", "weights": batch.fingerprint(checkpoint / "model.safetensors"),
              "max_new_tokens": 256, "temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": 0, "stop": [],
              "lookup_rule": "longest", "window": [7, 5, 7]}
    for flags, own in (
            ([], {"method": "vanilla"}), (["--eagle2", "--lookup"], {"method": "eagle2+lookup"}),
            (["--method", "eagle2"], {"method": "eagle2"}), (["--lookahead"], {"method": "lookahead"}),
            (["--medusa", folder], {"method": "medusa", "medusa": folder}),
            (["--speculate", folder, "--rejection"], {"method": "speculate+rejection", "speculate": folder}),
            (["--eagle2", "--tree_table"], {"method": "eagle2"}),
            (["--lookahead", "--window", "5", "3", "5"], {"method": "lookahead", "window": [5, 3, 5]}),
            (["--eagle2", "--draft_tokens", "9", "--raw"], {"method": "eagle2", "draft_tokens": 9, "raw": True})):
        assert batch.settings(generate.parse_args([*words, *flags])) == common | own


def test_settings_of_a_template(checkpoint: Path, tmp_path: Path) -> None:
    """Fails if a run goes on after the template file was changed, or does not after it was moved."""
    made = []
    for name, text in (("a", "one"), ("a", "two"), ("b", "two")):
        (tmp_path / name).write_text(text)
        words = ["--checkpoint", str(checkpoint), "--prompt_file", "x", "--output", "y"]
        made.append(batch.settings(generate.parse_args([*words, "--chat_template", str(tmp_path / name)])))
    assert made[0] != made[1] == made[2]


def test_stop(call, tmp_path: Path) -> None:
    """Fails if --stop does not end the answers of a file."""
    whole = call(PROMPTS[:1])[1][0]["text"]
    (tmp_path / "answers.jsonl").unlink()
    [answer] = call(None, "--stop", whole[4:6])[1]
    assert answer["text"] == whole.partition(whole[4:6])[0] and answer["stop"] == "string"


def test_fingerprint(tmp_path: Path) -> None:
    """Fails if weights that changed at the beginning, at the end or in length have the fingerprint they had before."""
    digests = set()
    for data in (b"0123456789", b"1123456789", b"0123456780", b"01234056789", b"01", b""):
        (tmp_path / "x").write_bytes(data)
        digests.add(batch.fingerprint(tmp_path / "x", 4))
    assert len(digests) == 6 and batch.fingerprint(tmp_path / "no") == ""


def test_two_at_once(call, tmp_path: Path) -> None:
    """Fails if two runs write to one file at the same time."""
    with open(tmp_path / "answers.jsonl", "ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        code, _, err = call(PROMPTS[:1])
    assert code == 2 and "another run is writing" in err


def test_on_the_disk_before_the_next(call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if an answer still waits in a buffer while the next prompt is processed: a crash would lose it."""
    events = []
    answer, sync = answer_module.generate, os.fsync
    output = tmp_path / "answers.jsonl"

    def generates(*inputs: object, **options: object) -> dict:
        events.append(("asked", output.read_bytes().count(b"\n")))
        return answer(*inputs, **options)
    monkeypatch.setattr(batch, "generate", generates)
    monkeypatch.setattr(batch.os, "fsync", lambda fd: sync(fd) or events.append(
        ("disk", output.read_bytes().count(b"\n"))))
    call(PROMPTS[:2])
    assert events == [("asked", 0), ("disk", 1), ("asked", 1), ("disk", 2)]


def test_seeds(call, checkpoint: Path) -> None:
    """Fails if a sampled answer is not the one that the prompt gets alone with the same seed."""
    _, answers, _ = call(PROMPTS[:2], "--temperature", 1, "--seed", 5)
    engine = Engine.load(checkpoint, device="cpu")
    for prompt, answer in zip(PROMPTS, answers):
        ids = engine.tokenizer.chat([{"role": "user", "content": prompt["prompt"]}])
        assert answer["tokens"] == sum(engine.generate(ids, 20, Sampling(1.0, seed=5)), [])
