"""GGUF files: tensors and config, in Hugging Face's form.

Where to look: `refuse_fields` for what makes another model, `gguf_rope` for the RoPE fields, GGUF_NAMES for the names
of tensors, `to_hf_rows` for the order of rows. The tokenizer: formats/gguf_tokenizer.py. What fields mean, and what
holds where one is missing, is llama.cpp's word (src/llama-model.cpp).
"""
import math
import re
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from gguf import GGUFReader, dequantize
from torch import Tensor

from formats.fields import positive
from formats.gguf_tokenizer import special_ids
from formats.hf import LazyTensor, hf_names

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

# Fields of the architecture, without its prefix, that gguf_config reads.
READ_FIELDS = {
    "embedding_length", "feed_forward_length", "block_count", "context_length", "attention.head_count",
    "attention.head_count_kv", "attention.key_length", "attention.layer_norm_rms_epsilon", "rope.freq_base",
    "rope.scaling.type", "rope.scaling.factor", "rope.scale_linear"}
# Fields that change nothing in the architectures above: notes, what only embedding models use, what only YaRN uses.
HARMLESS_FIELDS = {
    "vocab_size", "tensor_data_layout", "pooling_type", "attention.layer_norm_epsilon", "rope.scaling.finetuned",
    "rope.scaling.original_context_length", "rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow",
    "rope.scaling.yarn_log_multiplier"}


# ----- The file ----------------------------------------------------------------------------------------------------


def is_gguf(path: Path) -> bool:
    """Whether a path is meant to be a GGUF file: by its suffix or by its first bytes."""
    if path.suffix.lower() == ".gguf":
        return not path.is_dir()
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return file.read(4) == b"GGUF"


def check_start(path: Path) -> None:
    """Raise ValueError that says what a file is, unless it starts as a GGUF file that can be read."""
    with open(path, "rb") as file:
        start = file.read(512)
    number = int.from_bytes(start[4:8], "little")
    kinds = {
        "it is empty: download it again": not start,
        "it is a Git LFS pointer, not the model: run `git lfs pull` in its folder":
            start.startswith(b"version https://git-lfs"),
        "it is a web page, not the model (a login, or an error): open its address in a browser, then download it again":
            start.lstrip(b"\xef\xbb\xbf\r\n\t ").lower().startswith((b"<!doctype", b"<html", b"<head", b"<?xml")),
        "it is a GGML file, older than GGUF: look for a GGUF version": start[:4] in (b"lmgg", b"fmgg", b"tjgg"),
        f"it is no GGUF file, its first bytes are {start[:20]}: download it again": start[:4] != b"GGUF",
        "it is cut off after its first bytes: download it again": len(start) < 24,
        "it is big-endian, for other processors: look for the little-endian version": number % 2**16 == 0,
        f"its GGUF version is {number}, and 2 and 3 can be read: look for another version": number not in (2, 3),
    }
    for kind, is_so in kinds.items():
        if is_so:
            raise ValueError(kind)


class WholeReader(GGUFReader):
    """gguf's reader, except that what lies beyond the end of the file is an EOFError. gguf takes it for empty, and
    reads as many of such numbers as a damaged length says."""

    def _get(self, offset, dtype, count=1, override_order=None):
        if int(offset) + int(count) * np.dtype(dtype).itemsize > len(self.data):
            raise EOFError
        return super()._get(offset, dtype, count, override_order)


def read_file(path: Path) -> tuple[dict, list]:
    """The metadata and the tensors, as gguf gives them. Raises ValueError for a file that is not whole."""
    check_start(path)
    try:
        reader = WholeReader(path)
        return {key: field.contents() for key, field in reader.fields.items()}, reader.tensors
    except EOFError:
        raise ValueError(f"it is cut off after {path.stat().st_size:,} bytes: download it again, or, if it is a part "
                         "of a file, join all parts with `cat`") from None
    except Exception as err:  # what gguf raises for a damaged file cannot be listed
        raise ValueError(f"it is damaged, or newer than gguf {version('gguf')} ({type(err).__name__}: {err}): download "
                         "it again, or try `pip install -U gguf`") from err


