"""Block heads as their publishers write them: what is read, what is doubtful, what is refused, and what we write.

    python -m pytest tests/formats/test_block_files.py
"""
import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import block_published
import pytest
import tiny
import torch
from block_published import HEADS, names_of, write
from damage import damaged_json, damaged_safetensors, fuzz
from safetensors.torch import load_file, save_file
from torch import Tensor

from formats.block import open_block, save_block
from formats.config import Config
from formats.eagle3 import HeadFiles
from formats.foreign import kind_of_head
from quant.linear import quantize_weight

TARGET = Config.from_dict(tiny.SHAPE | {"num_hidden_layers": 8})
V, C = TARGET.vocab_size, TARGET.hidden_size


def change(folder: Path, tensors: dict[str, Tensor | None] | None = None, **config: object) -> None:
    """Change tensors of a model.safetensors, and entries of its config.json; None removes a tensor or an entry. In
    dflash_config and transformer_layer_config, entries are changed one by one, too."""
    file, config_file = folder / "model.safetensors", folder / "config.json"
    if tensors:
        changed = load_file(file) | tensors
        save_file({name: t for name, t in changed.items() if t is not None}, file)
    raw = json.loads(config_file.read_text())
    for key, value in config.items():
        raw[key] = raw[key] | value if isinstance(raw.get(key), dict) and isinstance(value, dict) else value
    for part in (raw, raw.get("dflash_config")):
        for key in [key for key in part or () if part[key] is None] if isinstance(part, dict) else ():
            del part[key]
    config_file.write_text(json.dumps(raw))


def assert_same(found: HeadFiles, wanted: HeadFiles) -> None:
    assert found.config == wanted.config
    assert found.doubts == wanted.doubts
    assert (found.file, found.metadata) == (wanted.file, wanted.metadata)
    assert found.tensors.keys() == wanted.tensors.keys()
    for name, tensor in wanted.tensors.items():
        assert found.tensors[name].dtype == tensor.dtype and torch.equal(found.tensors[name], tensor), name
    assert (found.ids is None) == (wanted.ids is None)
    assert wanted.ids is None or found.ids.dtype == torch.int64 and torch.equal(found.ids, wanted.ids)


# ----- Reading -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("publisher", "flags"), HEADS, ids=names_of(HEADS))
def test_published_heads(publisher: str, flags: dict, tmp_path: Path) -> None:
    """Fails if a layout or a flag is misread: a tensor under another name, the layers' queries and keys swapped, taps
    one layer off, a vocabulary sorted, a field of the config ignored, or a doubt kept silent."""
    wanted = write(tmp_path, publisher, TARGET, **flags)
    assert_same(open_block(tmp_path, TARGET), wanted)
    assert_same(open_block(wanted.file, TARGET), wanted)
    raw = json.loads((tmp_path / "config.json").read_text())
    assert kind_of_head(load_file(wanted.file), raw) == kind_of_head(wanted.tensors, {}) == "a block head"
    assert kind_of_head(("unknown.weight",), raw) == "a block head"


def test_twin_tensors(tmp_path: Path) -> None:
    """Fails if `head` gives others a head that differs from the one on disk, or forgets the copies of the target's."""
    copies = {"embed.weight": torch.ones(V, C), "lm_head.weight": torch.zeros(V, C), "other.weight": torch.ones(1)}
    wanted = write(tmp_path, "deepspec", TARGET, 3, copies, measured=True)
    config, tensors, ids = block_published.head("deepspec", TARGET, 3, copies)
    assert_same(open_block(tmp_path, TARGET), wanted._replace(config=config, tensors=tensors, ids=ids))
    assert torch.equal(tensors["embed.weight"], copies["embed.weight"]) and "other.weight" not in tensors


def test_true_values_come_first() -> None:
    """Fails if the likelier reading of a file without flags is not its publisher's: what nobody measures is wrong."""
    for publisher, flags in HEADS[:len(block_published.PUBLISHERS)]:
        f = block_published.Flags(**(block_published.PUBLISHERS[publisher] | flags))
        for field, values in block_published.doubts_of(publisher, f, 8).items():
            assert values[0] == getattr(f, field), (publisher, field)


