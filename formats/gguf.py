"""GGUF files: tensors and config, in Hugging Face's form.

Where to look: GGUF_ARCHS for the architectures, `refuse_fields` for what makes another model, GGUF_NAMES for the names
of tensors, `to_hf_rows` for the order of rows. The fields of RoPE: formats/gguf_rope.py. The tokenizer:
formats/gguf_tokenizer.py. What fields mean, and what holds where one is missing, is llama.cpp's word
(src/llama-model.cpp, src/models/).
"""
import math
import re
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import gguf
import numpy as np
import torch
from gguf import GGUFReader, dequantize
from torch import Tensor

from formats.fields import positive
from formats.gguf_rope import FACTORS, gguf_rope, old_context
from formats.gguf_tokenizer import special_ids
from formats.hf import LazyTensor, hf_names
from formats.packed import Packed

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
QUERY_OR_KEY = re.compile(r"\.attn_([qk])\.")


class Arch(NamedTuple):
    """A general.architecture. model_type: transformers'. reorders: llama.cpp's converter reorders the rows of q and k.
    own: fields that are read besides READ_FIELDS. names: modules that are not GGUF_NAMES'."""
    model_type: str
    reorders: bool = False
    own: tuple[str, ...] = ()
    names: dict = {}


ROPE_TENSORS = ("rope_freqs.weight", *FACTORS)
FUSED = {"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"}
GGUF_ARCHS = {
    "llama": Arch("llama", reorders=True), "qwen2": Arch("qwen2"), "qwen3": Arch("qwen3"),
    "mistral3": Arch("ministral3", reorders=True, own=("attention.temperature_scale",)),
    "granite": Arch("granite", reorders=True, own=("embedding_scale", "residual_scale", "logit_scale",
                                                  "attention.scale")),
    "smollm3": Arch("smollm3", reorders=True),
    "phi3": Arch("phi3", own=("rope.dimension_count", "attention.sliding_window"), names=FUSED),
    "chatglm": Arch("glm", own=("rope.dimension_count",), names=FUSED),
    "ernie4_5": Arch("ernie4_5"),
    "seed_oss": Arch("seed_oss", names={"post_attention_norm": "post_attention_layernorm"}),
}
CLASSES = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3", "ministral3": "Ministral3", "granite": "Granite",
           "smollm3": "SmolLM3", "phi3": "Phi3", "glm": "Glm", "ernie4_5": "Ernie4_5", "seed_oss": "SeedOss"}

# Fields of the architecture, without its prefix, that gguf_config and gguf_rope read.
READ_FIELDS = {
    "embedding_length", "feed_forward_length", "block_count", "context_length", "attention.head_count",
    "attention.head_count_kv", "attention.key_length", "attention.layer_norm_rms_epsilon", "rope.freq_base",
    "rope.scaling.type", "rope.scaling.factor", "rope.scale_linear", "rope.scaling.original_context_length"}
# Fields that change nothing: notes, what only embedding models use, what only YaRN uses (gguf_rope reads it there).
HARMLESS_FIELDS = {
    "vocab_size", "tensor_data_layout", "pooling_type", "attention.layer_norm_epsilon", "rope.scaling.finetuned",
    "rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow", "rope.scaling.yarn_log_multiplier"}


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
        reader = WholeReader(path, "c")  # arrays that may be written to, without changing the file
        return {key: field.contents() for key, field in reader.fields.items()}, reader.tensors
    except EOFError:
        raise ValueError(f"it is cut off after {path.stat().st_size:,} bytes: download it again, or, if it is a part "
                         "of a file, join all parts with `cat`") from None
    except Exception as err:  # what gguf raises for a damaged file cannot be listed
        raise ValueError(f"it is damaged, or newer than gguf {version('gguf')} ({type(err).__name__}: {err}): download "
                         "it again, or try `pip install -U gguf`") from err


