"""Block heads on disk (DFlash, DSpark, JetSpec): their tensors and draft vocabulary, as their publishers write them.

A head is a few Qwen3 layers, whatever its target is, and an fc for the target's hidden states. Publishers differ in
prefixes, in whether a head brings an embedding, an lm_head or a draft vocabulary, and in a Markov head. The tensors
decide on all of this. formats/block_config.py reads the config, and says what no file tells.

    python -c "from formats.block import *; print(open_block(Path('HEAD'), Config.load('TARGET')).config)"

Our names of the tensors, for a head of width H, L layers, k taps of targets of width C, V tokens, Vd draft tokens:

    fc.weight [H, k * C]; hidden_norm.weight, norm.weight [H]
    layers.i.{attn_norm, mlp_norm, q_norm, k_norm, wqkv, wo, w13, w2}.weight; layers.i.wqkv.bias or none
    embed.weight [V, H], lm_head.weight [Vd, H]: where the head has its own, be they copies of the target's
    markov.w1.weight [V, r], one row a token; markov.w2.weight [Vd, r]
    markov.gate.weight [r, H + r], .bias: of "gated" alone; markov.joint.weight [3r, 2r + H], .bias: of "rnn" alone

Quantised linears have .data and .scale in place of .weight.
"""
import re
from pathlib import Path

import torch
from torch import Tensor

from formats.block_config import BlockConfig, block_config_json, measured_json, read_block_config
from formats.config import Config
from formats.eagle import folder_of, fuse, open_head
from formats.eagle3 import (
    LINEARS,
    HeadFiles,
    count_layers,
    has,
    layer_parts,
    layer_sources,
    read_ids,
    size_of,
    usual_names,
    vocabulary_tables,
    what_tensors_say,
    write_head,
)
from formats.eagle3_config import naming

# Published names -> ours, one after the other.
RENAMED = ((r"^((model|draft_model|dflash_module|module)\.)+", ""), (r"^embed_tokens\.", "embed."),
           (r"^logit_head\.", ""), (r"^(markov_head\.)?markov_w([12])\.", r"markov.w\2."),
           (r"^(markov_head\.)?(gate|joint)_proj\.", r"markov.\2."))
# What estimates how likely a draft is accepted. The score of a path in the tree says the same.
CONFIDENCE = re.compile(r"(markov_head\.)?confidence_(head|proj)\.")
KNOWN = re.compile(r"(fc|lm_head|layers\.\d{1,3}\.(wqkv|wo|w13|w2)|markov\.(w2|gate|joint))\.(weight|data|scale)|"
                   r"(embed|markov\.w1|hidden_norm|norm|layers\.\d{1,3}\.(attn|mlp|q|k)_norm)\.weight|"
                   r"(layers\.\d{1,3}\.wqkv|markov\.(gate|joint))\.bias")
MARKOV_NAMES = {"w1": "markov_w1", "w2": "markov_w2", "gate": "gate_proj", "joint": "joint_proj"}


# ----- Reading -----------------------------------------------------------------------------------------------------


def open_block(path: Path, target: Config) -> HeadFiles:
    """Read a published head, or what quantize.py made of it: a folder, or a weight file in it.

    Raises FileNotFoundError, or ValueError with one line, where the head is damaged, of another kind or for another
    model than `target`, and where it asks for what is not implemented. Shapes of quantised weights are left for
    formats.weights.fill to check.
    """
    file, published, metadata = open_head(path, "block")
    with naming(file):
        tensors = {name: tensor for name, tensor in usual_names(published, RENAMED).items()
                   if not CONFIDENCE.match(name)}
        d2t, t2d = (tensors.pop(name, None) for name in ("d2t", "t2d"))
        wide = (False,) * count_layers(tensors)  # in EAGLE-3's words: no layer takes [embedding; feature]
    fuse(tensors, layer_sources(tensors, wide), file)
    with naming(file):
        check_names(tensors, len(wide))
        markov, rank = markov_head(tensors)
        found = what_tensors_say(tensors, wide, target, d2t)
    config, doubts = read_block_config(folder_of(path), found, markov, rank, target)
    with naming(file):
        ids = read_ids(d2t, t2d, config.draft_vocab_size, target.vocab_size)
        w2 = tensors.get("markov.w2.weight")
        if w2 is not None and ids is not None and len(ids) < len(w2) == target.vocab_size:
            tensors["markov.w2.weight"] = w2[ids]  # the rows that the lm_head has
        check_shapes(config, tensors)
    return HeadFiles(config, tensors, ids, doubts, file, metadata)


