"""app/server.py and app/service.py over a real socket, with a tiny model in fp32: answers, order, clients that go.

    python -m pytest tests/app/test_server.py
"""
import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import httpx
import openai
import pytest
import tiny
from conftest import ROOT
from serving import Gate, expected, make_served, running, wait

from app import server as server_module
from app import service as service_module
from app.answer import generate
from app.api import Refusal, Served, read_request
from app.server import is_this_machine, listen, read_key
from app.service import Job, Service, Unlocked
from engine import Engine
from sampling import Sampling

HELLO = [{"role": "user", "content": "Hello"}]
JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_everything(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def reference(folder: Path) -> Served:
    """The same model, which is not served."""
    return make_served(folder)


@pytest.fixture
def served(folder: Path) -> Served:
    return make_served(folder)


@pytest.fixture
def live(served: Served) -> Iterator[tuple[str, Service]]:
    with running(served) as (url, service):
        yield url, service


def client(url: str, key: str = "none") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=120)


def post(url: str, path: str = "/v1/completions", **fields: object) -> httpx.Response:
    return httpx.post(url + path, json=fields, timeout=120)


def error_of(answer: httpx.Response) -> dict:
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and "\n" not in error["message"]
    return error


# ----- Answers ---------------------------------------------------------------------------------------------------


def test_the_openai_package(live, reference: Served) -> None:
    """Fails if the package that people use cannot read an answer, as a whole or as a stream, or if its text, counts or
    reason are not those of generate.py."""
    url, _ = live
    ids = reference.engine.tokenizer.chat(HELLO)
    api = client(url)
    assert [model.id for model in api.models.list()] == ["tiny"] and api.models.retrieve("org/tiny").id == "tiny"
    for how in ({}, {"temperature": 0.8, "seed": 3, "top_p": 0.9, "extra_body": {"top_k": 50, "min_p": 0.01}}):
        sampling = Sampling(0.8, 50, 0.9, 0.01, 3) if how else Sampling()
        right = expected(reference, ids, 24, sampling)
        whole = api.chat.completions.create(model="tiny", messages=HELLO, **how)
        assert whole.choices[0].message.content == right["text"] and whole.choices[0].message.role == "assistant"
        assert whole.choices[0].finish_reason == ("length" if right["stop"] == "length" else "stop")
        assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (len(ids), right["new_tokens"])
        assert whole.seed == sampling.seed and whole.timings["mean_gained"] >= 1
        chunks = list(api.chat.completions.create(model="tiny", messages=HELLO, stream=True,
                                                  stream_options={"include_usage": True}, **how))
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1])
        assert text == right["text"] and chunks[0].choices[0].delta.role == "assistant"
        assert chunks[-1].usage.completion_tokens == right["new_tokens"] and not chunks[-1].choices
        assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
        assert chunks[-2].timings and {chunk.seed for chunk in chunks} == {sampling.seed}
        assert len({chunk.id for chunk in chunks}) == 1
    right = expected(reference, list(b"abc"), 9)
    older = api.completions.create(model="tiny", prompt="abc", max_tokens=9)
    pieces = api.completions.create(model="tiny", prompt="abc", max_tokens=9, stream=True)
    assert older.choices[0].text == right["text"] == "".join(piece.choices[0].text for piece in pieces)


@pytest.mark.slow
def test_stops_and_seeds(live, reference: Served) -> None:
    """Fails if a stop text is shown, alone or in a stream, or if the seed that an answer tells does not repeat it."""
    url, _ = live
    api = client(url)
    right = expected(reference, list(b"abc"), 24, Sampling(1.0, seed=8))
    stop = next(part for part in (right["text"][i:i + 2] for i in range(5, 20)) if part.isascii())
    cut = expected(reference, list(b"abc"), 24, Sampling(1.0, seed=8), (stop,))
    for stream in (False, True):
        answer = api.completions.create(model="tiny", prompt="abc", temperature=1, seed=8, stop=[stop], stream=stream)
        chunks = list(answer) if stream else [answer]
        assert "".join(chunk.choices[0].text for chunk in chunks) == cut["text"] == right["text"].partition(stop)[0]
        assert chunks[-1].choices[0].finish_reason == "stop"
    answers = [api.completions.create(model="tiny", prompt="abc", temperature=1) for _ in range(2)]
    assert answers[0].seed != answers[1].seed and answers[0].choices[0].text != answers[1].choices[0].text
    again = api.completions.create(model="tiny", prompt="abc", temperature=1, seed=answers[0].seed)
    assert again.choices[0].text == answers[0].choices[0].text


