"""What the tokenizer files of a checkpoint folder say, as one `tokenizers` BPE, its special tokens and chat template.

tokenizer.json is preferred; a tokenizer.model (sentencepiece, or Llama 3's tiktoken: told apart by content) is rebuilt
with transformers' own recipe, so that the ids are AutoTokenizer's. One thing is not: where tokenizer_config.json does
not say add_bos_token, a tokenizer.model adds bos, as Meta's code and transformers 4 do (transformers 5 does not).
"""
import base64
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment
from sentencepiece import SentencePieceProcessor
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors
from tokenizers import Tokenizer as BPE

# The byte-level alphabet: a printable byte is its own character, the others are, in order, those from U+0100 on.
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
CHAR_OF = dict(zip(sorted(range(256), key=lambda byte: chr(byte) not in ALPHABET), ALPHABET, strict=True))
BYTE_OF = {char: byte for byte, char in CHAR_OF.items()}
# Llama 3: how the text is split, and Meta's names among the 256 ids after the ranks (the others are reserved).
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_NAMES = {0: "begin_of_text", 1: "end_of_text", 6: "start_header_id", 7: "end_header_id", 9: "eot_id"}


@contextmanager
def clear_error(what: str) -> Iterator[None]:
    """Whatever goes wrong (`tokenizers` raises bare Exceptions, a template anything) as a ValueError saying where."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{what}: {str(error) or repr(error)}") from error


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; {} if there is no such file."""
    with clear_error(f"{path} is broken, copy it again"):
        value = json.loads(path.read_bytes()) if path.exists() else {}
        return {**value}


def load_bpe(folder: Path, model: dict[str, Any]) -> tuple[BPE, dict[str, Any]]:
    """The BPE of a folder whose config.json is `model`, and tokenizer_config.json with special tokens as strings."""
    path = next((folder / name for name in ("tokenizer.json", "tokenizer.model") if (folder / name).exists()), None)
    if path is None:
        raise FileNotFoundError(f"{folder} has no tokenizer.json and no tokenizer.model: copy one into it")
    config = read_json(folder / "tokenizer_config.json")
    if "added_tokens_decoder" not in config:  # an older folder: two more files
        config |= read_json(folder / "special_tokens_map.json")
    added = read_json(folder / "added_tokens.json")
    with clear_error(f"{path} is broken, copy it again"):
        if path.suffix == ".json":
            bpe, implied = BPE.from_file(str(path)), {}
        else:
            bpe, implied = from_model(path.read_bytes(), config.get("added_tokens_decoder", {}))
        byte_level = isinstance(bpe.decoder, decoders.ByteLevel)
        if implied and byte_level and model.get("bos_token_id") not in (None, bpe.token_to_id(implied["bos_token"])):
            raise ValueError("config.json has another bos_token_id, so lines are missing")  # special ids follow them
    with clear_error(f"{folder / 'tokenizer_config.json'} does not fit {path.name}, copy both again"):
        config = implied | {key: plain(value) for key, value in config.items() if value is not None}
        as_llama = config.get("tokenizer_class", "").removesuffix("Fast") == "LlamaTokenizer"
        if not byte_level and (implied or (as_llama and model.get("model_type", "llama") == "llama")):
            surround_as_llama(bpe, config.get("add_prefix_space", True), config.get("legacy", False))
        add_tokens(bpe, config, added)
        if implied:  # a tokenizer.json has its own post-processor, and transformers ignores the two flags beside it
            bos = [config["bos_token"]] * config.get("add_bos_token", True)
            eos = [config["eos_token"]] * config.get("add_eos_token", False)
            ids = [(token, bpe.token_to_id(token)) for token in bos + eos]
            bpe.post_processor = processors.TemplateProcessing(single=[*bos, "$A", *eos], special_tokens=ids)
    if not byte_level and b"ByteFallback" not in (bpe.decoder.__getstate__() if bpe.decoder else b""):
        raise ValueError(f"{path}: neither byte-level BPE nor sentencepiece BPE with byte fallback, so not supported")
    bpe.no_truncation()
    bpe.no_padding()
    return bpe, config


