"""Engines behind HTTP: any server with OpenAI's API, ours too, for bench.py --endpoint. Python's library is enough.

    python generate.py --checkpoint CHECKPOINT --eagle2 --serve 127.0.0.1:8000
    python bench.py --checkpoint CHECKPOINT --methods eagle2 --endpoint ours=http://127.0.0.1:8000/v1

A server sends text in pieces. A piece's time is when its bytes have arrived; t_first is that of the first piece, t_last
that of the last one or of the finish_reason that follows it. Tokens are counted by our tokenizer, whatever the server
says, and a text that a stop token ended has that token too, as ours have. The rate is

    (n - tokens of the first piece) / (t_last - t_first)

which is (n - 1) / (t_last - t_first) where the first piece is the token of prefill, as it is with servers that send
each step at once. Tokens that have come at t_first took none of the time after it, however many they are.

Run.said is a dict: `text`; `steps`, verifications, None where the server does not say; `prompt_tokens` and
`cached_tokens`, what the server counted and what of it was in its prefix cache, None and 0 where it does not say;
`other_prompt`, True if the server's own template made more or fewer tokens than ours.
"""
import argparse
import json
import time
from collections.abc import Callable
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

from app.answer import Run
from benchmarks.workload import Subject
from tokenizer import Tokenizer

SILENT_S = 600.0  # that a server may be silent, as it is during a long prompt
IN_ONE_PIECE = 32  # tokens of a whole answer that may come at once; more of them were not streamed
CUT = "\ufffd"  # at the end of a text that ends within a character; some servers leave it out


class Endpoint(NamedTuple):
    """What an --endpoint says."""
    name: str
    url: str  # the base, as OpenAI's clients take it
    model: str | None = None  # None: with_model asks the server
    prompts: str = "ids"  # or "chat"
    key: str | None = None  # "@FILE"


def read_endpoint(text: str) -> Endpoint:
    """NAME=URL[,model=NAME][,prompts=chat][,key=@FILE], for argparse."""
    name, _, rest = text.partition("=")
    url, *options = rest.split(",")
    given = dict(option.partition("=")[::2] for option in options)
    wrong = None
    try:
        parts = urlsplit(url)
        usable = (name and parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
                  and not (parts.query or parts.fragment or "@" in parts.netloc))  # none of these would be sent
    except ValueError:  # no address, or no port
        usable = False
    if not usable:
        wrong = "should be NAME=URL, such as theirs=http://127.0.0.1:8000/v1"
    elif given.keys() - {"model", "prompts", "key"} or not all(given.values()):
        wrong = "after the URL come only ,model=NAME ,prompts=chat and ,key=@FILE"
    elif given.get("prompts", "ids") not in ("ids", "chat"):
        wrong = "prompts=ids sends our token ids (the default), prompts=chat texts for the server's own template"
    elif not given.get("key", "@").startswith("@"):
        wrong = "give key=@FILE: results hold the command line, and so would the key"
    if wrong:
        raise argparse.ArgumentTypeError(f"{text!r}: {wrong}")
    return Endpoint(name, url.rstrip("/") if parts.path.strip("/") else f"{url.rstrip('/')}/v1", **given)


# ----- Asking --------------------------------------------------------------------------------------------------------


def ask(endpoint: Endpoint, path: str, body: dict | None = None) -> tuple[float, list[tuple[float, bytes]]]:
    """Post `body`, or get `path`. Returns when the request was sent, and the lines of the answer, each with the time at
    which it had arrived (time.perf_counter). ValueError with one line where there is no answer, or an error."""
    url = urlsplit(endpoint.url + path)
    headers = {"Content-Type": "application/json"}
    if endpoint.key:
        headers["Authorization"] = "Bearer " + Path(endpoint.key[1:]).read_text(encoding="utf-8").strip()
    kind = HTTPSConnection if url.scheme == "https" else HTTPConnection
    connection = kind(url.hostname, url.port, timeout=SILENT_S)
    lines = []
    try:
        connection.connect()
        start = time.perf_counter()
        connection.request("POST" if body else "GET", url.path, json.dumps(body) if body else None, headers)
        answer = connection.getresponse()
        while line := answer.readline():
            lines.append((time.perf_counter(), line))
    except (OSError, HTTPException) as error:
        if not lines or answer.status != 200:
            raise ValueError(f"{url.geturl()}: {getattr(error, 'strerror', None) or type(error).__name__}") from None
        # else it broke off: read_answer says so
    finally:
        connection.close()
    if answer.status != 200:
        raise ValueError(f"{url.geturl()}: {answer.status} {reason(b''.join(line for _, line in lines))}")
    return start, lines


def reason(raw: bytes | dict) -> str:
    """What an error's body says, on one line. It is {"error": {"message": ...}}, a part of that, or anything."""
    try:
        said = raw if isinstance(raw, dict) else json.loads(raw)
    except ValueError:
        said = raw.decode("utf-8", "replace")
    for key in ("error", "message"):
        if isinstance(said, dict):
            said = said.get(key, said)
    return " ".join(str(said).split())[:200]


def with_model(endpoint: Endpoint) -> Endpoint:
    """The endpoint with a model: the one that the server has, unless one is named. ValueError where it has several."""
    if endpoint.model:
        return endpoint
    _, lines = ask(endpoint, "/models")
    try:
        names = [model["id"] for model in json.loads(b"".join(line for _, line in lines))["data"]]
    except (ValueError, LookupError, TypeError):
        raise ValueError(f"{endpoint.url}/models: not a list of models; add ,model=NAME") from None
    if len(names) != 1:
        raise ValueError(f"{endpoint.url} has {len(names)} models, add ,model=NAME: {', '.join(map(str, names))[:200]}")
    return endpoint._replace(model=names[0])