def read_parts(path: Path) -> tuple[dict, list]:
    """The same, of all files of a model: NAME-00001-of-00003.gguf and so on, given by any of them. Their metadata are
    those of the first. Raises ValueError where one is missing or belongs to another model."""
    metadata, tensors = read_file(path)
    count = metadata.get("split.count", 0)
    if count in (0, 1):
        return metadata, tensors
    numbered = re.fullmatch(r"(.*)-\d{5}-of-(\d{5})\.gguf", path.name)
    if not numbered or int(numbered[2]) != count:
        raise ValueError(f"it is one of the {count} files of a model, whose names end in -00001-of-{count:05}.gguf and "
                         "so on: give them their names back")
    files = [path.with_name(f"{numbered[1]}-{i:05}-of-{count:05}.gguf") for i in range(1, count + 1)]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise ValueError(f"it is one of the {count} files of a model: {', '.join(missing[:3])} should lie beside it")
    tensors = []
    for i, file in enumerate(files):
        try:
            found, its_tensors = read_file(file)
        except ValueError as error:
            raise ValueError(f"{file.name}: {error}") from None
        if found.get("split.no") != i or found.get("split.count") != count:
            raise ValueError(f"{file.name}: it says that it is number {found.get('split.no')} of "
                             f"{found.get('split.count')}, counted from 0: download it again")
        metadata = found if i == 0 else metadata
        tensors += its_tensors
    names = {tensor.name for tensor in tensors}
    if len(names) != len(tensors) or len(tensors) != metadata.get("split.tensors.count", len(tensors)):
        raise ValueError(f"its {count} files are of different models: download them again")
    return metadata, tensors


# ----- Tensors -----------------------------------------------------------------------------------------------------


def open_gguf(path: Path) -> tuple[dict, dict[str, LazyTensor]]:
    """The metadata of a GGUF file, and its tensors in Hugging Face's names and order of rows; none is read yet.

    Where a field of the architecture is a list with one number for each layer, all the same, it is that number here.
    Raises ValueError for a file that is not whole, or holds anything but a whole model that is implemented.
    """
    metadata, found = read_parts(path)
    arch = metadata.get("general.architecture")
    kind = metadata.get("general.type")
    if kind in ("adapter", "mmproj", "imatrix"):
        raise ValueError(f"it holds no model, its general.type is {kind}: look for the model itself")
    if arch not in list(GGUF_ARCHS):
        raise ValueError(f"general.architecture {arch!r} is not implemented, only {', '.join(GGUF_ARCHS)}")
    for key, value in metadata.items():
        if key.startswith(f"{arch}.") and isinstance(value, list) and value and value == value[:1] * len(value):
            metadata[key] = value[0]

    def read(tensor) -> Tensor:
        weight = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        return to_hf_rows(tensor.name, weight, metadata) if GGUF_ARCHS[arch].reorders else weight

    def packed(tensor) -> Packed | None:
        if gguf.GGML_QUANT_SIZES[tensor.tensor_type][0] == 1 or len(tensor.shape) != 2:
            return None
        rows = None
        if GGUF_ARCHS[arch].reorders and QUERY_OR_KEY.search(tensor.name):
            rows = to_hf_rows(tensor.name, torch.arange(len(tensor.data))[:, None], metadata)[:, 0]
        return Packed(tensor.tensor_type.name, {"blocks": torch.from_numpy(tensor.data)}, {}, rows)

    tensors = {}
    for tensor in found:
        name = hf_names(tensor.name, GGUF_NAMES | GGUF_ARCHS[arch].names)[0]
        if (name == tensor.name and name not in ROPE_TENSORS) or not name.endswith((".weight", ".bias")):
            raise ValueError(f"the tensor {tensor.name} is not implemented")
        shape = tuple(tensor.shape[::-1].tolist())  # GGUF lists the innermost dimension first
        tensors[name] = LazyTensor(shape, partial(read, tensor), packed(tensor))
    if "model.embed_tokens.weight" not in tensors:
        raise ValueError("it has no token_embd.weight (only a vocabulary?): look for the model itself")
    return metadata, tensors


def to_hf_rows(name: str, weight: Tensor, metadata: dict) -> Tensor:
    """A tensor with the rows of q and k in Hugging Face's order, of a file in whose architecture llama.cpp reorders
    them: RoPE rotates pairs of elements of a head, (2j, 2j + 1) in llama.cpp, (j, j + head_dim / 2) in Hugging Face.
    """
    found = QUERY_OR_KEY.search(name)
    if not found:
        return weight
    arch = metadata["general.architecture"]
    heads = metadata[f"{arch}.attention.head_count"]
    if found[1] == "k":
        heads = metadata.get(f"{arch}.attention.head_count_kv", heads)
    return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).reshape(weight.shape)


# ----- config.json -------------------------------------------------------------------------------------------------


