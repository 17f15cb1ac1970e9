"""EAGLE-3 heads as six publishers write them: what is read, what is doubtful, what is refused, and what we write.

    python -m pytest tests/formats/test_eagle3_files.py
"""
import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import tiny
import torch
from damage import damaged_json, damaged_safetensors, flipped, fuzz
from eagle3_published import HEADS, names_of, write
from safetensors.torch import load_file, save_file
from torch import Tensor

from formats.config import Config
from formats.eagle3 import HeadFiles, open_eagle3, save_eagle3
from quant.linear import quantize_weight

TARGET = Config.from_dict(tiny.SHAPE | {"num_hidden_layers": 8})
V, C = TARGET.vocab_size, TARGET.hidden_size


def change(folder: Path, tensors: dict[str, Tensor | None] | None = None, **config: object) -> None:
    """Change tensors of a model.safetensors, and entries of its config.json; None removes a tensor or an entry."""
    file, config_file = folder / "model.safetensors", folder / "config.json"
    if tensors:
        changed = load_file(file) | tensors
        save_file({name: t for name, t in changed.items() if t is not None}, file)
    raw = json.loads(config_file.read_text()) | config
    config_file.write_text(json.dumps({key: value for key, value in raw.items() if value is not None}))


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
    """Fails if a layout or a flag is misread: a tensor under another name, a norm for the other half of the input, taps
    one layer off, a vocabulary sorted, a field of the config ignored, or a doubt kept silent."""
    wanted = write(tmp_path, publisher, TARGET, **flags)
    assert_same(open_eagle3(tmp_path, TARGET), wanted)
    assert_same(open_eagle3(wanted.file, TARGET), wanted)


def test_other_spellings(tmp_path: Path) -> None:
    """Fails if a name or a flag that only some files have is not read like the usual one."""
    wanted = write(tmp_path, "specforge", TARGET, fc_norm=True)
    tensors = load_file(wanted.file)
    old = {f"aux_norm_{word}.weight": tensors[f"fc_norm.{i}.weight"] for i, word in enumerate(("low", "mid", "high"))}
    change(tmp_path, old | {f"fc_norm.{i}.weight": None for i in range(3)}, fc_norm=None, use_aux_norm=True)
    assert_same(open_eagle3(tmp_path, TARGET), wanted)
    change(tmp_path, {"d2t": tensors["d2t"].to(torch.int32)}, use_aux_norm=None, head_dim=None)  # 32 / 4 heads
    assert_same(open_eagle3(tmp_path, TARGET), wanted)
    wanted = write(tmp_path, "megatron", TARGET, layers=2)
    change(tmp_path, {"midlayer.1.input_layernorm.weight": wanted.tensors["layers.1.attn_norm.weight"],
                      "midlayer.1.hidden_norm.weight": None})
    assert_same(open_eagle3(tmp_path, TARGET), wanted)


def test_tables_that_say_nothing(tmp_path: Path) -> None:
    """Fails if zeros for a draft vocabulary of the first tokens are refused, which t2d confirms, or if a d2t of a full
    vocabulary that reorders it is dropped."""
    wanted = write(tmp_path, "specforge", TARGET)
    first = torch.arange(V) < 16
    change(tmp_path, {"d2t": torch.zeros(16, dtype=torch.int64), "t2d": first})
    assert open_eagle3(tmp_path, TARGET).ids.tolist() == list(range(16))
    wanted = write(tmp_path, "modelopt", TARGET, draft_vocab=V)
    assert sorted(wanted.ids.tolist()) == list(range(V)) and torch.equal(open_eagle3(tmp_path, TARGET).ids, wanted.ids)


def test_fc_out_of_use(tmp_path: Path) -> None:
    """Fails if a head that is said to use no taps gets an fc all the same, which other engines then skip."""
    write(tmp_path, "specforge", TARGET)
    change(tmp_path, eagle_config={"use_aux_hidden_state": False})
    found = open_eagle3(tmp_path, TARGET)
    assert found.config.taps == () and "fc.weight" not in found.tensors


