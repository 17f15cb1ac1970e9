"""Small tokenizers, trained here, in folders as they are published; and the programs that they are compared with."""
import base64
import json
import random
from pathlib import Path

import sentencepiece
import tiktoken
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as BPE
from transformers import LlamaTokenizer, PreTrainedTokenizerFast

from formats.tokenizer_files import LLAMA3_SPLIT
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
KINDS = [*BYTE_LEVEL, "spm", "tiktoken"]


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


def llama_oracle(folder: Path, **options: object) -> LlamaTokenizer:
    """transformers' tokenizer for a sentencepiece model, built from the pieces, since its own reader needs protobuf."""
    spm = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    vocab = {spm.id_to_piece(i): i for i in range(len(spm))}
    pairs = [(p[:k], p[k:], i) for p, i in vocab.items() for k in range(1, len(p))]
    merges = [(a, b) for a, b, i in sorted(pairs, key=lambda x: x[2]) if a in vocab and b in vocab]
    return LlamaTokenizer(vocab=vocab, merges=merges, **{"add_bos_token": True, **options})


def meta_encoding(folder: Path) -> tiktoken.Encoding:
    """Llama 3's encoding as in Meta's release: the ranks of the file, then 256 special tokens."""
    lines = (folder / "tokenizer.model").read_bytes().splitlines()
    ranks = {base64.b64decode(line.split()[0]): i for i, line in enumerate(lines)}
    special = ["<|begin_of_text|>", "<|end_of_text|>", *(f"<|reserved_special_token_{i}|>" for i in range(4))]
    special += ["<|start_header_id|>", "<|end_header_id|>", "<|reserved_special_token_4|>", "<|eot_id|>"]
    special += [f"<|reserved_special_token_{i}|>" for i in range(5, 251)]
    names = {name: len(ranks) + i for i, name in enumerate(special)}
    return tiktoken.Encoding("meta", pat_str=LLAMA3_SPLIT, mergeable_ranks=ranks, special_tokens=names)
