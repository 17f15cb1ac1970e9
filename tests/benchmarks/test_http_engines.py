"""bench.py --endpoint: a stand-in server that says what a test wants, our own server, and llama.cpp's.

    python -m pytest tests/benchmarks/test_http_engines.py
"""
import argparse
import json
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import tiny
import tiny_sources
import torch
from helpers import operations
from safetensors.torch import load_file, save_file
from serving import make_served, running

import bench
from app.answer import Run
from benchmarks import http_engines, race
from benchmarks.http_engines import Endpoint, ask, http_decoder, read_answer, read_endpoint, text_parts_at, with_model
from benchmarks.report import about_endpoint
from benchmarks.workload import Prompt, Subject
from convert_hf_checkpoint import convert
from draft import Vanilla
from engine import Engine
from formats.weights import FORMAT
from ops import graphs
from tokenizer import Tokenizer

END = 257  # <|end|>, the tiny tokenizer's stop; all other ids below 256 are bytes
DONE = b"data: [DONE]\n\n"


def event(chunk: object) -> bytes:
    return b"data: " + json.dumps(chunk).encode() + b"\n\n"


def piece(text: str, finish: str | None = None) -> bytes:
    return event({"choices": [{"index": 0, "text": text, "finish_reason": finish}]})


def said(prompt: str, finish: str | None = None) -> bytes:
    """A chunk of a chat."""
    return event({"choices": [{"index": 0, "delta": {"content": prompt}, "finish_reason": finish}]})


def used(prompt: int, cached: int = 0, **more: object) -> bytes:
    return event({"choices": [], "usage": {"prompt_tokens": prompt, "completion_tokens": 4,
                                           "prompt_tokens_details": {"cached_tokens": cached}}, **more})


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny.save_tokenizer(folder)
    (folder / "config.json").write_text(json.dumps({"vocab_size": 260, "eos_token_id": END}))
    return Tokenizer(folder)


@pytest.fixture
def subject(tokenizer: Tokenizer) -> Subject:
    prompts = [Prompt("1", 1, "x", [72, 105], ("Hi",)), Prompt("2", 2, "x", [72, 111], ("Hi", "Ho", "Hey"))]
    return Subject(None, prompts, tokenizer.stop_ids, tokenizer, None)


class StandIn(ThreadingHTTPServer):
    """A server that answers every request with `parts`, one write each, functions being called, and then ends the
    connection. `requests` has what it was asked: (path, headers, body)."""
    daemon_threads = True

    def __init__(self) -> None:
        self.requests: list[tuple[str, dict, object]] = []
        self.parts: list[bytes | Callable[[], None]] = []
        self.models: object = {"data": [{"id": "theirs"}]}
        self.status = 200
        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self.answer([json.dumps(self.server.models).encode()])

    def do_POST(self) -> None:
        self.answer(self.server.parts)

    def answer(self, parts: list[bytes | Callable[[], None]]) -> None:
        raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.requests.append((self.path, dict(self.headers), json.loads(raw) if raw else None))
        self.send_response(self.server.status)
        self.end_headers()
        for part in parts:
            if callable(part):
                part()
            else:
                self.wfile.write(part)


@pytest.fixture
def server() -> Iterator[StandIn]:
    with StandIn() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


# ----- What --endpoint says -----------------------------------------------------------------------------------------


def test_read_endpoint() -> None:
    """Fails if a part of NAME=URL,... is lost, or the base URL is not that of OpenAI's clients."""
    assert read_endpoint("ours=http://127.0.0.1:8000") == Endpoint("ours", "http://127.0.0.1:8000/v1")
    assert read_endpoint("a, b=https://x/api/,model=m/n,prompts=chat,key=@f") == Endpoint(
        "a, b", "https://x/api", "m/n", "chat", "@f")


