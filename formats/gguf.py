"""GGUF files: metadata, tensors, tokenizer."""
import json
import math
import re
from functools import partial
from pathlib import Path

import torch
from gguf import GGUFReader, dequantize
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import Tensor

from formats.hf import Lazy, hf_names
from formats.tokenizer_files import LLAMA3_SPLIT

GGUF_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head",
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
GGUF_ARCHS = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}


def open_gguf(path: Path) -> tuple[dict, dict[str, Lazy]]:
    """The metadata of a GGUF file and its tensors, still unread, in Hugging Face's names and order of rows."""
    reader = GGUFReader(path)
    meta = {key: field.contents() for key, field in reader.fields.items()}
    arch, parts = meta["general.architecture"], meta.get("split.count", 0)
    if arch not in GGUF_ARCHS or parts > 1:
        raise ValueError(f"a {arch} model in {max(parts, 1)} file(s), but what can be converted is one file of "
                         f"{', '.join(GGUF_ARCHS)} (llama-gguf-split --merge joins several)")

    def read(tensor) -> Tensor:
        weight = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        if arch == "llama" and (which := re.search(r"\.attn_([qk])\.", tensor.name)):
            # llama.cpp rotates neighbours (2j, 2j+1) where Hugging Face rotates (j, j + head_dim/2)
            heads = meta["llama.attention.head_count" + {"q": "", "k": "_kv"}[which[1]]]
            return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).reshape(weight.shape)
        return weight

    return meta, {hf_names(tensor.name, GGUF_NAMES)[0]: (tuple(tensor.shape[::-1].tolist()), partial(read, tensor))
                  for tensor in reader.tensors}


def gguf_config(meta: dict, tensors: dict[str, Lazy], dtype: torch.dtype) -> dict:
    """Hugging Face's config.json for GGUF metadata. Takes rope_freqs.weight out of `tensors`."""
    arch = meta["general.architecture"]
    here = {key.removeprefix(f"{arch}."): value for key, value in meta.items() if key.startswith(f"{arch}.")}
    heads, theta = here["attention.head_count"], here.get("rope.freq_base", 1e4)
    head_dim = here.get("attention.key_length", here["embedding_length"] // heads)
    config = {
        "architectures": [GGUF_ARCHS[arch]], "model_type": arch, "hidden_act": "silu", "head_dim": head_dim,
        "hidden_size": here["embedding_length"], "intermediate_size": here["feed_forward_length"],
        "num_hidden_layers": here["block_count"], "num_attention_heads": heads,
        "num_key_value_heads": here["attention.head_count_kv"], "max_position_embeddings": here["context_length"],
        "rms_norm_eps": float(f"{here['attention.layer_norm_rms_epsilon']:.7g}"),  # float32: 1e-5 reads 9.99999974e-06
        "rope_theta": theta, "partial_rotary_factor": here.get("rope.dimension_count", head_dim) / head_dim,
        "rope_scaling": {"rope_type": here.get("rope.scaling.type", "none").replace("none", "default")},
        "vocab_size": tensors["model.embed_tokens.weight"][0][0], "torch_dtype": str(dtype).removeprefix("torch."),
        "bos_token_id": meta.get("tokenizer.ggml.bos_token_id"), "eos_token_id": meta["tokenizer.ggml.eos_token_id"],
        "tie_word_embeddings": "lm_head.weight" not in tensors}
    if "rope_freqs.weight" in tensors:  # Llama 3.1's and 3.2's scaling, stored as what it divides each frequency by
        divisors = tensors.pop("rope_freqs.weight")[1]().double()
        factor, low, high, context = float(divisors.max()), 1.0, 4.0, 8192
        turns = context / (2 * math.pi) / theta ** (torch.arange(len(divisors), dtype=torch.float64) / len(divisors))
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        if not torch.allclose(divisors, 1 / (keep + (1 - keep) / factor), rtol=1e-5):
            raise ValueError("rope_freqs.weight is not the scaling of Llama 3.1 or 3.2: start from the HF folder")
        config["rope_scaling"] = {"rope_type": "llama3", "factor": factor, "low_freq_factor": low,
                                  "high_freq_factor": high, "original_max_position_embeddings": context}
    return config


def write_gguf_tokenizer(meta: dict, folder: Path) -> None:
    """tokenizer.json (byte-level BPE, cut into words as `pre` says, or sentencepiece BPE) and its two companions."""
    ggml = {key.removeprefix("tokenizer.ggml."): value for key, value in meta.items()}
    tokens, types, kind, pre = ggml["tokens"], ggml["token_type"], ggml["model"], ggml.get("pre")
    vocab = {token: i for i, token in enumerate(tokens)}
    words = {"gpt-2": [], "smollm": [pre_tokenizers.Digits(individual_digits=True)],
             "llama-bpe": [pre_tokenizers.Split(Regex(LLAMA3_SPLIT), "isolated")],
             "qwen2": [pre_tokenizers.Split(Regex(LLAMA3_SPLIT.replace("{1,3}", "")), "isolated")]}
    if kind == "gpt2" and pre in words:
        merges = [tuple(merge.split(" ")) for merge in ggml["merges"]]
        tokenizer = Tokenizer(models.BPE(vocab, merges, ignore_merges=pre == "llama-bpe"))
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre in ("gpt-2", "smollm"))
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*words[pre], byte_level])
        tokenizer.normalizer = normalizers.NFC() if pre == "qwen2" else None
        tokenizer.decoder = decoders.ByteLevel()
    elif kind == "llama":  # sentencepiece has no list of merges: what makes the piece with the highest score goes first
        pairs = [(-ggml["scores"][i], i, vocab[token[:cut]], vocab[token[cut:]]) for i, token in enumerate(tokens)
                 if types[i] == 1 for cut in range(1, len(token)) if token[:cut] in vocab and token[cut:] in vocab]
        merges, unk = [(tokens[a], tokens[b]) for *_, a, b in sorted(pairs)], tokens[ggml.get("unknown_token_id", 0)]
        tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token=unk, fuse_unk=True, byte_fallback=True))
        space, replace = ggml.get("add_space_prefix", True), normalizers.Replace(" ", "▁")
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁")] * space + [replace])
        tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
                                              + [decoders.Strip(" ", 1, 0)] * space)
    else:
        raise ValueError(f"GGUF tokenizer {kind!r}, pre-tokenizer {pre!r}: supported are 'llama', and 'gpt2' with "
                         f"{', '.join(words)}; start from the Hugging Face folder")
    # types: 2 unknown, 3 control; 4 user-defined is found in text like those, but is shown when decoding
    tokenizer.add_tokens([AddedToken(token, special=sort != 4, normalized=False)
                          for token, sort in zip(tokens, types) if sort in (2, 3, 4)])
    named = {f"{key}_token": tokens[ggml[f"{key}_token_id"]] for key in ("bos", "eos") if f"{key}_token_id" in ggml}
    bos = [named.get("bos_token")] * ggml.get("add_bos_token", kind == "llama" or pre == "llama-bpe")  # as llama.cpp
    tokenizer.post_processor = processors.TemplateProcessing([*bos, "$A"], special_tokens=[(t, vocab[t]) for t in bos])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": bool(bos), **named,
              "chat_template": meta.get("tokenizer.chat_template"), "clean_up_tokenization_spaces": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2))
    stops = {"eos_token_id": [ggml[key] for key in ("eos_token_id", "eot_token_id", "eom_token_id") if key in ggml]}
    (folder / "generation_config.json").write_text(json.dumps(stops, indent=2))
