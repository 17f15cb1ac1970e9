"""Tiny models as others publish them: Hugging Face folders in shards, GGUF files, and a tokenizer.model."""
import base64
import io
import json
from pathlib import Path

import gguf
import sentencepiece
import torch
from safetensors.torch import save_file
from tiny import config_json, save_tokenizer, target
from torch import Tensor

from formats.gguf import GGUF_NAMES
from formats.hf import NAMES, hf_names
from formats.tokenizer_files import CHAR_OF
from model import Llama


def published_target(model: Llama) -> dict[str, Tensor]:
    """The tensors of a target under Hugging Face's names, with q, k, v and gate, up apart."""
    cfg = model.cfg
    rows = {"wqkv": [n * cfg.head_dim for n in (cfg.num_heads, cfg.num_kv_heads, cfg.num_kv_heads)],
            "w13": [cfg.intermediate_size] * 2}
    return {name: part.clone() for ours, t in model.state_dict().items()
            for name, part in zip(hf_names(ours, NAMES), t.split(rows.get(ours.split(".")[-2], len(t))), strict=True)}


def save_published(folder: Path, suffix: str) -> Path:
    """Save a target as Hugging Face does, in two shards of this suffix (safetensors, bin) with an index, and its
    tokenizer. Returns the folder."""
    model = target(3, torch.float32, vocab_size=260, num_hidden_layers=1)
    folder.mkdir(parents=True)
    tensors = published_target(model)
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    index = {name: f"{stem}-0000{1 + i % 2}-of-00002.{suffix}" for i, name in enumerate(tensors)}
    for file in sorted(set(index.values())):
        shard = {name: t for name, t in tensors.items() if index[name] == file}
        if suffix == "bin":
            torch.save(shard, folder / file)
        else:
            save_file(shard, folder / file, {"format": "pt"})
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    (folder / "config.json").write_text(json.dumps(config_json(model.cfg) | {"bos_token_id": 256, "eos_token_id": 257}))
    save_tokenizer(folder)
    return folder


def save_gguf(path: Path, kind: str) -> Path:
    """Save a target as a GGUF file with Q8_0 matrices. `kind` is the tokenizer's: "gpt2" (256 bytes, one merge) or
    "llama" (sentencepiece). Returns the path."""
    model = target(3, torch.float32, vocab_size=260, intermediate_size=64, num_hidden_layers=1)
    cfg = model.cfg
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(cfg.num_layers)
    writer.add_context_length(cfg.max_position_embeddings)
    writer.add_embedding_length(cfg.hidden_size)
    writer.add_feed_forward_length(cfg.intermediate_size)
    writer.add_head_count(cfg.num_heads)
    writer.add_head_count_kv(cfg.num_kv_heads)
    writer.add_layer_norm_rms_eps(cfg.rms_norm_eps)
    writer.add_rope_dimension_count(cfg.head_dim)
    writer.add_rope_freq_base(cfg.rope_theta)
    add_tokenizer(writer, kind)
    q8, f32 = gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.F32
    modules = {hf: module for module, hf in GGUF_NAMES.items()}
    for name, t in published_target(model).items():
        *prefix, module = name.removesuffix(".weight").removeprefix("model.layers.").split(".", 1)
        in_layer = name.startswith("model.layers.")
        stored = f"blk.{prefix[0]}.{modules[module]}" if in_layer else modules[name.removesuffix(".weight")]
        dtype = q8 if t.dim() == 2 else f32
        writer.add_tensor(f"{stored}.weight", gguf.quantize(t.numpy(), dtype), raw_dtype=dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_tokenizer(writer: gguf.GGUFWriter, kind: str) -> None:
    """260 tokens, with a chat template."""
    writer.add_tokenizer_model(kind)
    if kind == "gpt2":
        tokens = [CHAR_OF[i] for i in range(256)] + ["ab", "<tool>", "<|start|>", "<|end|>"]
        types = [1] * 257 + [4, 3, 3]
        bos, eos = 258, 259
        writer.add_tokenizer_pre("smollm")
        writer.add_token_merges(["a b"])
    else:
        tokens = ["<unk>", "<s>", "</s>"] + [f"<0x{i:02X}>" for i in range(256)] + ["\u2581"]
        types = [2, 3, 3] + [6] * 256 + [1]
        bos, eos = 1, 2
        writer.add_token_scores([-float(i) for i in range(260)])
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_bos_token_id(bos)
    writer.add_eos_token_id(eos)
    writer.add_chat_template("{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}")


def tiktoken_model() -> bytes:
    """A tokenizer.model of Llama 3's form: 256 bytes and two merges; 256 special tokens follow them."""
    tokens = [bytes([i]) for i in range(256)] + [b"ab", b"abc"]
    return b"".join(b"%s %d\n" % (base64.b64encode(token), i) for i, token in enumerate(tokens))


def sentencepiece_model() -> bytes:
    """A tokenizer.model of sentencepiece: 3 special tokens, 256 bytes and a few pieces."""
    made = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the cat sat on the mat", "the dog ran to the cat"] * 9), model_writer=made,
        vocab_size=290, model_type="bpe", byte_fallback=True, hard_vocab_limit=False, num_threads=1, minloglevel=2)
    return made.getvalue()
