"""Reading the tokenizer files of a checkpoint folder: one `tokenizers` BPE, its special tokens, and its chat template.

tokenizer.json is preferred. A tokenizer.model (sentencepiece, or Llama 3's tiktoken: the content tells) is rebuilt with
transformers' own recipe, so that the ids are AutoTokenizer's. There is one difference: where tokenizer_config.json does
not mention add_bos_token, a tokenizer.model adds bos, as Meta's code and transformers 4 do (transformers 5 does not).
"""
import base64
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors
from tokenizers import Tokenizer as BPE

from formats.tekken import NAMED, from_tekken

# Byte-level BPE writes bytes as characters: a printable byte as itself, the others as U+0100 and following, in order.
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
CHAR_OF = dict(zip(sorted(range(256), key=lambda byte: chr(byte) not in ALPHABET), ALPHABET, strict=True))
BYTE_OF = {char: byte for byte, char in CHAR_OF.items()}
# Llama 3 cuts a text into words with this pattern.
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Mistral's and GPT-4o's words begin with capitals, and end with small letters.
WORD = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]%s[\p{Ll}\p{Lm}\p{Lo}\p{M}]%s"
OTHERS = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TEKKEN_SPLIT = "|".join((WORD % ("*", "+"), WORD % ("+", "*"), r"\p{N}", OTHERS))
MISTRALS = ("mistral", "mistral3", "ministral", "ministral3")  # model_types of config.json
# Llama 3 has 256 special ids after the ranks. These have names in Meta's release, the others are reserved.
LLAMA3_NAMES = {0: "begin_of_text", 1: "end_of_text", 6: "start_header_id", 7: "end_header_id", 9: "eot_id"}
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "tekken.json")
# The model_types whose tokenizer_class transformers believes; of all others it obeys the tokenizer.json.
LLAMA_CLASSES = ("llama", "seed_oss", "cwm", "helium", "smollm3")
# CodeLlamaTokenizer has these tokens even where tokenizer_config.json does not mention them.
INFILLING = {"prefix_token": "▁<PRE>", "middle_token": "▁<MID>", "suffix_token": "▁<SUF>", "eot_token": "▁<EOT>",
             "fill_token": "<FILL_ME>"}


@contextmanager
def clear_error(subject: str) -> Iterator[None]:
    """Turn any exception in the block into a ValueError that starts with `subject`. Nothing narrower will do:
    `tokenizers` raises bare Exceptions for a damaged file, and PanicException, which is no Exception, where its Rust
    code gives up; a chat template can raise anything."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"{subject}: {str(error) or repr(error)}") from error


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; {} if there is no such file. Raises ValueError for anything else."""
    with clear_error(f"{path} is broken, copy it again"):
        value = json.loads(path.read_bytes()) if path.exists() else {}
        return {**value}  # fails unless it is an object


# ----- The BPE of a folder -----------------------------------------------------------------------------------------


def load_bpe(folder: Path, model: dict[str, Any]) -> tuple[BPE, dict[str, Any]]:
    """The BPE of a folder, and its tokenizer_config.json with special tokens as strings.

    `model` is the folder's config.json. Raises FileNotFoundError, or ValueError that names the broken file.
    """
    path = find_tokenizer(folder)
    config = read_tokenizer_config(folder)
    added = read_json(folder / "added_tokens.json")
    with clear_error(f"{path} is broken, copy it again"):
        bpe, implied = read_bpe(path, config, model)
    with clear_error(f"{folder / 'tokenizer_config.json'} does not fit {path.name}, copy both again"):
        is_llama = is_llama_sentencepiece(bpe, implied, config, model)
        infills = is_llama and tokenizer_class(config) == "CodeLlamaTokenizer"
        config = (INFILLING if infills else {}) | config
        config = implied | {key: plain(value) for key, value in config.items() if value is not None}
        if is_llama:
            legacy = config.get("legacy", False) and not infills
            surround_as_llama(bpe, config.get("add_prefix_space", True), legacy, strip=infills)
        add_tokens(bpe, config, added)
        if implied:  # transformers ignores add_bos_token and add_eos_token beside a tokenizer.json
            add_bos_and_eos(bpe, config)
    check_decoder(bpe, path)
    bpe.no_truncation()
    bpe.no_padding()
    return bpe, config


