"""Random tiny block heads, written to disk as publishers write them. The names and configs are spelled out here once
more, from the publishers' files, so that a mistake in formats/block.py does not repeat itself.

    expected = write(folder, "z-lab", target.cfg, seed=1, causal=True)
    assert open_block(folder, target.cfg).config == expected.config

For a plain twin of a drafter: head("z-lab", target.cfg, seed=1, causal=True) has the same tensors under our names.
"""
import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from formats.block_config import BlockConfig
from formats.config import Config
from formats.eagle3 import HeadFiles

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 256}
# What the heads of each publisher usually have.
PUBLISHERS: dict[str, dict] = {
    "z-lab": {}, "jetspec": {"causal": True}, "nemo": {}, "modelopt": {"block_size": 8},
    "modelopt-dspark": {"block_size": 8, "markov": "vanilla", "anchor_first": True, "confidence": True},
    "specforge": {}, "specforge-dspark": {"block_size": 7, "markov": "vanilla", "anchor_first": True,
                                          "confidence": True},
    "deepspec": {"block_size": 7, "anchor_first": True, "own_embed": True, "own_lm_head": True},
    "deepspec-dspark": {"block_size": 7, "anchor_first": True, "own_embed": True, "own_lm_head": True,
                        "markov": "vanilla", "confidence": True},
    "speculators": {"block_size": 8, "own_embed": True, "own_lm_head": True, "draft_vocab": 16},
    "speculators-dspark": {"block_size": 8, "own_embed": True, "own_lm_head": True, "draft_vocab": 16,
                           "markov": "vanilla", "anchor_first": True, "said_layout": True}}
# Heads for a target of 8 layers and 24 tokens: publisher and flags.
HEADS: list[tuple[str, dict]] = [(publisher, {}) for publisher in PUBLISHERS] + [
    ("z-lab", {"nested_block_size": True, "theta": 1e7, "layers": 3, "block_size": 10}),
    ("z-lab", {"prefix": "draft_model.model.", "dtype": torch.bfloat16, "said_layout": True}),
    ("z-lab", {"layers": 1, "taps": (5,), "heads": 2, "kv_heads": 1, "head_dim": 16, "biases": True}),
    ("z-lab", {"layers": 3, "taps": (1, 2, 4, 6, 8), "scaling": LLAMA3, "theta": 5e5}),
    ("z-lab", {"window": 16, "sliding": (True, True), "causal": True}),
    ("z-lab", {"silent_taps": True, "layers": 3, "taps": (2, 4, 6)}),
    ("z-lab", {"block_size": 64, "mask_token": 0, "measured": True}),
    ("z-lab", {"anchor_first": True, "said_layout": True, "block_size": 2}),
    ("jetspec", {"head_dim": 16, "intermediate": 64}),
    ("nemo", {"causal": True, "window": 12, "sliding": (True, False)}),
    ("specforge", {"taps": (0, 3), "theta": 1e6}),
    ("specforge-dspark", {"markov": "gated", "rank": 6}),
    ("specforge-dspark", {"markov": "rnn", "rank": 4, "layers": 3, "taps": (2, 4, 6)}),
    ("specforge-dspark", {"prefix": "logit_head.", "confidence": False}),  # as older ones wrote the Markov head
    ("deepspec", {"taps": (0, 2, 7), "layers": 3}),
    ("deepspec-dspark", {"markov": "gated", "measured": True}),
    ("speculators", {"draft_vocab": None, "taps": (1, 3, 6), "layers": 2}),
    ("speculators", {"block_size": 16, "said_layout": True, "theta": 1e6}),
    ("speculators", {"window": 20, "sliding": (True, False), "not_causal": True}),
    ("speculators", {"window": 20, "sliding": (True, True), "causal": True}),
    ("speculators-dspark", {"markov": "rnn", "full_w2": True, "unsorted": True}),
    ("z-lab", {"draft_vocab": 16, "share_lm_head": True}),  # as save_block writes it
]