@pytest.mark.parametrize("text, message", [
    ("http://x", "NAME=URL"), ("x=127.0.0.1:8000", "NAME=URL"), ("=http://x", "NAME=URL"), ("x=http://", "NAME=URL"),
    ("x=http://y:z", "NAME=URL"), ("x=http://[y", "NAME=URL"), ("x=https://y/v1?api-version=1", "NAME=URL"),
    ("x=http://me:secret@y", "NAME=URL"), ("x=http://y/v1#z", "NAME=URL"),
    ("x=http://y,temperature=1", "only ,model"), ("x=http://y,model", "only ,model"),
    ("x=http://y,prompts=text", "prompts=ids"), ("x=http://y,key=secret", "key=@FILE")])
def test_refused_endpoint(text: str, message: str) -> None:
    """Fails if a mistake is found only when the server is asked, or if a key may stand in the command line."""
    with pytest.raises(argparse.ArgumentTypeError, match=message):
        read_endpoint(text)


@pytest.mark.parametrize("words, message", [
    (("--temperature", "1"), "add --temperature 0"), (("--shape", "llama-2-7b"), "without --shape"),
    (("--endpoint", "x=http://z"), "NAME of its own"), (("--endpoint", "eagle2=http://z"), "NAME of its own")])
def test_refused_options(words: tuple, message: str, capsys: pytest.CaptureFixture) -> None:
    """Fails if two engines would share a row, or an option is ignored."""
    with pytest.raises(SystemExit):
        bench.parse_args(["--checkpoint", "x", "--endpoint", "x=http://y", *words])
    assert message in capsys.readouterr().err


def test_model_of_a_server(server: StandIn) -> None:
    """Fails if a server with one model must be told which, or one with several may choose."""
    endpoint = Endpoint("x", server.url)
    assert with_model(endpoint).model == "theirs"
    assert with_model(endpoint._replace(model="mine")).model == "mine" and len(server.requests) == 1
    for models, message in (({"data": [{"id": "a"}, {"id": "b"}]}, "2 models, add ,model=NAME: a, b"),
                            ({"data": []}, "0 models"), ({"models": 1}, "not a list of models"), ([], "not a list")):
        server.models = models
        with pytest.raises(ValueError, match=message):
            with_model(endpoint)


# ----- What is asked, and when it came ------------------------------------------------------------------------------


def test_request_with_ids(server: StandIn, subject: Subject) -> None:
    """Fails if a server gets other ids or a longer text than we, samples, penalises, or may leave out the usage."""
    server.parts = [piece("a"), piece("b", "length"), used(2), DONE]
    http_decoder(Endpoint("x", server.url, "theirs"), subject)([72, 105], 8)
    path, headers, body = server.requests[0]
    assert path == "/v1/completions" and "Authorization" not in headers
    assert body == {"model": "theirs", "prompt": [72, 105], "max_tokens": 8, "temperature": 0, "stream": True,
                    "repetition_penalty": 1.0, "stream_options": {"include_usage": True}}


def test_request_with_texts(server: StandIn, subject: Subject, tmp_path: Path) -> None:
    """Fails if the roles of a dialogue are wrong, the key is not sent, or texts of another prompt are."""
    (tmp_path / "key").write_text("abc\n")
    server.parts = [said("a"), said("b", "length"), used(9)]
    run = http_decoder(Endpoint("x", server.url, "m", "chat", f"@{tmp_path / 'key'}"), subject)([72, 111], 8)
    path, headers, body = server.requests[0]
    assert path == "/v1/chat/completions" and headers["Authorization"] == "Bearer abc" and "prompt" not in body
    assert [(m["role"], m["content"]) for m in body["messages"]] == [
        ("user", "Hi"), ("assistant", "Ho"), ("user", "Hey")]
    assert run.said["prompt_tokens"] == 9 and run.said["other_prompt"], "its template made 9 tokens, ours 2"