# n of the target, layers of the head, target_layer_ids or None -> the taps to try.
TAPS = [
    (36, 5, [1, 9, 17, 25, 33], [(2, 10, 18, 26, 34), (1, 9, 17, 25, 33)]),
    (36, 5, None, [(2, 10, 18, 26, 34), (1, 9, 17, 25, 33)]),
    (40, 5, None, [(2, 11, 20, 29, 38), (1, 10, 19, 28, 37)]), (24, 5, None, [(2, 7, 12, 17, 22), (1, 6, 11, 16, 21)]),
    (30, 5, None, [(2, 9, 15, 21, 28), (1, 8, 14, 20, 27)]), (64, 5, None, [(2, 17, 32, 47, 62), (1, 16, 31, 46, 61)]),
    (48, 5, [41, 5, 17, 29, 46], [(6, 18, 30, 42, 47), (5, 17, 29, 41, 46)]),
    (28, 1, None, [(15,), (14,)]), (8, 2, [-1, 3], [(0, 4)]), (8, 2, [3, 8], [(3, 8)]),
    (8, 2, [3, 7], [(4, 8), (3, 7)]),
]


@pytest.mark.parametrize(("layers", "own", "ids", "wanted"), TAPS)
def test_taps(layers: int, own: int, ids: list[int] | None, wanted: list[tuple[int, ...]], tmp_path: Path) -> None:
    """Fails if numbers that can mean one thing only are doubted, if of two meanings the likelier is not first, or if
    the usual taps are not those that the publishers compute."""
    target = replace(TARGET, num_layers=layers)
    write(tmp_path, "z-lab", target, layers=own, taps=wanted[0])
    change(tmp_path, dflash_config={"target_layer_ids": ids})
    found = open_block(tmp_path, target)
    assert found.config.taps == wanted[0]
    assert found.doubts.get("taps", tuple(wanted)) == tuple(wanted) and ("taps" in found.doubts) == (len(wanted) > 1)


# Publisher, flags of the head, entries of dflash_config or of the config -> the layouts to try.
LAYOUTS = [
    ("z-lab", {}, {}, {}, (False, True)), ("z-lab", {}, {"shift_label": True}, {}, (True,)),
    ("z-lab", {}, {"shift_label": True, "sample_from_anchor": False}, {}, (False,)),
    ("z-lab", {}, {"projector_type": "dspark"}, {}, (True, False)), ("deepspec", {}, {}, {}, (True, False)),
    ("z-lab", {"markov": "vanilla"}, {}, {}, (True, False)),
    ("deepspec", {}, {}, {"sample_from_anchor": False}, (False,)),
    ("speculators", {}, {}, {}, (False, True)), ("speculators", {}, {}, {"sample_from_anchor": True}, (True,)),
]


@pytest.mark.parametrize(("publisher", "flags", "nested", "outside", "wanted"), LAYOUTS)
def test_layouts(publisher: str, flags: dict, nested: dict, outside: dict, wanted: tuple[bool, ...], tmp_path: Path
                 ) -> None:
    """Fails if of several entries that say where the first draft stands another one counts, or if nothing is doubted
    where none does."""
    write(tmp_path, publisher, TARGET, **flags)
    change(tmp_path, **({"dflash_config": nested} if nested else {}), **outside)
    found = open_block(tmp_path, TARGET)
    assert found.config.anchor_first == wanted[0]
    assert found.doubts.get("anchor_first", wanted[:1]) == wanted


SLIDING, MIXED = {"window": 20, "sliding": (True, True)}, {"window": 20, "sliding": (True, False)}
CAUSALITIES = [
    ("z-lab", {}, {}, {}, (False, True)), ("z-lab", {}, {"causal": True}, {}, (True,)),
    ("z-lab", {}, {"causal": False, "causal_head": True}, {}, (False,)),
    ("z-lab", {}, {"causal": False}, {"is_causal": True}, (True,)),
    ("z-lab", SLIDING, {}, {"is_causal": False}, (False,)), ("z-lab", SLIDING, {}, {}, (True, False)),
    ("z-lab", MIXED, {"causal_head": True}, {}, (True,)),
    ("speculators", SLIDING, {}, {}, (True, False)),
    ("speculators", MIXED, {}, {"sliding_window_non_causal": True}, (False,)),
    ("speculators", {}, {}, {"sliding_window_non_causal": True}, (False, True)),
]


@pytest.mark.parametrize(("publisher", "flags", "nested", "outside", "wanted"), CAUSALITIES)
def test_causality(publisher: str, flags: dict, nested: dict, outside: dict, wanted: tuple[bool, ...], tmp_path: Path
                   ) -> None:
    """Fails if of several flags another one counts, if a flag that is false is taken for none, or if sliding layers
    make a head causal against its flag."""
    write(tmp_path, publisher, TARGET, **flags)
    change(tmp_path, **({"dflash_config": nested} if nested else {}), **outside)
    found = open_block(tmp_path, TARGET)
    assert found.config.causal == wanted[0] and found.doubts.get("causal", wanted[:1]) == wanted
    assert found.config.windows == tuple(20 if slides else None for slides in flags.get("sliding", (False, False)))


