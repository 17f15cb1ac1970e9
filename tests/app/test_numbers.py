"""The numbers that are printed about an answer, from scripted cycles and a scripted clock: every figure is known.

    python -m pytest tests/app/test_numbers.py
"""
import argparse
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch

from app import answer, batch, chat, memory, options
from app.answer import Run, compare, generate, report
from app.chat import Chat
from formats.config import Config
from generate import parse_args
from sampling import Sampling
from tokenizer import Tokenizer

# One token a byte: five cycles after the first token, which prefill chose.
CYCLES = [b"H", b"ell", b"o", b" big ", b"wo", b"rld!"]
NUMBERS = {"prefill_s": 2.5, "decode_s": 4.0}  # what the clock below gives


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A token for each byte; 257 ends a text."""
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny.save_tokenizer(folder)
    (folder / "config.json").write_text(json.dumps({"eos_token_id": 257}))
    return Tokenizer(folder)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[object], None]:
    """Give a module a clock that reads 10, then 12.5 when the first token is there, then 16.5 when the last one is."""
    def give(module: object) -> None:
        times = iter([10.0, 12.5, 16.5])
        monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: next(times)))
    return give


class Engine:
    """Writes CYCLES, or the tokens it is given."""
    cuda, device, compile_s, reused, max_seq_len = False, torch.device("cpu"), 0.75, 5, 512
    drafter = SimpleNamespace(max_depth=4)
    model = SimpleNamespace(embed=SimpleNamespace(weight=torch.zeros(1)))

    def __init__(self, cycles: list) -> None:
        self.cycles = cycles
        self.asked: list[tuple] = []

    def generate(self, ids: list[int], new_tokens: int, sampling: Sampling, reuse: bool = False
                 ) -> Iterator[list[int]]:
        self.asked.append((ids, new_tokens, sampling))
        yield from map(list, self.cycles)

    def top2_gap(self, ids: list[int], sampling: Sampling) -> float:
        self.asked.append((ids, sampling))
        return 0.125


def test_answer(tokenizer: Tokenizer, clock) -> None:
    """Fails if prefill's token or time counts as decoding in tokens/s or in tokens per step, or if a draft's depth is
    off by one."""
    clock(answer)
    engine = Engine(CYCLES)
    result = generate(engine, [1, 2, 3], 99, Sampling(0.5, seed=7), tokenizer, "eagle2")
    assert engine.asked == [([1, 2, 3], 99, Sampling(0.5, seed=7))]
    assert result["text"] == "Hello big world!" and bytes(result["tokens"]) == b"".join(CYCLES)
    assert {key: result[key] for key in NUMBERS} == NUMBERS
    assert (result["prompt_tokens"], result["new_tokens"], result["cycles"]) == (3, 16, 5)
    assert result["gained"] == [3, 1, 5, 2, 4] and result["mean_gained"] == 3.0
    assert result["accept_by_depth"] == [0.8, 0.6, 0.4, 0.2]  # more than 1, 2, 3, 4 tokens of a cycle
    assert result["tokens_per_sec"] == 15 / 4
    assert (result["compile_s"], result["seed"], result["method"], result["dtype"]) == (0.75, 7, "eagle2", "float32")
    assert report(result) == ("eagle2: 3.8 tokens/s (16 tokens, 4.00 s, 3.00 tokens per step; accepted by depth "
                              "80% 60% 40% 20%); prompt of 3 in 2.50 s")
    assert report(result | {"method": "vanilla"}) == "vanilla: 3.8 tokens/s (16 tokens, 4.00 s); prompt of 3 in 2.50 s"


@pytest.mark.parametrize("stops", [(), ("never", "big")])
def test_every_token_is_decoded_once(stops: tuple[str, ...], tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
                                     ) -> None:
    """Fails if the text is decoded again when it is complete, for which a server's last event would wait, or if it is
    not what was shown piece by piece: characters may be cut by a cycle's end, or by the text's."""
    cycles = [b"H", b"\xc3", b"\xa9", b"l\xe2\x82", b"\xac big", b" w\xf0\x9f"]
    decoded: list[int] = []
    pushed: list[str] = []
    right = tokenizer.decode(list(b"".join(cycles)), stops)
    token_bytes = tokenizer.token_bytes
    monkeypatch.setattr(tokenizer, "token_bytes", lambda i: decoded.append(i) or token_bytes(i))
    result = generate(Engine(cycles), [1], 99, Sampling(), tokenizer, stops=stops, push=pushed.append)
    assert decoded == result["tokens"] and result["text"] == "".join(pushed) == right
    assert right == ("Hél€ " if stops else "Hél€ big w\ufffd")
    assert generate(Engine(cycles), [1], 99, Sampling(), tokenizer, stops=stops)["text"] == right, "nobody looks on"


def test_one_token(tokenizer: Tokenizer, clock) -> None:
    """Fails if an answer that prefill alone wrote divides by no cycles, or has a speed."""
    clock(answer)
    result = generate(Engine(CYCLES[:1]), [1], 1, Sampling(), tokenizer)
    assert result["tokens_per_sec"] == result["mean_gained"] == result["cycles"] == 0 and result["gained"] == []
    assert result["accept_by_depth"] == [0, 0, 0, 0] and result["new_tokens"] == 1 and result["stop"] == "length"


@pytest.mark.parametrize("stop, tokens, gained", [
    ("lo", 5, [3, 1]), ("big", 9, [3, 1, 4]), ("ig w", 11, [3, 1, 5, 1]), ("ell", 4, [3]), ("el", 3, [2]),
    ("wo", 12, [3, 1, 5, 2]), ("H", 1, [])])
def test_stop_within_a_cycle(stop: str, tokens: int, gained: list[int], tokenizer: Tokenizer, clock) -> None:
    """Fails if tokens after the one that completes --stop are returned, or count in the speed or as gained."""
    clock(answer)
    result = generate(Engine(CYCLES), [1], 99, Sampling(), tokenizer, "eagle2", stops=("never", stop))
    assert result["text"] == "Hello big world!".partition(stop)[0] and result["stop"] == "string"
    assert bytes(result["tokens"]) == b"Hello big world!"[:tokens] and result["new_tokens"] == tokens
    assert result["gained"] == gained and result["cycles"] == len(gained)
    assert result["tokens_per_sec"] == (tokens - 1) / 4 and sum(gained) == tokens - 1


def test_why_a_text_ended(tokenizer: Tokenizer) -> None:
    """Fails if the end of an answer is put down to something else."""
    for cycles, limit, stop in ((CYCLES, 16, "length"), (CYCLES, 17, "context"), ([*CYCLES, [257]], 17, "eos"),
                                ([*CYCLES, [257]], 99, "eos")):
        assert generate(Engine(cycles), [1], limit, Sampling(), tokenizer)["stop"] == stop


def test_compare() -> None:
    """Fails if the speed-up is another ratio than that of the speeds (texts may differ in length), if the first token
    that differs is another, or if the gap is not that after vanilla's tokens before it."""
    vanilla = {"tokens": [5, 6, 7, 8], "tokens_per_sec": 20.0, "decode_s": 1.0, "dtype": "bfloat16"}
    fast = {"tokens": [5, 6, 7, 8], "tokens_per_sec": 50.0, "decode_s": 3.0, "dtype": "bfloat16"}
    engine = Engine([])
    assert compare(engine, vanilla, fast, [1, 2], Sampling()) == "2.50x vanilla, identical tokens"
    assert not engine.asked
    said = compare(engine, vanilla, fast | {"tokens": [5, 6, 9, 8, 8, 8]}, [1, 2], Sampling(1.0, seed=3))
    assert said.startswith("2.50x vanilla; differs at token 2, where vanilla's two best scores are 0.125 apart (bfloat")
    assert engine.asked == [([1, 2, 5, 6], Sampling(1.0, seed=3))]
    assert compare(engine, vanilla | {"tokens_per_sec": 0.0}, fast, [1], Sampling()) == "identical tokens"


