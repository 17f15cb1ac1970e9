"""tokenizer.py against transformers, sentencepiece and tiktoken, on small tokenizers trained here.

    python -m pytest tests/formats/test_tokenizer.py
"""

import base64
import functools
import json
import random
from datetime import datetime
from pathlib import Path

import pytest
import sentencepiece
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as BPE
from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerFast

from formats.tokenizer_files import BYTE_OF, LLAMA3_SPLIT
from tokenizer import Tokenizer

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
PIECES = [
    "def f(x):\n    return x ** 2  # square\n", "int main() {\n\tputs(\"hi\");\n}\n", "for (;;) { i++; }",
    "SELECT * FROM t;", "The quick brown fox", " jumps over", " the lazy dog.", "I'll", "they've", "DON'T",
    " don't", "naïve café", "Ελλάδα", "你好，世界！", "日本語のテキスト", "한국어", "こんにちは",
    "مرحبا بالعالم", "שלום", "हिन्दी में", "ภาษาไทย", "Привет, мир", "👍", "👩‍👩‍👧‍👦", "🏳️‍🌈", "🇨🇭🇩🇪",
    "👋🏽", "e\u0301a\u0308\u0323", "Z͑ͫ̓ͪ̂ͫ̽", "\u200b", "\ufeff", "\u00a0", "\ufffd", "\u2028", "𝔘𝔫𝔦", "\x00",
    "\x7f", " ", "  ", "   ", "        ", "\n", "\n\n", "\n\n\n", "\t", "\t\t", "\r\n", " \n ", "\n \n", "1",
    "12", "123", "1234567890", "3.14159", "1,000,000", "0x1F", "２０２４", "½", "!!!", "...", "->", "=>", "<|",
    "|>", "<s>", "</s>", "<unk>", "<0x0A>", "[INST]", "▁", "a▁b", "Ġ", "https://example.com/a?b=c&d=%20",
    "{\"a\": [1, 2]}", "\\n", "$x^2$", "C++", "#include <stdio.h>", "@user", *SPECIAL, "<|eot_id|>",
    "<|begin_of_text|>", "<|reserved_special_token_7|>", "<think>",
]  # fmt: skip


def mixed_strings() -> list[str]:
    rng = random.Random(0)
    mixed = ["".join(rng.choices(PIECES, k=rng.randint(2, 9))) for _ in range(400)]
    return ["", *PIECES, *mixed, *(" " + piece for piece in PIECES), *(piece + " " for piece in PIECES)]


STRINGS = mixed_strings()
CORPUS = [" ".join(PIECES), *STRINGS[:300]]
QWEN_SPLIT = LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
BYTE_LEVEL = {
    "gpt2": [pre_tokenizers.ByteLevel(add_prefix_space=False)],
    "smollm": [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)],
    "llama3": [pre_tokenizers.Split(Regex(LLAMA3_SPLIT), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)],
    "qwen": [pre_tokenizers.Split(Regex(QWEN_SPLIT), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)],
}
USER_ASSISTANT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}]


def train_byte_level(steps: list, special: list[str], size: int = 700) -> BPE:
    bpe = BPE(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(steps)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(CORPUS, trainer)
    return bpe


def write(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value), "utf-8")


def save_byte_level(folder: Path, kind: str) -> Path:
    """Save a folder as transformers does, with ChatML tokens, an added token that is not special, and one with a space.
    """
    bpe = train_byte_level(BYTE_LEVEL[kind], SPECIAL)
    if kind in ("llama3", "qwen"):
        bpe.normalizer = normalizers.NFC()
    if kind == "llama3":
        bos = ("<|endoftext|>", bpe.token_to_id("<|endoftext|>"))
        bpe.post_processor = processors.TemplateProcessing(single=[bos[0], "$A"], special_tokens=[bos])
    bpe.add_tokens([AddedToken("<think>", special=False, normalized=False), AddedToken("deux mots", special=False)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<|endoftext|>", eos_token="<|im_end|>", clean_up_tokenization_spaces=True
    )
    fast.save_pretrained(folder)
    write(folder / "config.json", {"model_type": "llama", "eos_token_id": 0})
    return folder


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("byte_level")
    return {kind: save_byte_level(root / kind, kind) for kind in BYTE_LEVEL}


@pytest.fixture(scope="module")
def spm_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("spm")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([line for text in CORPUS for line in text.splitlines() if "\x00" not in line]),
        model_prefix=str(folder / "tokenizer"), vocab_size=800, model_type="bpe", byte_fallback=True,
        character_coverage=0.98, normalization_rule_name="identity", remove_extra_whitespaces=False,
        split_digits=True, allow_whitespace_only_pieces=True, num_threads=1, minloglevel=2,
    )  # fmt: skip
    write(folder / "config.json", {"model_type": "llama"})
    return folder


