"""tokenizer.py against transformers, sentencepiece and tiktoken, on the small tokenizers of tests/tokenizer_folders.py.

    python -m pytest tests/formats/test_tokenizer.py
"""
import base64
import json
import random
from pathlib import Path

import pytest
import sentencepiece
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_folders import (
    BYTE_LEVEL,
    PIECES,
    STRINGS,
    assert_same,
    copy_with,
    llama_oracle,
    meta_encoding,
    write,
)
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as BPE
from transformers import AutoTokenizer
from transformers.integrations.mistral.tokenizer import MistralConverter

from formats.families import FAMILIES, WRAPPERS
from formats.gguf_tokenizer import TEKKEN_SPLIT
from formats.tokenizer_files import BYTE_OF, CHAR_OF, LLAMA3_SPLIT
from tokenizer import Tokenizer

# ----- Ids and text ------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", BYTE_LEVEL)
def test_byte_level_as_transformers(byte_level: dict[str, Path], kind: str) -> None:
    """Fails if a part of tokenizer.json is ignored: pre-tokenizer, normalizer, post-processor or added tokens. Fails
    too if decoded text is cleaned up: clean_up_tokenization_spaces is true here, as in Llama 3's files, and must not be
    obeyed."""
    ours, oracle = Tokenizer(byte_level[kind]), AutoTokenizer.from_pretrained(byte_level[kind])
    assert_same(ours, oracle, [*STRINGS, "deux mots <think>", "a , b ."])
    assert (ours.vocab_size, ours.bos_id) == (len(oracle), oracle.bos_token_id)


@pytest.mark.slow
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


@pytest.mark.slow
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
        for model_type in {*FAMILIES, *WRAPPERS} - {"qwen2", "qwen3"}:  # these never have such a tokenizer
            write(tmp_path / "tokenizer_config.json", {"tokenizer_class": tokenizer_class, **names})
            write(tmp_path / "config.json", {"model_type": model_type})
            oracle = AutoTokenizer.from_pretrained(tmp_path)
            seen.add(tuple(oracle("<s>[INST] a").input_ids))
            assert_same(Tokenizer(tmp_path), oracle, STRINGS[:150])
    assert len(seen) == 2  # otherwise the two fields would prove nothing