def test_a_key_is_encrypted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if what is for https, a key above all, is sent where everybody can read it."""
    (tmp_path / "key").write_text("abc")
    asked = []

    class Encrypted(http_engines.HTTPSConnection):
        def connect(self) -> None:
            asked.append((self.host, self.port))
            raise ConnectionRefusedError(111, "Connection refused")

    monkeypatch.setattr(http_engines, "HTTPSConnection", Encrypted)
    monkeypatch.setattr(http_engines.HTTPConnection, "connect", lambda self: 1 / 0)
    with pytest.raises(ValueError, match="https://nobody.invalid/v1/models: Connection refused"):
        ask(Endpoint("x", "https://nobody.invalid/v1", key=f"@{tmp_path / 'key'}"), "/models")
    assert asked == [("nobody.invalid", 443)]


class Clock:
    """Stands for time.perf_counter: the server sets it, each time after the client has looked at it so often."""

    def __init__(self) -> None:
        self.now = 10.0
        self.looks = 0
        self.changed = threading.Condition()

    def perf_counter(self) -> float:
        with self.changed:
            self.looks += 1
            self.changed.notify()
            return self.now

    def set(self, now: float, looks: int) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: self.looks >= looks, 60)
            self.now = now


def test_times(server: StandIn, subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if pieces get their times when the answer is over, if the time before the first one is decoding, or that in
    which a connection is made is any of it, or if what comes after the finish_reason is part of the answer."""
    clock = Clock()
    monkeypatch.setattr(http_engines, "time", clock)
    connect = http_engines.HTTPConnection.connect
    clock.now = 3.0
    monkeypatch.setattr(http_engines.HTTPConnection, "connect", lambda self: clock.set(10.0, 0) or connect(self))
    server.parts = [partial(clock.set, 11.0, 1), piece("a"), partial(clock.set, 12.0, 3), piece("bc"),
                    partial(clock.set, 14.0, 5), piece("d", "stop"), partial(clock.set, 19.0, 7), used(2), DONE]
    run = http_decoder(Endpoint("x", server.url, "m"), subject)([72, 105], 8)
    assert (run.prefill_s, run.decode_s, run.gained) == (1.0, 3.0, [4])


# ----- What becomes of the answer -----------------------------------------------------------------------------------


def decode(parts: list[tuple[float, bytes]], subject: Subject, monkeypatch: pytest.MonkeyPatch) -> Run:
    """The Run of an answer whose lines come at these times; it was asked for at 10."""
    lines = [(at, line + b"\n") for at, part in parts for line in part.split(b"\n")]
    monkeypatch.setattr(http_engines, "ask", lambda *_: (10.0, lines))
    return http_decoder(Endpoint("x", "http://y/v1", "m"), subject)([72, 105], 8)


