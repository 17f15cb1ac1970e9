"""EAGLE-3 heads on disk (arXiv 2503.01840), as six publishers write them: their tensors and draft vocabulary.

They differ in names, in norms, in the number of layers, in the order of the draft vocabulary, and in whether a head
brings an embedding and an lm_head. The tensors decide on all of this. formats/eagle3_config.py reads the config, and
says what no file tells.

    python -c "from formats.eagle3 import *; print(open_eagle3(Path('HEAD'), Config.load('TARGET')).config)"
"""
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from formats.config import Config
from formats.eagle import folder_of, fuse, open_head
from formats.eagle3_config import (
    MEASURED,
    Eagle3Config,
    Found,
    eagle3_config_json,
    measured_json,
    naming,
    read_eagle3_config,
)
from formats.hf import NAMES
from formats.weights import save_tensors
from formats.writing import replace_files

# Published names -> ours, one after the other. Layers are midlayer, midlayer.1, or layers.1.
RENAMED = ((r"^(model\.)+", ""), (r"^midlayer\.(?=\d+\.)", "layers."), (r"^midlayer\.", "layers.0."),
           (r"^embed_tokens\.", "embed."), (r"^fc_norm\.", "fc_norms."), (r"^aux_norm_low\.", "fc_norms.0."),
           (r"^aux_norm_mid\.", "fc_norms.1."), (r"^aux_norm_high\.", "fc_norms.2."))
# Our modules of a layer -> the published ones whose rows they stack. A wide layer takes [embedding; feature].
LINEARS = ("wqkv", "wo", "w13", "w2")
LAYER = {module: NAMES[module] for module in (*LINEARS, "q_norm", "k_norm", "mlp_norm")}
WIDE = {"embed_norm": "input_layernorm", "feature_norm": "hidden_norm"}
KNOWN = re.compile(r"(layers\.\d{1,3}\.(wqkv|wo|w13|w2)|fc)\.(weight|bias|data|scale)|lm_head\.(weight|data|scale)|"
                   r"(embed|norm|input_norm|fc_norms\.\d|layers\.\d{1,3}\.(embed|feature|attn|mlp|q|k)_norm)\.weight")
OTHERS = {"kv_a_proj": "MLA attention", "parallel_draft_heads": "drafting in parallel"}  # told by part of a name


class HeadFiles(NamedTuple):
    """A head as read. tensors: under the names of the module that drafts. ids: int64 [draft_vocab_size], the target's
    ids of the draft vocabulary, in any order; None: all tokens. doubts: fields of the config that the file cannot tell
    -> the values to try, the config's first."""
    config: Any  # an Eagle3Config; formats/block.py: a BlockConfig
    tensors: dict[str, Tensor]
    ids: Tensor | None
    doubts: dict[str, tuple]
    file: Path
    metadata: dict[str, str]


# ----- Reading -----------------------------------------------------------------------------------------------------


def open_eagle3(path: Path, target: Config) -> HeadFiles:
    """Read a published head, or what quantize.py made of it: a folder, or a weight file in it.

    Raises FileNotFoundError, or ValueError with one line, where the head is damaged, of another kind or for another
    model than `target`, and where it asks for what is not implemented. Shapes that the config does not need are left
    for formats.weights.fill to check.
    """
    file, published, metadata = open_head(path, "EAGLE-3")
    with naming(file):
        tensors = usual_names(published)
        d2t, t2d = (tensors.pop(name, None) for name in ("d2t", "t2d"))
        wide = wide_layers(tensors)
    fuse(tensors, layer_sources(tensors, wide), file)
    with naming(file):
        check_names(tensors, wide)
        found = what_tensors_say(tensors, wide, target, d2t)
    config, doubts = read_eagle3_config(folder_of(path), found, target)
    if not config.taps:  # vLLM and SGLang use no fc then, even where there is one
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("fc.")}
    with naming(file):
        check_width(config, tensors)
        ids = read_ids(d2t, t2d, config.draft_vocab_size, target.vocab_size)
    return HeadFiles(config, tensors, ids, doubts, file, metadata)


