"""app/api.py: what a request means, and what is refused. No network and no engine.

    python -m pytest tests/app/test_api.py
"""
import json
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from app.api import HARMLESS, OFF, Asked, Refusal, Reply, Served, read_request
from engine import Engine
from sampling import Sampling
from tokenizer import Tokenizer

HELLO = [{"role": "user", "content": "Hello"}]
RESULT = {"text": "Hi!", "tokens": [72, 105, 33], "prompt_tokens": 9, "new_tokens": 3, "stop": "eos", "reused": 4,
          "queue_s": 0.5, "prefill_s": 0.25, "decode_s": 1.0, "tokens_per_sec": 2.0, "mean_gained": 1.0}


class Unused:
    """As much of an engine as reading a request needs."""
    check = Engine.check
    max_seq_len = 96
    model = SimpleNamespace(cfg=SimpleNamespace(vocab_size=260, max_position_embeddings=512),
                            embed=SimpleNamespace(weight=torch.zeros(1)))

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Served:
    folder: Path = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text(json.dumps(tiny.SHAPE | {"vocab_size": 260}))
    tiny.save_tokenizer(folder)
    return Served(Unused(Tokenizer(folder)), "small", "eagle2", 40, Sampling(), ("END",))


def ask(served: Served, chat: bool = True, raw: bytes | None = None, **fields: object) -> Asked:
    given = ({"messages": HELLO} if chat else {"prompt": "Hello"}) | fields
    return read_request(json.dumps(given).encode() if raw is None else raw, chat, served)


def refusal(served: Served, chat: bool = True, raw: bytes | None = None, **fields: object) -> Refusal:
    with pytest.raises(Refusal) as caught:
        ask(served, chat, raw, **fields)
    return caught.value


def test_what_is_not_said(served: Served) -> None:
    """Fails if a request that says nothing else is not answered as on the command line."""
    hello = served.engine.tokenizer.chat(HELLO)
    assert ask(served) == Asked(True, hello, 40, Sampling(), ("END",), False, False)
    assert ask(served, False) == Asked(False, list(b"Hello"), 40, Sampling(), ("END",), False, False)
    nothing = dict.fromkeys(("temperature", "seed", "stop", "stream", "stream_options", "max_tokens", "tools", "n",
                             "model", "of nobody"))
    assert ask(served, **nothing) == ask(served)


def test_what_is_said(served: Served) -> None:
    """Fails if a field is read as another one, or not at all."""
    how = {"temperature": 0.7, "top_k": 5, "top_p": 0.9, "min_p": 0.1, "seed": -3}
    asked = ask(served, model="org/small", stop=["a", "b"], stream=True, stream_options={"include_usage": True},
                max_completion_tokens=7, **how)
    assert asked == Asked(
        True, served.engine.tokenizer.chat(HELLO), 7, Sampling(**how), ("a", "b"), True, True)
    assert ask(served, max_tokens=3, max_completion_tokens=3).max_tokens == 3
    assert ask(served, max_tokens=10**30).max_tokens >= 96
    assert ask(served, temperature=1, seed=2, top_k=-1).sampling == Sampling(1, seed=2), "vLLM's word for off"
    assert len(ask(served, stop=["x" * 200] * 8).stops) == 8
    assert ask(served, stop="x").stops == ("x",) and ask(served, stop=[]).stops == ()
    assert ask(served, False, prompt=[1, 2, 259]).ids == [1, 2, 259]
    assert ask(served, False, prompt=["Hi"]).ids == ask(served, False, prompt=[[72, 105]]).ids == list(b"Hi")


def test_seeds(served: Served) -> None:
    """Fails if sampling without a seed repeats itself, the seed is not told, or a greedy answer gets a CUDA graph of
    its own for settings that change nothing."""
    first, second = (ask(served, temperature=1).sampling.seed for _ in range(2))
    assert first != second and 0 <= min(first, second) and max(first, second) < 2**53
    assert ask(served, temperature=1.0, seed=5).sampling == Sampling(1.0, seed=5)
    assert ask(served, temperature=0, top_p=0.5, top_k=3, seed=4).sampling == Sampling(seed=4)
    asked = ask(served, temperature=1)
    assert Reply(asked, served).whole(RESULT)["seed"] == asked.sampling.seed
    warm = Served(served.engine, "small", "eagle2", 40, Sampling(0.8, top_p=0.9, seed=7))
    assert ask(warm, seed=1).sampling == Sampling(0.8, top_p=0.9, seed=1)
    assert ask(warm).sampling.seed != 7 and ask(warm, temperature=0).sampling == Sampling(seed=7)