def names_of(heads: list[tuple[str, dict]]) -> list[str]:
    return ["-".join((publisher, *flags)) for publisher, flags in heads]


@dataclass(frozen=True)
class Flags:
    """What a head is like. Its width is the target's."""
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 8
    intermediate: int = 48
    taps: tuple[int, ...] = (2, 6)  # boundaries
    silent_taps: bool = False  # the config does not say them
    block_size: int = 16
    nested_block_size: bool = False  # block_size within dflash_config
    mask_token: int = 23
    anchor_first: bool = False
    said_layout: bool = False  # the config says anchor_first
    causal: bool = False
    window: int | None = None
    sliding: tuple[bool, ...] = ()  # which layers have it
    not_causal: bool = False  # sliding_window_non_causal
    own_embed: bool = False
    own_lm_head: bool = False
    share_lm_head: bool = False  # the target's rows for the draft vocabulary
    draft_vocab: int | None = None  # None: all tokens
    unsorted: bool = False
    markov: str | None = None
    rank: int = 5
    full_w2: bool = False  # W2 has rows for all tokens, though fewer are drafted
    confidence: bool = False  # a confidence head, which is dropped
    biases: bool = False  # of q, k and v
    theta: float | None = None
    scaling: dict | None = None  # LLAMA3
    measured: bool = False  # write measured.json too
    prefix: str = ""  # before all names, such as "model."; "logit_head.": before the Markov head's
    dtype: torch.dtype = torch.float32


def head(publisher: str, target: Config, seed: int = 1, copies: dict[str, Tensor] | None = None, **flags: object
         ) -> tuple[BlockConfig, dict[str, Tensor], Tensor | None]:
    """A random head for `target`: its true config, its tensors under our names, and the ids of its draft vocabulary.

    `flags` are those of Flags; the others are PUBLISHERS'. copies: tensors to take in place of random ones, such as
    {"embed.weight": ..., "lm_head.weight": ...} of the target, where the head has its own.
    """
    f = Flags(**(PUBLISHERS[publisher] | flags))
    ids = draft_vocabulary(f, target.vocab_size, seed)
    tensors = random_tensors(f, target, seed)
    tensors |= {name: t.to(f.dtype) for name, t in (copies or {}).items() if name in tensors}
    layer = Config(vocab_size=target.vocab_size, hidden_size=target.hidden_size, intermediate_size=f.intermediate,
                   num_layers=f.layers, num_heads=f.heads, num_kv_heads=f.kv_heads, head_dim=f.head_dim,
                   rope_theta=f.theta or 10000.0, rope_scaling=f.scaling, rms_norm_eps=1e-6, tie_word_embeddings=False,
                   qk_norm=True, max_position_embeddings=2048, sliding_window=f.window)
    windows = tuple(f.window if slides else None for slides in f.sliding or (False,) * f.layers)
    config = BlockConfig(layer, target.hidden_size, target.num_layers, f.taps, f.block_size, f.mask_token,
                         f.anchor_first, f.causal, windows, f.draft_vocab or target.vocab_size, f.markov,
                         f.rank if f.markov else 0)
    return config, tensors, ids


def write(folder: Path, publisher: str, target: Config, seed: int = 1, copies: dict[str, Tensor] | None = None,
          **flags: object) -> HeadFiles:
    """Write a random head into the folder; arguments as those of `head`.

    Returns what open_block should. Where a config can be read in two ways, that is the likelier one, and `doubts` has
    both; true are always the flags. With measured=True, measured.json says them, and nothing is doubtful.
    """
    f = Flags(**(PUBLISHERS[publisher] | flags))
    config, tensors, ids = head(publisher, target, seed, copies, **flags)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIGS[publisher](f, target, config), indent=1))
    stored = published(publisher, f, tensors, ids, target.vocab_size, seed)
    file = folder / "model.safetensors"
    save_file({name: t.contiguous() for name, t in stored.items()}, file)
    doubts = doubts_of(publisher, f, target.num_layers)
    if f.measured:
        doubts = {}
        (folder / "measured.json").write_text(json.dumps(
            {"taps": f.taps, "anchor_first": f.anchor_first, "causal": f.causal}))
    elif doubts:
        config = replace(config, **{key: values[0] for key, values in doubts.items()})
    return HeadFiles(config, tensors, ids, doubts, file, {})