# Publisher, explicit numbers, n of the target -> the taps to try.
TAPS = [
    ("specforge", [1, 15, 28], 32, [(2, 16, 29)]), ("specforge", [2, 16, 29], 32, [(2, 16, 29)]),
    ("modelopt", [24, 30, 36], 36, [(24, 30, 36)]), ("specforge", [1, 18, 32], 36, [(2, 19, 33), (1, 18, 32)]),
    ("specforge", [28, 1, 14], 32, [(1, 14, 28), (2, 15, 29)]),
    ("specforge", [3, 15, 28], 32, [(3, 15, 28), (4, 16, 29)]),
    ("speculators", [1, 18, 32], 36, [(1, 18, 32)]), ("speculators", [1, 15, 28], 32, [(2, 16, 29)]),
    ("speculators", [29, 16, 2], 32, [(2, 16, 29)]), ("speculators", [1, 46, 90], 94, [(2, 47, 91)]),
    ("specforge", [-1, 3, 9], 32, [(0, 4, 10)]), ("specforge", [], 32, [(2, 16, 29)]),
]


@pytest.mark.parametrize(("publisher", "ids", "layers", "wanted"), TAPS)
def test_taps(publisher: str, ids: list[int], layers: int, wanted: list[tuple[int, ...]], tmp_path: Path) -> None:
    """Fails if numbers that can mean one thing only are doubted, or if of two meanings the likelier is not first."""
    target = replace(TARGET, num_layers=layers)
    write(tmp_path, publisher, target)
    if publisher == "speculators":
        change(tmp_path, eagle_aux_hidden_state_layer_ids=ids)
    else:
        change(tmp_path, eagle_config={"eagle_aux_hidden_state_layer_ids": ids})
    found = open_eagle3(tmp_path, target)
    assert found.config.taps == wanted[0]
    assert found.doubts.get("taps", tuple(wanted)) == tuple(wanted) and ("taps" in found.doubts) == (len(wanted) > 1)


def test_nested_entries(tmp_path: Path) -> None:
    """Fails if a flag in eagle_config overrides the one outside, which vLLM reads, if null counts as an entry, or if a
    size outside overrides that of speculators' layers."""
    write(tmp_path, "specforge", TARGET, norm_before_residual=True)
    change(tmp_path, eagle_config={"norm_before_residual": False, "eagle_aux_hidden_state_layer_ids": [1, 2, 3]})
    assert open_eagle3(tmp_path, TARGET).config.norm_before_residual
    raw = json.loads((tmp_path / "config.json").read_text()) | {"norm_before_residual": None}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert not open_eagle3(tmp_path, TARGET).config.norm_before_residual
    wanted = write(tmp_path, "speculators", TARGET)
    change(tmp_path, num_attention_heads=8, rope_theta=3.0)
    raw = json.loads((tmp_path / "config.json").read_text())
    change(tmp_path, transformer_layer_config=raw["transformer_layer_config"] | {"rope_theta": 10000.0})
    assert_same(open_eagle3(tmp_path, TARGET), wanted)


def test_measured(tmp_path: Path) -> None:
    """Fails if what was measured does not override the config and end the doubt, or if it ends other doubts too."""
    write(tmp_path, "specforge", TARGET, taps=(4, 6, 7), theta=1e6, norm_output=True)
    assert open_eagle3(tmp_path, TARGET).doubts.keys() == {"taps", "rope_theta", "norm_output"}
    (tmp_path / "measured.json").write_text('{"taps": [4, 6, 7], "norm_output": false}')
    found = open_eagle3(tmp_path, TARGET)
    assert found.config.taps == (4, 6, 7) and not found.config.norm_output
    assert found.doubts == {"rope_theta": (1e6, 10000.0)}
    (tmp_path / "measured.json").write_text('{"rope_theta": 10000, "norm_before_residual": true}')
    found = open_eagle3(tmp_path, TARGET)
    assert found.config.layer.rope_theta == 10000.0 and found.config.norm_before_residual
    assert found.doubts.keys() == {"taps", "norm_output"}
    write(tmp_path, "speculators", TARGET)
    change(tmp_path, norm_before_residual=None)
    assert open_eagle3(tmp_path, TARGET).config.norm_before_residual  # the file does not say it


def test_windows(tmp_path: Path) -> None:
    """Fails if a window of the head's own attention is forgotten."""
    write(tmp_path, "speculators", TARGET)
    nested = json.loads((tmp_path / "config.json").read_text())["transformer_layer_config"]
    change(tmp_path, transformer_layer_config=nested | {"layer_types": ["sliding_attention"], "sliding_window": 64})
    assert open_eagle3(tmp_path, TARGET).config.layer.sliding_window == 64