def gguf_config(metadata: dict, tensors: dict[str, LazyTensor], dtype: torch.dtype) -> dict:
    """Hugging Face's config.json for GGUF metadata. Takes ROPE_TENSORS out of `tensors`: they are no weights.
    Raises KeyError for a missing field, ValueError for one that is wrong or asks for what is not implemented."""
    arch = metadata["general.architecture"]
    hidden_size = positive(metadata, f"{arch}.embedding_length")
    heads = positive(metadata, f"{arch}.attention.head_count")
    head_dim = positive(metadata, f"{arch}.attention.key_length", hidden_size // heads)
    context = positive(metadata, f"{arch}.context_length")
    eps = positive(metadata, f"{arch}.attention.layer_norm_rms_epsilon", kind=float)
    refuse_fields(metadata, arch, head_dim, context)
    extra = {name: tensors.pop(name).read() for name in ROPE_TENSORS if name in tensors}
    rope = gguf_rope(metadata, arch, head_dim, context, extra)
    model_type = GGUF_ARCHS[arch].model_type
    has_biases = any(name.endswith(("q_proj.bias", "qkv_proj.bias")) for name in tensors)
    if arch == "llama" and has_biases:
        model_type = "qwen2"  # Hugging Face's name for a Llama with biases of q, k and v
    ids = special_ids(metadata)
    return {
        "architectures": [f"{CLASSES[model_type]}ForCausalLM"], "model_type": model_type, "hidden_act": "silu",
        "head_dim": head_dim, "hidden_size": hidden_size,
        "intermediate_size": positive(metadata, f"{arch}.feed_forward_length"),
        "num_hidden_layers": positive(metadata, f"{arch}.block_count"), "num_attention_heads": heads,
        "num_key_value_heads": positive(metadata, f"{arch}.attention.head_count_kv", heads),
        "max_position_embeddings": context,
        "rms_norm_eps": plain_number(eps), **rope, **own_entries(metadata, arch, head_dim, has_biases),
        "vocab_size": tensors["model.embed_tokens.weight"].shape[0],
        "torch_dtype": str(dtype).removeprefix("torch."), "bos_token_id": ids.get("bos"), "eos_token_id": ids["eos"],
        "tie_word_embeddings": "lm_head.weight" not in tensors}


def plain_number(value: float) -> float:
    """A number that was stored as float32, where 1e-5 reads 9.99999974e-06, as it was written."""
    return float(f"{value:.7g}")


def own_entries(metadata: dict, arch: str, head_dim: int, has_biases: bool) -> dict:
    """The entries of config.json that only this architecture has. A scale of 0 stands for none in llama.cpp."""
    def scale(field: str, default: float) -> float:
        key = f"{arch}.{field}"
        return plain_number(positive(metadata, key, default, float)) if metadata.get(key) else default

    if arch == "granite":
        if metadata.get("granite.rope.scaling.finetuned") is False:
            raise ValueError("granite.rope.scaling.finetuned = False: a Granite without RoPE is not implemented")
        positive(metadata, "granite.logit_scale", kind=float)
        return {"embedding_multiplier": scale("embedding_scale", 1.0), "logits_scaling": scale("logit_scale", 1.0),
                "residual_multiplier": scale("residual_scale", 1.0),
                "attention_multiplier": scale("attention.scale", head_dim ** -0.5)}
    if arch == "phi3":
        return {"sliding_window": metadata.get("phi3.attention.sliding_window") or None,
                "original_max_position_embeddings": old_context(
                    metadata, arch, positive(metadata, "phi3.context_length"))}
    if arch in ("chatglm", "seed_oss"):
        return {"attention_bias": has_biases}
    return {}


def refuse_fields(metadata: dict, arch: str, head_dim: int, context: int) -> None:
    """Raise ValueError for a field of the architecture that changes what the model computes, and whose value is not
    neutral: scales, soft caps, windows, experts, RoPE of a part of a head, and all fields that are not known here."""
    scaled = metadata.get(f"{arch}.rope.scaling.type") == "yarn"
    stretched = scaled or arch == "phi3"  # where gguf_rope reads how cos and sin grow
    allowed = {
        "attention.value_length": lambda value: value == head_dim,
        "rope.dimension_count": lambda value: value == head_dim,
        "rope.scaling.attn_factor": lambda value: value > 0 if stretched else value == 1,
        "rope.scaling.yarn_attn_factor": lambda value: value == 1,
        "rope.scaling.yarn_ext_factor": lambda value: value in ((-1, 1) if scaled else (0,)),
        "attention.causal": lambda value: value is True,
        "attention.scale": lambda value: value == 0 or math.isclose(value, head_dim ** -0.5, rel_tol=1e-5),
        "attention.sliding_window": lambda value: value == 0 or value >= context}
    for key, value in metadata.items():
        field = key.removeprefix(f"{arch}.")
        if field == key or field in HARMLESS_FIELDS or field in GGUF_ARCHS[arch].own:
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