def test_windows(tmp_path: Path) -> None:
    """Fails if the older way to say which layers slide is not read, or read where it is switched off."""
    write(tmp_path, "z-lab", TARGET, layers=3, taps=(2, 6), causal=True)
    change(tmp_path, layer_types=None, max_window_layers=1, sliding_window=9, use_sliding_window=True, is_causal=True)
    config = open_block(tmp_path, TARGET).config
    assert config.windows == (None, 9, 9) and config.layer.sliding_window == 9
    change(tmp_path, use_sliding_window=False)
    config = open_block(tmp_path, TARGET).config
    assert config.windows == (None, None, None) and config.layer.sliding_window is None


def test_nested_entries(tmp_path: Path) -> None:
    """Fails if an entry of dflash_config overrides the one outside, if null counts as an entry, or if a size outside
    overrides that of speculators' layers."""
    wanted = write(tmp_path, "z-lab", TARGET)
    change(tmp_path, dflash_config={"block_size": 4})
    raw = json.loads((tmp_path / "config.json").read_text()) | {"mask_token_id": None}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert_same(open_block(tmp_path, TARGET), wanted)
    wanted = write(tmp_path, "speculators", TARGET)
    change(tmp_path, num_attention_heads=8, rope_theta=3.0, transformer_layer_config={"rope_theta": 10000.0})
    assert_same(open_block(tmp_path, TARGET), wanted)


def test_measured(tmp_path: Path) -> None:
    """Fails if what was measured does not override the config and end the doubt, or if it ends other doubts too."""
    write(tmp_path, "z-lab", TARGET)
    assert open_block(tmp_path, TARGET).doubts.keys() == {"taps", "anchor_first", "causal"}
    (tmp_path / "measured.json").write_text('{"taps": [1, 5], "causal": true}')
    found = open_block(tmp_path, TARGET)
    assert found.config.taps == (1, 5) and found.config.causal and found.doubts == {"anchor_first": (False, True)}
    (tmp_path / "measured.json").write_text('{"anchor_first": true}')
    found = open_block(tmp_path, TARGET)
    assert found.config.anchor_first and found.doubts.keys() == {"taps", "causal"}
    write(tmp_path, "jetspec", TARGET, said_layout=True)
    (tmp_path / "measured.json").write_text('{"anchor_first": true, "causal": false}')
    found = open_block(tmp_path, TARGET)
    assert found.config.anchor_first and not found.config.causal  # its config says the opposite of both


def test_other_spellings(tmp_path: Path) -> None:
    """Fails if a name that only some files have is not read like the usual one, or if RoPE buffers are no head's."""
    wanted = write(tmp_path, "specforge-dspark", TARGET, markov="gated", rank=6, confidence=False)
    tensors = load_file(wanted.file)
    old = {name: name.replace("markov_head.", "logit_head.") for name in tensors if "markov_head" in name}
    assert len(old) == 4
    change(tmp_path, {new: tensors[name] for name, new in old.items()} | dict.fromkeys(old) | {
        "logit_head.confidence_head.proj.weight": torch.ones(1, C), "rotary_emb.inv_freq": torch.ones(4)})
    assert_same(open_block(tmp_path, TARGET), wanted)


@pytest.mark.parametrize("mode", ["int8", "int8dyn", "int4"])
def test_quantised_files(mode: str, tmp_path: Path) -> None:
    """Fails if a file with our names, integers and scales is not read like the head that it was made of."""
    wanted = write(tmp_path, "speculators-dspark", TARGET, markov="gated", rank=8, own_embed=False, biases=True)
    tensors = {"d2t": wanted.ids - torch.arange(len(wanted.ids))}
    for name, tensor in wanted.tensors.items():
        module, kind = name.rsplit(".", 1)
        if kind == "weight" and module.split(".")[-1] in ("wqkv", "wo", "w13", "w2", "fc", "lm_head", "gate"):
            weight = quantize_weight(tensor, "int8" if module == "lm_head" else mode)
            tensors |= {f"{module}.data": weight.data, f"{module}.scale": weight.scale}
        else:
            tensors[name] = tensor
    file = tmp_path / f"model-{mode}.safetensors"
    save_file(tensors, file, {"mode": mode, "group": "128"})
    del tensors["d2t"]
    found = open_block(file, TARGET)
    assert_same(found, wanted._replace(tensors=tensors, file=file, metadata=found.metadata))
    assert found.metadata == {"mode": mode, "group": "128"}


# ----- Refusals ----------------------------------------------------------------------------------------------------

