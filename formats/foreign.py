"""Published files that this engine does not read: weights quantised in other ways than formats/packed.py lists, and
draft heads of other kinds.

Nothing is read from them here. They are recognised by their config.json and by the names of their tensors, so that an
error can say what a file is and what to take instead.
"""
import json
import re
import zipfile
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from formats.packed import is_read, stated

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)  # what plain weights are stored in

MAX_BYTES_OF_A_PICKLE = 2**28  # without the tensors' data; those of large models take some megabytes

# ----- Quantised weights -------------------------------------------------------------------------------------------

# quant_method in config.json -> the method's name, and what hub ids of such checkpoints often have in them.
METHODS = {
    "awq": ("AWQ", "-AWQ"), "gptq": ("GPTQ", "-GPTQ or -Int4"), "compressed-tensors": ("compressed-tensors", "-w4a16"),
    "fp8": ("FP8", "-FP8"), "fbgemm_fp8": ("FP8", "-FP8"), "bitsandbytes": ("bitsandbytes", "-bnb-4bit"),
    "modelopt": ("NVIDIA's ModelOpt", "-FP8 or -NVFP4"), "mlx": ("MLX", "-4bit"), "exl2": ("EXL2", "-exl2"),
    "exl3": ("EXL3", "-exl3"), "hqq": ("HQQ", "-HQQ"), "torchao": ("torchao", "-INT4 or -torchao"),
    "mxfp4": ("MXFP4", "-MXFP4"), "auto-round": ("AutoRound", "-AutoRound"), "quanto": ("quanto", "-quanto"),
    "aqlm": ("AQLM", "-AQLM"), "vptq": ("VPTQ", "-VPTQ"), "bitnet": ("BitNet", "-1.58bit")}
# Ends of tensor names that one method alone uses.
NAMES = {
    "_qdata": "torchao", "weight._data": "quanto", "W_q": "hqq", "trellis": "exl3", "q_weight": "exl2",
    "q_invperm": "exl2", "weight_packed": "compressed-tensors", "weight_shape": "compressed-tensors",
    "weight_scale_inv": "fp8", "weight_scale_2": "modelopt", "SCB": "bitsandbytes", "absmax": "bitsandbytes",
    "quant_map": "bitsandbytes", "codebooks": "aqlm", "centroids.weight": "vptq", "weight_scale": "compressed-tensors",
    "input_scale": "modelopt"}


def refusal(method: str, details: str, evidence: str) -> str:
    """The line of an error about quantised weights. details: such as "4 bits, groups of 128", or ""."""
    name, mark = METHODS.get(method, (method, f"-{method}"))
    what = f"{name} ({details})" if details else name
    return (f"the weights are quantised with {what}, see {evidence}; this is not implemented: download the unquantised "
            f"model, whose name has no {mark}, and let quantize.py make int8 or int4 of it")


def quantized_by_config(raw: dict, is_head: bool = False) -> str | None:
    """What to tell of a config.json that says that the weights are quantised in a way that is not read, or None. Of
    draft heads no way is."""
    found = stated(raw)
    if found is None or (is_read(*found[:2]) and not is_head):
        return None
    method, said, where = found
    return f"{refusal(method, details_of(said), where)}. If they are plain after all, remove {where.split()[0]}"


def details_of(said: dict) -> str:
    """Bits, group and kind of number, as far as a quantization_config says them: "4 bits, groups of 128"."""
    found = dict(flat(said))
    bits = next((found[key] for key in ("bits", "w_bit", "num_bits", "nbits", "wbits") if found.get(key)), None)
    if bits is None and (found.get("load_in_4bit") or found.get("load_in_8bit")):
        bits = 4 if found.get("load_in_4bit") else 8
    group = next((found[key] for key in ("group_size", "q_group_size") if found.get(key)), None)
    kind = next((found[key] for key in ("quant_algo", "format", "quant_type", "_type", "bnb_4bit_quant_type", "fmt",
                                            "version", "checkpoint_format")
                 if isinstance(found.get(key), str)), None)
    parts = [f"{bits} bits" if bits else "", f"groups of {group}" if group and group != -1 else "", kind or ""]
    return ", ".join(filter(None, parts))


def flat(said: dict, depth: int = 0) -> Iterable[tuple[str, object]]:
    """The entries of an object and of the objects within, the outer ones last."""
    for value in said.values():
        if isinstance(value, dict) and depth < 5:
            yield from flat(value, depth + 1)
    yield from said.items()


def quantized_by_tensors(tensors: dict[str, Tensor]) -> str | None:
    """What to tell of the tensors of a model or head if they are quantised, or None."""
    ends = {name.rsplit(".", 1)[-1]: name for name in tensors}
    if "qweight" in ends:
        return packed_words(tensors, ends["qweight"])
    for end, method in NAMES.items():
        name = next((name for name in tensors if name.endswith(end)), None)
        if name:
            weight = tensors.get(name.removesuffix("_scale"))
            kind = "" if weight is None or weight.dtype in FLOATS else dtype_name(weight)
            return refusal("fp8" if "float8" in kind else method, kind, name)
    if "scales" in ends and "biases" in ends:
        return refusal("mlx", "", ends["scales"])
    for name, tensor in tensors.items():
        if name.endswith((".weight", ".bias")) and tensor.dtype not in FLOATS:
            kind = dtype_name(tensor)
            likely = {"uint8": "bitsandbytes", "int8": "INT8"}.get(kind, "FP8" if "float8" in kind else "packed")
            return (f"{name} is {kind}, and there are no scales for it: probably {likely} weights, saved without them; "
                    "download the unquantised model")
    return None


def dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def packed_words(tensors: dict[str, Tensor], name: str) -> str:
    """The same for 32-bit words `qweight`, of AWQ or GPTQ. AWQ packs along the outputs: [K, N * bits / 32]. GPTQ packs
    along the inputs: [K * bits / 32, N]. Both have scales [K / group, N] and qzeros [K / group, N * bits / 32]."""
    stem = name.removesuffix("qweight")
    words, scales, zeros = (tensors.get(stem + end) for end in ("qweight", "scales", "qzeros"))
    if scales is None or zeros is None or min(scales.dim(), zeros.dim(), words.dim()) != 2 or not scales.numel():
        return refusal("gptq", "", name)
    method = "gptq" if words.shape[1] == scales.shape[1] else "awq"
    bits = 32 * zeros.shape[1] // scales.shape[1]
    inputs = 32 * words.shape[0] // max(bits, 1) if method == "gptq" else words.shape[0]
    return refusal(method, f"{bits} bits, groups of {inputs // scales.shape[0]}", name)


def pickled_by(path: Path) -> str | None:
    """What to tell of a pickle with classes of a quantising library, or None. The pickle is searched, never run."""
    try:
        with zipfile.ZipFile(path) as archive:
            program = b"".join(archive.read(entry) for entry in archive.infolist()
                               if entry.filename.endswith("data.pkl") and entry.file_size < MAX_BYTES_OF_A_PICKLE)
    except Exception:  # no archive, or a damaged one, which raises anything: reading it as weights will say so
        return None
    method = next((name for name in ("torchao", "hqq", "quanto", "bitsandbytes") if name.encode() in program), None)
    return method and refusal(method, "", f"the classes in {path.name}")


# ----- Draft heads ---------------------------------------------------------------------------------------------------

# What only one kind of head has in the names of its tensors. The first that fits counts.
HEADS = [
    ("Hydra heads", r"hydra_|prefix_embedd?ing_layer"),
    ("Medusa heads (--medusa takes them)", r"^(medusa_heads?\.)?\d+\.\d+\.(linear\.)?weight$|^medusa_lm|^blocks\.\d+"),
    ("an MTP head", r"(^|\.)mtp[._]|eh_proj|(^|\.)[eh]norm\.|shared_head|pre_fc_norm"),
    ("a P-EAGLE head", r"^mask_hidden$"),
    ("a Domino head", r"^prefix_gru\."),
    ("a DFlare head", r"^layer_fusion_weights"),
    ("a DFlash2 head", r"^candidate_selector\.|(attention|mlp)_conv\."),
    ("a DFlash head of the assistant kind", r"^encoder\.(fc|output_norm_enc)\."),
    ("a DFlash head of Laguna's or MiMo's kind", r"^mask_embedding|^aux_hidden_norms|\.g_proj\."
     r"|(^|[._])sinks?([._]|$)"),
    ("a block head", r"^hidden_norm\.weight$|(^|\.)markov_head\.|^confidence_head\."),
    ("an EAGLE-3 head", r"^midlayer\.|^d2t$|^t2d$|^layers\.\d+\.(hidden|feature)_norm\."
     r"|^fc_norm\.|^input_norm\.|^aux_norm"),
    ("an MLP speculator", r"^(emb|proj|ln|head)\.\d+\.weight$"),
    ("a whole model (--speculate takes one)", r"^layers\.0\.(input_layernorm|attn_norm)\.weight$"),
    ("an EAGLE-1/2 head (--draft takes it)", r"^layers\.0\.self_attn\.q_proj\.weight$"),
]
# The same in config.json, for files whose tensors do not say.
SAID = {"peagle": "a P-EAGLE head", "hydra": "Hydra heads", "medusa": "Medusa heads (--medusa takes them)",
        "domino": "a Domino head", "dspark": "a block head", "dflash": "a block head", "eagle3": "an EAGLE-3 head",
        "mlp_speculator": "an MLP speculator", "mtp": "an MTP head"}


def head_for_model(names: Iterable[str], raw: dict) -> str | None:
    """What kind of draft head stands where a model should, without the remark in brackets; None for a model, which may
    have MTP layers of its own."""
    kind = kind_of_head(names, raw)
    return None if kind is None or kind.startswith(("a whole model", "an MTP")) else kind.partition(" (")[0]


def kind_of_head(names: Iterable[str], raw: dict) -> str | None:
    """What kind of draft head has tensors of these names and this config.json, such as "an EAGLE-3 head", or None."""
    names = {re.sub(r"^((model|draft_model|dflash_module|module)\.)+", "", name) for name in names}
    marks = {"a whole model": names & {"embed_tokens.weight", "embed.weight"}, "an EAGLE-1/2": "fc.weight" in names,
             "a DFlash head of Laguna": "fc.weight" in names}  # models have sinks and gates too
    for kind, pattern in HEADS:
        if any(re.search(pattern, name) for name in names):
            if all(found for start, found in marks.items() if kind.startswith(start)):
                break
    else:
        fields = ("speculators_model_type", "speculators_config", "architectures", "model_type", "hydra_num_heads")
        said = json.dumps({key: raw[key] for key in fields if key in raw}).lower()
        kind = next((kind for word, kind in SAID.items() if word in said), None)
    return kind
