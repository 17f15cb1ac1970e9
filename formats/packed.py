"""Quantised checkpoints: what says how their weights are packed, and which tensors make up one weight.

Nothing is unpacked here; quant/published.py does that. Which method it is, config.json says (or a file beside it, in
older uploads); which weights are packed, the tensors say. So modules that a method skipped need no list.
"""
import json
import re
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from formats.tokenizer_files import read_json

# Where config.json says it. MLX writes the second, older versions of llm-compressor the third.
KEYS = ("quantization_config", "quantization", "compression_config")
FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq", "hf_quant_config.json": "modelopt"}
# Ends of names of the tensors that make up a packed weight
PARTS = re.compile(r"(?P<module>.+)\.(?P<part>qweight|qzeros|scales|g_idx|SCB|weight_format|weight"
                   r"|weight_(packed|scale|scale_inv|shape|zero_point|g_idx|global_scale|scale_2)"
                   r"|weight\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\..+))")
# Published scales of activations and of the cache: this engine does not use them
UNUSED = re.compile(r".+\.(input_scale|input_zero_point|output_scale|output_zero_point|activation_scale|[qkv]_scale"
                    r"|[kv]_proj\.output_scale)")


class Packed(NamedTuple):
    """A weight [N, K] as its file packs it. kind: a key of quant.published.FORMATS or, in GGUF, the type ("Q4_K").
    parts: its tensors, memory-mapped, by the ends of their names; in GGUF `blocks` alone. facts: further arguments of
    the function that reads it. rows int64 [any]: the rows to take, in order; None: all. factor: multiplies them."""
    kind: str
    parts: dict[str, Tensor]
    facts: dict
    rows: Tensor | None = None
    factor: float = 1.0


# ----- What config.json says -----------------------------------------------------------------------------------------


def stated(raw: dict, folder: Path | None = None) -> tuple[str, dict, str] | None:
    """How the weights are quantised, after a config.json, or after the files of older uploads in `folder`: the method's
    name, the object that says it, and where that stands. None where nothing says so. An empty object, as some tools
    leave it behind, says nothing."""
    key = next((key for key in KEYS if raw.get(key)), None)
    if key:
        said = raw[key] if isinstance(raw[key], dict) else {}
        method = said.get("quant_method") or ("compressed-tensors" if key == KEYS[2] else None)
        if method is None and {"bits", "group_size"} <= said.keys():
            method = "mlx"
        elif method is None and ("quant_algo" in said or "producer" in said):
            method = "modelopt"
        elif method is None and any("bit" in key for key in said):
            method = "bitsandbytes"
        return str(method or "an unknown method").lower(), said, f"{key} in config.json"
    file = next((file for file in FILES if folder and (folder / file).is_file()), None)
    if file is None:
        return None
    said = read_json(folder / file)
    said = said.get("quantization", said) if isinstance(said, dict) else {}
    return FILES[file], said, file


def is_read(method: str, said: dict) -> bool:
    """Whether weights of this method are read, as far as config.json tells. The tensors have the last word."""
    bits = said.get("bits", said.get("w_bit", 4))
    if method == "awq":
        return bits == 4 and str(said.get("version", "gemm")).lower() == "gemm"
    if method == "gptq":
        return (bits in (4, 8) and (said.get("checkpoint_format") or "gptq") in ("gptq", "gptq_v2")
                and not said.get("is_marlin_format"))
    if method == "compressed-tensors":
        kinds = (None, "dense", "pack-quantized", "int-quantized", "naive-quantized", "float-quantized",
                 "mixed-precision")
        sparse, transforms = (found if isinstance(found := said.get(key), dict) else {} for key in (
            "sparsity_config", "transform_config"))
        is_dense = sparse.get("format") in (None, "dense")
        return said.get("format") in kinds and is_dense and not transforms.get("config_groups")
    if method == "modelopt":
        return said.get("quant_algo") == "FP8"
    return method in ("fp8", "fbgemm_fp8", "bitsandbytes")


# ----- Which tensors belong together ---------------------------------------------------------------------------------


def join_parts(tensors: dict[str, Tensor], method: str, said: dict, qkv_bias: bool = False
               ) -> dict[str, Tensor | Packed]:
    """The tensors of a model, the parts of each packed weight joined under the name MODULE.weight. Scales of
    activations are left out, and so are the biases of zeros that GPTQ may write where the model has none. qkv_bias: it
    has them for q, k and v.

    Raises ValueError for a weight that is packed in a way that is not read.
    """
    modules: dict[str, dict[str, Tensor]] = {}
    joined: dict[str, Tensor | Packed] = {}
    for name, tensor in tensors.items():
        found = PARTS.fullmatch(name)
        if found:
            modules.setdefault(found["module"], {})[found["part"]] = tensor
        elif not UNUSED.fullmatch(name):
            joined[name] = tensor
    for module, parts in modules.items():
        if parts.keys() == {"weight"}:
            joined[f"{module}.weight"] = parts["weight"]
            continue
        kind, facts = kind_of(module, parts, method, said)
        joined[f"{module}.weight"] = Packed(kind, parts, facts)
        bias = tensors.get(f"{module}.bias")
        is_real = qkv_bias and module.endswith(("q_proj", "k_proj", "v_proj"))
        if method == "gptq" and bias is not None and not is_real and not bias.any():
            del joined[f"{module}.bias"]
    return joined


def kind_of(module: str, parts: dict[str, Tensor], method: str, said: dict) -> tuple[str, dict]:
    """The kind and the facts of Packed for the tensors of one module."""
    weight = parts.get("weight")
    dtype = None if weight is None else weight.dtype
    state = next((part for part in parts if part.startswith("weight.quant_state.")), None)
    kinds = {
        "awq": "qweight" in parts and method == "awq",
        "gptq": "qweight" in parts and method == "gptq",
        "packed_int": "weight_packed" in parts and not {"weight_global_scale", "weight_scale_2"} & parts.keys(),
        "bnb_int8": "SCB" in parts and dtype == torch.int8,
        "bnb_4bit": state is not None,
        "plain_int8": "weight_scale" in parts and dtype == torch.int8,
        "fp8": bool({"weight_scale", "weight_scale_inv"} & parts.keys()) and dtype == torch.float8_e4m3fn
        and "weight_scale_2" not in parts}
    kind = next((kind for kind, fits in kinds.items() if fits), None)
    if kind is None:
        found = ", ".join(f"{part} ({str(t.dtype).removeprefix('torch.')})" for part, t in sorted(parts.items()))
        raise ValueError(f"{module} is quantised in a way that is not implemented: it has {found}")
    facts = {}
    if kind == "gptq":
        facts = {"v2": said.get("checkpoint_format") == "gptq_v2"}
    elif kind == "fp8" and said.get("weight_block_size"):
        facts = {"block": tuple(said["weight_block_size"])}
    elif kind == "bnb_4bit":
        facts = {"state": json.loads(bytes(parts[state].tolist()))}
    return kind, facts
