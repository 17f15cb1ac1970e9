"""The tokenizers that several files compare: trained once for all tests."""
import base64
from pathlib import Path

import pytest
import sentencepiece
import tiktoken
from tokenizer_folders import BYTE_LEVEL, CORPUS, meta_encoding, save_byte_level, train_byte_level, write

from formats.tokenizer_files import BYTE_OF
from tokenizer import Tokenizer


@pytest.fixture(scope="session")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("byte_level")
    return {kind: save_byte_level(root / kind, kind) for kind in BYTE_LEVEL}


@pytest.fixture(scope="session")
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


@pytest.fixture(scope="session")
def tiktoken_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiktoken")
    vocab = train_byte_level(BYTE_LEVEL["llama3"], []).get_vocab()
    tokens = [bytes(BYTE_OF[c] for c in token) for token in sorted(vocab, key=vocab.get)]
    lines = map(base64.b64encode, [*tokens, b" zyxwvu"])  # the last one: a whole word that no merges make
    (folder / "tokenizer.model").write_bytes(b"".join(b"%s %d\n" % (line, i) for i, line in enumerate(lines)))
    return folder


@pytest.fixture(scope="session")
def loaded(byte_level: dict[str, Path], spm_folder: Path, tiktoken_folder: Path) -> dict[str, Tokenizer]:
    return {k: Tokenizer(v) for k, v in {**byte_level, "spm": spm_folder, "tiktoken": tiktoken_folder}.items()}


@pytest.fixture(scope="session")
def meta(tiktoken_folder: Path) -> tiktoken.Encoding:
    return meta_encoding(tiktoken_folder)