def doubts_of(publisher: str, f: Flags, n: int) -> dict[str, tuple]:
    """What cannot be told of a head that has these flags: field -> values to try."""
    doubts = {}
    if not f.said_layout:
        doubts["anchor_first"] = (True, False) if f.markov or publisher == "deepspec" else (False, True)
    if publisher not in ("jetspec", "nemo") and not f.not_causal:
        doubts["causal"] = (True, False) if f.window else (False, True)
    outputs = tuple(boundary - 1 for boundary in f.taps)
    if not publisher.startswith("speculators") and outputs[0] >= 0:  # no boundary is below 0
        doubts["taps"] = f.taps, outputs
    return doubts


# ----- Tensors -----------------------------------------------------------------------------------------------------


def random_tensors(f: Flags, target: Config, seed: int) -> dict[str, Tensor]:
    """The tensors of a head under our names, as large as tiny.randomise makes them, so that attention is sharp."""
    H, V, D, r = target.hidden_size, target.vocab_size, f.head_dim, f.rank
    qkv_rows = (f.heads + 2 * f.kv_heads) * D
    shapes: dict[str, tuple[int, ...]] = {"fc.weight": (H, len(f.taps) * H), "hidden_norm.weight": (H,)}
    if f.own_embed:
        shapes["embed.weight"] = V, H
    for i in range(f.layers):
        layer = {"attn_norm.weight": (H,), "wqkv.weight": (qkv_rows, H), "q_norm.weight": (D,), "k_norm.weight": (D,),
                 "wo.weight": (H, f.heads * D), "mlp_norm.weight": (H,), "w13.weight": (2 * f.intermediate, H),
                 "w2.weight": (H, f.intermediate)}
        if f.biases:
            layer["wqkv.bias"] = (qkv_rows,)
        shapes |= {f"layers.{i}.{name}": shape for name, shape in layer.items()}
    shapes["norm.weight"] = (H,)
    if f.own_lm_head:
        shapes["lm_head.weight"] = f.draft_vocab or V, H
    if f.markov:
        shapes |= {"markov.w1.weight": (V, r), "markov.w2.weight": (f.draft_vocab or V, r)}
    if f.markov == "gated":
        shapes |= {"markov.gate.weight": (r, H + r), "markov.gate.bias": (r,)}
    if f.markov == "rnn":
        shapes |= {"markov.joint.weight": (3 * r, 2 * r + H), "markov.joint.bias": (3 * r,)}
    random = torch.Generator().manual_seed(seed)
    return {name: random_tensor(name, shape, random).to(f.dtype) for name, shape in shapes.items()}


def random_tensor(name: str, shape: tuple[int, ...], random: torch.Generator) -> Tensor:
    noise = torch.randn(shape, generator=random, dtype=torch.float64)
    if "norm" in name:
        return 1 + 0.2 * noise
    if name.endswith("bias"):
        return 0.5 * noise
    if "embed" in name or "markov.w1" in name:
        return noise
    return (3 if "wqkv" in name else 2) * noise / shape[1] ** 0.5


def draft_vocabulary(f: Flags, vocab_size: int, seed: int) -> Tensor | None:
    """Random ids, of which some are neighbours, as in any real vocabulary: so their offsets repeat."""
    random = torch.Generator().manual_seed(seed)
    while f.draft_vocab:
        ids = torch.randperm(vocab_size, generator=random)[:f.draft_vocab]
        ids = ids if f.unsorted else ids.sort().values
        if len((ids - torch.arange(len(ids))).unique()) < len(ids):
            return ids
    return None