@pytest.mark.slow
def test_the_next_turn(live, reference: Served) -> None:
    """Fails if the caches do not carry over to the next turn of a conversation, or if that changes its text."""
    url, service = live
    talk = list(b"abcdefgh" * 4)
    for turn in range(3):
        answer = post(url, prompt=talk, max_tokens=12).json()
        right = expected(reference, talk, 12)
        assert answer["choices"][0]["text"] == right["text"]
        cached = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
        assert cached == 0 if turn == 0 else cached > len(talk) - 20
        talk += right["tokens"] + list(b" more ")
    metrics = httpx.get(f"{url}/metrics").text.splitlines()
    assert 'generate_answers{status="200"} 3' in metrics and "generate_requests_now 0" in metrics
    assert f"generate_new_tokens {service.counts['new_tokens']:.9g}" in metrics


@pytest.mark.skipif(not any(Path(path, "curl").exists() for path in os.get_exec_path()), reason="needs curl")
def test_curl(live, reference: Served) -> None:
    """Fails if curl, which sends the headers that the page names and no others, gets another answer."""
    url, _ = live
    words = ["curl", "-sN", "-H", "Content-Type: application/json", f"{url}/v1/chat/completions", "-d"]
    asked = {"messages": HELLO, "stream": True}
    said = subprocess.run([*words, json.dumps(asked)], capture_output=True, text=True, timeout=120).stdout
    lines = said.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    texts = [json.loads(line.removeprefix("data: "))["choices"][0]["delta"].get("content", "") for line in lines[:-2]]
    assert "".join(texts) == expected(reference, reference.engine.tokenizer.chat(HELLO), 24)["text"]


# ----- Requests that get an error --------------------------------------------------------------------------------


@pytest.mark.slow
def test_errors(live) -> None:
    """Fails if a request that is wrong gets another status than OpenAI's, or an error of another shape."""
    url, _ = live
    with httpx.Client(base_url=url, timeout=120) as http:
        chat = "/v1/chat/completions"
        for status, answer in (
                (400, http.post(chat, json={"messages": HELLO, "tools": [{}]})),
                (400, http.post(chat, content=b"{", headers=JSON)),
                (400, http.post("/v1/completions", content=rb'{"prompt": "\ud800"}', headers=JSON)),
                (400, http.post("/v1/completions", json={"prompt": "x" * 300})),
                (404, http.post(chat, json={"messages": HELLO, "model": "gpt-5"})), (404, http.get("/v1/models/gpt-5")),
                (404, http.get("/nix")), (405, http.get(chat)), (405, http.options(chat)),
                (413, http.post(chat, content=b" " * 200_000, headers=JSON)),
                (413, http.post(chat, content=(b" " * 50_000 for _ in range(9)), headers=JSON)),
                (415, http.post(chat, content=json.dumps({"messages": HELLO}))),
                (415, http.post(chat, content=b"x", headers=JSON | {"content-encoding": "gzip"})),
                (403, http.get("/v1/models", headers={"host": "evil.example:80"}))):
            assert answer.status_code == status and error_of(answer)["type"] == "invalid_request_error", answer.text
        assert http.post(chat, json={"messages": HELLO}, headers={"host": "localhost:5"}).status_code == 200
        assert http.post(chat, content=json.dumps({"messages": HELLO}).ljust(70_000), headers=JSON).status_code == 200
        assert http.get("/v1/models", headers={"host": "evil.example"}).headers["connection"] == "close"
    with pytest.raises(openai.BadRequestError, match="n: this server does it only as 1"):
        client(url).chat.completions.create(model="tiny", messages=HELLO, n=2)
    with pytest.raises(openai.NotFoundError):
        client(url).chat.completions.create(model="gpt-5", messages=HELLO)