# ----- Tensors -----------------------------------------------------------------------------------------------------


def open_gguf(path: Path) -> tuple[dict, dict[str, LazyTensor]]:
    """The metadata of a GGUF file, and its tensors in Hugging Face's names and order of rows; none is read yet.

    Where a field of the architecture is a list with one number for each layer, all the same, it is that number here.
    Raises ValueError for a file that is not whole, or holds anything but a whole model that is implemented.
    """
    metadata, found = read_file(path)
    arch = metadata.get("general.architecture")
    kind = metadata.get("general.type")
    num_files = metadata.get("split.count", 0)
    if num_files not in (0, 1):
        raise ValueError(f"it is one of the {num_files} files of a model: join them with `llama-gguf-split --merge "
                         "FIRST.gguf WHOLE.gguf`")
    if kind in ("adapter", "mmproj", "imatrix"):
        raise ValueError(f"it holds no model, its general.type is {kind}: look for the model itself")
    if arch not in list(GGUF_ARCHS):
        raise ValueError(f"general.architecture {arch!r} is not implemented, only {', '.join(GGUF_ARCHS)}")
    for key, value in metadata.items():
        if key.startswith(f"{arch}.") and isinstance(value, list) and value and value == value[:1] * len(value):
            metadata[key] = value[0]

    def read(tensor) -> Tensor:
        weight = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        return to_hf_rows(tensor.name, weight, metadata) if arch == "llama" else weight

    tensors = {}
    for tensor in found:
        name = hf_names(tensor.name, GGUF_NAMES)[0]
        if name == tensor.name != "rope_freqs.weight" or not name.endswith((".weight", ".bias")):
            raise ValueError(f"the tensor {tensor.name} is not implemented")
        shape = tuple(tensor.shape[::-1].tolist())  # GGUF lists the innermost dimension first
        tensors[name] = (shape, partial(read, tensor))
    if "model.embed_tokens.weight" not in tensors:
        raise ValueError("it has no token_embd.weight (only a vocabulary?): look for the model itself")
    return metadata, tensors


def to_hf_rows(name: str, weight: Tensor, metadata: dict) -> Tensor:
    """A tensor of a "llama" file with the rows of q and k in Hugging Face's order.

    RoPE rotates pairs of elements of a head: (2j, 2j + 1) in llama.cpp, (j, j + head_dim / 2) in Hugging Face. For
    "llama" files llama.cpp reorders the rows of q and k accordingly; for Qwen's it does not.
    """
    found = re.search(r"\.attn_([qk])\.", name)
    if not found:
        return weight
    heads = metadata["llama.attention.head_count"]
    if found[1] == "k":
        heads = metadata.get("llama.attention.head_count_kv", heads)
    return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).reshape(weight.shape)


# ----- config.json -------------------------------------------------------------------------------------------------