def published(publisher: str, f: Flags, tensors: dict[str, Tensor], ids: Tensor | None, vocab_size: int, seed: int
              ) -> dict[str, Tensor]:
    """The tensors under a publisher's names, with q, k, v and gate, up apart, and what is dropped when it is read."""
    q_rows, kv_rows = f.heads * f.head_dim, f.kv_heads * f.head_dim
    fused = {"wqkv": (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), (q_rows, kv_rows, kv_rows)),
             "w13": (("mlp.gate_proj", "mlp.up_proj"), (f.intermediate, f.intermediate))}
    plain = {"attn_norm": "input_layernorm", "q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm",
             "wo": "self_attn.o_proj", "mlp_norm": "post_attention_layernorm", "w2": "mlp.down_proj"}
    markov = {"w1": "markov_w1", "w2": "markov_w2", "gate": "gate_proj", "joint": "joint_proj"}
    logit_head = f.prefix if f.prefix == "logit_head." else ""
    out = {}
    for name, t in tensors.items():
        *place, module, kind = name.split(".")
        if not place:
            out[name.replace("embed.", "embed_tokens.")] = t
        elif place == ["markov"]:
            if f.full_w2 and module == "w2":
                t = torch.ones(vocab_size, f.rank, dtype=t.dtype).index_copy(0, ids, t)
            out[f"{logit_head}markov_head.{markov[module]}.{kind}"] = t
        elif module in fused:
            parts, rows = fused[module]
            out |= {f"layers.{place[1]}.{part}.{kind}": x.clone() for part, x in zip(parts, t.split(rows), strict=True)}
        else:
            out[f"layers.{place[1]}.{plain[module]}.{kind}"] = t
    if f.confidence:
        name = "confidence_proj" if publisher.startswith("modelopt") else "confidence_head.proj"
        out |= {f"{name}.weight": torch.ones(1, tensors["norm.weight"].numel() + f.rank), f"{name}.bias": torch.ones(1)}
    if ids is not None:
        out |= {"d2t": ids - torch.arange(len(ids)), "t2d": torch.isin(torch.arange(vocab_size), ids)}
    prefix = "dflash_module." if publisher.startswith("modelopt") else "" if logit_head else f.prefix
    return {prefix + name: t for name, t in out.items()}


# ----- config.json -------------------------------------------------------------------------------------------------


def sizes(f: Flags, target: Config, **more: object) -> dict:
    types = ["sliding_attention" if slides else "full_attention" for slides in f.sliding or (False,) * f.layers]
    raw = {"model_type": "qwen3", "hidden_size": target.hidden_size, "intermediate_size": f.intermediate,
           "num_hidden_layers": f.layers, "num_attention_heads": f.heads, "num_key_value_heads": f.kv_heads,
           "head_dim": f.head_dim, "hidden_act": "silu", "rms_norm_eps": 1e-6, "max_position_embeddings": 2048,
           "vocab_size": target.vocab_size, "attention_bias": f.biases, "attention_dropout": 0.0,
           "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.02,
           "transformers_version": "4.57.1", "use_cache": True, "rope_scaling": None, "dtype": "bfloat16",
           "layer_types": types, "max_window_layers": f.layers, "sliding_window": f.window,
           "use_sliding_window": f.window is not None}
    if f.theta:
        raw["rope_theta"] = f.theta
    if f.scaling:
        raw["rope_scaling"] = f.scaling
    return raw | more


