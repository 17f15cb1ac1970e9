"""Hugging Face folders: their names for tensors."""
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from formats.tokenizer_files import read_json
from formats.weights import read_tensors

NAMES = {  # our modules, and those of Hugging Face that they stack along the rows, in this order
    "embed": "model.embed_tokens", "norm": "model.norm", "lm_head": "lm_head", "attn_norm": "input_layernorm",
    "wqkv": "self_attn.q_proj self_attn.k_proj self_attn.v_proj", "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm", "wo": "self_attn.o_proj", "mlp_norm": "post_attention_layernorm",
    "w13": "mlp.gate_proj mlp.up_proj", "w2": "mlp.down_proj"}
Lazy = tuple[tuple[int, ...], Callable[[], Tensor]]  # the shape of a tensor, and how to read it


def hf_names(name: str, table: dict[str, str]) -> list[str]:
    """Hugging Face's names for our "layers.3.wqkv.bias" or GGUF's "blk.3.attn_q.bias"; the name itself if unknown."""
    *layer, module, kind = name.split(".")
    prefix = f"model.layers.{layer[-1]}." if layer else ""
    return [f"{prefix}{theirs}.{kind}" for theirs in table[module].split()] if module in table else [name]


def open_folder(folder: Path) -> dict[str, Lazy]:
    """The memory-mapped tensors of a Hugging Face folder, in one file or in the shards that an index names."""
    kinds = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
    path = next((folder / kind for kind in kinds if (folder / kind).is_file()), None)
    if path is None:
        raise ValueError(f"no weights; one of {', '.join(kinds)} should be there")
    index = read_json(path)["weight_map"] if path.suffix == ".json" else {"": path.name}
    tensors = {}
    for file in sorted(set(map(str, index.values()))):
        if Path(file).name != file or not (folder / file).is_file():
            raise ValueError(f"{path}: names {file!r}, which is not a file of its folder; finish the download")
        found = read_tensors(folder / file)[0]
        if not isinstance(found, dict) or not all(isinstance(t, Tensor) for t in found.values()):
            raise ValueError(f"{folder / file}: holds other things than plain tensors; use a safetensors version")
        tensors |= {str(name): (tuple(t.shape), t.detach) for name, t in found.items()}
    return tensors