@pytest.mark.parametrize("mode", ["int8", "int8dyn", "int4"])
def test_quantised_files(mode: str, tmp_path: Path) -> None:
    """Fails if a file with our names, integers and scales is not read like the head that it was made of."""
    wanted = write(tmp_path, "speculators", TARGET, layers=2, own_embed=False, taps=(1, 4))
    tensors = {"d2t": wanted.ids - torch.arange(len(wanted.ids))}
    for name, tensor in wanted.tensors.items():
        module = name.removesuffix(".weight")
        if module.split(".")[-1] in ("wqkv", "wo", "w13", "w2", "fc", "lm_head"):
            weight = quantize_weight(tensor, "int8" if module == "lm_head" else mode)
            tensors |= {f"{module}.data": weight.data, f"{module}.scale": weight.scale}
        else:
            tensors[name] = tensor
    file = tmp_path / f"model-{mode}.safetensors"
    save_file(tensors, file, {"mode": mode, "group": "128"})
    del tensors["d2t"]
    found = open_eagle3(file, TARGET)
    assert_same(found, wanted._replace(tensors=tensors, file=file, metadata=found.metadata))
    assert found.metadata == {"mode": mode, "group": "128"}


# ----- Refusals ----------------------------------------------------------------------------------------------------

MID = "midlayer.self_attn.{}_proj.weight"
D2T = torch.arange(0, 16) // 2  # offsets of the ids 0, 1, 3, 4, 6, 7, ...
T2D = torch.isin(torch.arange(V), D2T + torch.arange(16))
YARN = {"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 2048}
# What is wrong: publisher, tensors and entries of the config to change, words of the error.
REFUSED: dict[str, tuple[str, dict, dict, str]] = {
    "P-EAGLE": ("speculators", {"mask_hidden": torch.zeros(1, 1, 3 * C)}, {}, "holds a P-EAGLE head; only EAGLE-3"),
    "P-EAGLE by its config": ("speculators", {}, {"speculators_model_type": "peagle"}, "'peagle' is not implemented"),
    "MLA": ("specforge", {"midlayer.self_attn.kv_a_proj_with_mqa.weight": torch.zeros(4, 4)}, {}, "MLA attention"),
    "MTP": ("specforge", {"eh_proj.weight": torch.zeros(C, 2 * C)}, {}, "holds an MTP head"),
    "parallel heads": ("modelopt", {"parallel_draft_heads.0.medusa_layers.0.linear.weight": torch.zeros(C, C)}, {},
                       "drafting in parallel"),
    "parallel steps": ("modelopt", {}, {"parallel_draft_step": 4}, "parallel_draft_step 4 is not implemented"),
    "parallel drafting": ("specforge", {}, {"parallel_drafting": True}, "parallel_drafting is not implemented"),
    "quantised": ("modelopt", {}, {"quantization_config": {"quant_method": "fp8"}}, "quantised with FP8"),
    "quantised weights": ("modelopt", {"fc.weight": torch.zeros(C, 3 * C, dtype=torch.int8)}, {}, "is int8"),
    "no input norm": ("modelopt", {}, {"use_input_layernorm_in_first_layer": False}, "first_layer false is not"),
    "MTP norm": ("modelopt", {}, {"use_mtp_layernorm": True}, "use_mtp_layernorm is not implemented"),
    "RoPE": ("modelopt", {}, {"rope_scaling": YARN | {"rope_type": "other"}}, "RoPE type 'other' is not implemented"),
    "logit_scale": ("specforge", {}, {"logit_scale": 0.5}, "logit_scale 0.5 is not implemented"),
    "GELU": ("specforge", {}, {"hidden_act": "gelu"}, "hidden_act 'gelu' is not implemented"),
    "unknown tensor": ("specforge", {"gate.weight": torch.zeros(3)}, {}, "has unknown gate.weight"),
    "a norm's bias": ("specforge", {"norm.bias": torch.zeros(C)}, {}, "has unknown norm.bias"),
    "two names": ("specforge", {"model.norm.weight": torch.ones(C)}, {}, "norm.weight is there under another name"),
    "narrow first layer": ("specforge", {MID.format(x): torch.zeros(16 + 16 * (x == "q"), C) for x in "qkv"}, {},
                           "first layer takes a feature without an embedding"),
    "no EAGLE-3 layer": ("specforge", {MID.format("q"): torch.zeros(32, 3 * C)}, {}, "q_proj of layer 0 takes 96"),
    "q, k, v unlike": ("specforge", {MID.format("k"): torch.zeros(16, C)}, {}, "do not fit together"),
    "q missing": ("specforge", {MID.format("q"): None}, {}, "lacks layers.0.self_attn.q_proj"),
    "k missing": ("specforge", {MID.format("k"): None}, {}, "do not fit together"),
    "o is no matrix": ("specforge", {MID.format("o"): torch.zeros(32)}, {}, "no matrix"),
    "norm missing": ("specforge", {"midlayer.hidden_norm.weight": None}, {}, "lacks layers.0.feature_norm.weight"),
    "one qk-norm": ("deepspec", {"layers.0.self_attn.k_norm.weight": None}, {}, "lacks layers.0.k_norm.weight"),
    "a layer missing": ("modelopt", {"layers.2.input_layernorm.weight": torch.ones(C)}, {}, r"layers are \[0, 2\]"),
    "head_dim": ("angelslim", {}, {"head_dim": 16}, "4 heads .* head_dim 16 do not fit the 64 rows .*: correct"),
    "number of heads": ("specforge", {}, {"num_attention_heads": 3}, "3 heads"),
    "key/value heads": ("specforge", {}, {"num_key_value_heads": 4}, "4 key/value heads"),
    "heads as many rows": ("specforge", {}, {"num_attention_heads": 6, "num_key_value_heads": 1}, "6 heads and 1 key"),
    "no heads": ("specforge", {}, {"num_attention_heads": None}, "num_attention_heads is missing"),
    "hidden_size": ("specforge", {}, {"hidden_size": 64}, "hidden_size is 64, but should be 32, the width"),
    "no fc": ("specforge", {"fc.weight": None}, {}, "there should|no fc.weight"),
    "fc of another model": ("specforge", {"fc.weight": torch.zeros(C, 100)}, {}, "fc takes 100 .* another model's"),
    "two taps": ("specforge", {"fc.weight": torch.zeros(C, 2 * C)}, {}, r"taps \[2, 4, 5\] do not fit .* fc for 2"),
    "taps beyond": ("deepspec", {}, {"target_layer_ids": [0, 1, 2, 3, 8]}, "do not fit a target of 8 layers"),
    "taps twice": ("speculators", {}, {"eagle_aux_hidden_state_layer_ids": [2, 2, 5]}, "do not fit"),
    "taps are words": ("speculators", {}, {"eagle_aux_hidden_state_layer_ids": ["a"]}, "list of whole numbers"),
    "target_hidden_size": ("specforge", {}, {"target_hidden_size": 64}, "target_hidden_size is 64, but should be 32"),
    "vocabulary": ("specforge", {}, {"vocab_size": 25}, "vocab_size is 25, but should be 24"),
    "embedding": ("speculators", {"embed_tokens.weight": torch.zeros(V, 2 * C)}, {}, "embed_tokens.*another model's"),
    "too large": ("specforge", {"lm_head.weight": torch.zeros(V + 1, C)}, {}, "lm_head has 25 rows.*another model's"),
    "t2d": ("specforge", {"t2d": torch.ones(V + 1, dtype=torch.bool)}, {}, "t2d is .*another model's"),
    "no d2t": ("specforge", {"d2t": None}, {}, "lm_head has 16 rows for 24 tokens, and no d2t"),
    "no d2t, no t2d": ("modelopt", {"d2t": None}, {}, "no d2t"),
    "d2t too short": ("specforge", {"d2t": torch.zeros(15, dtype=torch.int64)}, {}, r"d2t is \[15\].* 16 integers"),
    "d2t of floats": ("specforge", {"d2t": torch.zeros(16)}, {}, "d2t is .* of torch.float32"),
    "d2t lost": ("modelopt", {"d2t": torch.zeros(16, dtype=torch.int64)}, {}, "d2t is all zeros"),
    "d2t lost, t2d not": ("specforge", {"d2t": torch.zeros(16, dtype=torch.int64), "t2d": T2D}, {}, "those of t2d"),
    "d2t absolute": ("modelopt", {"d2t": torch.arange(16) + 3}, {}, "d2t holds the tokens' ids themselves"),
    "d2t absolute, says t2d": ("specforge", {"d2t": D2T + torch.arange(16), "t2d": T2D}, {}, "ids themselves"),
    "d2t beyond": ("modelopt", {"d2t": torch.full((16,), 9)}, {}, "16 different ids from 9 to 24"),
    "d2t below": ("modelopt", {"d2t": torch.full((16,), -1)}, {}, "from -1 to 14"),
    "d2t overflows": ("modelopt", {"d2t": torch.full((16,), 2**63 - 1)}, {}, "different ids"),
    "d2t twice": ("modelopt", {"d2t": torch.tensor([1, 0] + [0] * 14)}, {}, "15 different ids"),
    "d2t against t2d": ("specforge", {"d2t": D2T, "t2d": T2D.roll(1)}, {}, "those of t2d"),
    "no lm_head": ("specforge", {"lm_head.weight": None}, {}, "draft_vocab_size is 16, but should be 24"),
    "shared and own lm_head": ("specforge", {}, {"share_lm_head": True}, "share_lm_head is true, so .* no lm_head"),
    "shared without d2t": ("specforge", {"lm_head.weight": None, "d2t": None}, {"share_lm_head": True}, "have a d2t"),
    "norm_before_fc": ("specforge", {}, {"norm_before_fc": True}, "norm_before_fc is true, but .* not the tensors"),
    "use_aux_norm": ("specforge", {}, {"use_aux_norm": True}, "fc_norm is true, but .* not the tensors"),
    "fc_norm": ("speculators", {f"fc_norm.{i}.weight": torch.ones(C) for i in range(3)}, {}, "fc_norm is false, but"),
    "two fc_norms": ("specforge", {f"fc_norm.{i}.weight": torch.ones(C) for i in range(2)}, {}, "2 norms .* 3 taps"),
    "both norms": ("specforge", {f"fc_norm.{i}.weight": torch.ones(C) for i in range(3)} | {
        "input_norm.weight": torch.ones(3 * C)}, {}, "exclude each other"),
    "norm for no taps": ("specforge", {"input_norm.weight": torch.ones(3 * C)}, {"use_aux_hidden_state": False},
                         "norms for taps"),
    "last norm": ("specforge", {"norm.weight": None}, {}, "use_last_layernorm is true, but .* not the tensors"),
    "last norm unused": ("specforge", {}, {"use_last_layernorm": False}, "use_last_layernorm is false, but"),
    "no norm to output": ("specforge", {"norm.weight": None}, {"use_last_layernorm": False, "norm_output": True},
                          "norm_output is true, but the weights have no last norm"),
    "flag is a word": ("specforge", {}, {"norm_before_residual": "yes"}, "should be true or false, not 'yes'"),
    "silent speculators": ("speculators", {}, {"norm_before_residual": None}, "norm_before_residual is missing"),
    "eagle_config": ("specforge", {}, {"eagle_config": [1]}, "should be objects"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refusals(what: str, tmp_path: Path) -> None:
    """Fails if a head that would compute something else, or that is damaged, loads or is refused for another reason
    than what is wrong with it."""
    publisher, tensors, config, words = REFUSED[what]
    write(tmp_path, publisher, TARGET)
    change(tmp_path, tensors, **config)
    with pytest.raises(ValueError, match=words) as error:
        open_eagle3(tmp_path, TARGET)
    assert str(error.value).startswith(str(tmp_path)) and "\n" not in str(error.value)


def test_table_of_ids(tmp_path: Path) -> None:
    """Fails if a table of ids that could be one of offsets too is taken for that, without a t2d that says so."""
    ids = torch.arange(0, 12, 2)
    for publisher, t2d in (("modelopt", {}), ("specforge", {"t2d": torch.isin(torch.arange(V), ids)})):
        write(tmp_path, publisher, TARGET, draft_vocab=6)
        change(tmp_path, {"d2t": ids} | t2d)
        with pytest.raises(ValueError, match="d2t holds the tokens' ids themselves"):
            open_eagle3(tmp_path, TARGET)
    change(tmp_path, {"t2d": torch.isin(torch.arange(V), ids + torch.arange(6))})
    assert open_eagle3(tmp_path, TARGET).ids.tolist() == [0, 3, 6, 9, 12, 15]


def test_other_targets(tmp_path: Path) -> None:
    """Fails if a head for another width, vocabulary or depth loads."""
    write(tmp_path, "safeailab", TARGET)
    wide = tmp_path / "wide"
    write(wide, "safeailab", TARGET, width=48, own_embed=True)
    with pytest.raises(ValueError, match="vocab_size is 24, but should be 30, .* another model's head"):
        open_eagle3(tmp_path, replace(TARGET, vocab_size=30))
    with pytest.raises(ValueError, match=r"taps \[2, 4, 5\] do not fit .* an fc for 6 of them: another model's head"):
        open_eagle3(tmp_path, replace(TARGET, hidden_size=C // 2))
    with pytest.raises(ValueError, match="fc takes 96 numbers, no multiple .* 36: another model's head"):
        open_eagle3(wide, replace(TARGET, hidden_size=36))
    with pytest.raises(ValueError, match=r"taps \[2, 3, 3\] do not fit a target of 6 layers"):
        open_eagle3(tmp_path, replace(TARGET, num_layers=6))
    for flags in ({}, {"own_embed": True, "own_lm_head": False, "draft_vocab": None}, {"own_embed": True, "taps": ()}):
        write(wide, "safeailab", TARGET, width=48, **flags)
        with pytest.raises(ValueError, match="width 48 .* needs fc, embed_tokens and lm_head .* another model's head"):
            open_eagle3(wide, TARGET)


def test_other_files(tmp_path: Path) -> None:
    """Fails if a missing folder, weight file or config, or another kind of head, ends in anything but one line."""
    with pytest.raises(FileNotFoundError, match="no draft head there"):
        open_eagle3(tmp_path / "nothing", TARGET)
    write(tmp_path, "specforge", TARGET)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match="config.json: missing, or no JSON object"):
        open_eagle3(tmp_path, TARGET)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="neither model.safetensors nor pytorch_model.bin"):
        open_eagle3(tmp_path, TARGET)
    tiny.save_head(tiny.head(tiny.target()), tmp_path)
    with pytest.raises(ValueError, match="holds an EAGLE-1/2 head .--draft takes it.; only EAGLE-3 heads"):
        open_eagle3(tmp_path, TARGET)


@pytest.mark.parametrize("text", [
    "[]", "{", '{"taps": [4, 6]}', '{"taps": [6, 4, 7]}', '{"taps": [4, 6, 9]}', '{"taps": [4, 6, 7.0]}', '{"taps": 4}',
    '{"rope_theta": "x"}', '{"rope_theta": null}', '{"norm_output": 1}', '{"tap": [4, 6, 7]}', "[" * 99999])
def test_wrong_measurements(text: str, tmp_path: Path) -> None:
    """Fails if a measured.json with an unknown or wrong entry is used in part, or ends in a traceback."""
    write(tmp_path, "specforge", TARGET)
    (tmp_path / "measured.json").write_text(text)
    with pytest.raises(ValueError, match="measured.json: ") as error:
        open_eagle3(tmp_path, TARGET)
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_damaged_files(tmp_path: Path) -> None:
    """Fails if flipped bytes, a file that is cut off, or entries of the wrong kind raise anything but one line."""
    keys = ("rope_scaling", "sliding_window", "layer_types", "norm_output", "eagle_config", "transformer_layer_config",
            "speculators_model_type", "eagle_aux_hidden_state_layer_ids", "target_layer_ids", "parallel_draft_step")
    for publisher in ("specforge", "speculators", "deepspec", "megatron"):
        folder = tmp_path / publisher
        write(folder, publisher, TARGET, measured=True)
        fuzz(folder / "model.safetensors", 120, damaged_safetensors, open_eagle3, folder, TARGET)
        fuzz(folder / "config.json", 120, partial(damaged_json, more_keys=keys), open_eagle3, folder, TARGET)
        fuzz(folder / "measured.json", 60, damaged_json, open_eagle3, folder, TARGET)
    write(tmp_path / "pickle", "safeailab", TARGET)
    fuzz(tmp_path / "pickle/pytorch_model.bin", 120, flipped, open_eagle3, tmp_path / "pickle", TARGET)


# ----- Writing -----------------------------------------------------------------------------------------------------


def vllm_taps(raw: dict, n: int) -> tuple[int, ...]:
    """The boundaries that vLLM reads: numbers from outside or from eagle_config, as they are."""
    ids = raw.get("eagle_aux_hidden_state_layer_ids") or raw["eagle_config"].get("eagle_aux_hidden_state_layer_ids")
    return tuple(ids or (2, n // 2, n - 3))


def sglang_taps(raw: dict, n: int) -> tuple[int, ...]:
    """The boundaries that SGLang reads since May 2026: outputs if the first number is 1."""
    ids = raw["eagle_config"].get("eagle_aux_hidden_state_layer_ids")
    return tuple(i + (ids[0] == 1) for i in ids) if ids else (2, n // 2, n - 3)


def saved(folder: Path, head: HeadFiles) -> HeadFiles:
    save_eagle3(head.config, head.tensors, head.ids, folder)
    return open_eagle3(folder, TARGET)


@pytest.mark.parametrize(("publisher", "flags"), HEADS, ids=names_of(HEADS))
def test_round_trip(publisher: str, flags: dict, tmp_path: Path) -> None:
    """Fails if a head that we write is read back as another one, be it by us or, for its taps, by vLLM or SGLang; or
    if it is doubtful."""
    head = write(tmp_path / "published", publisher, TARGET, **flags)
    if head.config.taps[:1] == (1,):
        with pytest.raises(ValueError, match="choose another first tap"):
            saved(tmp_path / "ours", head)
        assert not (tmp_path / "ours").exists()
        return
    folder = tmp_path / "ours"
    rounded = {name: t.to(torch.bfloat16) for name, t in head.tensors.items()}
    found = saved(folder, head)
    assert_same(found, head._replace(tensors=rounded, doubts={}, file=folder / "model.safetensors"))
    raw = json.loads((folder / "config.json").read_text())
    if head.config.taps:
        assert vllm_taps(raw, 8) == sglang_taps(raw, 8) == head.config.taps
    (folder / "measured.json").unlink()
    assert open_eagle3(folder, TARGET).config == head.config


def test_what_is_written(tmp_path: Path) -> None:
    """Fails if a plain head does not have exactly the tensors and the entries that other engines look for."""
    head = write(tmp_path / "published", "modelopt", TARGET)
    saved(tmp_path / "ours", head)
    tensors = load_file(tmp_path / "ours/model.safetensors")
    layer = {f"midlayer.{name}.weight" for name in (
        "input_layernorm", "hidden_norm", "post_attention_layernorm", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
        "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")}
    assert tensors.keys() == layer | {"fc.weight", "norm.weight", "lm_head.weight", "d2t", "t2d"}
    assert {t.dtype for name, t in tensors.items() if name not in ("d2t", "t2d")} == {torch.bfloat16}
    assert (tensors["d2t"].dtype, tensors["t2d"].dtype) == (torch.int64, torch.bool)
    assert torch.equal(tensors["d2t"] + torch.arange(16), head.ids)
    assert set(tensors["t2d"].nonzero()[:, 0].tolist()) == set(head.ids.tolist())
    raw = json.loads((tmp_path / "ours/config.json").read_text())
    assert raw["architectures"] == ["LlamaForCausalLMEagle3"] and raw["draft_vocab_size"] == 16
    assert (raw["target_hidden_size"], raw["vocab_size"], raw["num_hidden_layers"]) == (C, V, 1)
    assert "eagle_aux_hidden_state_layer_ids" not in raw["eagle_config"] and "norm_output" not in raw
    head = write(tmp_path / "published", "speculators", TARGET, layers=2, norm_before_fc=True, norm_output=True)
    saved(tmp_path / "ours", head)
    tensors = load_file(tmp_path / "ours/model.safetensors").keys()
    assert {"layers.0.hidden_norm.weight", "layers.1.input_layernorm.weight", "embed_tokens.weight"} <= tensors
    raw = json.loads((tmp_path / "ours/config.json").read_text())
    assert raw["norm_output"] is raw["norm_before_fc"] is raw["eagle_config"]["norm_before_fc"] is True
    assert "fc_norm" not in raw and raw["norm_before_residual"] is True


def test_first_tap_of_1(tmp_path: Path) -> None:
    """Fails if taps are written that vLLM and SGLang read in different ways, or if the refusal damages an old head."""
    head = write(tmp_path / "published", "specforge", TARGET)
    saved(tmp_path / "ours", head)
    with pytest.raises(ValueError, match=r"taps \[1, 4, 5\]: SGLang .* choose another first tap"):
        saved(tmp_path / "ours", head._replace(config=replace(head.config, taps=(1, 4, 5))))
    assert open_eagle3(tmp_path / "ours", TARGET).config == head.config