def gguf_config(metadata: dict, tensors: dict[str, LazyTensor], dtype: torch.dtype) -> dict:
    """Hugging Face's config.json for GGUF metadata. Takes rope_freqs.weight out of `tensors`: it is no weight.
    Raises KeyError for a missing field, ValueError for one that is wrong or asks for what is not implemented."""
    arch = metadata["general.architecture"]
    hidden_size = positive(metadata, f"{arch}.embedding_length")
    heads = positive(metadata, f"{arch}.attention.head_count")
    head_dim = positive(metadata, f"{arch}.attention.key_length", hidden_size // heads)
    context = positive(metadata, f"{arch}.context_length")
    eps = positive(metadata, f"{arch}.attention.layer_norm_rms_epsilon", kind=float)
    refuse_fields(metadata, arch, head_dim, context)
    rope_freqs = None
    if "rope_freqs.weight" in tensors:
        _, read = tensors.pop("rope_freqs.weight")
        rope_freqs = read()
    rope = gguf_rope(metadata, arch, head_dim, rope_freqs)
    if arch == "llama" and "model.layers.0.self_attn.q_proj.bias" in tensors:
        arch_name = "qwen2"  # Hugging Face's name for a Llama with biases of q, k and v
    else:
        arch_name = arch
    ids = special_ids(metadata)
    return {
        "architectures": [GGUF_ARCHS[arch_name]], "model_type": arch_name, "hidden_act": "silu", "head_dim": head_dim,
        "hidden_size": hidden_size, "intermediate_size": positive(metadata, f"{arch}.feed_forward_length"),
        "num_hidden_layers": positive(metadata, f"{arch}.block_count"), "num_attention_heads": heads,
        "num_key_value_heads": positive(metadata, f"{arch}.attention.head_count_kv", heads),
        "max_position_embeddings": context,
        "rms_norm_eps": float(f"{eps:.7g}"),  # stored as float32, where 1e-5 reads 9.99999974e-06
        **rope, "vocab_size": tensors["model.embed_tokens.weight"][0][0],
        "torch_dtype": str(dtype).removeprefix("torch."), "bos_token_id": ids.get("bos"), "eos_token_id": ids["eos"],
        "tie_word_embeddings": "lm_head.weight" not in tensors}


def refuse_fields(metadata: dict, arch: str, head_dim: int, context: int) -> None:
    """Raise ValueError for a field of the architecture that changes what the model computes, and whose value is not
    neutral: scales, soft caps, windows, experts, RoPE of a part of a head, and all fields that are not known here."""
    allowed = {
        "attention.value_length": lambda value: value == head_dim,
        "rope.dimension_count": lambda value: value == head_dim,
        "rope.scaling.attn_factor": lambda value: value == 1,
        "rope.scaling.yarn_attn_factor": lambda value: value == 1,
        "rope.scaling.yarn_ext_factor": lambda value: value == 0,
        "attention.causal": lambda value: value is True,
        "attention.scale": lambda value: value == 0 or math.isclose(value, head_dim ** -0.5, rel_tol=1e-5),
        "attention.sliding_window": lambda value: value == 0 or value >= context}
    for key, value in metadata.items():
        field = key.removeprefix(f"{arch}.")
        if field == key or field in HARMLESS_FIELDS:
            continue
        if isinstance(value, list):
            neutral = not value
        elif field in READ_FIELDS:
            neutral = True
        elif field in allowed and not isinstance(value, str):
            neutral = allowed[field](value)
        elif field.endswith(("scale", "multiplier", "factor")):
            neutral = value in (0, 1)
        else:
            neutral = not value
        if not neutral:
            raise ValueError(f"{key} = {value} changes what the model computes, and is not implemented: look for a "
                             "version without it")


def gguf_rope(metadata: dict, arch: str, head_dim: int, rope_freqs: Tensor | None) -> dict:
    """The RoPE entries of config.json. All that a GGUF file says about RoPE and that is implemented is read here.

    rope_freqs: the tensor rope_freqs.weight, if there is one. Where there is no type, it is "linear". Linear scaling
    by 1, or by 0, is none. "none" means none, whatever the factor. Raises ValueError for other scaling.
    """
    theta = positive(metadata, f"{arch}.rope.freq_base", 1e4, float)
    keys = [f"{arch}.rope.{key}" for key in ("scaling.type", "scaling.factor", "scale_linear")]
    type_key, factor_key, old_factor_key = keys
    scaling_type = metadata.get(type_key, "linear")
    factor = metadata.get(factor_key, metadata.get(old_factor_key, 0))
    if scaling_type != "none" and not (scaling_type == "linear" and factor in (0, 1)):
        given = ", ".join(f"{key} = {metadata[key]}" for key in keys if key in metadata)
        raise ValueError(f"{given}: RoPE scaling of type {scaling_type!r} is not implemented; look for a version "
                         "without it")
    scaling = {"rope_type": "default"}
    if rope_freqs is not None:
        if rope_freqs.shape != (head_dim // 2,):
            raise ValueError(f"rope_freqs.weight is {list(rope_freqs.shape)}, for {head_dim // 2} frequencies")
        scaling = llama3_scaling(rope_freqs, theta)
    return {"rope_theta": theta, "rope_scaling": scaling}


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