def zlab(f: Flags, target: Config, config: BlockConfig, **nested: object) -> dict:
    block = {"mask_token_id": f.mask_token, **nested}
    if not f.silent_taps:
        block["target_layer_ids"] = [boundary - 1 for boundary in f.taps]
    if f.said_layout:
        block["sample_from_anchor"] = f.anchor_first
    raw = sizes(f, target, architectures=["DFlashDraftModel"], num_target_layers=target.num_layers,
                auto_map={"AutoModel": "dflash.DFlashDraftModel"}, dflash_config=block)
    (block if f.nested_block_size else raw)["block_size"] = f.block_size
    if f.share_lm_head:
        raw |= {"share_lm_head": True, "draft_vocab_size": f.draft_vocab}
    return raw


def jetspec(f: Flags, target: Config, config: BlockConfig) -> dict:
    return zlab(f, target, config, causal_head=f.causal)


def nemo(f: Flags, target: Config, config: BlockConfig) -> dict:
    return zlab(f, target, config, causal=f.causal)


def specforge(f: Flags, target: Config, config: BlockConfig) -> dict:
    raw = zlab(f, target, config, projector_type="dflash", attention_mode="gqa")
    if f.theta:  # as transformers 5 writes it
        raw["rope_parameters"] = {"rope_type": "default", "rope_theta": raw.pop("rope_theta")}
    return raw


def specforge_dspark(f: Flags, target: Config, config: BlockConfig) -> dict:
    raw = zlab(f, target, config, projector_type="dspark", attention_mode="gqa", markov_rank=f.rank,
               markov_head_type=f.markov, enable_confidence_head=f.confidence, confidence_head_with_markov=True)
    return raw | {"architectures": ["DSparkDraftModel"], "auto_map": {"AutoModel": "dspark.DSparkDraftModel"}}


def modelopt_dspark(f: Flags, target: Config, config: BlockConfig) -> dict:
    return zlab(f, target, config, projector_type="dspark", markov_rank=f.rank, markov_head_type=f.markov)


def deepspec(f: Flags, target: Config, config: BlockConfig) -> dict:
    return sizes(f, target, architectures=["Qwen3DSparkModel"], block_size=f.block_size, mask_token_id=f.mask_token,
                 target_layer_ids=[boundary - 1 for boundary in f.taps], num_anchors=512,
                 num_target_layers=target.num_layers, markov_rank=f.rank if f.markov else 0,
                 markov_head_type=f.markov or "vanilla", enable_confidence_head=f.confidence,
                 confidence_head_with_markov=f.confidence)


def speculators(f: Flags, target: Config, config: BlockConfig) -> dict:
    nested = sizes(f, target)
    if f.theta:
        scaling = nested.pop("rope_scaling") or {"rope_type": "default"}
        nested["rope_parameters"] = scaling | {"rope_theta": nested.pop("rope_theta")}
    algorithm = "dspark" if f.markov else "dflash"
    raw = {"architectures": ["DSparkSpeculator" if f.markov else "DFlashSpeculator"], "block_size": f.block_size,
           "speculators_model_type": algorithm, "speculators_version": "0.5.0", "transformer_layer_config": nested,
           "speculators_config": {"algorithm": algorithm, "proposal_methods": [{"proposal_type": "greedy"}],
                                  "verifier": {"architectures": ["Qwen3ForCausalLM"], "name_or_path": "org/name"}},
           "draft_vocab_size": config.draft_vocab_size, "mask_token_id": f.mask_token, "tie_word_embeddings": False,
           "aux_hidden_state_layer_ids": list(f.taps), "sliding_window_non_causal": f.not_causal}
    if f.markov:
        raw |= {"markov_rank": f.rank, "markov_head_type": f.markov}
    return raw | ({"sample_from_anchor": f.anchor_first} if f.said_layout else {})


CONFIGS = {"z-lab": zlab, "jetspec": jetspec, "nemo": nemo, "modelopt": zlab, "modelopt-dspark": modelopt_dspark,
           "specforge": specforge, "specforge-dspark": specforge_dspark, "deepspec": deepspec,
           "deepspec-dspark": deepspec, "speculators": speculators, "speculators-dspark": speculators}