def test_what_vanilla_is_compared_under(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if --compare lets vanilla run otherwise than the method: without graphs, cold, or beyond --stop."""
    made = []

    class Plain(Engine):
        def __init__(self, model: object, drafter: object, *how: object) -> None:
            super().__init__(CYCLES)
            made.append(how)

        def warm_up(self, sampling: Sampling) -> None:
            made.append((sampling, len(self.asked)))

    monkeypatch.setattr(answer, "Engine", Plain)
    monkeypatch.setattr(answer, "setting", lambda engine: "")
    engine = Engine(CYCLES)
    engine.tokenizer = tokenizer
    words = ["--checkpoint", "x", "--prompt", "x", "--eagle2", "--compare", "--stop", "wo"]
    for more, compiled in (((), True), (("--no_compile",), False)):
        made.clear()
        result = answer.answer_and_report(parse_args([*words, *more]), engine, [1], Sampling(0.5))
        assert result["identical"] and result["vanilla"]["text"] == result["text"] == "Hello big "
        assert made == [(512, tokenizer.stop_ids, compiled), (Sampling(0.5), 0)]


def test_parts_of_the_start() -> None:
    """Fails if a part of 10 ms or more is left out of the time to the first token, or a shorter one is shown."""
    parts = {"imports": 2.0, "model": 0.01, "tokenizer": 0.009}
    result = answer.time_to_first_token(parts, 0.481)
    assert answer.start_report(result) == "first token after 2.50 s: imports 2.00, model 0.01, prompt 0.48"


def test_text_comes_at_once(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if the text of a cycle waits in a buffer for that of the next one, in an answer or in a chat."""
    seen = []

    class Out(io.StringIO):
        def flush(self) -> None:
            seen.append(self.getvalue())

    for write in (lambda: generate(Engine(CYCLES), [1], 99, Sampling(), tokenizer, show=True),
                  lambda: Chat(Engine(CYCLES), tokenizer, Sampling(), 16).write_answer([1])):
        seen.clear()
        monkeypatch.setattr("sys.stdout", Out())
        write()
        assert seen[:6] == ["H", "Hell", "Hello", "Hello big ", "Hello big wo", "Hello big world!"]


def test_run_asks_the_clock_twice(clock) -> None:
    """Fails if decoding is timed from the beginning, or a text goes on after its reader ended it."""
    clock(answer)
    seen: list[list[int]] = []
    run = answer.run(Engine(CYCLES), [1], 9, show=lambda new: seen.append(new) or len(seen) == 3)
    assert run == Run(list(b"Hello"), [3, 1], 2.5, 4.0) and seen == [list(part) for part in CYCLES[:3]]


def test_chat(tokenizer: Tokenizer, clock, capsys: pytest.CaptureFixture) -> None:
    """Fails if the figures of an answer contain prefill's token or time, or if those of several answers are not all
    tokens / all seconds, with the mean of the waits."""
    clock(chat)
    talk = Chat(Engine(CYCLES), tokenizer, Sampling(), 16)
    assert talk.write_answer([1] * 8) == "Hello big world!"
    assert talk.answers == [chat.Answer(8, 5, [3, 1, 5, 2, 4], 16, 2.5, 4.0)]
    out, err = capsys.readouterr()
    assert out == "Hello big world!\n"
    assert "3.8 tokens/s, 3.00 tokens per step, first token after 2.50 s, 5 of 8 prompt tokens reused" in err
    assert "[--max_new_tokens 16 ended the answer]" in err
    others = [*talk.answers, chat.Answer(20, 10, [1, 1, 1], 4, 0.5, 14.0), chat.Answer(2, 0, [], 1, 0.0, 0.0)]
    assert chat.report(others) == ("1.0 tokens/s, 2.25 tokens per step, first token after 1.00 s, "
                                   "15 of 30 prompt tokens reused")
    assert chat.report(others[2:]) == "first token after 0.00 s, 0 of 2 prompt tokens reused"


def test_batch() -> None:
    """Fails if the summary of many prompts counts prefill's token in a speed, is a mean of means, or loses a turn or a
    failed prompt."""
    one = {"new_tokens": 16, "gained": [3, 1, 5, 2, 4], "decode_s": 4.0}
    other = {"new_tokens": 6, "gained": [5], "decode_s": 1.0}
    total = sum(map(batch.figures, (one, {"turns": [one, other]}, {"error": "no"})), start=batch.figures(other))
    assert total == {"prompts": 4, "failed": 1, "tokens": 44, "gained": 40, "cycles": 12, "seconds": 10.0}
    assert batch.summary(total) == "4 prompts (1 failed), 44 tokens, 4.0 tokens/s, 3.33 tokens per step"
    assert batch.summary(batch.figures(other)) == "1 prompts, 6 tokens, 5.0 tokens/s, 5.00 tokens per step"


# ----- Memory, and how many slots ----------------------------------------------------------------------------------


def test_need() -> None:
    """Fails if what quantising takes on load is left out of the total, or is added to what comes only after it."""
    assert memory.Need(100, 10, 5, 3, 7).total == 118
    assert memory.Need(100, 10, 5, 3, 50).total == 150


def test_advice_that_loading_does_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if the advice names a mode whose loading takes more than there is: of layers of a 13B's width in int4 with
    512 slots, that is more than the cache and a prefill take."""
    folder = tmp_path / "wide"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({
        "model_type": "llama", "vocab_size": 32000, "hidden_size": 5120, "intermediate_size": 13824,
        "num_hidden_layers": 4, "num_attention_heads": 40, "max_position_embeddings": 4096}))
    monkeypatch.setattr(memory, "read_tensors", lambda path: ({}, {}))
    args = parse_args(["--checkpoint", str(folder), "--prompt", "x"])
    need = memory.plan(args, torch.bfloat16, 512, "int4")
    after = need.cache + need.drafter + need.passing
    assert need.loading > 1.2 * after and need.total == need.weights + need.loading
    for free, fits in ((need.total + 10**7, True), (need.weights + after + 10**7, False)):
        said = memory.advice(args, "cuda", torch.bfloat16, 512, free)
        assert said.endswith("free: --quantize int4 (2.9 GB) fits" if fits else "free: a smaller model would fit")


def test_context() -> None:
    """Fails if the default number of slots is not the least of the model's context, its sliding window and 4096, or if
    it overrules --max_seq_len. A larger cache than the window is refused."""
    def slots(asked: int | None = None, **changes: object) -> int:
        cfg = Config.from_dict(tiny.SHAPE | {"model_type": "mistral", "max_position_embeddings": 32768} | changes)
        return options.context(argparse.Namespace(max_seq_len=asked), cfg)

    assert slots() == slots(sliding_window=None) == 4096
    assert slots(sliding_window=1000) == 1000 and slots(sliding_window=8000) == 4096
    assert slots(sliding_window=1000, max_position_embeddings=300) == slots(max_position_embeddings=300) == 300
    assert slots(77, sliding_window=50) == 77
