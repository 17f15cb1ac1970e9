"""The tokenizer of a GGUF file, as the files of a Hugging Face folder.

Where to look: WORD_SPLITS for what is supported, `stop_ids` for where an answer ends. What fields mean, and what holds
where one is missing, is llama.cpp's word (src/llama-vocab.cpp).
"""
import json
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from formats.tokenizer_files import LLAMA3_SPLIT, OTHERS, TEKKEN_SPLIT, WORD, clear_error

NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4  # kinds of tokens in tokenizer.ggml.token_type
# Special tokens that end a text, a turn or a message, whatever the fields say. Only for eos a file always has a field.
# llama.cpp has the same list (with names of architectures that are not read here).
END_TOKENS = {
    "</s>", "<eos>", "[EOS]", "<EOT>", "▁<EOT>", "[EOT]", "<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>",
    "<|endoftext|>", "<|end_of_text|>", "<end_of_turn>", "<end_of_utterance>",
    "<|fim_pad|>", "<|fim_repo|>", "<|repo_name|>", "<|file_sep|>"}
# Phi-3's special tokens drop the spaces and line ends behind them, all but these. A file does not say so.
PHI3_KEEPS = ("<unk>", "<s>", "<|endoftext|>")
ENDING = "(?i:'s|'t|'re|'ve|'m|'ll|'d)?"  # that a word of GPT-4o's may have
GPT4O_SPLIT = "|".join((WORD % ("*", "+") + ENDING, WORD % ("+", "*") + ENDING, r"\p{N}{1,3}", OTHERS))
# Names in tokenizer.ggml.pre for one way to cut a text into words; llama.cpp has the same list.
SAME_SPLIT = {"llama3": "llama-bpe", "llama-v3": "llama-bpe", "falcon3": "llama-bpe", "deepseek-r1-qwen": "qwen2",
              "megrez": "qwen2", "refact": "smollm", "glm4": "dbrx", "chatglm-bpe": "dbrx"}
# How a byte-level BPE does it, besides what ByteLevel does.
WORD_SPLITS = {
    "gpt-2": [],
    "smollm": [pre_tokenizers.Digits(individual_digits=True)],
    "llama-bpe": [pre_tokenizers.Split(Regex(LLAMA3_SPLIT), "isolated")],
    "smaug-bpe": [pre_tokenizers.Split(Regex(LLAMA3_SPLIT), "isolated")],
    "dbrx": [pre_tokenizers.Split(Regex(LLAMA3_SPLIT), "isolated")],
    "qwen2": [pre_tokenizers.Split(Regex(LLAMA3_SPLIT.replace("{1,3}", "")), "isolated")],  # digits one by one
    "tekken": [pre_tokenizers.Split(Regex(TEKKEN_SPLIT), "isolated")],
    "gpt-4o": [pre_tokenizers.Split(Regex(GPT4O_SPLIT), "isolated")],
}
WHOLE_WORDS = ("llama-bpe", "tekken")  # a word in the vocabulary is one token, whatever the merges; bos by default


def special_ids(metadata: dict) -> dict[str, int]:
    """The ids of the special tokens that the fields name: bos, eos, eot, eom, unknown. eos is always there.

    Where a field is missing or is no id, llama.cpp takes 1, 2 and 0 for bos, eos and unknown of a sentencepiece BPE.
    Raises KeyError if there are no tokens, or no eos.
    """
    count = len(metadata["tokenizer.ggml.tokens"])
    defaults = {"bos": 1, "eos": 2, "unknown": 0} if metadata.get("tokenizer.ggml.model") == "llama" else {}
    ids = {}
    for name in ("bos", "eos", "eot", "eom", "unknown"):
        for i in (metadata.get(f"tokenizer.ggml.{name}_token_id"), defaults.get(name)):
            if isinstance(i, int) and 0 <= i < count:
                ids.setdefault(name, i)
    if "eos" not in ids:
        raise KeyError("tokenizer.ggml.eos_token_id")
    return ids