def test_code_llama(spm_folder: Path, tmp_path: Path) -> None:
    """Fails if a CodeLlamaTokenizer gives other ids than in transformers, where it is LlamaTokenizer without `legacy`,
    always strips when it decodes, and has five tokens that its files need not mention."""
    bpe = llama_oracle(spm_folder).backend_tokenizer
    bpe.pre_tokenizer = None
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    bpe.save(str(tmp_path / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    for name in ("CodeLlamaTokenizer", "CodeLlamaTokenizerFast"):
        for model_type, more in (("llama", {}), ("llama", {"legacy": True, "add_prefix_space": False}),
                                 ("llama", {"prefix_token": "▁<PRE>", "fill_token": None}), ("mistral", {})):
            write(tmp_path / "tokenizer_config.json", {"tokenizer_class": name, **names, **more})
            write(tmp_path / "config.json", {"model_type": model_type})
            texts = [*STRINGS[:100], " hi", "<s>hi", "▁<PRE> a▁<SUF>b▁<MID>", "▁<EOT>"]
            assert_same(Tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path), texts)


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


@pytest.mark.slow
@settings(max_examples=500, deadline=None)
@given(text=st.text(st.sampled_from("abe \n'1.") | st.characters(exclude_categories=["Cs"], exclude_characters="<▁")))
def test_any_text(loaded: dict[str, Tokenizer], meta: tiktoken.Encoding, text: str) -> None:
    """Fails if rare characters or ties between merges give other ids than Meta's code, or if a text is not the same
    after encoding and decoding."""
    assert loaded["tiktoken"].encode(text)[1:] == meta.encode(text)
    assert loaded["tiktoken"].decode(meta.encode(text)) == text
    assert loaded["gpt2"].decode(loaded["gpt2"].encode(text)) == text
    assert loaded["spm"].decode(loaded["spm"].encode(text)) == text.removeprefix(" ")


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
        Tokenizer(folder).chat([{"role": "user", "content": "Hi"}])
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


def test_tekken(byte_level: dict[str, Path], tmp_path: Path) -> None:
    """Fails if Mistral's tekken.json gives other ids than in transformers: a special token that the file does not list,
    tokens beyond the vocabulary's size, or the order of merges. Fails too if no bos begins a text."""
    learned = json.loads((byte_level["llama3"] / "tokenizer.json").read_text())["model"]["vocab"]
    learned = [token for token in sorted(learned, key=learned.get) if set(token) <= BYTE_OF.keys()]
    pieces = sorted(CHAR_OF.values()) + [token for token in learned if len(token) > 1]
    special = [{"rank": i, "token_str": name} for i, name in enumerate(("<unk>", "<s>", "</s>", "[INST]"))]
    write(tmp_path / "tekken.json", {
        "config": {"pattern": TEKKEN_SPLIT, "default_num_special_tokens": 9, "default_vocab_size": 9 + len(pieces)},
        "special_tokens": special[::-1],
        "vocab": [{"rank": i, "token_bytes": base64.b64encode(bytes(map(BYTE_OF.get, piece))).decode()}
                  for i, piece in enumerate([*pieces, CHAR_OF[0] * 3])]})
    write(tmp_path / "config.json", {"model_type": "mistral3", "text_config": {"bos_token_id": 1, "eos_token_id": 2}})
    write(tmp_path / "chat_template.json", {"chat_template": "{{ bos_token }}[INST]{{ messages[0]['content'] }}"})
    ours, oracle = Tokenizer(tmp_path), MistralConverter(str(tmp_path / "tekken.json")).converted()
    for text in (*STRINGS[:150], "[INST] a</s><SPECIAL_7>b"):
        ids = oracle.encode(text, add_special_tokens=False).ids
        assert ours.encode(text, add_special_tokens=False) == ids and ours.encode(text) == [1, *ids], repr(text)
        assert ours.decode(ids) == oracle.decode(ids)
    assert ours.vocab_size == 9 + len(pieces) and ours.stop_ids == {2}
    assert ours.chat([{"role": "user", "content": "a"}])[:2] == [1, 3]
    (tmp_path / "tekken.json").write_text('{"config": {"pattern": "."}, "vocab": []}')
    with pytest.raises(ValueError, match="tekken.json is broken"):
        Tokenizer(tmp_path)


# ----- What files do not say, or say wrongly -------------------------------------------------------------------------


@pytest.mark.parametrize("model_type, tokens", [("mistral3", 2), ("llama", 1)])
def test_mistrals_words(model_type: str, tokens: int, tmp_path: Path) -> None:
    """Fails if a tokenizer.json of Mistral's with Llama 3's pattern, which transformers 4 wrote, cuts words as Llama 3
    does, or if Llama 3 no longer does."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = BPE(models.BPE({token: i for i, token in enumerate(["<s>", "</s>", *alphabet, "aB"])}, [("a", "B")]))
    split = pre_tokenizers.Split(Regex(LLAMA3_SPLIT), "isolated")
    bpe.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    bpe.decoder = decoders.ByteLevel()
    bpe.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    assert len(Tokenizer(tmp_path).encode("aB")) == tokens


@pytest.mark.parametrize("extra", [["<tool>", "<think>"], {"tool": "<tool>", "think": "<think>"}])
def test_tokens_that_are_named_only(extra: list | dict, tmp_path: Path) -> None:
    """Fails if special tokens under transformers 5's name are taken for text, or if a token that ends a text is shown
    where its file does not call it special."""
    bpe = BPE(models.BPE({token: i for i, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(False), decoders.ByteLevel()
    bpe.add_tokens(["<end>", "<plain>"])
    bpe.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<end>", "extra_special_tokens": extra}))
    tokenizer = Tokenizer(tmp_path)
    ids = tokenizer.encode("a<tool>b<plain><end>")
    assert len(ids) == 5 and tokenizer.decode(ids) == "ab<plain>"