def from_model(data: bytes, listed: dict[str, Any]) -> tuple[BPE, dict[str, str]]:
    """A tokenizer.model as BPE, and the special tokens that its format implies. Pieces stand in merging order."""
    tiktoken = re.match(rb"[A-Za-z0-9+/]+=* \d+\s", data) is not None  # lines of "base64 rank"
    if tiktoken:
        ranks = [(base64.b64decode(token), int(rank)) for token, rank in map(bytes.split, data.splitlines())]
        vocab = {"".join(map(CHAR_OF.get, token)): rank for token, rank in ranks}
    else:
        spm = SentencePieceProcessor()
        spm.LoadFromSerializedProto(data)
        vocab = {spm.id_to_piece(i): i for i in range(len(spm))}
        if any(spm.get_score(i) % 1 for i in range(len(spm))):  # of BPE: minus the piece's place in merging order
            raise ValueError("a sentencepiece unigram model: only its tokenizer.json will do")
    if [*vocab.values()] != [*range(len(vocab))]:
        raise ValueError("ids are missing, double or out of order")
    splits = ((piece[:cut], piece[cut:]) for piece in vocab for cut in range(1, len(piece)))
    merges = [(left, right) for left, right in splits if left in vocab and right in vocab]
    bpe = BPE(models.BPE(vocab, merges, fuse_unk=True, byte_fallback=not tiktoken, ignore_merges=tiktoken))
    if not tiktoken:
        bpe.add_special_tokens([piece for piece, i in vocab.items() if spm.is_control(i)])
        return bpe, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    split = pre_tokenizers.Split(Regex(LLAMA3_SPLIT), "isolated")
    bpe.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    bpe.decoder = decoders.ByteLevel()
    reserved = (f"reserved_special_token_{i}" for i in range(256))
    names = [f"<|{LLAMA3_NAMES.get(i) or next(reserved)}|>" for i in range(256)]
    bpe.add_special_tokens([plain(listed.get(str(len(vocab) + i), name)) for i, name in enumerate(names)])
    return bpe, {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}


def surround_as_llama(bpe: BPE, add_prefix_space: bool, legacy: bool) -> None:
    """What transformers' LlamaTokenizer puts around a BPE: a space before the text (legacy: before every segment)."""
    scheme = ("always" if legacy else "first") if add_prefix_space else "never"
    bpe.normalizer = None
    bpe.pre_tokenizer = pre_tokenizers.Metaspace("▁", scheme, split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    bpe.decoder = decoders.Sequence(steps + [decoders.Strip(" ", 1, 0)] * add_prefix_space)


def plain(token: Any) -> Any:
    return token["content"] if isinstance(token, dict) and "content" in token else token


def add_tokens(bpe: BPE, config: dict[str, Any], added: dict[str, int]) -> None:
    """The tokens that a text is split at first: added_tokens_decoder, else added_tokens.json; and the named ones."""
    special = [value for key, value in config.items() if key.endswith("_token") and isinstance(value, str)]
    special += map(plain, config.get("additional_special_tokens", []))
    listed = config.get("added_tokens_decoder", {})
    bpe.add_tokens([AddedToken(**listed[i]) for i in sorted(listed, key=int)])
    bpe.add_tokens([AddedToken(token, special=token in special) for token in sorted(added, key=added.get)])
    known = {token.content for token in bpe.get_added_tokens_decoder().values()}
    bpe.add_special_tokens([token for token in special if token not in known])


def load_template(folder: Path, source: str | list | dict | None) -> jinja2.Template | None:
    """chat_template.jinja, else the chat_template of tokenizer_config.json, sandboxed: it is a stranger's program."""

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:  # jinja's own escapes < and >
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    path = folder / "chat_template.jinja"
    with clear_error(f"{path if path.exists() else folder / 'tokenizer_config.json'}: broken chat template"):
        if path.exists():
            source = path.read_text("utf-8")
        if isinstance(source, list):
            source = {template["name"]: template["template"] for template in source}
        if isinstance(source, dict):
            source = source.get("default")
        if source is None:
            return None
        extensions = ["jinja2.ext.loopcontrols"]
        env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
        env.filters["tojson"] = tojson
        env.globals |= {"raise_exception": raise_exception, "strftime_now": lambda form: datetime.now().strftime(form)}
        # {% generation %} ... {% endgeneration %} marks the text to train on: here a block that is always written
        source = re.sub(r"(\{%[-+]?\s*)generation(\s*[-+]?%\})", r"\1if true\2", source)
        return env.from_string(re.sub(r"(\{%[-+]?\s*)endgeneration(\s*[-+]?%\})", r"\1endif\2", source))