@pytest.fixture(scope="module")
def tiktoken_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiktoken")
    vocab = train_byte_level(BYTE_LEVEL["llama3"], []).get_vocab()
    tokens = [bytes(BYTE_OF[c] for c in token) for token in sorted(vocab, key=vocab.get)]
    lines = map(base64.b64encode, [*tokens, b" zyxwvu"])  # the last one: a whole word that no merges make
    (folder / "tokenizer.model").write_bytes(b"".join(b"%s %d\n" % (line, i) for i, line in enumerate(lines)))
    return folder


def copy_with(source: Path, target: Path, **config: object) -> Path:
    """Copy a tokenizer folder, and set these values in its tokenizer_config.json."""
    target.mkdir()
    for path in source.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    old = target / "tokenizer_config.json"
    write(old, {**(json.loads(old.read_text("utf-8")) if old.exists() else {}), **config})
    return target


def assert_same(ours: Tokenizer, oracle: PreTrainedTokenizerFast, strings: list[str]) -> None:
    for text in strings:
        ids = oracle(text).input_ids
        assert ours.encode(text) == ids, repr(text)
        assert ours.decode(ids) == oracle.decode(ids, skip_special_tokens=True), repr(text)


# ----- Ids and text ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", BYTE_LEVEL)
def test_byte_level_as_transformers(byte_level: dict[str, Path], kind: str) -> None:
    """Fails if a part of tokenizer.json is ignored: pre-tokenizer, normalizer, post-processor or added tokens. Fails
    too if decoded text is cleaned up: clean_up_tokenization_spaces is true here, as in Llama 3's files, and must not be
    obeyed."""
    ours, oracle = Tokenizer(byte_level[kind]), AutoTokenizer.from_pretrained(byte_level[kind])
    assert_same(ours, oracle, [*STRINGS, "deux mots <think>", "a , b ."])
    assert (ours.vocab_size, ours.bos_id) == (len(oracle), oracle.bos_token_id)


def llama_oracle(folder: Path, **options: object) -> LlamaTokenizer:
    """transformers' tokenizer for a sentencepiece model, built from the pieces, since its own reader needs protobuf."""
    spm = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    vocab = {spm.id_to_piece(i): i for i in range(len(spm))}
    pairs = [(p[:k], p[k:], i) for p, i in vocab.items() for k in range(1, len(p))]
    merges = [(a, b) for a, b, i in sorted(pairs, key=lambda x: x[2]) if a in vocab and b in vocab]
    return LlamaTokenizer(vocab=vocab, merges=merges, **{"add_bos_token": True, **options})


@pytest.mark.parametrize(
    "options", [{}, {"legacy": True}, {"add_prefix_space": False}, {"add_eos_token": True}, {"add_bos_token": False}]
)
def test_sentencepiece_as_transformers(spm_folder: Path, tmp_path: Path, options: dict[str, bool]) -> None:
    """Fails if a tokenizer.model gives other ids than transformers: the leading space (one before the text, with legacy
    one before every segment), byte fallback, bos and eos."""
    oracle = llama_oracle(spm_folder, **options)
    ours = Tokenizer(copy_with(spm_folder, tmp_path / "x", tokenizer_class="LlamaTokenizer", **options))
    assert_same(ours, oracle, STRINGS)
    assert (ours.vocab_size, ours.bos_id, ours.stop_ids) == (len(oracle), 1, {2})


def test_sentencepiece_as_sentencepiece(spm_folder: Path) -> None:
    """Fails if the merges are rebuilt in a wrong order: the ids would differ from sentencepiece's own."""
    ours = Tokenizer(spm_folder)
    spm = sentencepiece.SentencePieceProcessor(model_file=str(spm_folder / "tokenizer.model"))
    compared = 0
    for text in STRINGS:  # before a text that starts with a space sentencepiece adds another one, transformers does not
        if text.strip(" ") == text != "" and not any(x in text for x in ("<s>", "</s>", "<unk>", "\x00", "▁")):
            assert ours.encode(text) == [1, *spm.encode(text)], repr(text)
            compared += 1
    assert compared > 100