def usual_names(published: dict[str, Tensor], renamed: tuple[tuple[str, str], ...] = RENAMED) -> dict[str, Tensor]:
    """The tensors without their publishers' prefixes, and layers as layers.0, layers.1, ..."""
    tensors = {}
    for name, tensor in published.items():
        plain = name
        for pattern, new in renamed:
            plain = re.sub(pattern, new, plain)
        if plain in tensors:
            raise ValueError(f"{name} is there under another name too")
        if not plain.endswith("rotary_emb.inv_freq"):
            tensors[plain] = tensor
    return tensors


def has(tensors: dict[str, Tensor], module: str) -> bool:
    return f"{module}.weight" in tensors or f"{module}.data" in tensors


def size_of(tensors: dict[str, Tensor], module: str) -> tuple[int, int | None]:
    """(rows, columns) of a linear; columns are None in int4, which pads them. ValueError if missing or no matrix."""
    if not has(tensors, module):
        raise ValueError(f"lacks {module}.weight")
    matrix = tensors.get(f"{module}.weight", tensors.get(f"{module}.data"))
    scale = tensors.get(f"{module}.scale")
    if matrix.dim() != 2 or not matrix.numel():
        raise ValueError(f"{module} is {list(matrix.shape)}, which is no matrix")
    return len(matrix), None if scale is not None and scale.dim() == 3 else matrix.shape[1]


def count_layers(tensors: dict[str, Tensor]) -> int:
    """How many layers there are. ValueError if there is none, or if one is missing between others."""
    numbers = {int(found[1]) for name in tensors if (found := re.match(r"layers\.(\d{1,3})\.", name))}
    if not numbers or numbers != set(range(len(numbers))):
        raise ValueError(f"its layers are {sorted(numbers)[:9]}, where 0, 1, ... should be: download it again")
    return len(numbers)


def wide_layers(tensors: dict[str, Tensor]) -> tuple[bool, ...]:
    """For each layer, whether it takes [embedding; feature], twice the width that its o_proj gives."""
    for part, what in OTHERS.items():
        if name := next((name for name in tensors if part in name), None):
            raise ValueError(f"has {name}: {what} is not implemented")
    wide = []
    for i in range(count_layers(tensors)):
        if has(tensors, f"layers.{i}.wqkv"):  # a file of ours
            wide.append(f"layers.{i}.embed_norm.weight" in tensors)
            continue
        width = size_of(tensors, f"layers.{i}.self_attn.o_proj")[0]
        columns = size_of(tensors, f"layers.{i}.self_attn.q_proj")[1]
        if columns not in (width, 2 * width):
            raise ValueError(f"q_proj of layer {i} takes {columns} numbers, and o_proj gives {width}: no EAGLE-3 head")
        wide.append(columns == 2 * width)
    if not wide[0]:
        raise ValueError("its first layer takes a feature without an embedding: that is not implemented")
    return tuple(wide)


def layer_sources(tensors: dict[str, Tensor], wide: tuple[bool, ...]) -> dict[str, list[str]]:
    """Our tensors of the layers -> the published ones that they are made of, for formats.eagle.fuse."""
    sources = {}
    for i, is_wide in enumerate(wide):
        # vLLM and SGLang have two names for the norm of a layer that takes features alone.
        narrow = next((name for name in WIDE.values() if f"layers.{i}.{name}.weight" in tensors), "input_layernorm")
        for module, parts in (LAYER | (WIDE if is_wide else {"attn_norm": narrow})).items():
            for kind in ("weight", "bias"):
                sources[f"layers.{i}.{module}.{kind}"] = [f"layers.{i}.{part}.{kind}" for part in parts.split()]
    return sources


def check_names(tensors: dict[str, Tensor], wide: tuple[bool, ...]) -> None:
    """ValueError for a tensor that is unknown, or missing in a layer."""
    if unknown := sorted(name for name in tensors if not KNOWN.fullmatch(name)):
        raise ValueError(f"has unknown {', '.join(unknown[:3])}: what they do is not implemented")
    qk_norms = [norm for norm in ("q_norm", "k_norm") if any(name.endswith(f".{norm}.weight") for name in tensors)]
    for i, is_wide in enumerate(wide):
        for norm in (*(WIDE if is_wide else ["attn_norm"]), "mlp_norm", *(qk_norms and ("q_norm", "k_norm"))):
            if f"layers.{i}.{norm}.weight" not in tensors:
                raise ValueError(f"lacks layers.{i}.{norm}.weight")
        for module in LINEARS:
            size_of(tensors, f"layers.{i}.{module}")