def test_counts(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if tokens that came with the first piece count as decoded afterwards, the stop token does not count, or the
    chunk of the usage, which comes later, is taken for the end."""
    run = decode([(11.0, piece("abc")), (12.0, piece("d")), (14.0, piece("ef")), (15.0, piece("", "stop")),
                  (19.0, used(2) + DONE)], subject, monkeypatch)
    assert run == Run([*b"abcdef", END], [4], 1.0, 4.0, run.said)
    assert run.said == {"text": "abcdef", "steps": None, "prompt_tokens": 2, "cached_tokens": 0, "other_prompt": False}
    assert race.speeds([[run]])["tokens_per_sec"]["median"] == 1.0  # d e f and the stop token in 4 s
    assert race.speeds([[run]])["with_prefill"]["median"] == 7 / 5
    assert race.speeds([[run]])["mean_gained"] is race.speeds([[run]])["cycle_ms"] is None
    assert race.speeds([[run]])["histogram"] == [0], "the server's cycles are not known"


def test_other_ways_to_stream(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a role's chunk, an empty or null text, a comment, CRLF, or a missing [DONE] or usage matter."""
    chunks = [event({"choices": [{"delta": {"role": "assistant", "content": ""}, "finish_reason": None}]}),
              event({"choices": [{"delta": {"content": None}}], "usage": None}), b": ping\n\n", b"event: x\n",
              said("a").replace(b"\n", b"\r\n"), said(""), said("b"), said("", "length")]
    run = decode(list(zip((10.5, 11.0, 11.5, 11.75, 12.0, 13.0, 14.0, 14.5), chunks)), subject, monkeypatch)
    assert run == Run([*b"ab"], [1], 2.0, 2.5, run.said) and run.said["prompt_tokens"] is None


def test_short_answers(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if one piece, of which no rate is known, gives one, or if an answer without a text is an error."""
    run = decode([(12.0, piece("abc", "stop"))], subject, monkeypatch)
    assert run == Run([*b"abc", END], [], 2.0, 0.0, run.said)
    run = decode([(12.0, piece("", "stop"))], subject, monkeypatch)
    assert run == Run([END], [], 2.0, 0.0, run.said)
    assert len(decode([(12.0, piece("a" * 32, "length"))], subject, monkeypatch).tokens) == 32
    with pytest.raises(ValueError, match="http://y/v1/completions: 33 tokens came in one piece"):
        decode([(12.0, piece("a" * 33, "stop"))], subject, monkeypatch)


@pytest.mark.parametrize("more, steps", [
    ({}, None), ({"timings": {"mean_gained": 1.5}}, 2), ({"timings": {"predicted_n": 9}}, None),
    ({"timings": {"predicted_n": 9, "draft_n": 7, "draft_n_accepted": 3}}, 5),
    ({"metrics": {"speculative_decoding": {"num_spec_steps": 6}}}, 6),
    ({"metrics": {"speculative_decoding": None}}, None)])
def test_steps(more: dict, steps: int | None, subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if what a server says about its verifications is lost, or made up where it says nothing."""
    chunks = [piece("a"), piece("bcd"), piece("", "length"), used(2, 1, **more)]
    run = decode(list(zip((11.0, 12.0, 13.0, 14.0), chunks)), subject, monkeypatch)
    assert run.said["steps"] == steps and run.said["cached_tokens"] == 1
    assert race.speeds([[run]])["mean_gained"] == (steps and 3 / steps)


def test_no_steps(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if our server's answer of one token, which has no verification, is an error; if no other zero is."""
    zero = {"timings": {"mean_gained": 0.0}}
    usage = event({"choices": [], "usage": {"completion_tokens": 1}, **zero})
    assert decode([(11.0, piece("", "stop") + usage)], subject, monkeypatch).said["steps"] == 0
    with pytest.raises(ValueError, match="it sent an object of another form"):
        decode([(11.0, piece("", "stop") + used(2, **zero))], subject, monkeypatch)


BROKEN = "its answer broke off after 1 pieces"


@pytest.mark.parametrize("parts, message", [
    ([piece("a")], BROKEN), ([piece("a"), DONE], BROKEN), ([piece("a"), piece("b")[:-9]], BROKEN),
    ([b'{"choices": [{"text": "abc"}]}'], "it streamed no answer"), ([], "it streamed no answer"),
    ([piece("a"), event({"error": {"message": "out of\n memory"}})], "completions: out of memory"),
    ([b"data: {oops}\n\n"], "it sent what is not JSON: data: {oops}"), ([event([1])], "an object of another form"),
    ([event({"choices": [1]})], "an object of another form"), ([piece(7)], "an object of another form"),
    ([event({"choices": [{"delta": {"reasoning_content": "hm"}}]})], "leave out prompts=chat"),
    ([piece("a"), piece("b", "stop"), used(5)], "it read a prompt of 2 ids as 5 tokens")])
def test_bad_answers(parts: list[bytes], message: str, server: StandIn, subject: Subject) -> None:
    """Fails if half an answer counts as one, or if an error is not one line that names the server."""
    server.parts = parts
    with pytest.raises(ValueError, match=message) as error:
        http_decoder(Endpoint("x", server.url, "m"), subject)([72, 105], 8)
    assert str(error.value).startswith(f"{server.url}/completions: ") and "\n" not in str(error.value)


@pytest.mark.parametrize("body, message", [
    ({"error": {"message": "too\nlong", "code": 400}}, "400 too long"), ({"error": "no"}, "400 no"),
    ({"message": "no model"}, "400 no model"), ({"detail": [1]}, "400 {'detail': [1]}"), ("text", "400 text"),
    (None, "400 None")])
def test_refusals(body: object, message: str, server: StandIn) -> None:
    """Fails if it is not shown why a server refuses, whichever form it gives that."""
    for raw in (json.dumps(body).encode(), *([b"text"] if body == "text" else [])):
        server.status, server.parts = 400, [raw]
        with pytest.raises(ValueError) as error:
            ask(Endpoint("x", server.url), "/completions", {"a": 1})
        assert str(error.value) == f"{server.url}/completions: {message}"


def test_no_server(server: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a server that is not there, hangs, or breaks off in a chunk gives a traceback."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
        monkeypatch.setattr(http_engines, "SILENT_S", 0.05)
        with pytest.raises(ValueError, match="TimeoutError"):
            ask(Endpoint("x", f"http://127.0.0.1:{port}"), "/models")
    with pytest.raises(ValueError, match=f"http://127.0.0.1:{port}/models: Connection refused"):
        ask(Endpoint("x", f"http://127.0.0.1:{port}"), "/models")
    monkeypatch.setattr(http_engines, "SILENT_S", 600.0)
    monkeypatch.setattr(Handler, "protocol_version", "HTTP/1.1")
    monkeypatch.setattr(Handler, "end_headers", lambda self: (
        self.send_header("Transfer-Encoding", "chunked"), self.send_header("Connection", "close"),
        BaseHTTPRequestHandler.end_headers(self)))
    part = piece("a")
    for parts in ([b"%x\r\n%s\r\n" % (len(part), part)], [b"%x\r\n%s\r\n5\r\nda" % (len(part), part)]):
        server.parts = parts
        _, lines = ask(Endpoint("x", server.url), "/completions", {"a": 1})
        with pytest.raises(ValueError, match=BROKEN):
            read_answer(lines)


# ----- Comparing texts ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text, at", [
    ("abc", None), ("abd", 2), ("", 0), ("ab", 2), ("abcd", 3), ("xbc", 0)])
def test_where_a_text_parts(text: str, at: int | None, tokenizer: Tokenizer) -> None:
    """Fails if the token is not the first that the text lacks; the stop token is the one where theirs goes on."""
    assert text_parts_at(text, [*b"abc", END], tokenizer) == at


def test_where_a_text_parts_within_a_character(tokenizer: Tokenizer) -> None:
    """Fails if a character that the length cuts off is a difference, or if the first bytes that two characters share
    are."""
    smile = "\N{SLIGHTLY SMILING FACE}".encode()
    for text in ("a", "a\ufffd", "a\ufffd\ufffd"):
        assert text_parts_at(text, [*b"a", *smile[:2]], tokenizer) is None
    assert text_parts_at("a\N{UPSIDE-DOWN FACE}", [*b"a", *smile], tokenizer) == 4  # the last byte
    assert text_parts_at("a\ud83d", [*b"a", *smile], tokenizer) == 1, "half a surrogate pair"
    assert text_parts_at("abcd", [*b"abc"], tokenizer) == 3, "ours was cut off by the length"


def test_other_tokens_of_the_same_text(subject: Subject, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a text whose tokens we would choose otherwise counts as another text, or its gap is that of another
    token: vanilla wrote the bytes of "é" apart, and the server's text has one character."""
    monkeypatch.setattr(tokenizer, "encode", lambda text, add_special_tokens: [1] * len(text))
    model = tiny.target(3, torch.float32, vocab_size=260)
    vanilla = Engine(model, Vanilla(), 64)
    ours = [[Run([*"aéb".encode()], [1, 1, 1], 1.0, 3.0)]]
    for text, at in (("aéb", None), ("aéc", 3), ("aeb", 1)):
        runs = {"vanilla": ours, "x": [[Run([1, 1, 1], [2], 1.0, 2.0, {"text": text, "steps": None})]]}
        entry = race.summarise("x", 0.0, runs, subject.prompts[:1], vanilla, {}, tokenizer)
        assert entry["same"] == (at is None) and [gap["token"] for gap in entry["gaps"]] == [at] * (at is not None)
        for gap in entry["gaps"]:
            best = tiny.logits(model, [72, 105, *"aéb".encode()[:at]])[-1].topk(2).values
            assert gap["gap"] == pytest.approx((best[0] - best[1]).item(), abs=1e-4)


def test_sentencepiece_space(tmp_path: Path) -> None:
    """Fails if the space that sentencepiece puts before a text, which some servers leave there, is a difference."""
    (tmp_path / "tokenizer.model").write_bytes(tiny_sources.sentencepiece_model())
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 400}))
    tokenizer = Tokenizer(tmp_path)
    ids = tokenizer.encode("the cat sat", add_special_tokens=False)
    assert tokenizer.stream().strip and tokenizer.token_bytes(ids[0]).startswith(b" ")
    assert text_parts_at("the cat sat", ids, tokenizer) is text_parts_at(" the cat sat", ids, tokenizer) is None
    pieces = [tokenizer.token_bytes(i).decode() for i in ids]
    assert len(ids) > 1 and max(map(len, pieces)) > 1, "tokens of several bytes"
    for at in range(1, len(ids)):
        assert text_parts_at("".join(pieces[:at]) + "!", ids, tokenizer) == at