def test_llama_2_tokenizer_json(spm_folder: Path, tmp_path: Path) -> None:
    """Fails if the normalizer of an old tokenizer.json is obeyed where transformers' LlamaTokenizer overrides it: every
    segment after a special token would get a space, as after "<s>" in every Llama-2 prompt "<s>[INST]"."""
    bpe = llama_oracle(spm_folder).backend_tokenizer
    bpe.pre_tokenizer = None
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    bpe.save(str(tmp_path / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    seen = set()
    for tokenizer_class in ("LlamaTokenizer", "LlamaTokenizerFast", "PreTrainedTokenizerFast"):
        for model_type in ("llama", "mistral"):
            write(tmp_path / "tokenizer_config.json", {"tokenizer_class": tokenizer_class, **names})
            write(tmp_path / "config.json", {"model_type": model_type})
            oracle = AutoTokenizer.from_pretrained(tmp_path)
            seen.add(tuple(oracle("<s>[INST] a").input_ids))
            assert_same(Tokenizer(tmp_path), oracle, STRINGS[:150])
    assert len(seen) == 2  # otherwise the two fields would prove nothing


def test_added_tokens_of_older_folders(spm_folder: Path, tmp_path: Path) -> None:
    """Fails if added_tokens.json or special_tokens_map.json is ignored: <|im_end|> would become several pieces."""
    folder = copy_with(spm_folder, tmp_path / "x")
    size = Tokenizer(spm_folder).vocab_size
    write(folder / "added_tokens.json", {"<think>": size + 1, "<|im_end|>": size})
    write(folder / "special_tokens_map.json", {"eos_token": {"content": "<|im_end|>", "lstrip": False}})
    ours = Tokenizer(folder)
    assert ours.encode("<|im_end|><think>") == [1, size, size + 1]
    assert ours.decode([size, size + 1]) == "<think>"
    assert ours.stop_ids == {size}


def test_added_tokens_decoder(spm_folder: Path, tmp_path: Path) -> None:
    """Fails if the flags or ids in added_tokens_decoder are ignored. rstrip, as in Phi-3, swallows the spaces after a
    token."""
    size = Tokenizer(spm_folder).vocab_size
    flags = {"lstrip": False, "normalized": False, "rstrip": True, "single_word": False, "special": True}
    listed = {str(size + i): {"content": name, **flags} for i, name in enumerate(["<|user|>", "<|end|>"])}
    ours = Tokenizer(copy_with(spm_folder, tmp_path / "x", added_tokens_decoder=listed, eos_token="<|end|>"))
    oracle = llama_oracle(spm_folder, eos_token="<|end|>")
    oracle.add_tokens([AddedToken(**token) for token in listed.values()], special_tokens=True)
    for text in ("<|user|>  Hi<|end|> a", "a <|end|>\n\n<|user|>", "<|user|>"):
        assert ours.decode(ours.encode(text)) == oracle.decode(oracle(text).input_ids, skip_special_tokens=True)
    assert ours.encode("<|user|>  Hi") == ours.encode("<|user|>Hi") == [1, size, *ours.encode("<|user|>Hi")[2:]]
    assert ours.stop_ids == {size + 1}


def meta_encoding(folder: Path) -> tiktoken.Encoding:
    """Llama 3's encoding as in Meta's release: the ranks of the file, then 256 special tokens."""
    lines = (folder / "tokenizer.model").read_bytes().splitlines()
    ranks = {base64.b64decode(line.split()[0]): i for i, line in enumerate(lines)}
    special = ["<|begin_of_text|>", "<|end_of_text|>", *(f"<|reserved_special_token_{i}|>" for i in range(4))]
    special += ["<|start_header_id|>", "<|end_header_id|>", "<|reserved_special_token_4|>", "<|eot_id|>"]
    special += [f"<|reserved_special_token_{i}|>" for i in range(5, 251)]
    names = {name: len(ranks) + i for i, name in enumerate(special)}
    return tiktoken.Encoding("meta", pat_str=LLAMA3_SPLIT, mergeable_ranks=ranks, special_tokens=names)


def test_llama_3_as_tiktoken(tiktoken_folder: Path) -> None:
    """Fails if Meta's own tokenizer.model is read wrong: the ranks, the split into words, or the 256 special ids, which
    are in no file."""
    ours, meta = Tokenizer(tiktoken_folder), meta_encoding(tiktoken_folder)
    bos = meta.encode_single_token("<|begin_of_text|>")
    assert (ours.bos_id, ours.vocab_size, ours.stop_ids) == (bos, meta.n_vocab, {bos + 1})
    for text in [*STRINGS, "a zyxwvu zyxwvut"]:
        ids = meta.encode(text, allowed_special="all")
        assert ours.encode(text) == [bos, *ids], repr(text)
        assert ours.decode(ids) == meta.decode([i for i in ids if i < bos]), repr(text)
    assert meta.decode([bos + i for i in range(256)]) == "".join(ours.bpe.id_to_token(bos + i) for i in range(256))


def test_llama_3_names_of_the_folder(tiktoken_folder: Path, tmp_path: Path) -> None:
    """Fails if tokens that Llama 3.1 renames are added as new ones: their ids would be beyond the vocabulary."""
    bos = Tokenizer(tiktoken_folder).bos_id
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    listed = {str(bos + 8): {"content": "<|eom_id|>", **flags}, str(bos + 9): {"content": "<|eot_id|>", **flags}}
    ours = Tokenizer(copy_with(tiktoken_folder, tmp_path / "x", added_tokens_decoder=listed, eos_token="<|eot_id|>"))
    assert ours.encode("<|eom_id|><|eot_id|>") == [bos, bos + 8, bos + 9]
    assert (ours.vocab_size, ours.stop_ids) == (bos + 256, {bos + 9})


@pytest.fixture(scope="module")
def loaded(byte_level: dict[str, Path], spm_folder: Path, tiktoken_folder: Path) -> dict[str, Tokenizer]:
    return {k: Tokenizer(v) for k, v in {**byte_level, "spm": spm_folder, "tiktoken": tiktoken_folder}.items()}


@pytest.fixture(scope="module")
def meta(tiktoken_folder: Path) -> tiktoken.Encoding:
    return meta_encoding(tiktoken_folder)


@settings(max_examples=500, deadline=None)
@given(text=st.text(st.sampled_from("abe \n'1.") | st.characters(exclude_categories=["Cs"], exclude_characters="<▁")))
def test_any_text(loaded: dict[str, Tokenizer], meta: tiktoken.Encoding, text: str) -> None:
    """Fails if rare characters or ties between merges give other ids than Meta's code, or if a text is not the same
    after encoding and decoding."""
    assert loaded["tiktoken"].encode(text)[1:] == meta.encode(text)
    assert loaded["tiktoken"].decode(meta.encode(text)) == text
    assert loaded["gpt2"].decode(loaded["gpt2"].encode(text)) == text
    assert loaded["spm"].decode(loaded["spm"].encode(text)) == text.removeprefix(" ")


# ----- Incremental decoding ----------------------------------------------------------------------------------------


KINDS = [*BYTE_LEVEL, "spm", "tiktoken"]
STREAMS = {"ids": st.lists(st.integers(0, 2**16), max_size=60), "cuts": st.lists(st.integers(0, 60), max_size=8)}


@functools.cache
def single_bytes(tokenizer: Tokenizer) -> list[int]:
    """The ids of tokens of one byte that is no character by itself."""
    return [i for i in range(tokenizer.vocab_size) if len(b := tokenizer.token_bytes(i)) == 1 and b[0] >= 0x80]


def byte_heavy(tokenizer: Tokenizer, numbers: list[int]) -> list[int]:
    """Ids from random numbers. Half of them are tokens of a single byte that is no character: broken UTF-8 of any kind.
    """
    single = single_bytes(tokenizer)
    return [single[n // 2 % len(single)] if n % 2 else n // 2 % (tokenizer.vocab_size + 5) for n in numbers]


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


@pytest.mark.parametrize("kind", [*BYTE_LEVEL, "tiktoken"])
@settings(max_examples=500, deadline=None)
@given(ids=STREAMS["ids"])
def test_byte_level_decode_is_its_own(loaded: dict[str, Tokenizer], kind: str, ids: list[int]) -> None:
    """Fails if the text differs from that of the decoder of `tokenizers`: the number of U+FFFD for broken UTF-8, and
    added tokens."""
    ids = byte_heavy(loaded[kind], ids)
    assert loaded[kind].decode(ids) == loaded[kind].bpe.decode(ids, skip_special_tokens=True)


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


# ----- Chat templates and stop ids ---------------------------------------------------------------------------------

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou"
    " are a helpful AI assistant<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n'"
    " + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA_2 = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}{% set system_message = "
    "messages[0]['content'] %}{% else %}{% set loop_messages = messages %}{% set system_message = false %}{% endif %}"
    "{% for message in loop_messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if loop.index0 == 0 and system_message != false %}{% set content = '<<SYS>>\\n' + system_message + "
    "'\\n<</SYS>>\\n\\n' + message['content'] %}{% else %}{% set content = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
LLAMA_3 = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\n\n" }}
{{- "Today Date: " + date_string + "\n\n" + system_message + "<|eot_id|>" }}
{%- if tools is not none %}
    {{- tools | tojson(indent=4) }}
{%- endif %}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}
"""
MISTRAL = """{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- set ns = namespace(index=0) %}
{%- for message in loop_messages %}
    {%- if (message["role"] == "user") != (ns.index % 2 == 0) %}
        {{- raise_exception("After the optional system message, conversation roles must alternate") }}
    {%- endif %}
    {%- set ns.index = ns.index + 1 %}
{%- endfor %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\n\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- else %}
        {{- " " + message["content"]|trim + eos_token}}
    {%- endif %}
{%- endfor %}
"""
QWEN = """{%- if tools %}
    {{- '<|im_start|>system\\n# Tools' }}
    {%- for tool in tools %}
        {{- "\\n" }}{{- tool | tojson }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- else %}
    {%- if messages[0].role == 'system' %}
        {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
        {%- break %}
    {%- endif %}
{%- endfor %}
  {% for message in messages %}
    {%- if message.role == "system" %}{% continue %}{% endif %}
    {%- if message.role == "assistant" and loop.index0 > ns.last_query_index %}
        {{- '<|im_start|>assistant\\n<think>\\n</think>\\n' + message.content.split('</think>')[-1].lstrip('\\n') }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' }}{% generation %}{{ message.content }}{% endgeneration %}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
{{- {"html": "<&>'", "é": [1, none]} | tojson }}
"""
TEMPLATES = {"chatml": CHATML, "llama2": LLAMA_2, "llama3": LLAMA_3, "mistral": MISTRAL, "qwen": QWEN}
TALK = [
    {"role": "system", "content": "Be  brief. "},
    {"role": "user", "content": " What is <b>2 & 3</b>?\n"},
    {"role": "assistant", "content": "\nFive — 五. "},
    {"role": "user", "content": "你好 👍 <|im_end|>"},
]
CHATS = [TALK, TALK[1:2], TALK[1:], TALK[:2]]


@pytest.mark.parametrize("form", ["jinja", "string", "list"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_chat_as_transformers(byte_level: dict[str, Path], tmp_path: Path, name: str, form: str) -> None:
    """Fails if a template runs differently from transformers: trimmed blocks, bos_token, raise_exception, strftime_now,
    tojson without HTML escapes, break and continue, generation blocks, tools that are none. Fails too if bos comes
    twice."""
    config = {
        "jinja": {"chat_template": "not this one"},
        "string": {"chat_template": TEMPLATES[name]},
        "list": {"chat_template": [{"name": k, "template": v} for k, v in (("a", "no"), ("default", TEMPLATES[name]))]},
    }[form]
    folder = copy_with(byte_level["llama3"], tmp_path / "x", **config)
    if form == "jinja":
        write(folder / "chat_template.jinja", TEMPLATES[name])
    ours, oracle = Tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    assert ours.has_chat_template
    for chat in CHATS:
        assert ours.chat(chat) == oracle.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    assert datetime.now().strftime("%Y") in ours.render(TALK) or name != "llama3"


def test_chat_on_sentencepiece(spm_folder: Path, tmp_path: Path) -> None:
    """Fails if the spaces around [INST], where sentencepiece and special tokens meet, are not those of transformers."""
    ours = Tokenizer(copy_with(spm_folder, tmp_path / "x", chat_template=LLAMA_2))
    oracle = llama_oracle(spm_folder, chat_template=LLAMA_2)
    for chat in CHATS:
        assert ours.chat(chat) == oracle.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)


def test_template_refuses(byte_level: dict[str, Path], tmp_path: Path) -> None:
    """Fails if the template's own error message is lost: it says what is wrong with the conversation."""
    ours = Tokenizer(copy_with(byte_level["gpt2"], tmp_path / "x", chat_template=LLAMA_2))
    with pytest.raises(ValueError, match="chat template failed: Conversation roles must alternate"):
        ours.chat([TALK[1], TALK[1]])
    plain = Tokenizer(byte_level["gpt2"])
    assert not plain.has_chat_template
    with pytest.raises(ValueError, match="no chat template"):
        plain.chat(TALK)


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ strftime_now.__globals__.update(x=1) }}",
        "{% set x = messages.append({'role': 'user', 'content': ''}) %}",
        "{{ ('%s' | attr('__class__')).mro() }}",
        "{{ '{0.__class__.__mro__}'.format(messages) }}",
        "{% for i in range(10**9) %}x{% endfor %}",
        "{% for i in range(99999) %}{% for j in range(99999) %}without end {% endfor %}{% endfor %}",
        "{{ 'x' * 10**8 }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ],
)
def test_template_is_sandboxed(byte_level: dict[str, Path], tmp_path: Path, template: str) -> None:
    """Fails if a template can run code or never ends. It comes with a download, and plain jinja2 would run any code."""
    ours = Tokenizer(copy_with(byte_level["gpt2"], tmp_path / "x", chat_template="." + template))
    with pytest.raises(ValueError, match="chat template failed"):
        ours.chat(TALK)


def test_stop_ids(byte_level: dict[str, Path], tmp_path: Path) -> None:
    """Fails if one of the sources of stop ids is ignored. Without the last one, the chat template, Llama-3-Instruct
    never stops if it has no generation_config.json: its config.json names only <|end_of_text|>, and a turn ends with
    <|eot_id|>."""
    folder = copy_with(byte_level["gpt2"], tmp_path / "x", eos_token="<|endoftext|>")
    assert Tokenizer(folder).stop_ids == {0}
    write(folder / "config.json", {"eos_token_id": [7, 8]})
    assert Tokenizer(folder).stop_ids == {0, 7, 8}
    write(folder / "generation_config.json", {"eos_token_id": 9})
    assert Tokenizer(folder).stop_ids == {0, 7, 8, 9}
    end = {"chatml": 2, "qwen": 2, "mistral": 0, "llama2": 0}
    for name, token in end.items():
        write(folder / "chat_template.jinja", TEMPLATES[name])
        assert Tokenizer(folder).stop_ids == {0, 7, 8, 9, token}, name
    write(folder / "chat_template.jinja", "{% for m in messages %}{{ m.role }} {{ m.content }}\n{% endfor %}<|im_end|>")
    assert Tokenizer(folder).stop_ids == {0, 2, 7, 8, 9}
    write(folder / "chat_template.jinja", "<|im_start|>{{ messages[0].content }}")
    assert Tokenizer(folder).stop_ids == {0, 7, 8, 9}


# ----- Broken files ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("tokenizer.json", b'{"version": "1.0"'),
        ("tokenizer.json", b"[]"),
        ("tokenizer.json", b"\xff\xfe"),
        ("tokenizer_config.json", b'"a string"'),
        ("tokenizer_config.json", b'{"added_tokens_decoder": ["a", "b"]}'),
        ("tokenizer_config.json", b'{"added_tokens_decoder": {"a": {"content": 3}}}'),
        ("tokenizer_config.json", b'{"tokenizer_class": 3}'),
        ("tokenizer_config.json", b'{"chat_template": 3}'),
        ("tokenizer_config.json", b'{"chat_template": [1, 2]}'),
        ("tokenizer_config.json", b'{"chat_template": "{% if %}"}'),
        ("chat_template.jinja", b"\xff"),
        ("chat_template.jinja", b"{{ 1 + }}"),
        ("config.json", b"{"),
        ("config.json", b'{"eos_token_id": "</s>"}'),
        ("generation_config.json", b"[1]"),
        ("special_tokens_map.json", b"3"),
    ],
)
def test_broken_file_is_named(byte_level: dict[str, Path], tmp_path: Path, name: str, data: bytes) -> None:
    """Fails if the error does not name the file to replace, or is longer than a line."""
    folder = copy_with(byte_level["gpt2"], tmp_path / "x")
    (folder / name).write_bytes(data)
    with pytest.raises(ValueError, match=name.replace(".", r"\.")) as raised:
        Tokenizer(folder)
    assert "\n" not in str(raised.value)