def what_tensors_say(tensors: dict[str, Tensor], wide: tuple[bool, ...], target: Config, d2t: Tensor | None) -> Found:
    """All that the config is checked against."""
    width, heads_width = size_of(tensors, "layers.0.wo")
    columns = size_of(tensors, "fc")[1] if has(tensors, "fc") else 0
    if columns and columns % target.hidden_size:
        raise ValueError(f"fc takes {columns} numbers, no multiple of the target's hidden size {target.hidden_size}: "
                         "another model's head")
    taps = columns and columns // target.hidden_size
    fc_norms = {name for name in tensors if name.startswith("fc_norms.")}
    if taps is not None and fc_norms not in (set(), {f"fc_norms.{i}.weight" for i in range(taps)}):
        raise ValueError(f"has {len(fc_norms)} norms (fc_norm) for {taps} taps")
    norms = {"norm_before_fc": "input_norm.weight" in tensors, "fc_norm": bool(fc_norms),
             "use_last_layernorm": "norm.weight" in tensors}
    return Found(width, size_of(tensors, "layers.0.w13")[0] // 2, size_of(tensors, "layers.0.wqkv")[0], heads_width,
                 "layers.0.q_norm.weight" in tensors, wide, taps,
                 size_of(tensors, "lm_head")[0] if has(tensors, "lm_head") else None,
                 len(d2t) if d2t is not None and d2t.dim() == 1 else None, norms)


def check_width(config: Eagle3Config, tensors: dict[str, Tensor]) -> None:
    """ValueError if the embedding is another model's, or the target's would not fit."""
    width, vocab_size = config.layer.hidden_size, config.layer.vocab_size
    embed = tensors.get("embed.weight")
    if embed is not None and embed.shape != (vocab_size, width):
        raise ValueError(f"embed_tokens.weight is {list(embed.shape)}, where [{vocab_size}, {width}] would fit: "
                         "another model's head")
    if width != config.target_size and not (config.taps and embed is not None and has(tensors, "lm_head")):
        raise ValueError(f"a head of width {width} for a target of hidden size {config.target_size} needs fc, "
                         "embed_tokens and lm_head of its own: another model's head")


def read_ids(d2t: Tensor | None, t2d: Tensor | None, size: int, vocab_size: int) -> Tensor | None:
    """The target's ids of the draft vocabulary, int64 [size]; None if draft token i is token i, for all tokens.
    d2t int32 or int64 [size] holds offsets: draft token i is token i + d2t[i]. t2d bool or uint8 [vocab_size] marks the
    tokens that are in the draft vocabulary. Raises ValueError if the tables are damaged or do not fit.
    """
    if size > vocab_size:
        raise ValueError(f"lm_head has {size} rows, and the target {vocab_size} tokens: another model's head")
    if t2d is not None and (t2d.shape != (vocab_size,) or t2d.dtype not in (torch.bool, torch.uint8)):
        raise ValueError(f"t2d is {list(t2d.shape)} of {t2d.dtype}, where [{vocab_size}] of bool would fit: another "
                         "model's head")
    if d2t is None:
        if size < vocab_size:
            raise ValueError(f"lm_head has {size} rows for {vocab_size} tokens, and no d2t says for which: unusable")
        return None
    if d2t.shape != (size,) or d2t.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"d2t is {list(d2t.shape)} of {d2t.dtype}: it should be {size} integers, one a row of lm_head")
    offsets = d2t.long()
    ids = torch.arange(size) + offsets
    if not offsets.any() and size == vocab_size:
        return None
    if not offsets.any() and t2d is None:
        raise ValueError(f"d2t is all zeros, but {size} of {vocab_size} tokens are drafted: the table was lost")
    # Without t2d, a table of ids can pass for one of offsets. But offsets repeat: neighbours are often both chosen.
    if are_ids(offsets, t2d, vocab_size) and (t2d is None or not are_ids(ids, t2d, vocab_size)):
        raise ValueError("d2t holds the tokens' ids themselves; it should hold offsets, id - row")
    if not are_ids(ids, t2d, vocab_size):
        raise ValueError(f"d2t gives {len(ids.unique())} different ids from {ids.min()} to {ids.max()}: it should give "
                         f"{size} below {vocab_size}" + (", those of t2d" if t2d is not None else ""))
    return ids