def test_what_is_told_of_prompts() -> None:
    """Fails if a prefix cache or another template goes unmentioned, or is mentioned where there is none."""
    said = {"prompt_tokens": 50, "cached_tokens": 0, "other_prompt": False}
    none = said | {"prompt_tokens": None}
    assert about_endpoint({"method": "x", "said": [said, none]}) == about_endpoint({"method": "x"}) == ""
    told = about_endpoint({"method": "x", "said": [said, said | {"cached_tokens": 30, "other_prompt": True}, none]})
    assert "x: 30 of 100 prompt tokens" in told and "other prompts than ours of 1 of 3" in told


# ----- Real servers -------------------------------------------------------------------------------------------------


def ascii_head(weight: torch.Tensor) -> None:
    """Let a model write printable ASCII alone: random bytes are no text, of which servers make different things."""
    weight[[i for i in range(len(weight)) if not 32 <= i < 127]] = 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny.save_everything(tmp_path_factory.mktemp("model") / "tiny")
    tensors = load_file(folder / "model.safetensors")
    ascii_head(tensors["lm_head.weight"])
    save_file(tensors, folder / "model.safetensors", {"format": FORMAT})
    return folder


@pytest.fixture
def shootout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict]:
    """Runs bench.py on a folder, with two questions. Returns the result."""
    monkeypatch.setattr(graphs, "elapsed", operations)
    asked = [{"turns": ["Why?", "How?"], "category": "a"}, {"turns": ["One?"], "category": "b"}]
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps(q) + "\n" for q in asked))

    def shootout(folder: Path, *words: object) -> dict:
        monkeypatch.setattr(sys, "argv", ["bench.py", *map(str, (
            "--checkpoint", folder, "--questions", tmp_path / "asked.jsonl", "--device", "cpu", "--max_new_tokens", 20,
            "--runs", 2, "--json", tmp_path / "out.json", *words))])
        assert bench.main() == 0
        return json.loads((tmp_path / "out.json").read_text())
    return shootout


