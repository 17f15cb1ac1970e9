"""Small checkpoints as they are published, for the tests of the converter, and running the converter as a command."""
import json
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from convert_hf_checkpoint import main
from formats.tokenizer_files import CHAR_OF
from model import load_model

SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": None}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 8192, "rope_theta": 500000.0}
FAMILIES = {
    "llama": lambda: transformers.LlamaConfig(**SIZES, tie_word_embeddings=False),
    "llama-tied": lambda: transformers.LlamaConfig(**SIZES, tie_word_embeddings=True),
    "llama-3": lambda: transformers.LlamaConfig(**SIZES, tie_word_embeddings=False, rope_parameters=LLAMA3),
    "mistral": lambda: transformers.MistralConfig(**SIZES, head_dim=16, tie_word_embeddings=False),
    "qwen2": lambda: transformers.Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen3": lambda: transformers.Qwen3Config(**SIZES, head_dim=16, tie_word_embeddings=False),
}


def hf_folder(folder: Path, family: str = "llama") -> dict[str, torch.Tensor]:
    """Save a random Hugging Face checkpoint in one model.safetensors, with other files beside it. Returns its tensors.
    """
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(FAMILIES[family]())
    for parameter in model.parameters():  # biases of 0 and norms of 1 would hide swapped tensors
        torch.nn.init.normal_(parameter)
    model.config.save_pretrained(folder)
    tied = model.config.tie_word_embeddings
    tensors = {name: tensor for name, tensor in model.state_dict().items() if not (tied and name == "lm_head.weight")}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    save_tokenizer(folder)
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "README.md").write_text("not wanted")
    return tensors


def save_tokenizer(folder: Path) -> None:
    """Save a byte-level tokenizer of 64 ids: the bytes from space to underscore but the last, and <s>."""
    tokenizer = Tokenizer(models.BPE({CHAR_OF[32 + i]: i for i in range(63)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>"])
    tokenizer.save(str(folder / "tokenizer.json"))


def repack(folder: Path, tensors: dict[str, torch.Tensor], kind: str) -> None:
    """Save the weights again as `kind`: one file or two shards with an index, as safetensors or as pickles."""
    (folder / "model.safetensors").unlink()
    suffix = "bin" if "bin" in kind else "safetensors"
    stem = "pytorch_model" if suffix == "bin" else "model"
    write = torch.save if suffix == "bin" else partial(save_file, metadata={"format": "pt"})
    if "sharded" not in kind:
        return write(tensors, folder / f"{stem}.{suffix}")
    names, shards = sorted(tensors), [f"{stem}-0000{i}-of-00002.{suffix}" for i in (1, 2)]
    for i, shard in enumerate(shards):
        write({name: tensors[name] for name in names[i::2]}, folder / shard)
    index = {"metadata": {}, "weight_map": {name: shards[i % 2] for i, name in enumerate(names)}}
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """The exit code of the script; 0 if it returns."""
    monkeypatch.setattr(sys, "argv", ["convert_hf_checkpoint.py", *map(str, arguments)])
    try:
        main()
    except SystemExit as end:
        return end.code
    return 0


def assert_nothing_loads(out: Path) -> None:
    """The folder must hold no file, or not exist."""
    assert not [path for path in out.rglob("*") if path.is_file()] if out.exists() else True
    with pytest.raises((OSError, ValueError)):
        load_model(out)


def head_folder(folder: Path, suffix: str = "safetensors", **changes: torch.Tensor | None) -> Path:
    """Save an EAGLE-2 head for hidden size 32 under the published names. `changes` replace tensors; None drops one."""
    folder.mkdir()
    shapes = {"fc.weight": (32, 64), "layers.0.self_attn.q_proj.weight": (32, 32), "embed_tokens.weight": (64, 32),
              "layers.0.self_attn.k_proj.weight": (16, 32), "layers.0.self_attn.v_proj.weight": (16, 32),
              "layers.0.self_attn.o_proj.weight": (32, 32), "layers.0.mlp.gate_proj.weight": (48, 32),
              "layers.0.mlp.up_proj.weight": (48, 32), "layers.0.mlp.down_proj.weight": (32, 48),
              "layers.0.post_attention_layernorm.weight": (32,)}
    tensors = {name: torch.randn(shape) for name, shape in shapes.items()} | changes
    tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    if suffix == "bin":
        torch.save(tensors, folder / "pytorch_model.bin")
    else:
        save_file(tensors, folder / "model.safetensors")
    config = {key: value for key, value in SIZES.items() if key != "pad_token_id"}
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "llama", "num_hidden_layers": 1}))
    (folder / "README.md").write_text("not wanted")
    return folder