# ----- Understanding the answer --------------------------------------------------------------------------------------


class Answer(NamedTuple):
    """A whole, streamed answer."""
    pieces: list[tuple[float, str]]  # of its text, each with its time
    end: float  # when the last of them, or the finish_reason, came
    finish: str  # the finish_reason
    said: dict  # what Run.said has


def read_answer(lines: list[tuple[float, bytes]]) -> Answer:
    """Understand what `ask` returned. ValueError unless it is a whole, streamed answer."""
    pieces: list[tuple[float, str]] = []
    end, finish, about = 0.0, "", {}
    line = b""
    try:
        for at, line in lines:
            # A last line without its end was cut off.
            if not line.startswith(b"data:") or line[5:].strip() == b"[DONE]" or not line.endswith(b"\n"):
                continue
            chunk = json.loads(line[5:])
            if chunk.get("error"):
                raise ValueError(reason(chunk))
            about |= {key: chunk[key] for key in ("usage", "timings", "metrics") if chunk.get(key)}
            for choice in chunk.get("choices") or []:
                delta = choice.get("delta") or choice  # /completions has no delta
                if delta.get("reasoning_content") or delta.get("reasoning"):
                    raise ValueError("it keeps reasoning apart from the text: leave out prompts=chat")
                text = delta.get("content") or delta.get("text")
                if text:
                    pieces.append((at, "" + text))
                if text or choice.get("finish_reason"):
                    end, finish = at, choice.get("finish_reason") or finish
        usage = about.get("usage", {})
        said = {"text": "".join(text for _, text in pieces), "steps": steps_of(about),
                "prompt_tokens": usage.get("prompt_tokens"),
                "cached_tokens": (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0}
    except json.JSONDecodeError:
        raise ValueError(f"it sent what is not JSON: {reason(line)}") from None
    except (AttributeError, TypeError, LookupError, ArithmeticError):
        raise ValueError(f"it sent an object of another form: {reason(line)}") from None
    if not finish:
        raise ValueError(f"its answer broke off after {len(pieces)} pieces" if pieces else "it streamed no answer")
    return Answer(pieces, end, finish, said)


def steps_of(about: dict) -> int | None:
    """How many verifications the server says there were; None where it does not."""
    timings = about.get("timings", {})
    if "mean_gained" in timings and "usage" in about:  # ours
        decoded = about["usage"]["completion_tokens"] - 1
        return round(decoded / timings["mean_gained"]) if decoded else 0
    if "draft_n_accepted" in timings:  # llama.cpp: each verification commits what it accepts and one token more
        return timings["predicted_n"] - 1 - timings["draft_n_accepted"]
    return (about.get("metrics", {}).get("speculative_decoding") or {}).get("num_spec_steps")  # vLLM, where it is on


def http_decoder(endpoint: Endpoint, subject: Subject) -> Callable[[list[int], int], Run]:
    """Greedy answers of an endpoint: (prompt ids, max_new_tokens) -> Run."""
    texts_of = {tuple(prompt.ids): prompt.texts for prompt in subject.prompts}

    def count(text: str) -> list[int]:
        return subject.tokenizer.encode(text, add_special_tokens=False)

    def decode(ids: list[int], new_tokens: int) -> Run:
        # The penalty is said because vLLM and SGLang take that of generation_config.json where a request says none.
        body = {"model": endpoint.model, "max_tokens": new_tokens, "temperature": 0, "repetition_penalty": 1.0,
                "stream": True, "stream_options": {"include_usage": True}}
        if endpoint.prompts == "ids":
            path, prompt = "/completions", {"prompt": ids}
        else:
            path, prompt = "/chat/completions", {"messages": [
                {"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts_of[tuple(ids)])]}
        start, lines = ask(endpoint, path, body | prompt)
        try:
            pieces, end, finish, said = read_answer(lines)
            tokens = count(said["text"])
            if len(pieces) == 1 and len(tokens) > IN_ONE_PIECE:
                raise ValueError(f"{len(tokens)} tokens came in one piece, so there is no rate (is a proxy between?)")
            said["other_prompt"] = said["prompt_tokens"] not in (None, len(ids))
            if said["other_prompt"] and endpoint.prompts == "ids":
                raise ValueError(f"it read a prompt of {len(ids)} ids as {said['prompt_tokens']} tokens")
        except ValueError as error:
            raise ValueError(f"{endpoint.url}{path}: {error}") from None
        if finish == "stop":
            tokens += sorted(subject.stop_ids)[:1]
        if len(pieces) < 2:  # nothing came later whose time could be measured
            return Run(tokens, [], end - start, 0.0, said)
        t_first, first = pieces[0]
        return Run(tokens, [max(len(tokens) - len(count(first)), 0)], t_first - start, end - t_first, said)
    return decode


def text_parts_at(text: str, expected: list[int], tokenizer: Tokenizer) -> int | None:
    """Where a text parts from the ids `expected`: the index of the first of them that the text does not have; None
    where the texts are equal. UTF-8 bytes are compared, because a text does not say of which tokens it was made."""
    pieces = [tokenizer.token_bytes(token) for token in expected]
    ours, theirs = b"".join(pieces), text.encode("utf-8", "replace")
    if tokenizer.stream().strip and ours[:1] == b" " != theirs[:1]:
        theirs = b" " + theirs  # sentencepiece's, which some servers drop
    if theirs.decode().rstrip(CUT) == ours.decode("utf-8", "replace").rstrip(CUT):
        return None
    end = 0
    for at, piece in enumerate(pieces):
        if not theirs.startswith(piece, end):
            return at
        end += len(piece)
    return len(expected) - (expected[-1] in tokenizer.stop_ids)  # theirs goes on