def are_ids(ids: Tensor, t2d: Tensor | None, vocab_size: int) -> bool:
    """Whether these are different tokens of the target, and those of t2d."""
    if ids.min() < 0 or ids.max() >= vocab_size or len(ids.unique()) < len(ids):
        return False
    return t2d is None or bool(t2d.bool()[ids].all() and t2d.bool().sum() == len(ids))


# ----- Writing -----------------------------------------------------------------------------------------------------


def save_eagle3(cfg: Eagle3Config, state: dict[str, Tensor], ids: Tensor | None, out: Path) -> None:
    """Write the folder of a head from its config, its tensors as `open_eagle3` gives them, and the ids of its draft
    vocabulary: bf16, in the format of SafeAILab and SpecForge, with one layer as midlayer and several as layers.0 ....

    measured.json says what is known of the head, so that nothing has to be measured when it is read. Raises ValueError
    for taps that other engines would misread (eagle3_config_json), and OSError.
    """
    state = {name: t.detach().to("cpu", torch.bfloat16) for name, t in state.items()}
    norms = {"norm_before_fc": "input_norm.weight" in state, "fc_norm": "fc_norms.0.weight" in state,
             "use_last_layernorm": "norm.weight" in state}
    biases = [any(f"layers.0.{module}.bias" in state for module in pair) for pair in (("wqkv", "wo"), ("w13", "w2"))]
    config = eagle3_config_json(cfg, norms, *biases, ids is not None and "lm_head.weight" not in state)
    tensors = {name: t for old, tensor in state.items() for name, t in published_tensors(cfg, old, tensor)}
    tensors |= vocabulary_tables(ids, cfg.layer.vocab_size)
    write_head(out, tensors, config, measured_json(cfg))


def write_head(out: Path, tensors: dict[str, Tensor], config: dict, measured: dict) -> None:
    """Write the folder of a head: published tensors, config.json and measured.json. Raises OSError."""
    with replace_files(out) as part:
        save_tensors(part / "model.safetensors", tensors)
        for name, values in (("config.json", config), (MEASURED, measured)):
            (part / name).write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def published_tensors(cfg: Eagle3Config, name: str, tensor: Tensor) -> list[tuple[str, Tensor]]:
    """A tensor of ours under its published names, with q, k, v and gate, up apart."""
    prefix, module, kind = re.fullmatch(r"(?:layers\.(\d+)\.)?(.*)\.(\w+)", name).groups()
    if prefix is None:
        module = {"embed": "embed_tokens"}.get(module, module).replace("fc_norms.", "fc_norm.")
        return [(f"{module}.{kind}", tensor)]
    prefix = "midlayer" if cfg.layer.num_layers == 1 else f"layers.{prefix}"
    return [(f"{prefix}.{part}.{kind}", piece) for part, piece in layer_parts(cfg.layer, module, tensor)]


def layer_parts(layer: Config, module: str, tensor: Tensor) -> list[tuple[str, Tensor]]:
    """The published modules that a module of a layer is made of, and the rows of its tensor that belong to each."""
    kv_rows = layer.num_kv_heads * layer.head_dim
    rows = {"wqkv": (layer.num_heads * layer.head_dim, kv_rows, kv_rows), "w13": len(tensor) // 2}
    parts = (LAYER | WIDE | {"attn_norm": "input_layernorm"})[module].split()
    return list(zip(parts, tensor.split(rows.get(module, len(tensor))), strict=True))


def vocabulary_tables(ids: Tensor | None, vocab_size: int) -> dict[str, Tensor]:
    """d2t and t2d (read_ids) for these ids [any]; {} for None."""
    if ids is None:
        return {}
    ids = ids.detach().to("cpu", torch.int64)
    return {"d2t": ids - torch.arange(len(ids)),
            "t2d": torch.zeros(vocab_size, dtype=torch.bool).index_fill(0, ids, True)}