def test_truncated_model_is_named(spm_folder: Path, tiktoken_folder: Path, tmp_path: Path) -> None:
    """Fails if half a download is accepted: the ids of all special tokens would shift."""
    for number, source in enumerate([spm_folder, tiktoken_folder]):
        folder = copy_with(source, tmp_path / str(number))
        data = (source / "tokenizer.model").read_bytes()
        for size in (0, 1, 100, len(data) // 2, len(data) * 9 // 10 + 1):
            (folder / "tokenizer.model").write_bytes(data[:size])
            with pytest.raises(ValueError, match=r"tokenizer\.model"):
                Tokenizer(folder)
    # Without its last lines the file alone looks right.
    (folder / "tokenizer.model").write_bytes(b"".join(data.splitlines(keepends=True)[:-9]))
    write(folder / "config.json", {"bos_token_id": Tokenizer(source).bos_id})
    with pytest.raises(ValueError, match=r"tokenizer\.model.*lines are missing"):
        Tokenizer(folder)
    (folder / "tokenizer.model").unlink()
    with pytest.raises(FileNotFoundError, match=r"no tokenizer\.json and no tokenizer\.model"):
        Tokenizer(folder)


@pytest.mark.parametrize("kind", ["spm", "tiktoken"])
def test_flipped_bytes(kind: str, spm_folder: Path, tiktoken_folder: Path, tmp_path: Path) -> None:
    """Fails if a tokenizer.model with changed bytes gives neither an error that names it nor a tokenizer that works."""
    folder = copy_with({"spm": spm_folder, "tiktoken": tiktoken_folder}[kind], tmp_path / "x")
    data = (folder / "tokenizer.model").read_bytes()
    draw = random.Random(0)
    named = 0
    for _ in range(60):
        broken = bytearray(data)
        for _ in range(draw.choice((1, 2, 8))):
            broken[draw.randrange(len(data))] = draw.randrange(256)
        (folder / "tokenizer.model").write_bytes(broken)
        try:
            tokenizer = Tokenizer(folder)
        except ValueError as error:
            assert "tokenizer.model" in str(error)
            named += 1
        else:
            tokenizer.decode(tokenizer.encode("Hi, naïve 漢字 😀"))
    assert 5 < named < 60


def test_other_kinds_are_refused(tmp_path: Path, byte_level: dict[str, Path]) -> None:
    """Fails if tokens whose bytes depend on their neighbours are accepted, such as WordPiece's: streams would be wrong.
    """
    bpe = BPE.from_file(str(byte_level["gpt2"] / "tokenizer.json"))
    for decoder in (decoders.WordPiece(), decoders.Metaspace(), None):
        bpe.decoder = decoder
        bpe.save(str(tmp_path / "tokenizer.json"))
        with pytest.raises(ValueError, match="not supported"):
            Tokenizer(tmp_path)


def test_unigram_is_refused(tmp_path: Path) -> None:
    """Fails if a sentencepiece unigram model is read as BPE: the ids look right, but the model never saw such texts."""
    options = {"vocab_size": 300, "model_type": "unigram", "hard_vocab_limit": False, "minloglevel": 2}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(PIECES[:30] * 5), model_prefix=str(tmp_path / "tokenizer"), **options
    )
    with pytest.raises(ValueError, match=r"tokenizer\.model.*unigram"):
        Tokenizer(tmp_path)


def test_surrogates_are_refused(loaded: dict[str, Tokenizer]) -> None:
    """Fails if a prompt from bytes that are not UTF-8 ends in a TypeError that does not say so."""
    with pytest.raises(ValueError, match="surrogate"):
        loaded["gpt2"].encode("caf\udce9")


# ----- The demo model ----------------------------------------------------------------------------------------------

DEMO = Path(__file__).parents[2] / "checkpoints" / "HuggingFaceTB" / "SmolLM2-135M-Instruct"


@pytest.mark.skipif(not DEMO.is_dir(), reason="no demo checkpoint: run make demo")
def test_demo_checkpoint() -> None:
    """Fails if the tokenizer files that the converter wrote from a GGUF file give other ids, chats or stops than
    transformers."""
    ours, oracle = Tokenizer(DEMO), AutoTokenizer.from_pretrained(DEMO)
    assert_same(ours, oracle, STRINGS)
    for chat in CHATS:
        assert ours.chat(chat) == oracle.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    assert oracle.eos_token_id in ours.stop_ids