@pytest.mark.slow
def test_keys(served: Served) -> None:
    """Fails if somebody without the key, or with another one, gets more than /health."""
    with running(served, "s3cret") as (url, _):
        assert client(url, "s3cret").chat.completions.create(model="tiny", messages=HELLO).choices
        for headers in ({}, {"authorization": "Bearer s3cre"}, {"authorization": "s3cret"},
                        {"authorization": b"Bearer s3cr\xe9t"}):
            for path in ("/v1/models", "/metrics", "/nix"):
                answer = httpx.get(url + path, headers=headers)
                assert answer.status_code == 401 and error_of(answer)["code"] == "invalid_api_key"
        assert httpx.get(f"{url}/health", headers={"host": "elsewhere"}).json() == {"status": "ok"}
        assert httpx.get(f"{url}/v1/models", headers={"authorization": "Bearer s3cret"}).status_code == 200


@pytest.mark.slow
def test_slow_clients(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a client that sends its headers or its body too slowly keeps its connection, or stops the others."""
    monkeypatch.setattr(server_module, "HEADER_S", 0.4)
    monkeypatch.setattr(server_module, "BODY_S", 0.4)
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with running(served) as (url, _):
        where = ("127.0.0.1", int(url.rpartition(":")[2]))
        with socket.create_connection(where) as silent, socket.create_connection(where) as slow, \
                socket.create_connection(where) as body:
            body.sendall(head + b"Content-Length: 99\r\n\r\n{")
            slow.sendall(head)
            assert post(url, prompt="abc").status_code == 200
            with pytest.raises(OSError):  # the server closes it
                for n in range(99):
                    slow.sendall(b"X-%d: 1\r\n" % n)
                    time.sleep(0.05)
            silent.settimeout(10)
            assert silent.recv(999) == b""
            answer = body.makefile("rb").read()
            assert answer.startswith(b"HTTP/1.1 408 ") and b"did not arrive" in answer


def test_long_prompts_hold_nobody_up(served: Served) -> None:
    """Fails if Python's lock is held while a long prompt is tokenised, which would stop the answer under way, or if the
    ids are others."""
    bpe = served.engine.tokenizer.bpe
    unlocked = Unlocked(bpe)
    text = "ab é" * 60_000
    done = threading.Event()
    ticks = 0

    def tick() -> None:
        nonlocal ticks
        while not done.wait(0.0005):
            ticks += 1

    thread = threading.Thread(target=tick)
    thread.start()
    ids = unlocked.encode(text, add_special_tokens=False).ids
    done.set()
    thread.join()
    assert ticks > 5 and ids == bpe.encode(text, add_special_tokens=False).ids


def test_a_failing_engine(live, served: Served, monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    """Fails if an error of the engine ends the server, is hidden, or puts the prompt into the log."""
    url, _ = live
    generate = served.engine.generate
    monkeypatch.setattr(served.engine, "generate", lambda *_: 1 / 0)
    answer = post(url, prompt="a secret")
    assert answer.status_code == 500 and error_of(answer)["type"] == "server_error"
    assert "ZeroDivisionError" in caplog.text and "secret" not in caplog.text
    assert httpx.get(f"{url}/health").status_code == 503

    def breaks(*how: object) -> Iterator[list[int]]:
        yield [65]
        yield [66]
        raise MemoryError

    monkeypatch.setattr(served.engine, "generate", breaks)
    with pytest.raises(openai.APIError, match="engine failed"):
        list(client(url).completions.create(model="tiny", prompt="abc", stream=True))
    monkeypatch.setattr(served.engine, "generate", generate)
    assert post(url, prompt="abc").status_code == 200 and httpx.get(f"{url}/health").status_code == 200


# ----- The queue -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_order_and_length_of_the_queue(live, served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a request overtakes another one, if the queue is longer than it should be, or if a place is not free
    again after an answer."""
    url, service = live
    monkeypatch.setattr(service_module, "WAITING", 5)
    gate = Gate(served.engine)
    with ThreadPoolExecutor(6) as pool:
        answers = []
        for number in range(6):
            answers.append(pool.submit(post, url, prompt=f"{number} {'x' * (99 - 20 * number)}", max_tokens=2))
            wait(lambda: len(service.jobs) == len(answers))
        full = post(url, prompt="one too many")
        assert full.status_code == 429 and error_of(full)["type"] == "rate_limit_error" and full.headers["retry-after"]
        assert [bytes(ids)[:1] for ids in gate.begun] == [b"0"]
        gate.let(99)
        assert [answer.result().status_code for answer in answers] == [200] * 6
    assert [bytes(ids)[:1] for ids in gate.begun] == [b"0", b"1", b"2", b"3", b"4", b"5"]
    wait(lambda: not service.jobs)
    assert post(url, prompt="x").status_code == 200


def test_gone_before_the_prompt_is_read(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a prompt is read to its end for a client that has gone, or if that counts as a fault of the engine."""
    service, asked = Service(served), read_request(b'{"prompt": "Hello"}', False, served)
    monkeypatch.setattr(served.engine, "prefill_chunk", lambda *_: 1 / 0)

    async def leave_early() -> Job:
        job = Job()
        monkeypatch.setattr(service_module, "generate", lambda *how, **more: job.leave() or generate(*how, **more))
        await service.take_turn(job, asked)
        return job

    job = asyncio.run(leave_early())
    assert job.begun and [job.events.get_nowait().status for _ in range(2)] == [499, 499]
    assert not service.failing and not service.counts["new_tokens"]


@pytest.mark.parametrize("stream", [True, False])
def test_clients_that_go(stream: bool, live, served: Served, reference: Served) -> None:
    """Fails if an answer goes on for more than a cycle after its client has gone, if one that waits is begun all the
    same, or if the next one is wrong."""
    url, service = live
    gate = Gate(served.engine)
    where = ("127.0.0.1", int(url.rpartition(":")[2]))

    def begin(prompt: str) -> socket.socket:
        count = len(service.jobs)
        body = json.dumps({"prompt": prompt, "max_tokens": 200, "stream": stream}).encode()
        connection = socket.create_connection(where)
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                           b"Content-Length: %d\r\n\r\n" % len(body) + body)
        wait(lambda: len(service.jobs) == count + 1)
        return connection

    first = begin("first")
    waiting = begin("waiting")
    gate.let(3)
    wait(lambda: gate.cycles == 3)
    waiting.close()
    wait(lambda: len(service.jobs) == 1)
    first.close()
    wait(lambda: service.counts["clients_gone"] == 2)
    gate.let(99)
    wait(lambda: not service.jobs)
    assert gate.cycles <= 4 and gate.begun == [list(b"first")]
    assert post(url, prompt="first and", max_tokens=9).json()["choices"][0]["text"] == expected(
        reference, list(b"first and"), 9)["text"]


@pytest.mark.slow
@pytest.mark.parametrize("patient", [True, False])
def test_closing(patient: bool, served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a server that is told to end does not finish the answer under way, goes on with one that takes too long,
    or leaves those that wait without an answer."""
    monkeypatch.setattr(service_module, "GRACE_S", 60 if patient else 0.1)
    gate = Gate(served.engine)
    with ThreadPoolExecutor(2) as pool:
        with running(served) as (url, service):
            under_way = pool.submit(post, url, prompt="abc", max_tokens=6)
            wait(lambda: gate.begun)
            waiting = pool.submit(post, url, prompt="abc")
            wait(lambda: len(service.jobs) == 2)
            threading.Thread(target=lambda: (waiting.result(), gate.let(99 if patient else 1))).start()
            if not patient:  # a cycle ends after the patience
                threading.Timer(0.5, gate.let, [1]).start()
        assert waiting.result().status_code == 503 and error_of(waiting.result())["type"] == "server_error"
        assert under_way.result().status_code == (200 if patient else 503)


@pytest.mark.slow
@pytest.mark.parametrize("signal_number, code, said", [
    (signal.SIGINT, 130, "interrupted\n"), (signal.SIGTERM, -15, "")])
def test_signals(signal_number: int, code: int, said: str, folder: Path) -> None:
    """Fails if `generate.py --serve` does not serve, does not finish its answer after Ctrl-C or SIGTERM, takes more
    than 5 seconds to end, or says more than a line."""
    command = [sys.executable, "generate.py", "--checkpoint", str(folder), "--eagle2", "--device", "cpu", "--dtype",
               "float32", "--serve", "127.0.0.1:0"]
    restore = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)  # noqa: E731
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, preexec_fn=restore) as process, \
            ExitStack() as at_the_end:
        at_the_end.callback(process.kill)  # else a failure would wait for it for ever
        line = process.stderr.readline()
        assert line.startswith("tiny with eagle2 at http://127.0.0.1:")
        url = line.split()[-1]
        with httpx.stream("POST", f"{url}/completions", json={"prompt": "abc", "stream": True, "temperature": 2,
                                                              "max_tokens": 300}, timeout=120) as answer:
            lines = answer.iter_lines()
            next(lines)
            process.send_signal(signal_number)
            start = time.monotonic()
            rest = list(lines)
        assert any("[DONE]" in line or "shutting down" in line for line in rest)
        assert process.wait(30) == code and time.monotonic() - start < 25  # 5 on a machine that does nothing else
        assert process.stderr.read() == said


