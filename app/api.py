"""What a request to the server means, and what its answer looks like: OpenAI's API, without a network.

Nothing that would change an answer is ignored: what this server cannot do is refused by name. What changes nothing
(`user`, `metadata` ...) is accepted, and so is every field whose value is null or says that it is off. What a request
does not say is as on generate.py's command line. Fields and shapes: https://platform.openai.com/docs/api-reference/chat
"""
import json
import secrets
import time
from dataclasses import dataclass
from typing import Any

from app.options import Engine
from sampling import Sampling

MAX_STOPS = 8
MAX_STOP_CHARACTERS = 200  # all of them are searched after every token

HARMLESS = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key",
            "prompt_cache_retention", "prediction", "parallel_tool_calls"}
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "seed")
READ = {"model", "stream", "stream_options", "stop", "max_tokens", "messages", "prompt", *SAMPLING}
# Values that ask for nothing; any other is refused.
OFF: dict[str, tuple] = {
    "n": (1,), "best_of": (1,), "frequency_penalty": (0, 0.0), "presence_penalty": (0, 0.0),
    "repetition_penalty": (1, 1.0), "logit_bias": ({},), "logprobs": (False,), "top_logprobs": (0,), "echo": (False,),
    "suffix": ("",), "tools": ([],), "tool_choice": ("none", "auto"), "functions": ([],),
    "function_call": ("none", "auto"), "response_format": ({"type": "text"},), "modalities": (["text"],),
    # of vLLM, SGLang and llama.cpp
    "stop_token_ids": ([],), "min_tokens": (0,), "ignore_eos": (False,), "skip_special_tokens": (True,),
    "length_penalty": (1, 1.0), "typical_p": (1, 1.0), "use_beam_search": (False,), "chat_template_kwargs": ({},)}
FINISH = {"string": "stop", "eos": "stop", "length": "length", "context": "length"}  # of app.answer.generate's `stop`


