"""GGUF files: tensors, config and tokenizer, in Hugging Face's form.

Where to look: `gguf_rope` for the RoPE fields, GGUF_NAMES for the names of tensors, `to_hf_rows` for the order of rows.
"""
import json
import math
import re
from functools import partial
from pathlib import Path

import torch
from gguf import GGUFReader, dequantize
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import Tensor

from formats.hf import LazyTensor, hf_names
from formats.tokenizer_files import LLAMA3_SPLIT

# llama.cpp's module -> Hugging Face's.
GGUF_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
GGUF_ARCHS = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4  # kinds of tokens in tokenizer.ggml.token_type


# ----- Tensors -----------------------------------------------------------------------------------------------------


def open_gguf(path: Path) -> tuple[dict, dict[str, LazyTensor]]:
    """The metadata of a GGUF file, and its tensors in Hugging Face's names and order of rows; none is read yet.
    Raises ValueError for an architecture that is not implemented and for a model in several files."""
    reader = GGUFReader(path)
    metadata = {key: field.contents() for key, field in reader.fields.items()}
    arch = metadata["general.architecture"]
    num_files = metadata.get("split.count", 0)
    if arch not in GGUF_ARCHS or num_files > 1:
        raise ValueError(f"a {arch} model in {max(num_files, 1)} file(s), but what can be converted is one file of "
                         f"{', '.join(GGUF_ARCHS)} (llama-gguf-split --merge joins several)")

    def read(tensor) -> Tensor:
        weight = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        return to_hf_rows(tensor.name, weight, metadata) if arch == "llama" else weight

    tensors = {}
    for tensor in reader.tensors:
        shape = tuple(tensor.shape[::-1].tolist())  # GGUF lists the innermost dimension first
        tensors[hf_names(tensor.name, GGUF_NAMES)[0]] = (shape, partial(read, tensor))
    return metadata, tensors


def to_hf_rows(name: str, weight: Tensor, metadata: dict) -> Tensor:
    """A tensor of a "llama" file with the rows of q and k in Hugging Face's order.

    RoPE rotates pairs of elements of a head: (2j, 2j + 1) in llama.cpp, (j, j + head_dim / 2) in Hugging Face. For
    "llama" files llama.cpp reorders the rows of q and k accordingly; for Qwen's it does not.
    """
    found = re.search(r"\.attn_([qk])\.", name)
    if not found:
        return weight
    key = {"q": "llama.attention.head_count", "k": "llama.attention.head_count_kv"}[found[1]]
    return weight.unflatten(0, (metadata[key], -1, 2)).transpose(1, 2).reshape(weight.shape)


# ----- config.json -------------------------------------------------------------------------------------------------