@pytest.mark.slow
def test_our_server(folder: Path, shootout: Callable[..., dict], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Fails if our own server's texts, tokens or tokens per step are not those of the same method in this process; if a
    server that fails stops the others; if `compare` or `card` does not read what --json wrote."""
    with running(make_served(folder)) as (url, _):
        with socket.create_server(("127.0.0.1", 0)) as free:
            gone = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
        result = shootout(folder, "--methods", "eagle2", "--endpoint", f"ids={url}/v1", "--endpoint",
                          f"chat={url},prompts=chat,model=tiny", "--endpoint", f"gone={gone},model=x")
    printed = capsys.readouterr().out
    assert result["failed"] == {"gone": f"{gone}/completions: Connection refused"} and "gone failed" in printed
    vanilla, eagle2, ids, chat = result["measured"]
    assert [e["method"] for e in result["measured"]] == ["vanilla", "eagle2", "ids", "chat"]
    for e in (ids, chat):
        assert (e["same"], e["gaps"], e["texts"]) == (3, [], eagle2["texts"]) and e["steady"]
        assert e["mean_gained"] == pytest.approx(eagle2["mean_gained"]) and e["mean_gained"] >= 1
        assert all(s["prompt_tokens"] == len(p["ids"]) for s, p in zip(e["said"], result["prompts"]))
        assert e["tokens_per_sec"]["median"] > 0 and e["accept_by_depth"] == [] and e["split_ms"] is None
        assert set(e["by_category"]) == {"a", "b"}
    assert result["endpoints"]["ids"] == {"url": f"{url}/v1", "model": "tiny", "prompts": "ids"}
    out = tmp_path / "out.json"
    assert bench.reread(["compare", str(out), str(out)]) == 0
    compared = capsys.readouterr().out
    assert compared.count("1.000") == 4 and "differs" not in compared
    assert bench.reread(["card", str(out)]) == 0
    card = capsys.readouterr().out
    assert card.startswith("### tiny on ") and "tiny, prompts as chat" in card and "gone failed" in card
    assert "3 of 3" in card and str(tmp_path) not in card and "--endpoint" in card and "--json" not in card
    del result["settings"]["runs"]
    out.write_text(json.dumps(result))
    with pytest.raises(ValueError, match="out.json: not what bench.py --json writes"):
        bench.reread(["card", str(out)])


@pytest.mark.slow
def test_llamacpp_server(shootout: Callable[..., dict], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a real server of another project, llama.cpp's, cannot take part: its tokens are not as many as asked
    for, its prompt is another one, or what differs from our text goes without its gap."""
    xllamacpp = pytest.importorskip("xllamacpp", reason="llama.cpp's server: pip install xllamacpp")

    def target(*args: object, make: Callable = tiny_sources.target, **changes: object) -> torch.nn.Module:
        model = make(*args, **changes)
        with torch.no_grad():
            ascii_head(model.lm_head.weight)
        return model

    monkeypatch.setattr(tiny_sources, "target", target)
    file = tiny_sources.save_gguf(tmp_path / "x.gguf", "gpt2")
    convert(file, tmp_path / "x", torch.float32)
    params = xllamacpp.CommonParams()
    params.model.path = str(file)
    params.n_ctx, params.n_parallel, params.n_gpu_layers, params.verbosity, params.port = 256, 1, 0, 0, 0
    server = xllamacpp.Server(params)
    result = shootout(tmp_path / "x", "--methods", "lookup", "--endpoint", f"theirs={server.listening_address}/v1")
    theirs = result["measured"][-1]
    assert theirs["method"] == "theirs" and theirs["steady"] and theirs["mean_gained"] is None
    assert theirs["same"] + len(theirs["gaps"]) == 3 and all(at["gap"] < 0.5 for at in theirs["gaps"])
    assert all(15 <= len(text) <= 20 for text in theirs["texts"]) and theirs["tokens_per_sec"]["median"] > 0
    assert [s["prompt_tokens"] for s in theirs["said"]] == [len(p["ids"]) for p in result["prompts"]]
    assert sum(s["cached_tokens"] for s in theirs["said"]) > 0, "its second turn begins with the first"
