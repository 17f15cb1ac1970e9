"""Random tiny EAGLE-3 heads, written to disk as publishers write them. The names and configs are spelled out here once
more, from the publishers' files, so that a mistake in formats/eagle3.py does not repeat itself.

    expected = write(folder, "specforge", target.cfg, seed=1, own_embed=True, norm_before_residual=True)
    assert open_eagle3(folder, target.cfg).config == expected.config
"""
import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from formats.config import Config
from formats.eagle3 import HeadFiles
from formats.eagle3_config import Eagle3Config

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 256}
# What the heads of each publisher usually have. safeailab writes a pickle, megatron is modelopt's second exporter.
PUBLISHERS: dict[str, dict] = {
    "safeailab": {}, "specforge": {}, "angelslim": {"theta": 1e6},
    "speculators": {"own_embed": True, "norm_before_residual": True},
    "deepspec": {"own_embed": True, "draft_vocab": None, "qk_norm": True, "all_wide": True, "taps": (2, 3, 4, 6, 7)},
    "modelopt": {"unsorted": True}, "megatron": {"unsorted": True, "layers": 3}}
USUAL = (2, 4, 5)  # the usual taps of a target of 8 layers
BIASES = ("fc", "wqkv", "wo", "w13", "w2")
NORMS = {"fc_norm": True, "norm_output": True}
# Heads for a target of 8 layers: publisher and flags.
HEADS: list[tuple[str, dict]] = [(publisher, {}) for publisher in PUBLISHERS] + [
    ("safeailab", {"draft_vocab": None}),
    ("safeailab", {"dtype": torch.float16, "biases": BIASES}),
    ("safeailab", {"own_embed": True, "width": 48}),
    ("specforge", {"taps": (0, 3), "norm_before_fc": True}),
    ("specforge", {"taps": (2, 3, 8), "head_dim": 16, "prefix": "model."}),
    ("specforge", {"taps": (4, 6, 7), "theta": 5e5, "scaling": LLAMA3}),
    ("specforge", {"own_lm_head": False, "draft_vocab": None, **NORMS}),
    ("specforge", {"width": 64, "own_embed": True, "heads": 6, "kv_heads": 3, "measured": True, "theta": 1e6, **NORMS}),
    ("specforge", {"taps": (), "last_norm": False}),
    ("specforge", {"taps": USUAL, "theta": 10000.0, "dtype": torch.bfloat16}),
    ("angelslim", {"head_dim": 20, "own_embed": True, "prefix": "model."}),
    ("speculators", {"taps": (1, 3, 6), "qk_norm": True, "theta": 1e6}),
    ("speculators", {"taps": USUAL, "draft_vocab": None, "norm_before_fc": True, "norm_before_residual": False}),
    ("speculators", {"layers": 2, "theta": 5e5, "scaling": LLAMA3, "biases": ("wqkv",), **NORMS}),
    ("speculators", {"layers": 3, "all_wide": True, "width": 16, "head_dim": 4}),
    ("deepspec", {"layers": 3, "theta": 1e6, "measured": True}),
    ("deepspec", {"layers": 2, "head_dim": 16, "kv_heads": 4, "taps": (0, 8)}),
    ("modelopt", {"taps": (2, 6, 7), "norm_before_residual": True, "norm_before_fc": True, "draft_vocab": None}),
    ("modelopt", {"layers": 2, "last_norm": False, "taps": (3, 7)}),
    ("modelopt", {"layers": 2, "all_wide": True, **NORMS}),
    ("megatron", {"layers": 1, "taps": (), "own_lm_head": False, "draft_vocab": None}),
    ("megatron", {"layers": 2, "biases": BIASES, "unsorted": False, "taps": (1, 2, 3, 4)}),
    ("specforge", {"own_lm_head": False, "share_lm_head": True}),  # as train.py writes it
]


def names_of(heads: list[tuple[str, dict]]) -> list[str]:
    return ["-".join((publisher, *flags)) for publisher, flags in heads]