Q = "layers.0.self_attn.q_proj."
W = "markov_head.markov_w{}.weight"
DSPARK = "specforge-dspark"


def nested(**entries: object) -> dict:
    return {"dflash_config": entries}


# What is wrong: publisher, tensors and entries of the config to change, words of the error.
REFUSED: dict[str, tuple[str, dict, dict, str]] = {
    "Domino": ("z-lab", {"prefix_gru.weight_hh_l0": torch.ones(3, 1)}, {}, "holds a Domino head; only block heads"),
    "DFlare": ("z-lab", {"layer_fusion_weights": torch.ones(2, 2)}, {}, "holds a DFlare head; only block"),
    "DFlash2": ("z-lab", {"layers.0.attention_conv.base_kernel": torch.ones(2, 2, C)}, {}, "holds a DFlash2 head"),
    "assistant": ("z-lab", {"encoder.fc.weight": torch.ones(1)}, {}, "holds a DFlash head of the assistant kind; only"),
    "mask embedding": ("z-lab", {"mask_embedding": torch.ones(C)}, {}, "a DFlash head of Laguna's or MiMo's kind"),
    "gates": ("z-lab", {"layers.0.self_attn.g_proj.weight": torch.ones(1)}, {}, "of Laguna's or MiMo's kind"),
    "norms of taps": ("z-lab", {"aux_hidden_norms.0.weight": torch.ones(C)}, {}, "of Laguna's or MiMo's kind"),
    "sinks": ("z-lab", {"layers.0.self_attn.sinks": torch.ones(4)}, {}, "of Laguna's or MiMo's kind"),
    "Domino's config": ("z-lab", {}, nested(projector_type="domino"), "projector_type 'domino' is not implemented"),
    "attention": ("specforge", {}, nested(attention_mode="mla"), "attention_mode 'mla' is not implemented"),
    "sinks' config": ("z-lab", {}, {"attention_sink_bias": True}, "attention_sink_bias True is not implemented"),
    "use_swa": ("z-lab", {}, {"use_swa": True}, "use_swa True is not implemented"),
    "another speculator": ("speculators", {}, {"speculators_model_type": "peagle"}, "'peagle' is not implemented"),
    "Gemma": ("deepspec", {}, {"architectures": ["Gemma4DSparkModel"]}, "heads with Gemma's layers are not"),
    "Gemma's model_type": ("deepspec", {}, {"model_type": "gemma4_text"}, "heads with Gemma's layers are not"),
    "gelu": ("deepspec", {}, {"hidden_act": "gelu_pytorch_tanh"}, "hidden_act 'gelu_pytorch_tanh'"),
    "scaled embedding": ("z-lab", {}, nested(input_embedding_scale=2.0), "input_embedding_scale 2.0 is not impl"),
    "capped logits": ("z-lab", {}, nested(final_logit_softcapping=30.0), "final_logit_softcapping 30.0 is not"),
    "partial rotary": ("z-lab", {}, {"partial_rotary_factor": 0.25}, "partial_rotary_factor 0.25 is not"),
    "RoPE": ("z-lab", {}, {"rope_scaling": {"rope_type": "other", "factor": 4.0}}, "RoPE type 'other' is not"),
    "FP8": ("z-lab", {}, {"quantization_config": {"quant_method": "fp8"}}, "quantised with FP8"),
    "unknown tensor": ("z-lab", {"layers.0.layer_scalar": torch.ones(1)}, {}, "has unknown layers.0.layer_scalar"),
    "bias of o_proj": ("z-lab", {"layers.0.self_attn.o_proj.bias": torch.ones(C)}, {}, "has unknown layers.0.wo.bias"),
    "bias of fc": ("z-lab", {"fc.bias": torch.ones(C)}, {}, "has unknown fc.bias"),
    "fused qkv": ("z-lab", {"layers.0.self_attn.qkv_proj.weight": torch.ones(64, C)}, {}, "has unknown .*qkv_proj"),
    "some biases": ("z-lab", {f"{Q}bias": torch.ones(32)}, {}, "q_proj.bias, .* do not fit together"),
    "biases of a layer": ("z-lab", {f"layers.0.self_attn.{x}_proj.bias": torch.ones(n) for x, n in (
        ("q", 32), ("k", 16), ("v", 16))}, {}, "has biases of q_proj, k_proj and v_proj in some layers only"),
    "twice": ("z-lab", {"model.fc.weight": torch.ones(C, 2 * C)}, {}, "fc.weight is there under another name too"),
    "no q_proj": ("z-lab", {f"{Q}weight": None}, {}, "q_proj.weight, .* do not fit together"),
    "no o_proj": ("z-lab", {"layers.1.self_attn.o_proj.weight": None}, {}, "lacks layers.1.wo.weight"),
    "no k_norm": ("z-lab", {"layers.0.self_attn.k_norm.weight": None}, {}, "lacks layers.0.k_norm.weight"),
    "no input norm": ("z-lab", {"layers.1.input_layernorm.weight": None}, {}, "lacks layers.1.attn_norm.weight"),
    "no hidden_norm": (DSPARK, {"hidden_norm.weight": None}, {}, "lacks hidden_norm.weight"),
    "no norm": ("z-lab", {"norm.weight": None}, {}, "lacks norm.weight"),
    "no fc": ("z-lab", {"fc.weight": None}, {}, "lacks fc.weight"),
    "a layer missing": ("z-lab", {"layers.3.input_layernorm.weight": torch.ones(C)}, {}, r"layers are \[0, 1, 3\]"),
    "q_proj is wide": ("z-lab", {f"layers.0.self_attn.{x}_proj.weight": torch.ones(n, 2 * C) for x, n in (
        ("q", 32), ("k", 16), ("v", 16))}, {}, r"layers.0.wqkv.weight is \[64, 64\], where \[64, 32\] would fit"),
    "fc is a vector": ("z-lab", {"fc.weight": torch.ones(C)}, {}, "fc is .*no matrix"),
    "fc of another model": ("z-lab", {"fc.weight": torch.zeros(C, 100)}, {}, "fc takes 100 .* another model's"),
    "fc too high": ("z-lab", {"fc.weight": torch.zeros(C + 1, 2 * C)}, {}, r"fc.weight is \[33, 64\], where \[32"),
    "norm too long": ("z-lab", {"hidden_norm.weight": torch.zeros(2 * C)}, {}, r"hidden_norm.weight is \[64\], where"),
    "norms of heads": ("z-lab", {"layers.1.self_attn.q_norm.weight": torch.ones(C)}, {}, "layers.1.q_norm.weight is"),
    "second layer": ("z-lab", {"layers.1.mlp.down_proj.weight": torch.ones(C, 40)}, {}, "layers.1.w2.weight is"),
    "number of heads": ("z-lab", {}, {"num_attention_heads": 8}, "8 heads and 2 key/value heads .* do not fit the 64"),
    "head_dim": ("z-lab", {}, {"head_dim": 16}, "head_dim 16 do not fit the 64 rows"),
    "head_dim of norms": ("z-lab", {}, {"head_dim": 16, "num_attention_heads": 2, "num_key_value_heads": 1},
                          r"q_norm.weight is \[8\], where \[16\]"),
    "hidden_size": ("z-lab", {}, {"hidden_size": 64}, "hidden_size is 64, but should be 32, the width of the layers"),
    "three taps": ("z-lab", {}, nested(target_layer_ids=[1, 3, 5]), r"taps \[2, 4, 6\] do not fit .* an fc for 2"),
    "taps beyond": ("z-lab", {}, nested(target_layer_ids=[1, 9]), r"taps \[2, 10\] do not fit a target of 8"),
    "taps below": ("z-lab", {}, nested(target_layer_ids=[-2, 3]), r"taps \[-1, 4\] do not fit"),
    "taps twice": ("z-lab", {}, nested(target_layer_ids=[1, 1]), "do not fit"),
    "no taps": ("z-lab", {}, nested(target_layer_ids=[]), r"taps \[\] do not fit"),
    "boundaries beyond": ("speculators", {}, {"aux_hidden_state_layer_ids": [2, 9]}, "do not fit a target of 8 layers"),
    "taps are words": ("z-lab", {}, nested(target_layer_ids=["a"]), "target_layer_ids should be a list of whole"),
    "taps are true": ("z-lab", {}, nested(target_layer_ids=[True, 5]), "list of whole numbers"),
    "taps are a number": ("z-lab", {}, nested(target_layer_ids=5), "list of whole numbers, not 5"),
    "silent taps": ("speculators", {}, {"aux_hidden_state_layer_ids": None}, "layer_ids is missing, and nothing else"),
    "usual taps": ("z-lab", {"fc.weight": torch.zeros(C, 3 * C)}, nested(target_layer_ids=None),
                   r"taps \[2, 6\] do not fit .* an fc for 3 of them.*target_layer_ids is wrong or missing"),
    "num_target_layers": ("z-lab", {}, {"num_target_layers": 36}, "num_target_layers is 36, but the target has 8"),
    "vocab_size": ("z-lab", {}, {"vocab_size": 25}, "vocab_size is 25, but should be 24, the target's"),
    "no block_size": ("z-lab", {}, {"block_size": None}, "block_size is missing"),
    "block of 1": ("z-lab", {}, {"block_size": 1}, "block_size 1 is not implemented: a block has 2 to 64 rows"),
    "block of 65": ("z-lab", {}, {"block_size": 65}, "block_size 65 is not implemented"),
    "block of a half": ("z-lab", {}, {"block_size": 7.5}, "block_size should be a positive whole number"),
    "no mask token": ("z-lab", {}, nested(mask_token_id=None), "mask_token_id is missing, and nothing else tells it"),
    "mask beyond": ("z-lab", {}, nested(mask_token_id=V), "mask_token_id is 24, but .* of the 24 rows .* lost rows"),
    "mask below": ("z-lab", {}, nested(mask_token_id=-1), "mask_token_id is -1, but should be one of the 24 rows"),
    "mask is true": ("z-lab", {}, nested(mask_token_id=True), "mask_token_id is True, but"),
    "mask is a string": ("z-lab", {}, nested(mask_token_id="<MASK>"), "mask_token_id is '<MASK>', but"),
    "flag is a word": ("z-lab", {}, nested(sample_from_anchor="no"), "sample_from_anchor should be true or false"),
    "causal is 1": ("z-lab", {}, nested(causal_head=1), "causal_head should be true or false, not 1"),
    "dflash_config": ("z-lab", {}, {"dflash_config": [1]}, "dflash_config and .* should be objects"),
    "some layers slide": ("z-lab", {}, {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 9},
                          "some layers have sliding windows, and some have not.*add is_causal"),
    "a window without size": ("z-lab", {}, {"layer_types": ["sliding_attention"] * 2}, "sliding_window is missing"),
    "layer_types": ("z-lab", {}, {"layer_types": ["full_attention"] * 3}, "layer_types should be a list of 2, one for"),
    "linear attention": ("z-lab", {}, {"layer_types": ["linear_attention"] * 2}, "'linear_attention' is not impl"),
    "embedding": ("deepspec", {"embed_tokens.weight": torch.zeros(V + 1, C)}, {}, r"embed.weight is \[25, 32\], where"),
    "lm_head too high": ("deepspec", {"lm_head.weight": torch.zeros(V + 1, C)}, {}, "lm_head has 25 rows"),
    "lm_head too wide": ("deepspec", {"lm_head.weight": torch.zeros(V, C + 1)}, {}, r"lm_head.weight is \[24, 33\]"),
    "lm_head too low": ("deepspec", {"lm_head.weight": torch.zeros(9, C)}, {}, "lm_head has 9 rows .* no d2t says"),
    "no lm_head": ("speculators", {"lm_head.weight": None}, {}, "draft_vocab_size is 16, but should be 24"),
    "shared and own": ("speculators", {}, {"share_lm_head": True}, "share_lm_head is true, so .* no lm_head"),
    "shared without d2t": ("z-lab", {}, {"share_lm_head": True}, "share_lm_head is true, so .* have a d2t"),
    "no d2t": ("speculators", {"d2t": None}, {}, "lm_head has 16 rows for 24 tokens, and no d2t"),
    "d2t beyond": ("speculators", {"d2t": torch.full((16,), 9)}, {}, "16 different ids from 9 to 24"),
    "d2t below": ("speculators", {"d2t": torch.full((16,), -1)}, {}, "from -1 to 14"),
    "d2t too short": ("speculators", {"d2t": torch.zeros(15, dtype=torch.int64)}, {}, r"d2t is \[15\].* 16 integers"),
    "d2t of floats": ("speculators", {"d2t": torch.zeros(16)}, {}, "d2t is .* of torch.float32"),
    "t2d": ("speculators", {"t2d": torch.ones(V + 1, dtype=torch.bool)}, {}, "t2d is .*another model's"),
    "half a Markov head": (DSPARK, {W.format(1): None}, {}, "lacks markov.w1.weight"),
    "the other half": (DSPARK, {W.format(2): None}, {}, "lacks markov.w2.weight"),
    "no Markov head": (DSPARK, {W.format(1): None, W.format(2): None}, {}, "markov_rank is 5, but .* is 0: download"),
    "markov_rank": (DSPARK, {}, nested(markov_rank=8), "markov_rank is 8, but that of the weights is 5"),
    "markov_head_type": (DSPARK, {}, nested(markov_head_type="rnn"), "type is 'rnn', but the weights are .*'vanilla'"),
    "w1": (DSPARK, {W.format(1): torch.ones(V + 1, 5)}, {}, r"markov.w1.weight is \[25, 5\], where \[24, 5\]"),
    "w2": (DSPARK, {W.format(2): torch.ones(V, 6)}, {}, r"markov.w2.weight is \[24, 6\], where \[24, 5\] would fit"),
    "w1 is a vector": (DSPARK, {W.format(1): torch.ones(5)}, {}, "markov.w1 is .*no matrix"),
    "w2 of other rows": ("speculators-dspark", {W.format(2): torch.ones(17, 5)}, {}, r"\[17, 5\], where \[16, 5\]"),
    "gate without bias": (DSPARK, {"markov_head.gate_proj.weight": torch.ones(5, C + 5)}, {}, "lacks markov.gate.bias"),
    "bias without gate": (DSPARK, {"markov_head.gate_proj.bias": torch.ones(5)}, {}, "lacks markov.gate.weight"),
    "gate": (DSPARK, {"markov_head.gate_proj.weight": torch.ones(5, C), "markov_head.gate_proj.bias": torch.ones(5)},
             nested(markov_head_type="gated"), r"markov.gate.weight is \[5, 32\], where \[5, 37\] would fit"),
    "joint": (DSPARK, {"markov_head.joint_proj.weight": torch.ones(5, C),
                       "markov_head.joint_proj.bias": torch.ones(15)}, nested(markov_head_type="rnn"),
              r"markov.joint.weight is \[5, 32\], where \[15, 42\] would fit"),
    "both kinds": (DSPARK, {f"markov_head.{x}_proj.{kind}": torch.ones(5) for x in ("gate", "joint") for kind in (
        "weight", "bias")}, {}, "both gate_proj and joint_proj"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refusals(what: str, tmp_path: Path) -> None:
    """Fails if a head that would compute something else, or that is damaged, loads or is refused for another reason
    than what is wrong with it."""
    publisher, tensors, config, words = REFUSED[what]
    write(tmp_path, publisher, TARGET)
    change(tmp_path, tensors, **config)
    with pytest.raises(ValueError, match=words) as error:
        open_block(tmp_path, TARGET)
    assert str(error.value).startswith((f"{tmp_path}/model.safetensors: ", f"{tmp_path}/config.json: "))
    assert "\n" not in str(error.value)


def test_integers_without_scales(tmp_path: Path) -> None:
    """Fails if another program's quantised weights are taken for numbers."""
    write(tmp_path, "z-lab", TARGET)
    change(tmp_path, {f"{Q}weight": torch.ones(32, C, dtype=torch.int8)})
    with pytest.raises(ValueError, match="q_proj.weight is int8, and there are no scales"):
        open_block(tmp_path, TARGET)


def test_other_targets(tmp_path: Path) -> None:
    """Fails if a head for another width, vocabulary or depth loads."""
    write(tmp_path, "z-lab", TARGET)
    for changes, words in (({"vocab_size": 30}, "vocab_size is 24, but should be 30, .* another model's head"),
                           ({"hidden_size": C // 2}, "width 32 for a target of hidden size 16: adapters between two"),
                           ({"hidden_size": 36}, "fc takes 64 numbers, no multiple .* 36: another model's head"),
                           ({"num_layers": 7}, "num_target_layers is 8, but the target has 7: another model's head")):
        with pytest.raises(ValueError, match=words):
            open_block(tmp_path, replace(TARGET, **changes))


def test_other_files(tmp_path: Path) -> None:
    """Fails if a missing folder, weight file or config, or another kind of head, ends in anything but one line."""
    with pytest.raises(FileNotFoundError, match="no draft head there"):
        open_block(tmp_path / "nothing", TARGET)
    write(tmp_path, "z-lab", TARGET)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match="config.json: missing, or no JSON object"):
        open_block(tmp_path, TARGET)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="neither model.safetensors nor pytorch_model.bin"):
        open_block(tmp_path, TARGET)
    tiny.save_head(tiny.head(tiny.target()), tmp_path)
    with pytest.raises(ValueError, match="holds an EAGLE-1/2 head .--draft takes it.; only block heads"):
        open_block(tmp_path, TARGET)


@pytest.mark.parametrize("text", [
    "[]", "{", '{"taps": [2]}', '{"taps": [6, 2]}', '{"taps": [2, 9]}', '{"taps": [2, 6.0]}', '{"taps": 4}',
    '{"causal": 1}', '{"causal": null}', '{"anchor_first": "x"}', '{"rope_theta": 10000.0}', '{"tap": [2, 6]}',
    "[" * 99999])
def test_wrong_measurements(text: str, tmp_path: Path) -> None:
    """Fails if a measured.json with an unknown or wrong entry is used in part, or ends in a traceback."""
    write(tmp_path, "z-lab", TARGET)
    (tmp_path / "measured.json").write_text(text)
    with pytest.raises(ValueError, match="measured.json: ") as error:
        open_block(tmp_path, TARGET)
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_damaged_files(tmp_path: Path) -> None:
    """Fails if flipped bytes, a file that is cut off, or entries of the wrong kind raise anything but one line."""
    keys = ("rope_scaling", "sliding_window", "layer_types", "dflash_config", "transformer_layer_config", "is_causal",
            "speculators_model_type", "aux_hidden_state_layer_ids", "target_layer_ids", "mask_token_id", "block_size",
            "max_window_layers", "use_sliding_window", "sample_from_anchor", "markov_rank", "architectures")
    for publisher in ("z-lab", "specforge-dspark", "deepspec", "speculators"):
        folder = tmp_path / publisher
        write(folder, publisher, TARGET, measured=True)
        fuzz(folder / "model.safetensors", 120, damaged_safetensors, open_block, folder, TARGET)
        fuzz(folder / "measured.json", 60, damaged_json, open_block, folder, TARGET)
        (folder / "measured.json").unlink()
        fuzz(folder / "config.json", 120, partial(damaged_json, more_keys=keys), open_block, folder, TARGET)


# ----- Writing -----------------------------------------------------------------------------------------------------


def saved(folder: Path, head: HeadFiles) -> HeadFiles:
    save_block(head.config, head.tensors, head.ids, folder)
    return open_block(folder, TARGET)


@pytest.mark.parametrize(("publisher", "flags"), HEADS, ids=names_of(HEADS))
def test_round_trip(publisher: str, flags: dict, tmp_path: Path) -> None:
    """Fails if a head that we write is read back as another one, or is doubtful; or if, without measured.json, more
    than the taps is doubtful."""
    head = write(tmp_path / "published", publisher, TARGET, **flags)
    folder = tmp_path / "ours"
    rounded = {name: t.to(torch.bfloat16) for name, t in head.tensors.items()}
    found = saved(folder, head)
    assert_same(found, head._replace(tensors=rounded, doubts={}, file=folder / "model.safetensors"))
    (folder / "measured.json").unlink()
    found = open_block(folder, TARGET)
    assert found.config == head.config and found.doubts.keys() <= {"taps"}


def test_what_is_written(tmp_path: Path) -> None:
    """Fails if a plain head does not have exactly the tensors and the entries that other engines look for."""
    head = write(tmp_path / "published", "modelopt", TARGET, taps=(0, 6), causal=True)
    saved(tmp_path / "ours", head)
    tensors = load_file(tmp_path / "ours/model.safetensors")
    layer = ("input_layernorm", "post_attention_layernorm", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
             "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "self_attn.q_norm",
             "self_attn.k_norm")
    assert tensors.keys() == {f"layers.{i}.{name}.weight" for i in range(2) for name in layer} | {
        "fc.weight", "hidden_norm.weight", "norm.weight"}
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}
    raw = json.loads((tmp_path / "ours/config.json").read_text())
    assert raw["architectures"] == ["DFlashDraftModel"] and raw["block_size"] == 8 and raw["num_target_layers"] == 8
    assert raw["dflash_config"] == {"mask_token_id": 23, "target_layer_ids": [-1, 5], "sample_from_anchor": False,
                                    "causal_head": False, "causal": False}
    assert (raw["model_type"], raw["vocab_size"], raw["num_hidden_layers"]) == ("qwen3", V, 2)
    assert json.loads((tmp_path / "ours/measured.json").read_text()) == {
        "taps": [0, 6], "anchor_first": False, "causal": False}
    head = write(tmp_path / "published", "speculators-dspark", TARGET, markov="gated", own_embed=True)
    saved(tmp_path / "ours", head)
    tensors = load_file(tmp_path / "ours/model.safetensors")
    assert {"embed_tokens.weight", "lm_head.weight", "markov_head.markov_w1.weight", "markov_head.markov_w2.weight",
            "markov_head.gate_proj.weight", "markov_head.gate_proj.bias", "d2t", "t2d"} <= tensors.keys()
    assert torch.equal(tensors["d2t"] + torch.arange(16), head.ids)
    raw = json.loads((tmp_path / "ours/config.json").read_text())
    assert raw["architectures"] == ["DSparkDraftModel"] and raw["draft_vocab_size"] == 16
    assert raw["dflash_config"].items() >= {"sample_from_anchor": True, "projector_type": "dspark", "markov_rank": 5,
                                            "markov_head_type": "gated"}.items()