def find_tokenizer(folder: Path) -> Path:
    """The first of TOKENIZERS that is there. Raises FileNotFoundError if none is."""
    for name in TOKENIZERS:
        if (folder / name).exists():
            return folder / name
    raise FileNotFoundError(f"{folder} has no tokenizer.json and no tokenizer.model: copy one into it")


def read_model(folder: Path) -> dict[str, Any]:
    """The folder's config.json; of a model that sees images too, with the entries of text_config that it lacks."""
    raw = read_json(folder / "config.json")
    text = raw.get("text_config")
    return (text if isinstance(text, dict) else {}) | {key: value for key, value in raw.items() if value is not None}


def read_tokenizer_config(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json as it is; in an older folder, with special_tokens_map.json merged into it."""
    config = read_json(folder / "tokenizer_config.json")
    if "added_tokens_decoder" not in config:  # an older folder
        config |= read_json(folder / "special_tokens_map.json")
    return config


def read_bpe(path: Path, config: dict[str, Any], model: dict[str, Any]) -> tuple[BPE, dict[str, str]]:
    """The BPE in one of TOKENIZERS, and the special tokens that the format implies. The latter are {} for a
    tokenizer.json, which says everything itself."""
    if path.name == "tekken.json":
        return from_tekken(read_json(path), CHAR_OF), NAMED
    if path.suffix == ".json":
        bpe = BPE.from_file(str(path))
        return (with_mistrals_words(bpe) if model.get("model_type") in MISTRALS else bpe), {}
    bpe, implied = from_model(path.read_bytes(), config.get("added_tokens_decoder", {}))
    if is_byte_level(bpe) and model.get("bos_token_id") not in (None, bpe.token_to_id(implied["bos_token"])):
        # tiktoken's special ids follow the ranks: a file that was cut at the end of a line shifts them
        raise ValueError("config.json has another bos_token_id, so lines are missing")
    return bpe, implied


def with_mistrals_words(bpe: BPE) -> BPE:
    """The tokenizer of a tekken model, cut into Mistral's words. transformers 4 wrote Llama 3's pattern into the
    tokenizer.json of some, as of Mistral Small 3.1; AutoTokenizer mends it with fix_mistral_regex=True. Llama 3 has
    "12" for a token, where tekken has single digits."""
    words = bpe.pre_tokenizer.__getstate__() if bpe.pre_tokenizer else b""
    if json.dumps(LLAMA3_SPLIT).encode() in words and bpe.token_to_id("12") is None:
        split = pre_tokenizers.Split(Regex(TEKKEN_SPLIT), "isolated")
        bpe.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    return bpe


def is_byte_level(bpe: BPE) -> bool:
    return isinstance(bpe.decoder, decoders.ByteLevel)


def is_llama_sentencepiece(bpe: BPE, implied: dict[str, str], config: dict[str, Any], model: dict[str, Any]) -> bool:
    """Whether transformers would make a LlamaTokenizer of it, which overrides the normalizer and the decoder: for any
    sentencepiece tokenizer.model, and for a tokenizer.json of this class in the folder of one of LLAMA_CLASSES."""
    has_llama_class = tokenizer_class(config) in ("LlamaTokenizer", "CodeLlamaTokenizer")
    if is_byte_level(bpe):
        return False
    return bool(implied) or (has_llama_class and model.get("model_type", "llama") in LLAMA_CLASSES)


def tokenizer_class(config: dict[str, Any]) -> str:
    return (config.get("tokenizer_class") or "").removesuffix("Fast")


def surround_as_llama(bpe: BPE, add_prefix_space: bool, legacy: bool, strip: bool) -> None:
    """Set what transformers' LlamaTokenizer puts around a BPE: a space before the text, or with `legacy` before every
    segment between special tokens. strip: decode without a leading space even if none is added."""
    scheme = ("always" if legacy else "first") if add_prefix_space else "never"
    bpe.normalizer = None
    bpe.pre_tokenizer = pre_tokenizers.Metaspace("▁", scheme, split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    bpe.decoder = decoders.Sequence(steps + [decoders.Strip(" ", 1, 0)] * (add_prefix_space or strip))


def plain(token: Any) -> Any:
    """A special token as a string, where the file has it as an object with `content`; any other value as it is."""
    return token["content"] if isinstance(token, dict) and "content" in token else token


def add_tokens(bpe: BPE, config: dict[str, Any], added: dict[str, int]) -> None:
    """Add the tokens that are cut out of a text before anything else: those that added_tokens_decoder lists with their
    flags, those of an older added_tokens.json (`added`), and special tokens that the config only names."""
    special = [value for key, value in config.items() if key.endswith("_token") and isinstance(value, str)]
    extra = config.get("extra_special_tokens", [])  # transformers 5's name: a list, or names and tokens
    extra = list(extra.values()) if isinstance(extra, dict) else extra
    special += map(plain, [*config.get("additional_special_tokens", []), *extra])
    listed = config.get("added_tokens_decoder", {})
    bpe.add_tokens([AddedToken(**listed[i]) for i in sorted(listed, key=int)])
    bpe.add_tokens([AddedToken(token, special=token in special) for token in sorted(added, key=added.get)])
    known = {token.content for token in bpe.get_added_tokens_decoder().values()}
    bpe.add_special_tokens([token for token in special if token not in known])


def add_bos_and_eos(bpe: BPE, config: dict[str, Any]) -> None:
    """Let `encode` put bos before a text (unless the config says no) and eos after it (only if the config says so)."""
    bos = [config["bos_token"]] * config.get("add_bos_token", True)
    eos = [config["eos_token"]] * config.get("add_eos_token", False)
    ids = [(token, bpe.token_to_id(token)) for token in bos + eos]
    bpe.post_processor = processors.TemplateProcessing(single=[*bos, "$A", *eos], special_tokens=ids)


def check_decoder(bpe: BPE, path: Path) -> None:
    """Raise ValueError for tokens that do not always stand for the same bytes. WordPiece's, for example, do not, and
    streamed text would be wrong."""
    has_byte_fallback = b"ByteFallback" in (bpe.decoder.__getstate__() if bpe.decoder else b"")
    if not is_byte_level(bpe) and not has_byte_fallback:
        raise ValueError(f"{path}: neither byte-level BPE nor sentencepiece BPE with byte fallback, so not supported")


# ----- A tokenizer.model -------------------------------------------------------------------------------------------


def from_model(data: bytes, listed: dict[str, Any]) -> tuple[BPE, dict[str, str]]:
    """A tokenizer.model as BPE, and the special tokens that its format implies. `listed`: added_tokens_decoder."""
    if re.match(rb"[A-Za-z0-9+/]+=* \d+\s", data):  # lines of "base64 rank"
        return from_tiktoken(data, listed)
    return from_sentencepiece(data)


def from_tiktoken(data: bytes, listed: dict[str, Any]) -> tuple[BPE, dict[str, str]]:
    """Llama 3's tokenizer.model. Its 256 special tokens are in no file of Meta's release; `listed` may rename them."""
    ranks = [(base64.b64decode(token), int(rank)) for token, rank in map(bytes.split, data.splitlines())]
    vocab = {"".join(map(CHAR_OF.get, token)): rank for token, rank in ranks}
    bpe = BPE(models.BPE(vocab, rebuild_merges(vocab), fuse_unk=True, byte_fallback=False, ignore_merges=True))
    split = pre_tokenizers.Split(Regex(LLAMA3_SPLIT), "isolated")
    bpe.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    bpe.decoder = decoders.ByteLevel()
    reserved = (f"reserved_special_token_{i}" for i in range(256))
    names = [f"<|{LLAMA3_NAMES.get(i) or next(reserved)}|>" for i in range(256)]
    bpe.add_special_tokens([plain(listed.get(str(len(vocab) + i), name)) for i, name in enumerate(names)])
    return bpe, {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}


def from_sentencepiece(data: bytes) -> tuple[BPE, dict[str, str]]:
    """A sentencepiece BPE model, such as Llama 2's. Raises ValueError for a unigram model."""
    from sentencepiece import SentencePieceProcessor  # here, since most folders have a tokenizer.json
    spm = SentencePieceProcessor()
    spm.LoadFromSerializedProto(data)
    vocab = {spm.id_to_piece(i): i for i in range(len(spm))}
    if any(spm.get_score(i) % 1 for i in range(len(spm))):  # a BPE's scores are whole: minus the place in merging order
        raise ValueError("a sentencepiece unigram model: only its tokenizer.json will do")
    bpe = BPE(models.BPE(vocab, rebuild_merges(vocab), fuse_unk=True, byte_fallback=True, ignore_merges=False))
    bpe.add_special_tokens([piece for piece, i in vocab.items() if spm.is_control(i)])
    return bpe, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def rebuild_merges(vocab: dict[str, int]) -> list[tuple[str, str]]:
    """The merges of a BPE whose pieces are in merging order: every way to cut a piece into two pieces, in that order.
    Raises ValueError where the ids of `vocab` are not 0, 1, 2 and so on."""
    if [*vocab.values()] != [*range(len(vocab))]:
        raise ValueError("ids are missing, double or out of order")
    splits = ((piece[:cut], piece[cut:]) for piece in vocab for cut in range(1, len(piece)))
    return [(left, right) for left, right in splits if left in vocab and right in vocab]


# ----- The chat template -------------------------------------------------------------------------------------------


def load_template(folder: Path, source: str | list | dict | None, file: Path | None = None) -> jinja2.Template | None:
    """The chat template in `file`, or else the folder's, or None if it has none: chat_template.jinja, or else `source`,
    the chat_template of tokenizer_config.json, or else chat_template.json. It runs in a sandbox, since it is a program
    from a download. Raises ValueError if it is broken. The filters and functions are those that transformers gives to
    templates."""

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:  # jinja's own one escapes < and >
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    path = file or folder / "chat_template.jinja"
    with clear_error(f"{path if file or path.exists() else folder / 'tokenizer_config.json'}: broken chat template"):
        if file or path.exists():
            source = path.read_text("utf-8-sig")
        if isinstance(source, list):  # several named templates
            source = {template["name"]: template["template"] for template in source}
        if isinstance(source, dict):
            source = source.get("default")
        if source is None:  # folders of models that see images may have it here
            source = read_json(folder / "chat_template.json").get("chat_template")
        if source is None:
            return None
        extensions = ["jinja2.ext.loopcontrols"]
        env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
        env.filters["tojson"] = tojson
        env.globals |= {"raise_exception": raise_exception, "strftime_now": lambda form: datetime.now().strftime(form)}
        # {% generation %} ... {% endgeneration %} marks the text to train on. Here it becomes an "if true" block.
        source = re.sub(r"(\{%[-+]?\s*)generation(\s*[-+]?%\})", r"\1if true\2", source)
        source = re.sub(r"(\{%[-+]?\s*)endgeneration(\s*[-+]?%\})", r"\1endif\2", source)
        return env.from_string(source)


def find_turn_ends(bpe: BPE, render: Callable[[list[dict[str, str]], bool], str]) -> tuple[set[int], str]:
    """The added tokens that a chat template writes first after an answer, at the end of a conversation and before the
    next question; and the first line of what it writes there. Nothing where it refuses all conversations: those with a
    system message are tried last, since only few templates need one.

    `render` makes the text of messages, with or without a generation prompt, or raises ValueError.
    """
    question, answer = "20461739558", "93710846259"  # in no template; and no template changes digits
    added = bpe.get_added_tokens_decoder()
    asked, answered = {"role": "user", "content": question}, {"role": "assistant", "content": answer}
    ends: set[int] = set()
    line = ""
    for start in ([], [{"role": "system", "content": question}]):
        for messages in ([*start, asked, answered], [*start, asked, answered, asked]):
            try:
                text = render(messages, False)
            except ValueError:
                continue
            _, is_there, after = text.rpartition(answer)
            after = after.partition(question)[0].strip() if is_there else ""
            line = after.partition("\n")[0] or line
            ids = bpe.encode(after, add_special_tokens=False).ids
            ends.update([i for i in ids if i in added and added[i].content.strip()][:1])
        if ends:
            break
    return ends, line