def gguf_config(metadata: dict, tensors: dict[str, LazyTensor], dtype: torch.dtype) -> dict:
    """Hugging Face's config.json for GGUF metadata. Takes rope_freqs.weight out of `tensors`: it is no weight."""
    arch = metadata["general.architecture"]
    fields = {key.removeprefix(f"{arch}."): value for key, value in metadata.items() if key.startswith(f"{arch}.")}
    heads = fields["attention.head_count"]
    head_dim = fields.get("attention.key_length", fields["embedding_length"] // heads)
    rope_freqs = None
    if "rope_freqs.weight" in tensors:
        _, read = tensors.pop("rope_freqs.weight")
        rope_freqs = read()
    return {
        "architectures": [GGUF_ARCHS[arch]], "model_type": arch, "hidden_act": "silu", "head_dim": head_dim,
        "hidden_size": fields["embedding_length"], "intermediate_size": fields["feed_forward_length"],
        "num_hidden_layers": fields["block_count"], "num_attention_heads": heads,
        "num_key_value_heads": fields["attention.head_count_kv"], "max_position_embeddings": fields["context_length"],
        # stored as float32, where 1e-5 reads 9.99999974e-06
        "rms_norm_eps": float(f"{fields['attention.layer_norm_rms_epsilon']:.7g}"),
        **gguf_rope(fields, head_dim, rope_freqs),
        "vocab_size": tensors["model.embed_tokens.weight"][0][0], "torch_dtype": str(dtype).removeprefix("torch."),
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": metadata["tokenizer.ggml.eos_token_id"], "tie_word_embeddings": "lm_head.weight" not in tensors}


def gguf_rope(fields: dict, head_dim: int, rope_freqs: Tensor | None) -> dict:
    """The RoPE entries of config.json. All that a GGUF file says about RoPE is read here.

    fields: the metadata without the architecture's prefix. rope_freqs: the tensor rope_freqs.weight, if there is one.
    Other kinds of scaling than Llama 3's are passed on by name, and formats/config.py refuses them.
    """
    theta = fields.get("rope.freq_base", 1e4)
    rotated = fields.get("rope.dimension_count", head_dim)
    scaling_type = fields.get("rope.scaling.type", "none").replace("none", "default")
    scaling = {"rope_type": scaling_type} if rope_freqs is None else llama3_scaling(rope_freqs, theta)
    return {"rope_theta": theta, "partial_rotary_factor": rotated / head_dim, "rope_scaling": scaling}


def llama3_scaling(divisors: Tensor, theta: float) -> dict:
    """Hugging Face's rope_scaling of Llama 3.1 and 3.2, from what it divides each frequency by [head_dim / 2].

    GGUF stores only these divisors, fp32. The factor is the largest of them, and the other three numbers are the same
    in all releases. Raises ValueError if the four do not give the divisors (model.rope_table has the formula).
    """
    divisors = divisors.double()
    factor, low, high, context = float(divisors.max()), 1.0, 4.0, 8192
    wavelengths = 2 * math.pi * theta ** (torch.arange(len(divisors), dtype=torch.float64) / len(divisors))
    turns = context / wavelengths  # full turns of each frequency within the old context
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    if not torch.allclose(divisors, 1 / (keep + (1 - keep) / factor), rtol=1e-5):
        raise ValueError("rope_freqs.weight is not the scaling of Llama 3.1 or 3.2: start from the HF folder")
    return {"rope_type": "llama3", "factor": factor, "low_freq_factor": low, "high_freq_factor": high,
            "original_max_position_embeddings": context}


# ----- The tokenizer -----------------------------------------------------------------------------------------------


# How a byte-level BPE cuts a text into words, by the name in tokenizer.ggml.pre, besides what ByteLevel does.
WORD_SPLITS = {
    "gpt-2": [],
    "smollm": [pre_tokenizers.Digits(individual_digits=True)],
    "llama-bpe": [pre_tokenizers.Split(Regex(LLAMA3_SPLIT), "isolated")],
    "qwen2": [pre_tokenizers.Split(Regex(LLAMA3_SPLIT.replace("{1,3}", "")), "isolated")],  # digits one by one
}


def write_gguf_tokenizer(metadata: dict, folder: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and generation_config.json from the metadata of a GGUF file.
    Raises ValueError for a tokenizer or a way to cut words that is not implemented."""
    ggml = {key.removeprefix("tokenizer.ggml."): value for key, value in metadata.items()}
    tokens, types = ggml["tokens"], ggml["token_type"]
    kind, pre = ggml["model"], ggml.get("pre")
    vocab = {token: i for i, token in enumerate(tokens)}
    if kind == "gpt2" and pre in WORD_SPLITS:
        tokenizer = byte_level_bpe(ggml, vocab, pre)
    elif kind == "llama":
        tokenizer = sentencepiece_bpe(ggml, vocab)
    else:
        raise ValueError(f"GGUF tokenizer {kind!r}, pre-tokenizer {pre!r}: supported are 'llama', and 'gpt2' with "
                         f"{', '.join(WORD_SPLITS)}; start from the Hugging Face folder")
    # User-defined tokens are found in a text like special ones, but decoding shows them.
    tokenizer.add_tokens([AddedToken(token, special=type_ != USER_DEFINED, normalized=False)
                          for token, type_ in zip(tokens, types) if type_ in (UNKNOWN, CONTROL, USER_DEFINED)])
    named = {f"{key}_token": tokens[ggml[f"{key}_token_id"]] for key in ("bos", "eos") if f"{key}_token_id" in ggml}
    adds_bos = ggml.get("add_bos_token", kind == "llama" or pre == "llama-bpe")  # the defaults are llama.cpp's
    bos = [named.get("bos_token")] * adds_bos
    tokenizer.post_processor = processors.TemplateProcessing([*bos, "$A"], special_tokens=[(t, vocab[t]) for t in bos])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": bool(bos), **named,
              "chat_template": metadata.get("tokenizer.chat_template"), "clean_up_tokenization_spaces": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2))
    stops = {"eos_token_id": [ggml[key] for key in ("eos_token_id", "eot_token_id", "eom_token_id") if key in ggml]}
    (folder / "generation_config.json").write_text(json.dumps(stops, indent=2))


def byte_level_bpe(ggml: dict, vocab: dict[str, int], pre: str) -> Tokenizer:
    """A BPE over bytes written as characters, such as GPT-2's. `pre` names the way to cut a text into words."""
    merges = [tuple(merge.split(" ")) for merge in ggml["merges"]]
    tokenizer = Tokenizer(models.BPE(vocab, merges, ignore_merges=pre == "llama-bpe"))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre in ("gpt-2", "smollm"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*WORD_SPLITS[pre], byte_level])
    tokenizer.normalizer = normalizers.NFC() if pre == "qwen2" else None
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def sentencepiece_bpe(ggml: dict, vocab: dict[str, int]) -> Tokenizer:
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
    unknown = tokens[ggml.get("unknown_token_id", 0)]
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    space_first = ggml.get("add_space_prefix", True)
    replace_spaces = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁")] * space_first + [replace_spaces])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(steps + [decoders.Strip(" ", 1, 0)] * space_first)
    return tokenizer