# ----- Starting it -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("address, said", [
    ("0.0.0.0:0", "other machines could use it"), ("127.0.0.1", "HOST:PORT"), ("localhost:x", "HOST:PORT"),
    ("127.0.0.1:70000", "HOST:PORT"), ("nobody.invalid:1", "--serve"), ("a..b:80", "--serve a..b:80"),
    ("127.0.0.1:" + 5000 * "1", "HOST:PORT")])
def test_addresses_refused(address: str, said: str) -> None:
    """Fails if others can reach a server without a key, or a wrong address is not named in one line."""
    with pytest.raises(ValueError, match=said):
        listen(address, None)


def test_addresses() -> None:
    """Fails if an address that is meant is refused, if one in use is not said to be, or a host is taken for another."""
    for address, key in (("127.0.0.1:0", None), ("localhost:0", None), (":0", None), ("0.0.0.0:0", "key")):
        with listen(address, key) as sock:
            sock.listen()
            with pytest.raises(ValueError, match="in use"):
                listen(f"127.0.0.1:{sock.getsockname()[1]}", None)
    here = ("localhost", "localhost:80", "127.0.0.1", "127.9.9.9:1", "[::1]", "[::1]:80")
    assert all(map(is_this_machine, here))
    assert not any(map(is_this_machine, ("", "example.com", "127.0.0.1.example.com", "localhost.example.com", "[", "0",
                                         "10.0.0.1", "localhost:x:y@evil")))