def check_names(tensors: dict[str, Tensor], layers: int) -> None:
    """ValueError for a tensor that is unknown, or missing."""
    if unknown := sorted(name for name in tensors if not KNOWN.fullmatch(name)):
        raise ValueError(f"has unknown {', '.join(unknown[:3])}: what they do is not implemented")
    norms = [f"layers.{i}.{norm}_norm" for i in range(layers) for norm in ("attn", "mlp", "q", "k")]
    for module in ("hidden_norm", "norm", *norms):
        if f"{module}.weight" not in tensors:
            raise ValueError(f"lacks {module}.weight")
    for module in ("fc", *(f"layers.{i}.{linear}" for i in range(layers) for linear in LINEARS)):
        size_of(tensors, module)
    if sum(f"layers.{i}.wqkv.bias" in tensors for i in range(layers)) not in (0, layers):
        raise ValueError("has biases of q_proj, k_proj and v_proj in some layers only: download it again")


def markov_head(tensors: dict[str, Tensor]) -> tuple[str | None, int]:
    """The kind of Markov head, and its rank; (None, 0) if there is none."""
    if not any(name.startswith("markov.") for name in tensors):
        return None, 0
    size_of(tensors, "markov.w2")
    rank = size_of(tensors, "markov.w1")[1]
    kinds = {kind: f"markov.{module}" for kind, module in (("gated", "gate"), ("rnn", "joint"))
             if has(tensors, f"markov.{module}") or f"markov.{module}.bias" in tensors}
    if len(kinds) > 1:
        raise ValueError("has both gate_proj and joint_proj in its Markov head, which exclude each other")
    for module in kinds.values():
        size_of(tensors, module)
        if f"{module}.bias" not in tensors:
            raise ValueError(f"lacks {module}.bias")
    return next(iter(kinds), "vanilla"), rank


def check_shapes(config: BlockConfig, tensors: dict[str, Tensor]) -> None:
    """ValueError for a tensor of another shape than the config tells. Those of quantised weights are not looked at."""
    layer, rank, drafted = config.layer, config.markov_rank, config.draft_vocab_size
    size, heads_width = layer.hidden_size, layer.num_heads * layer.head_dim
    qkv_rows = heads_width + 2 * layer.num_kv_heads * layer.head_dim
    wanted = {
        "fc.weight": (size, len(config.taps) * config.target_size), "hidden_norm.weight": (size,),
        "norm.weight": (size,), "embed.weight": (layer.vocab_size, size), "lm_head.weight": (drafted, size),
        "attn_norm.weight": (size,), "mlp_norm.weight": (size,), "q_norm.weight": (layer.head_dim,),
        "k_norm.weight": (layer.head_dim,), "wqkv.weight": (qkv_rows, size), "wqkv.bias": (qkv_rows,),
        "wo.weight": (size, heads_width), "w13.weight": (2 * layer.intermediate_size, size),
        "w2.weight": (size, layer.intermediate_size), "markov.w1.weight": (layer.vocab_size, rank),
        "markov.w2.weight": (drafted, rank), "markov.gate.weight": (rank, size + rank), "markov.gate.bias": (rank,),
        "markov.joint.weight": (3 * rank, 2 * rank + size), "markov.joint.bias": (3 * rank,)}
    for name, tensor in tensors.items():
        shape = wanted.get(re.sub(r"^layers\.\d+\.", "", name), tensor.shape)
        if tensor.shape != shape:
            raise ValueError(f"{name} is {list(tensor.shape)}, where {list(shape)} would fit: damaged, or another "
                             "model's head")


# ----- Writing -----------------------------------------------------------------------------------------------------


def save_block(cfg: BlockConfig, state: dict[str, Tensor], ids: Tensor | None, out: Path) -> None:
    """Write the folder of a head from its config, its tensors as `open_block` gives them, and the ids of its draft
    vocabulary: bf16, under z-lab's names, and DeepSpec's for a Markov head.

    measured.json says what is known of the head, so that nothing has to be measured when it is read. Raises OSError.
    """
    state = {name: t.detach().to("cpu", torch.bfloat16) for name, t in state.items()}
    config = block_config_json(cfg, "layers.0.wqkv.bias" in state, ids is not None and "lm_head.weight" not in state)
    tensors = {name: t for old, tensor in state.items() for name, t in published_tensors(cfg, old, tensor)}
    tensors |= vocabulary_tables(ids, cfg.layer.vocab_size)
    write_head(out, tensors, config, measured_json(cfg))


def published_tensors(cfg: BlockConfig, name: str, tensor: Tensor) -> list[tuple[str, Tensor]]:
    """A tensor of ours under its published names, with q, k, v and gate, up apart."""
    *place, module, kind = name.split(".")
    if not place:
        return [(f"{'embed_tokens' if module == 'embed' else module}.{kind}", tensor)]
    if place == ["markov"]:
        return [(f"markov_head.{MARKOV_NAMES[module]}.{kind}", tensor)]
    return [(f"layers.{place[1]}.{part}.{kind}", piece) for part, piece in layer_parts(cfg.layer, module, tensor)]