def test_messages(served: Served) -> None:
    """Fails if a message loses its text or role, parts are joined wrongly, or an answer of the openai package cannot be
    sent back."""
    text = [{"type": "text", "text": "He"}, {"type": "text", "text": "llo"}]
    assert ask(served, messages=[{"role": "user", "content": text}]).ids == ask(served).ids
    chat = served.engine.tokenizer.chat
    answer = {"role": "assistant", "content": "Hi", "refusal": None, "annotations": [], "tool_calls": None}
    assert ask(served, messages=[{"role": "developer", "content": "Be brief."}, *HELLO, answer, *HELLO]).ids == chat(
        [{"role": "system", "content": "Be brief."}, *HELLO, {"role": "assistant", "content": "Hi"}, *HELLO])


@pytest.mark.parametrize("fields, param, said", [
    ({"tools": [{"type": "function"}]}, "tools", "leave it out"), ({"n": 2}, "n", "only as 1"),
    ({"n": True}, "n", "only as 1"), ({"logprobs": True}, "logprobs", "false"), ({"frequency_penalty": 0.5}, None, ""),
    ({"response_format": {"type": "json_object"}}, "response_format", "text"), ({"logit_bias": {"5": 1}}, None, ""),
    ({"reasoning_effort": "high"}, "reasoning_effort", "unknown field"), ({"prompt": "x"}, "prompt", "unknown field"),
    ({"audio": {}}, "audio", "unknown field"), ({"x" * 999: 1}, "x" * 50, "unknown field"),
    ({"model": "gpt-5"}, "model", "'small' only"), ({"model": 5}, "model", ""),
    ({"stream": 1}, "stream", "true or false"), ({"stream_options": {}}, "stream_options", "stream: true"),
    ({"stream": True, "stream_options": {"include": 1}}, "stream_options", "include_usage"),
    ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options", "true or false"),
    ({"max_tokens": 0}, "max_tokens", "1 or more"), ({"max_tokens": 1.5}, "max_tokens", ""),
    ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens", "differ"), ({"max_tokens": True}, "max_tokens", ""),
    ({"temperature": "hot"}, "temperature", "number"), ({"temperature": -1}, "temperature", "0.000001"),
    ({"temperature": True}, "temperature", "number"), ({"top_p": 0, "temperature": 1}, "top_p", "more than 0"),
    ({"top_k": 1.5}, "top_k", "without a fraction"), ({"top_k": -2}, "top_k", "0 or more"),
    ({"min_p": 2}, "min_p", "0 to 1"), ({"seed": 2**64}, "seed", "64 bits"), ({"seed": 1.0}, "seed", "fraction"),
    ({"seed": 10**4000}, "seed", "64 bits"), ({"stop": ""}, "stop", "empty"), ({"stop": ["a"] * 9}, "stop", "at most"),
    ({"stop": "x" * 201}, "stop", "at most"), ({"stop": 5}, "stop", "text"), ({"messages": []}, "messages", "empty"),
    ({"messages": "Hi"}, "messages", "list"), ({"messages": ["Hi"]}, "messages[0]", "object"),
    ({"messages": [{"role": "user"}]}, "messages[0].content", "text"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role", "tools are not supported"),
    ({"messages": [{"role": ["user"], "content": "x"}]}, "messages[0].role", "system"),
    ({"messages": [*HELLO, {"role": "user", "content": "x", "name": "Ann"}]}, "messages[1]", "'name'"),
    ({"messages": [{"role": "assistant", "content": "x", "tool_calls": [{}]}]}, "messages[0]", "'tool_calls'"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
     "messages[0].content[0]", "no images"), ({"messages": [{"role": "user", "content": ["x"]}]}, None, "text"),
    ({"messages": [{"role": "user", "content": "x" * 99}]}, "messages", "--max_seq_len 96"),
    ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages", "surrogate")], ids=lambda v: str(v)[:40])
def test_refused(served: Served, fields: dict, param: str | None, said: str) -> None:
    """Fails if what this server cannot do is ignored, or refused without a name and a reason."""
    error = refusal(served, **fields)
    assert error.status == (404 if "model" in fields else 400) and said in error.message and len(error.message) < 400
    assert error.param == param or param is None
    assert set(json.loads(json.dumps(error.body()))["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize("fields, said", [
    ({"prompt": ["a", "b"]}, "one text"), ({"prompt": [260]}, "0 to 259"), ({"prompt": [-1]}, "0 to 259"),
    ({"prompt": [True]}, "one text"), ({"prompt": ""}, "nothing to continue"), ({"prompt": []}, "nothing"),
    ({"prompt": None}, "one text"), ({"prompt": [[1], [2]]}, "one text"), ({"logprobs": 0}, "leave it out"),
    ({"echo": True}, "leave it out"), ({"suffix": "x"}, "leave it out"), ({"best_of": 2}, "leave it out"),
    ({"messages": HELLO}, "unknown field"), ({"max_completion_tokens": 5}, "unknown"), ({"prompt": "x" * 96}, "96")])
def test_completions_refused(served: Served, fields: dict, said: str) -> None:
    """Fails if what the older interface has besides is ignored."""
    assert said in refusal(served, False, **fields).message


def test_codes(served: Served) -> None:
    """Fails if programs that look at an error's code, as many do to shorten a conversation, take it for another."""
    for chat, fields, code in (
            (True, {"messages": [{"role": "user", "content": "x" * 99}]}, "context_length_exceeded"),
            (False, {"prompt": "x" * 96}, "context_length_exceeded"), (False, {"prompt": ""}, None),
            (True, {"model": "gpt-5"}, "model_not_found"), (True, {"n": 2}, "unsupported_value")):
        assert refusal(served, chat, **fields).code == code


@pytest.mark.parametrize("raw", [
    b"", b"[]", b"5", b"{", b'{"messages": NaN}', b"\xff", b'{"a": 1}}', b"[" * 100_000, b'{"n": ' + b"9" * 5000 + b"}",
    '{"é": 1}'.encode("latin-1")], ids=lambda raw: str(raw)[:20])
def test_not_json(served: Served, raw: bytes) -> None:
    """Fails if a body that is no JSON object raises something else, or is quoted in the error."""
    error = refusal(served, raw=raw)
    assert error.status == 400 and "the body" in error.message and len(error.message) < 100


def test_harmless(served: Served) -> None:
    """Fails if a field that changes nothing, or one that says that it is off, is refused or changes the answer."""
    off = {name: values[-1] for name, values in OFF.items()}
    assert ask(served, **dict.fromkeys(HARMLESS, "x"), **off) == ask(served)
    assert ask(served, False, **dict.fromkeys(HARMLESS, "x"), **off) == ask(served, False)


def test_replies(served: Served) -> None:
    """Fails if an answer lacks what OpenAI's has, or says a wrong reason for its end."""
    whole = Reply(ask(served, max_tokens=9), served).whole(RESULT)
    assert whole["object"] == "chat.completion" and whole["system_fingerprint"] == "eagle2-float32"
    assert whole["choices"] == [{"index": 0, "message": {"role": "assistant", "content": "Hi!"}, "logprobs": None,
                                 "finish_reason": "stop"}]
    assert whole["usage"] == {"prompt_tokens": 9, "completion_tokens": 3, "total_tokens": 12,
                              "prompt_tokens_details": {"cached_tokens": 4}}
    assert whole["timings"] == {"queue_s": 0.5, "prefill_s": 0.25, "decode_s": 1.0, "tokens_per_sec": 2.0,
                                "mean_gained": 1.0}
    assert 0 <= time.time() - whole["created"] < 60 and whole["model"] == "small"
    assert served.card(7) == {"id": "small", "object": "model", "created": 7, "owned_by": "local", "max_model_len": 96}
    for stop, reason in (("string", "stop"), ("length", "length"), ("context", "length")):
        assert Reply(ask(served, False), served).whole(RESULT | {"stop": stop})["choices"][0] == {
            "index": 0, "text": "Hi!", "logprobs": None, "finish_reason": reason}
    reply = Reply(ask(served, stream=True, stream_options={"include_usage": True}), served)
    assert reply.piece("", first=True)["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert reply.piece("H")["usage"] is None and reply.piece("H")["object"] == "chat.completion.chunk"
    end, last = reply.last(RESULT)
    assert end["choices"][0] == {"index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop"}
    assert last["choices"] == [] and last["usage"] == whole["usage"] and end["timings"] == whole["timings"]
    assert len(Reply(ask(served, stream=True), served).last(RESULT)) == 1
    assert "usage" not in Reply(ask(served, stream=True), served).piece("H")
    assert Reply(ask(served, False, stream=True), served).piece("H")["object"] == "text_completion"


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9) | st.sampled_from(
        ["user", "system", "text", "small", 10**400, float("inf"), "\ud800"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["role", "content", "type", "text", "include_usage", "x"]), inner, max_size=3), max_leaves=9)
MESSAGES = st.lists(st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "tool"]) | VALUES,
                                           "content": st.text(max_size=9) | VALUES}), max_size=3)
NAMES = st.sampled_from([*sorted(OFF), "model", "stream", "stream_options", "stop", "max_tokens", "temperature",
                         "top_k", "top_p", "min_p", "seed", "user", "max_completion_tokens", "x"])


@pytest.mark.slow
@settings(max_examples=500, deadline=None)
@given(st.dictionaries(NAMES, VALUES, max_size=3), MESSAGES | VALUES, st.booleans(), st.binary(max_size=3))
def test_any_body(served: Served, fields: dict, said: object, chat: bool, cut: bytes) -> None:
    """Fails if some body raises anything but a Refusal of the client's fault, or one that cannot be sent."""
    raw = json.dumps(fields | {"messages" if chat else "prompt": said}).encode()
    for body in (raw, raw[:len(raw) // 2] + cut + raw[len(raw) // 2:]):
        try:
            asked = read_request(body, chat, served)
        except Refusal as error:
            assert error.status in (400, 404) and len(json.dumps(error.body())) < 9999
        else:
            assert asked.ids and asked.max_tokens >= 1 and asked.chat == chat
            json.dumps(Reply(asked, served).whole(RESULT))