def test_unread_answers() -> None:
    """Fails if a client that reads nothing is dropped after another time than UNREAD_S: Linux counts milliseconds."""
    with listen("127.0.0.1:0", None) as sock:
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 60_000


def test_what_is_served(folder: Path, call, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if an option does not hold for requests that say nothing, if the model has the name of a file, or if the
    first client waits for what could be compiled before."""
    seen = []
    monkeypatch.setattr(service_module.Service, "finish", lambda self: None)
    monkeypatch.setattr(server_module.Server, "run", lambda self, sockets: seen.append(self.service.served))
    monkeypatch.setattr(Engine, "warm_up", lambda self, sampling: seen.append(sampling))
    words = ("--checkpoint", folder / "model.safetensors", "--device", "cpu", "--eagle2", "--serve", "127.0.0.1:0")
    code, _, err = call(*words, "--stop", "a", "--stop", "b", "--temperature", 0.5)
    warmed, served = seen
    assert code == 0 and err.startswith("tiny with eagle2 at http://127.0.0.1:")
    assert served == Served(served.engine, "tiny", "eagle2", 1024, warmed, ("a", "b")) and warmed == Sampling(0.5)


def test_keys_from_files(tmp_path: Path) -> None:
    """Fails if a key cannot be kept out of the list of processes, an empty one protects nothing, or one is taken that
    no client can send."""
    (tmp_path / "key").write_text("abc\n")
    assert read_key(f"@{tmp_path / 'key'}") == "abc" and read_key("x y") == "x y"
    for key in ("", "é", "a\nb", "k ", " "):
        with pytest.raises(ValueError, match="ASCII"):
            read_key(key)


@pytest.mark.parametrize("words, said", [
    (("--api_key", "x", "--prompt", "x"), "--api_key is for --serve"), (("--serve", "--raw"), "without --raw"),
    (("--serve", "--show_tree", "--eagle2"), "--show_tree"), (("--serve", "--json"), "single --prompt"),
    (("--serve", "--system", "x"), "--system is for"), (("--serve", "--prompt", "x"), "not allowed with"),
    (("--serve", "8.8.8.8.8:1"), "--serve 8.8.8.8.8:1"), (("--serve", "0.0.0.0:0"), "give --api_key"),
    (("--serve", "0.0.0.0:0", "--api_key", ""), "--api_key should be"),
    (("--serve", ""), "--serve takes HOST:PORT"), (("--serve", "", "--api_key", "x"), "--serve takes HOST:PORT")])
def test_command_line(words: tuple[str, ...], said: str, folder: Path, call) -> None:
    """Fails if an option that does not fit is ignored, or a wrong one ends in more than one line."""
    code, out, err = call("--checkpoint", folder, "--device", "cpu", *words)
    assert code == 2 and said in err.splitlines()[-1] and out == ""


def test_not_installed(folder: Path, call, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a missing package ends in a traceback, or after the model was loaded."""
    monkeypatch.delitem(sys.modules, "app.server")
    monkeypatch.setitem(sys.modules, "starlette.applications", None)
    code, _, err = call("--checkpoint", folder, "--serve")
    assert code == 2 and err.count("\n") == 1 and "pip install -r requirements-server.txt" in err


def test_a_place_is_kept_while_the_engine_works(served: Served) -> None:
    """Fails if a job whose client has gone gives its place away while the engine still works on it."""
    service, go = Service(served), threading.Event()
    service.work = lambda job, asked: go.wait(60) and Refusal(499, "gone")

    async def leave() -> list[int]:
        async def client() -> None:
            async with service.admit() as job:
                await service.begin(job, b'{"prompt": "Hello"}', False)
                while not job.begun:
                    await asyncio.sleep(0.001)
        task = asyncio.create_task(client())
        await asyncio.sleep(0.3)
        working = len(service.jobs)
        go.set()
        await task
        return [working, len(service.jobs)]

    assert asyncio.run(leave()) == [1, 0]


def test_seconds_of_each_part(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if what was counted, or the seconds of the prompt, of the answer and of waiting, are taken for one another.
    """
    service = Service(served)
    served.engine.reused = 4
    asked = read_request(b'{"prompt": "Hello"}', False, served)
    result = {"prompt_tokens": 5, "new_tokens": 3, "cycles": 2, "prefill_s": 0.25, "decode_s": 2.0}
    monkeypatch.setattr(service_module, "generate", lambda *how, **more: time.sleep(0.5) or dict(result))

    async def answered() -> dict:
        job = Job()
        await service.take_turn(job, asked)
        return job.events.get_nowait()

    assert asyncio.run(answered())["queue_s"] < 0.4
    assert service.counts == {"prefill_seconds": 0.25, "decode_seconds": 2.0, "prompt_tokens": 5, "reused_tokens": 4,
                              "new_tokens": 3, "steps": 2}


def test_health(served: Served) -> None:
    """Fails if a server that is to end, or whose engine failed, is still sent requests."""
    service = Service(served)
    for closing, failing, status in ((False, False, 200), (True, False, 503), (False, True, 503)):
        service.closing, service.failing = closing, failing
        assert asyncio.run(server_module.Pages(service).health(None)).status_code == status


def test_only_health_is_open(served: Served) -> None:
    """Fails if a page that is not /health is shown to somebody without the key."""
    with running(served, "s3cret") as (url, _):
        assert httpx.get(f"{url}/healthy").status_code == 401
