"""Hugging Face folders: their names for tensors, and opening their weight files."""
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from formats.tokenizer_files import read_json
from formats.weights import read_tensors

# Our module -> the Hugging Face modules whose rows it stacks, in this order.
NAMES = {
    "embed": "model.embed_tokens",
    "norm": "model.norm",
    "lm_head": "lm_head",
    "attn_norm": "input_layernorm",
    "wqkv": "self_attn.q_proj self_attn.k_proj self_attn.v_proj",
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
    "wo": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm",
    "w13": "mlp.gate_proj mlp.up_proj",
    "w2": "mlp.down_proj",
}
LazyTensor = tuple[tuple[int, ...], Callable[[], Tensor]]  # a tensor's shape, and a function that reads it


def hf_names(name: str, table: dict[str, str]) -> list[str]:
    """Hugging Face's names for the pieces of a tensor, by a table of modules such as NAMES: "layers.3.wqkv.bias" gives
    the biases of q_proj, k_proj and v_proj of model.layers.3. A name whose module is not in the table is returned as it
    is. GGUF's "blk.3.attn_q.bias" works the same way, with the table in formats/gguf.py.
    """
    *layer, module, kind = name.split(".")
    if module not in table:
        return [name]
    prefix = f"model.layers.{layer[-1]}." if layer else ""
    return [f"{prefix}{hf_module}.{kind}" for hf_module in table[module].split()]


def open_folder(folder: Path) -> dict[str, LazyTensor]:
    """The memory-mapped tensors of a Hugging Face folder, by Hugging Face's names. They are in one file, or in the
    shards that an index lists. Raises ValueError where a file is missing, damaged, or holds more than plain tensors."""
    kinds = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
    path = next((folder / kind for kind in kinds if (folder / kind).is_file()), None)
    if path is None:
        raise ValueError(f"no weights; one of {', '.join(kinds)} should be there")
    index = read_json(path)["weight_map"] if path.suffix == ".json" else {"": path.name}
    tensors = {}
    for file in sorted(set(map(str, index.values()))):
        if Path(file).name != file or not (folder / file).is_file():  # never a file outside the folder
            raise ValueError(f"{path}: names {file!r}, which is not a file of its folder; finish the download")
        found = read_tensors(folder / file)[0]
        if not isinstance(found, dict) or not all(isinstance(t, Tensor) for t in found.values()):
            raise ValueError(f"{folder / file}: holds other things than plain tensors; use a safetensors version")
        tensors |= {str(name): (tuple(t.shape), t.detach) for name, t in found.items()}
    return tensors