class Refusal(Exception):
    """A request that gets an error for an answer: an HTTP status, one line, and the field that is wrong."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = " ".join(message.encode("utf-8", "replace").decode().split())  # it may quote a lone surrogate
        self.param = param
        self.code = code

    def body(self) -> dict:
        kinds = {401: "authentication_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


@dataclass(frozen=True)
class Served:
    """What is served: a model under a name, and what holds where a request says nothing."""
    engine: Engine
    name: str
    method: str
    max_tokens: int
    sampling: Sampling
    stops: tuple[str, ...] = ()

    @property
    def fingerprint(self) -> str:
        return f"{self.method}-{str(self.engine.model.embed.weight.dtype).removeprefix('torch.')}"

    def card(self, created: int) -> dict:
        """The model as /v1/models lists it."""
        return {"id": self.name, "object": "model", "created": created, "owned_by": "local",
                "max_model_len": self.engine.max_seq_len}


@dataclass(frozen=True)
class Asked:
    """A request, understood."""
    chat: bool
    ids: list[int]
    max_tokens: int
    sampling: Sampling
    stops: tuple[str, ...]
    stream: bool
    include_usage: bool


# ----- Reading a request -----------------------------------------------------------------------------------------


def read_request(raw: bytes, chat: bool, served: Served) -> Asked:
    """The body of a request to /v1/chat/completions or to /v1/completions. Raises Refusal."""
    fields = read_json(raw)
    check_fields(fields, chat)
    check_model(fields.get("model", served.name), served)
    stream = flag(fields, "stream")
    options = fields.get("stream_options", {})
    if not isinstance(options, dict) or options.keys() - {"include_usage", "include_obfuscation"}:
        raise Refusal(400, "stream_options should be an object with include_usage", "stream_options")
    if "stream_options" in fields and not stream:
        raise Refusal(400, "stream_options is for stream: true", "stream_options")
    stops = read_stops(fields["stop"]) if "stop" in fields else served.stops
    max_tokens = read_max_tokens(fields, served.max_tokens)
    sampling = read_sampling(fields, served.sampling)
    ids = read_messages(fields, served) if chat else read_prompt(fields, served)
    try:
        served.engine.check(ids, max_tokens)
    except ValueError as error:
        raise Refusal(400, str(error), "messages" if chat else "prompt",
                      "context_length_exceeded" if ids else None) from None
    return Asked(chat, ids, max_tokens, sampling, stops, stream, flag(options, "include_usage", "stream_options."))


def read_json(raw: bytes) -> dict[str, Any]:
    """The fields of the body; those that are null are left out. Raises Refusal if the body is not a JSON object."""
    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    try:
        fields = json.loads(raw.decode(), parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise Refusal(400, f"the body is not JSON in UTF-8: {type(error).__name__}") from None  # its text stays out
    if not isinstance(fields, dict):
        raise Refusal(400, "the body should be a JSON object")
    return {key: value for key, value in fields.items() if value is not None}


def check_fields(fields: dict[str, Any], chat: bool) -> None:
    """Refuses what would change the answer and is not honoured."""
    own = READ - {"prompt"} | {"max_completion_tokens"} if chat else READ - {"messages"}
    for key, value in fields.items():
        if key in own or key in HARMLESS:
            continue
        if key not in OFF:
            raise Refusal(400, f"unknown field {key[:50]!r}: it may change the answer, so leave it out", key[:50])
        if not any(type(value) is type(off) and value == off for off in OFF[key]):
            raise Refusal(400, f"{key}: this server does it only as {json.dumps(OFF[key][0])}, so leave it out", key,
                          "unsupported_value")


def check_model(name: object, served: Served) -> None:
    """Refuses every name but the served one, which may have an organisation before it."""
    if not isinstance(name, str) or name.rpartition("/")[2] != served.name:
        raise Refusal(404, f"model: this server has {served.name!r} only", "model", "model_not_found")


def flag(fields: dict[str, Any], key: str, where: str = "") -> bool:
    value = fields.get(key)
    if value is not None and not isinstance(value, bool):
        raise Refusal(400, f"{where}{key} should be true or false", where.rstrip(".") or key)
    return bool(value)


def is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def read_max_tokens(fields: dict[str, Any], default: int) -> int:
    found = [fields[key] for key in ("max_tokens", "max_completion_tokens") if key in fields]
    for value in found:
        if not is_integer(value) or value < 1:
            raise Refusal(400, "max_tokens and max_completion_tokens should be integers of 1 or more", "max_tokens")
    if len(set(found)) > 1:
        raise Refusal(400, "max_tokens and max_completion_tokens differ: give one of them", "max_tokens")
    return min(*found, 2**31) if found else default  # the context ends it before


def read_stops(stop: object) -> tuple[str, ...]:
    stops = [stop] if isinstance(stop, str) else stop
    if not isinstance(stops, list) or not all(isinstance(text, str) and text for text in stops):
        raise Refusal(400, "stop should be a text or a list of texts, none of them empty", "stop")
    if len(stops) > MAX_STOPS or any(len(text) > MAX_STOP_CHARACTERS for text in stops):
        raise Refusal(400, f"stop: at most {MAX_STOPS} texts of at most {MAX_STOP_CHARACTERS} characters", "stop")
    return tuple(stops)


def read_sampling(fields: dict[str, Any], default: Sampling) -> Sampling:
    """The sampling of a request. Without a seed, a temperature above 0 gets a random one. At temperature 0 (greedy),
    top_k, top_p and min_p are turned off: they change nothing there. Raises Refusal."""
    values: dict[str, Any] = {}
    for name in SAMPLING:
        value = fields.get(name, getattr(default, name))
        value = values[name] = 0 if name == "top_k" and value == -1 else value  # -1 is off in vLLM
        if not is_integer(value) and (name in ("seed", "top_k") or not isinstance(value, float)):
            raise Refusal(400, f"{name} should be a number{' without a fraction' * (name in ('seed', 'top_k'))}", name)
    if values["temperature"] and "seed" not in fields:
        values["seed"] = secrets.randbelow(2**53)  # what JavaScript's numbers hold
    try:
        sampling = Sampling(**values)
    except ValueError as error:
        raise Refusal(400, str(error)[:200], str(error).partition(" ")[0]) from None
    return sampling if sampling.temperature else Sampling(seed=sampling.seed)


def read_messages(fields: dict[str, Any], served: Served) -> list[int]:
    """The ids of the conversation, up to where the answer starts."""
    messages = fields.get("messages")
    if not isinstance(messages, list) or not messages:
        raise Refusal(400, "messages should be a list of messages, and not empty", "messages")
    plain = [read_message(message, f"messages[{i}]") for i, message in enumerate(messages)]
    try:
        return served.engine.tokenizer.chat(plain)
    except ValueError as error:  # there is no template, or it wants another order of roles
        raise Refusal(400, str(error)[:500], "messages") from None


def read_message(message: object, where: str) -> dict[str, str]:
    if not isinstance(message, dict):
        raise Refusal(400, f"{where} should be an object with role and content", where)
    said = {key: value for key, value in message.items() if value not in (None, [])}
    role, content = said.get("role"), said.get("content")
    if not isinstance(role, str) or role not in ("system", "developer", "user", "assistant"):
        raise Refusal(400, f"{where}.role should be system, developer, user or assistant (tools are not supported)",
                      f"{where}.role")
    other = next(iter(said.keys() - {"role", "content"}), None)
    if other is not None:
        raise Refusal(400, f"{where}: {other[:50]!r} is not supported: a message has role and content", where)
    if isinstance(content, list):
        content = "".join(read_part(part, f"{where}.content[{i}]") for i, part in enumerate(content))
    if not isinstance(content, str):
        raise Refusal(400, f"{where}.content should be a text", f"{where}.content")
    return {"role": "system" if role == "developer" else role, "content": content}  # OpenAI's newer word for it


def read_part(part: object, where: str) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind != "text" or part.keys() != {"type", "text"} or not isinstance(part["text"], str):
        raise Refusal(400, f'{where} should be {{"type": "text", "text": ...}}: no images, audio or files', where)
    return part["text"]


def read_prompt(fields: dict[str, Any], served: Served) -> list[int]:
    """The ids of a text that is continued as it is; a prompt may be given as ids too."""
    prompt = fields.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1 and not is_integer(prompt[0]):
        prompt = prompt[0]
    if isinstance(prompt, list) and all(map(is_integer, prompt)):
        size = served.engine.model.cfg.vocab_size
        if not all(0 <= token < size for token in prompt):
            raise Refusal(400, f"prompt: token ids are 0 to {size - 1}", "prompt")
        return prompt
    if not isinstance(prompt, str):
        raise Refusal(400, "prompt should be one text, or one list of token ids", "prompt")
    try:
        return served.engine.tokenizer.encode(prompt)
    except ValueError as error:
        raise Refusal(400, str(error)[:500], "prompt") from None


# ----- Writing an answer -----------------------------------------------------------------------------------------


class Reply:
    """The objects of one answer. `result` is what app.answer.generate returns, with `queue_s` and `reused`: seconds
    of waiting, and how many tokens of the prompt were in the caches."""

    def __init__(self, asked: Asked, served: Served) -> None:
        self.chat = asked.chat
        self.include_usage = asked.stream and asked.include_usage
        self.head = {
            "id": ("chatcmpl-" if asked.chat else "cmpl-") + secrets.token_hex(12),
            "object": ("chat.completion" if asked.chat else "text_completion") + ".chunk" * (asked.chat & asked.stream),
            "created": int(time.time()), "model": served.name, "system_fingerprint": served.fingerprint,
            "seed": asked.sampling.seed}

    def whole(self, result: dict) -> dict:
        text = {"message": {"role": "assistant", "content": result["text"]}} if self.chat else {"text": result["text"]}
        choice = {"index": 0, **text, "logprobs": None, "finish_reason": FINISH[result["stop"]]}
        return {**self.head, "choices": [choice], "usage": usage(result), "timings": timings(result)}

    def piece(self, text: str, first: bool = False, finish: str | None = None) -> dict:
        """A chunk of the stream."""
        delta = {"role": "assistant"} if first else {}
        said = {"delta": delta | ({"content": text} if text or first else {})} if self.chat else {"text": text}
        choice = {"index": 0, **said, "logprobs": None, "finish_reason": finish}
        return {**self.head, "choices": [choice], **({"usage": None} if self.include_usage else {})}

    def last(self, result: dict) -> list[dict]:
        """The chunks after the text."""
        end = self.piece("", finish=FINISH[result["stop"]]) | {"timings": timings(result)}
        return [end, {**self.head, "choices": [], "usage": usage(result)}] if self.include_usage else [end]


def usage(result: dict) -> dict:
    prompt, new = result["prompt_tokens"], result["new_tokens"]
    return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new,
            "prompt_tokens_details": {"cached_tokens": result["reused"]}}


def timings(result: dict) -> dict:
    """queue_s, prefill_s, decode_s: seconds. tokens_per_sec: of decoding. mean_gained: tokens per step."""
    names = ("queue_s", "prefill_s", "decode_s", "tokens_per_sec", "mean_gained")
    return {name: round(result[name], 6) for name in names}