@dataclass(frozen=True)
class Flags:
    """What a head is like. `taps` None: the usual ones, which its config leaves out; (): it has no fc."""
    layers: int = 1
    all_wide: bool = False  # later layers take [embedding; feature] too
    width: int | None = None  # None: the target's
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 8
    intermediate: int = 48
    taps: tuple[int, ...] | None = None  # boundaries
    own_embed: bool = False
    own_lm_head: bool = True
    share_lm_head: bool = False  # the target's rows for the draft vocabulary
    draft_vocab: int | None = 16  # None: all tokens
    unsorted: bool = False
    qk_norm: bool = False
    biases: tuple[str, ...] = ()  # of fc, wqkv, wo, w13, w2
    norm_before_residual: bool = False
    norm_before_fc: bool = False
    fc_norm: bool = False
    norm_output: bool = False
    last_norm: bool = True
    theta: float | None = None
    scaling: dict | None = None  # LLAMA3
    measured: bool = False  # write measured.json too
    prefix: str = ""  # before all names, such as "model."
    dtype: torch.dtype = torch.float32

    def boundaries(self, n: int) -> tuple[int, ...]:
        return (2, n // 2, n - 3) if self.taps is None else self.taps


def write(folder: Path, publisher: str, target: Config, seed: int = 1, **flags: object) -> HeadFiles:
    """Write a random head for `target` into the folder. `flags` are those of Flags; the others are PUBLISHERS'.

    Returns what open_eagle3 should. Where a config can be read in two ways, that is the likelier one, and `doubts` has
    the others; true are always the flags. With measured=True, measured.json says them, and nothing is doubtful.
    """
    f = Flags(**(PUBLISHERS[publisher] | flags))
    n, vocab_size = target.num_layers, target.vocab_size
    tensors = random_tensors(f, target, seed)
    ids = draft_vocabulary(f, vocab_size, seed)
    layer = Config(vocab_size=vocab_size, hidden_size=f.width or target.hidden_size, intermediate_size=f.intermediate,
                   num_layers=f.layers, num_heads=f.heads, num_kv_heads=f.kv_heads, head_dim=f.head_dim,
                   rope_theta=f.theta or 10000.0, rope_scaling=f.scaling, rms_norm_eps=1e-5, tie_word_embeddings=False,
                   qk_norm=f.qk_norm, max_position_embeddings=2048, sliding_window=None)
    config = Eagle3Config(layer, target.hidden_size, n, f.boundaries(n), wide_layers(f), f.draft_vocab or vocab_size,
                          f.norm_before_residual, f.norm_output)
    folder.mkdir(parents=True, exist_ok=True)
    raw = CONFIGS[publisher](f, target, config)
    (folder / "config.json").write_text(json.dumps(raw, indent=1))
    stored = {f.prefix + name: t for name, t in published(publisher, f, tensors).items()} | tables(
        publisher, ids, vocab_size)
    if publisher == "safeailab":
        file = folder / "pytorch_model.bin"
        torch.save(stored, file)
    else:
        file = folder / "model.safetensors"
        save_file({name: t.contiguous() for name, t in stored.items()}, file)
    doubts = doubts_of(publisher, f, n)
    if f.measured:
        doubts = {}
        (folder / "measured.json").write_text(json.dumps(
            {"taps": config.taps, "rope_theta": layer.rope_theta, "norm_output": f.norm_output}))
    elif "taps" in doubts:
        config = replace(config, taps=doubts["taps"][0])
    return HeadFiles(config, tensors, ids, doubts, file, {})


def doubts_of(publisher: str, f: Flags, n: int) -> dict[str, tuple]:
    """What cannot be told of a head that has these flags: field -> values to try."""
    doubts = {}
    if publisher != "speculators" and f.theta not in (None, 10000.0):
        doubts["rope_theta"] = f.theta, 10000.0
    if publisher == "specforge" and f.norm_output:
        doubts["norm_output"] = True, False
    if publisher in ("specforge", "modelopt", "megatron") and f.taps and f.taps != (2, n // 2, n - 3):
        outputs = tuple(boundary - 1 for boundary in f.taps)
        if outputs[0] >= 0:  # no boundary is below 0
            doubts["taps"] = (f.taps, outputs) if outputs[0] == 1 else (outputs, f.taps)
    return doubts


# ----- Tensors -----------------------------------------------------------------------------------------------------


def wide_layers(f: Flags) -> tuple[bool, ...]:
    return tuple(i == 0 or f.all_wide for i in range(f.layers))


def random_tensors(f: Flags, target: Config, seed: int) -> dict[str, Tensor]:
    """The tensors of a head under our names, as large as tiny.randomise makes them, so that attention is sharp."""
    H, V, D = f.width or target.hidden_size, target.vocab_size, f.head_dim
    of_taps = len(f.boundaries(target.num_layers)) * target.hidden_size
    shapes: dict[str, tuple[int, ...]] = {}
    if of_taps:
        shapes["fc.weight"] = H, of_taps
    if f.norm_before_fc:
        shapes["input_norm.weight"] = (of_taps,)
    if f.fc_norm:
        shapes |= {f"fc_norms.{i}.weight": (target.hidden_size,) for i in range(of_taps // target.hidden_size)}
    if f.own_embed:
        shapes["embed.weight"] = V, H
    for i, is_wide in enumerate(wide_layers(f)):
        layer = {"wqkv.weight": ((f.heads + 2 * f.kv_heads) * D, H * (1 + is_wide)), "wo.weight": (H, f.heads * D),
                 "w13.weight": (2 * f.intermediate, H), "w2.weight": (H, f.intermediate), "mlp_norm.weight": (H,)}
        layer |= dict.fromkeys(("embed_norm.weight", "feature_norm.weight") if is_wide else ("attn_norm.weight",), (H,))
        if f.qk_norm:
            layer |= {"q_norm.weight": (D,), "k_norm.weight": (D,)}
        shapes |= {f"layers.{i}.{name}": shape for name, shape in layer.items()}
    if f.last_norm:
        shapes["norm.weight"] = (H,)
    if f.own_lm_head:
        shapes["lm_head.weight"] = f.draft_vocab or V, H
    biased = [name for name in shapes if name.split(".")[-2] in f.biases]
    shapes |= {name.replace("weight", "bias"): shapes[name][:1] for name in biased}
    random = torch.Generator().manual_seed(seed)
    return {name: random_tensor(name, shape, random).to(f.dtype) for name, shape in shapes.items()}


def random_tensor(name: str, shape: tuple[int, ...], random: torch.Generator) -> Tensor:
    noise = torch.randn(shape, generator=random, dtype=torch.float64)
    if "norm" in name:
        return 1 + 0.2 * noise
    if name.endswith("bias"):
        return 0.5 * noise
    return noise if "embed" in name else (3 if "wqkv" in name else 2) * noise / shape[1] ** 0.5


def draft_vocabulary(f: Flags, vocab_size: int, seed: int) -> Tensor | None:
    """Random ids, of which some are neighbours, as in any real vocabulary: so their offsets repeat."""
    random = torch.Generator().manual_seed(seed)
    while f.draft_vocab:
        ids = torch.randperm(vocab_size, generator=random)[:f.draft_vocab]
        ids = ids if f.unsorted else ids.sort().values
        if len((ids - torch.arange(len(ids))).unique()) < len(ids):
            return ids
    return None


def published(publisher: str, f: Flags, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under a publisher's names, with q, k, v and gate, up apart."""
    q_rows, kv_rows = f.heads * f.head_dim, f.kv_heads * f.head_dim
    fused = {"wqkv": (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), (q_rows, kv_rows, kv_rows)),
             "w13": (("mlp.gate_proj", "mlp.up_proj"), (f.intermediate, f.intermediate))}
    plain = {"wo": "self_attn.o_proj", "w2": "mlp.down_proj", "mlp_norm": "post_attention_layernorm",
             "q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm", "embed_norm": "input_layernorm",
             "feature_norm": "hidden_norm", "attn_norm": "input_layernorm"}
    if publisher == "megatron":
        plain["attn_norm"] = "hidden_norm"
    out = {}
    for name, t in tensors.items():
        if not name.startswith("layers."):
            out[name.replace("embed.", "embed_tokens.").replace("fc_norms.", "fc_norm.")] = t
            continue
        _, i, module, kind = name.split(".")
        prefix = f"layers.{i}"
        if publisher in ("safeailab", "specforge", "angelslim") or publisher == "megatron" and f.layers == 1:
            assert f.layers == 1
            prefix = "midlayer"
        elif publisher == "megatron":
            prefix = f"midlayer.{i}"
        if module in fused:
            parts, rows = fused[module]
            out |= {f"{prefix}.{part}.{kind}": x.clone() for part, x in zip(parts, t.split(rows), strict=True)}
        else:
            out[f"{prefix}.{plain[module]}.{kind}"] = t
    if publisher == "safeailab":
        out["midlayer.self_attn.rotary_emb.inv_freq"] = torch.ones(f.head_dim // 2)
    return out


def tables(publisher: str, ids: Tensor | None, vocab_size: int) -> dict[str, Tensor]:
    """d2t and t2d. For all tokens, SafeAILab stores zeros, and others nothing."""
    if ids is None and publisher != "safeailab":
        return {}
    ids = torch.arange(vocab_size) if ids is None else ids
    d2t = ids - torch.arange(len(ids))
    if publisher in ("modelopt", "megatron"):
        return {"d2t": d2t}
    return {"d2t": d2t, "t2d": torch.isin(torch.arange(vocab_size), ids)}


# ----- config.json -------------------------------------------------------------------------------------------------


def sizes(f: Flags, config: Eagle3Config, **more: object) -> dict:
    layer = config.layer
    raw = {"model_type": "llama", "hidden_size": layer.hidden_size, "intermediate_size": layer.intermediate_size,
           "num_hidden_layers": f.layers, "num_attention_heads": f.heads, "num_key_value_heads": f.kv_heads,
           "head_dim": f.head_dim, "hidden_act": "silu", "rms_norm_eps": 1e-5, "max_position_embeddings": 2048,
           "vocab_size": layer.vocab_size, "attention_bias": False, "tie_word_embeddings": False, "bos_token_id": 1,
           "initializer_range": 0.02, "transformers_version": "4.57.1", "use_cache": True, "rope_scaling": None}
    if f.theta:
        raw["rope_theta"] = f.theta
    if f.scaling:
        raw["rope_scaling"] = f.scaling
    return raw | more


def outputs_of(f: Flags) -> dict:
    """The taps as numbers of the layers whose outputs they are; nothing for the usual ones."""
    return {"eagle_aux_hidden_state_layer_ids": [boundary - 1 for boundary in f.taps]} if f.taps else {}


def said(f: Flags, *names: str) -> dict[str, bool]:
    """The flags of these names that are true."""
    return {name: True for name in names if getattr(f, name)}


def safeailab(f: Flags, target: Config, config: Eagle3Config) -> dict:
    assert not f.taps
    raw = sizes(f, config, architectures=["LlamaForCausalLM"], draft_vocab_size=config.draft_vocab_size,
                num_hidden_layers=40, pretraining_tp=1)  # Vicuna's head says 40, and has one
    return raw | usual_switches(f)


def usual_switches(f: Flags) -> dict:
    """Rare flags that no publisher's default has."""
    raw = {} if f.last_norm else {"use_last_layernorm": False}
    return raw | ({"use_aux_hidden_state": False} if f.taps == () else {})


def specforge(f: Flags, target: Config, config: Eagle3Config) -> dict:
    raw = sizes(f, config, architectures=["LlamaForCausalLMEagle3"], draft_vocab_size=config.draft_vocab_size,
                target_model_type="llama", target_hidden_size=target.hidden_size, sliding_window=None,
                eagle_config=outputs_of(f) | usual_switches(f))
    return raw | said(f, "fc_norm", "norm_output", "norm_before_residual", "norm_before_fc", "share_lm_head")


def angelslim(f: Flags, target: Config, config: Eagle3Config) -> dict:
    assert not f.taps
    return sizes(f, config, architectures=["Eagle3LlamaForCausalLM"], draft_vocab_size=config.draft_vocab_size,
                 tie_word_embeddings=True, use_sliding_window=False, sliding_window=None) | usual_switches(f)


def speculators(f: Flags, target: Config, config: Eagle3Config) -> dict:
    nested = sizes(f, config, model_type="qwen3" if f.qk_norm else "llama")
    if f.theta:  # as transformers 5 writes it
        scaling = nested.pop("rope_scaling") or {"rope_type": "default"}
        nested["rope_parameters"] = scaling | {"rope_theta": nested.pop("rope_theta")}
    return {"architectures": ["Eagle3Speculator"], "speculators_model_type": "eagle3", "speculators_version": "0.3.0",
            "speculators_config": {"algorithm": "eagle3", "proposal_methods": [{"proposal_type": "greedy"}],
                                   "verifier": {"architectures": ["LlamaForCausalLM"], "name_or_path": "org/name"}},
            "transformer_layer_config": nested, "draft_vocab_size": config.draft_vocab_size,
            "tie_word_embeddings": False, "target_hidden_size": None if f.width is None else target.hidden_size,
            "eagle_aux_hidden_state_layer_ids": f.taps and list(f.taps), "norm_before_fc": f.norm_before_fc,
            "norm_before_residual": f.norm_before_residual, "fc_norm": f.fc_norm, "norm_output": f.norm_output,
            } | usual_switches(f)


def deepspec(f: Flags, target: Config, config: Eagle3Config) -> dict:
    return sizes(f, config, architectures=["Qwen3Eagle3Model"], model_type="qwen3" if f.qk_norm else "llama",
                 target_layer_ids=[boundary - 1 for boundary in config.taps], num_target_layers=target.num_layers,
                 ttt_length=7, layer_types=["full_attention"] * f.layers, use_sliding_window=False, sliding_window=None,
                 max_window_layers=36)


def modelopt(f: Flags, target: Config, config: Eagle3Config, arch: str = "LlamaForCausalLMEagle3") -> dict:
    nested = {"use_aux_hidden_state": f.taps != (), "use_last_layernorm": f.last_norm, "use_mtp_layernorm": False,
              "use_input_layernorm_in_first_layer": True, "parallel_draft_step": 1,
              "next_layer_regular": not f.all_wide, "norm_before_fc": f.norm_before_fc, **outputs_of(f),
              **said(f, "norm_before_residual", "fc_norm")}
    if f.norm_output:
        nested["return_hidden_post_norm"] = True
    return sizes(f, config, architectures=[arch], draft_vocab_size=config.draft_vocab_size, eagle_config=nested)


def megatron(f: Flags, target: Config, config: Eagle3Config) -> dict:
    return modelopt(f, target, config, "LlamaForCausalLMEagle3" + "Deep" * (f.layers > 1))


CONFIGS = {"safeailab": safeailab, "specforge": specforge, "angelslim": angelslim, "speculators": speculators,
           "deepspec": deepspec, "modelopt": modelopt, "megatron": megatron}
