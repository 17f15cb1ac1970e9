"""Text that is decoded as it comes, and where it stops, on the small tokenizers of tests/tokenizer_folders.py.

    python -m pytest tests/formats/test_streaming.py
"""
import functools
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_folders import BYTE_LEVEL, KINDS

from tokenizer import Tokenizer

NUMBERS = st.binary(max_size=120).map(lambda b: [*memoryview(b[:len(b) // 2 * 2]).cast("H")])  # a list is drawn slowly
STREAMS = {"ids": NUMBERS, "cuts": st.lists(st.integers(0, 60), max_size=8)}


@functools.cache
def single_bytes(tokenizer: Tokenizer) -> list[int]:
    """The ids of tokens of one byte that is no character by itself."""
    return [i for i in range(tokenizer.vocab_size) if len(b := tokenizer.token_bytes(i)) == 1 and b[0] >= 0x80]


def byte_heavy(tokenizer: Tokenizer, numbers: list[int]) -> list[int]:
    """Ids from random numbers. Half of them are tokens of a single byte that is no character: broken UTF-8 of any kind.
    """
    single = single_bytes(tokenizer)
    return [single[n // 2 % len(single)] if n % 2 else n // 2 % (tokenizer.vocab_size + 5) for n in numbers]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=1000, deadline=None)
@given(**STREAMS)
def test_stream_is_decode(loaded: dict[str, Tokenizer], kind: str, ids: list[int], cuts: list[int]) -> None:
    """Fails if text is lost, doubled or changed between two pushes: half characters, leading spaces, special ids, ids
    beyond the vocabulary, broken bytes. After every push the text so far must be a prefix of the whole text."""
    tokenizer = loaded[kind]
    ids = byte_heavy(tokenizer, ids)
    stream, whole, text = tokenizer.stream(), tokenizer.decode(ids), ""
    for start, end in zip([0, *sorted(cuts)], [*sorted(cuts), len(ids)], strict=True):
        text += stream.push(ids[start:end])
        assert whole.startswith(text)
    assert text + stream.flush() == whole


def first_stop(tokenizer: Tokenizer, ids: list[int], stops: list[str]) -> tuple[str, int | None]:
    """The text before the first stop that is complete, and the number of ids that complete it (None: no stop). This is
    the plain way: every prefix of the ids is decoded from the start, as far as its text is final."""
    for count in range(len(ids) + 1):
        text = tokenizer.stream().push(ids[:count])
        for end in range(len(text) + 1):
            ended = [stop for stop in stops if text[:end].endswith(stop)]
            if ended:
                return text[:end - len(max(ended, key=len))], count
    text = tokenizer.decode(ids)
    ends = [(at + len(stop), at) for stop in stops if (at := text.find(stop)) >= 0]
    return (text[:min(ends)[1]], len(ids)) if ends else (text, None)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gpt2", "spm"])
@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_stops(loaded: dict[str, Tokenizer], kind: str, data: st.DataObject) -> None:
    """Fails if a stop text is missed or shown: one that spans several tokens or pushes, begins inside another one, is
    begun but not completed, or holds half a character. Fails too if the stop depends on where the pushes end."""
    tokenizer = loaded[kind]
    text = data.draw(st.text(st.sampled_from("aab é"), min_size=4, max_size=20))
    ids = tokenizer.encode(text, add_special_tokens=False)
    if data.draw(st.booleans()):  # other ids of the same text: one for each byte
        single = {tokenizer.token_bytes(i): i for i in range(tokenizer.vocab_size)}
        ids = [i for byte in text.encode() if (i := single.get(bytes([byte]))) is not None]
    ids = ids[:data.draw(st.integers(1, len(ids)))] if ids else ids
    pieces = st.builds(lambda at, n: text[at % len(text):][:n], st.integers(0, 20), st.integers(1, 5))
    stops = data.draw(st.lists(pieces | st.sampled_from(["ab", "\ufffd", "aaa", "b a", "zz"]), min_size=1, max_size=3))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(ids)), max_size=5)))
    stream, shown, (wanted, count) = tokenizer.stream(stops), "", first_stop(tokenizer, ids, stops)
    for start, end in zip([0, *cuts], [*cuts, len(ids)], strict=True):
        shown += stream.push(ids[start:end])
        assert wanted.startswith(shown)
    assert shown + stream.flush() == wanted == tokenizer.decode(ids, stops)
    assert stream.stopped == (count is not None) and stream.tokens == (len(ids) if count is None else count)


def test_stop_holds_back_no_more_than_it_must(loaded: dict[str, Tokenizer]) -> None:
    """Fails if the beginning of a stop is shown, or if text that cannot become a stop is held back."""
    tokenizer = loaded["gpt2"]
    stream = tokenizer.stream(["\n\nUser:", "END"])
    shown = [stream.push(tokenizer.encode(piece, False)) for piece in ("Hi E", "N", "T", "\n\n", "Us", "er", ":", "x")]
    assert shown == ["Hi ", "", "ENT", "", "", "", "", ""] and stream.stopped


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*BYTE_LEVEL, "tiktoken"])
@settings(max_examples=500, deadline=None)
@given(ids=STREAMS["ids"])
def test_byte_level_decode_is_its_own(loaded: dict[str, Tokenizer], kind: str, ids: list[int]) -> None:
    """Fails if the text differs from that of the decoder of `tokenizers`: the number of U+FFFD for broken UTF-8, and
    added tokens."""
    ids = byte_heavy(loaded[kind], ids)
    assert loaded[kind].decode(ids) == loaded[kind].bpe.decode(ids, skip_special_tokens=True)


@pytest.mark.slow
@settings(max_examples=1000, deadline=None)
@given(ids=STREAMS["ids"])
def test_sentencepiece_decode_is_its_own(loaded: dict[str, Tokenizer], spm_folder: Path, ids: list[int]) -> None:
    """Fails if broken byte tokens are decoded differently from sentencepiece: one U+FFFD for each stray byte, and the
    characters around it unchanged."""
    spm = sentencepiece.SentencePieceProcessor(model_file=str(spm_folder / "tokenizer.model"))
    ids = [i for i in byte_heavy(loaded["spm"], ids) if 2 < i < len(spm)]  # special tokens are skipped beforehand
    assert loaded["spm"].decode(ids) == spm.decode([spm.piece_to_id("a"), *ids])[1:].removeprefix(" ")


@pytest.mark.parametrize("kind", KINDS)
def test_stream_does_not_wait(loaded: dict[str, Tokenizer], kind: str) -> None:
    """Fails if a stream holds back text that nothing can change any more, for example at a U+FFFD, real or from broken
    bytes. Fails too if its cost grows with the text: every id must be looked up exactly once."""
    tokenizer = loaded[kind]
    text = "Hi 你好 👩‍👩‍👧‍👦 \ufffd"
    lookups: list[int] = []
    stream = tokenizer.stream()
    stream.token_bytes = lambda i: lookups.append(i) or tokenizer.token_bytes(i)
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert "".join(stream.push([i]) for i in ids) == text
    stray = next(i for i in range(tokenizer.vocab_size) if tokenizer.token_bytes(i) == b"\x80")
    assert stream.push([stray] * 10) == "\ufffd" * 10
    lead = next(i for i in range(tokenizer.vocab_size) if tokenizer.token_bytes(i) == b"\xf0")
    assert stream.push([lead]) == ""
    assert stream.push(ids[:1]).startswith("\ufffd")
    assert len(lookups) == len(ids) + 12