def stop_ids(metadata: dict) -> list[int]:
    """The ids that end an answer, eos first: those of the fields, and special tokens with a name in END_TOKENS.
    A file has only one eos, where Hugging Face's has a list: often of the tokens that end a turn, and a text."""
    ids = special_ids(metadata)
    stops = [ids[name] for name in ("eos", "eot", "eom") if name in ids]
    stops += metadata.get("tokenizer.ggml.eos_token_ids", [])  # Ollama writes such a list
    pairs = zip(metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"])
    stops += [i for i, (token, type_) in enumerate(pairs) if token in END_TOKENS and type_ in (CONTROL, USER_DEFINED)]
    return list(dict.fromkeys(stops))


def write_gguf_tokenizer(metadata: dict, folder: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and generation_config.json from the metadata of a GGUF file.
    Raises KeyError for a missing field, ValueError for a damaged tokenizer or a way to cut words not implemented."""
    ggml = {key.removeprefix("tokenizer.ggml."): value for key, value in metadata.items()}
    kind, pre = ggml.get("model"), ggml.get("pre")
    pre = SAME_SPLIT.get(pre, pre)
    if kind != "llama" and not (kind == "gpt2" and pre in WORD_SPLITS):
        raise ValueError(f"GGUF tokenizer {kind!r}, pre-tokenizer {pre!r}: supported are 'llama', and 'gpt2' with "
                         f"{', '.join(WORD_SPLITS)}; start from the Hugging Face folder")
    for key in ("tokens", "token_type", "merges" if kind == "gpt2" else "scores"):
        if key not in ggml:
            raise KeyError(f"tokenizer.ggml.{key}")
    tokens, types = ggml["tokens"], ggml["token_type"]
    ids = special_ids(metadata)
    adds_bos = ggml.get("add_bos_token", kind == "llama" or pre in WHOLE_WORDS)  # the defaults are llama.cpp's
    if adds_bos and "bos" not in ids:
        raise KeyError("tokenizer.ggml.bos_token_id")
    with clear_error("its tokenizer is damaged, download it again"):
        vocab = {token: i for i, token in enumerate(tokens)}
        if kind == "gpt2":
            tokenizer = byte_level_bpe(ggml, vocab, pre)
        else:
            tokenizer = sentencepiece_bpe(ggml, vocab, tokens[ids["unknown"]])
        is_phi3 = kind == "llama" and metadata["general.architecture"] == "phi3"
        # User-defined tokens are found in a text like special ones, but decoding shows them.
        tokenizer.add_tokens([AddedToken(token, special=type_ != USER_DEFINED, normalized=False,
                                         rstrip=is_phi3 and token not in PHI3_KEEPS)
                              for token, type_ in zip(tokens, types, strict=True)
                              if type_ in (UNKNOWN, CONTROL, USER_DEFINED)])
        bos = [tokens[ids["bos"]]] if adds_bos else []
        eos = [tokens[ids["eos"]]] if ggml.get("add_eos_token") else []
        tokenizer.post_processor = processors.TemplateProcessing(
            [*bos, "$A", *eos], special_tokens=[(token, vocab[token]) for token in bos + eos])
        tokenizer.save(str(folder / "tokenizer.json"))
    named = {f"{name}_token": tokens[ids[name]] for name in ("bos", "eos") if name in ids}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": bool(bos), **named,
              "chat_template": metadata.get("tokenizer.chat_template"), "clean_up_tokenization_spaces": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": stop_ids(metadata)}, indent=2))


def byte_level_bpe(ggml: dict, vocab: dict[str, int], pre: str) -> Tokenizer:
    """A BPE over bytes written as characters, such as GPT-2's. `pre` names the way to cut a text into words."""
    merges = [tuple(merge.split(" ")) for merge in ggml["merges"]]
    tokenizer = Tokenizer(models.BPE(vocab, merges, ignore_merges=pre in WHOLE_WORDS))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre in ("gpt-2", "smollm"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*WORD_SPLITS[pre], byte_level])
    tokenizer.normalizer = normalizers.NFC() if pre == "qwen2" else None
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def sentencepiece_bpe(ggml: dict, vocab: dict[str, int], unknown: str) -> Tokenizer:
    """A sentencepiece BPE, such as Llama 2's. It has no list of merges, only a score for each piece: of all pairs in a
    text, the one that makes the piece with the highest score is merged first. So every way to cut a piece into two
    pieces is a merge, and the merges are in the order of the scores."""
    tokens, scores, types = ggml["tokens"], ggml["scores"], ggml["token_type"]
    pairs = []  # sorted by score, then by the ids of the piece and its halves
    for i, token in enumerate(tokens):
        if types[i] == NORMAL:
            for cut in range(1, len(token)):
                left, right = vocab.get(token[:cut]), vocab.get(token[cut:])
                if left is not None and right is not None:
                    pairs.append((-scores[i], i, left, right))
    merges = [(tokens[left], tokens[right]) for *_, left, right in sorted(pairs)]
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    space_first = ggml.get("add_space_prefix", True)
    replace_spaces = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁")] * space_first + [replace_spaces])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(steps + [decoders.Strip(" ", 1, 0)] * space_first)
    return tokenizer
