"""Draft heads of kinds that are not implemented: the error says which kind it is, for --draft and for --medusa.

    python -m pytest tests/test_heads_refused.py
"""
import json
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import save_file
from torch import Tensor

from drafters.heads import load_head
from drafters.medusa import load_medusa
from formats.foreign import kind_of_head
from formats.hf import open_folder

C, V = tiny.SHAPE["hidden_size"], tiny.SHAPE["vocab_size"]


def layer(prefix: str, columns: int = C, norms: tuple[str, ...] = (), qk_norms: bool = False) -> dict[str, Tensor]:
    """The tensors of a Llama layer. EAGLE-3's first layer reads 2C columns."""
    shapes = {"self_attn.q_proj": (32, columns), "self_attn.k_proj": (16, columns), "self_attn.v_proj": (16, columns),
              "self_attn.o_proj": (32, 32), "mlp.gate_proj": (48, 32), "mlp.up_proj": (48, 32),
              "mlp.down_proj": (32, 48), "post_attention_layernorm": (32,), **dict.fromkeys(norms, (32,))}
    if qk_norms:
        shapes |= {"self_attn.q_norm": (8,), "self_attn.k_norm": (8,)}
    return {f"{prefix}.{name}.weight": torch.zeros(shape) for name, shape in shapes.items()}


def named(*names: str) -> dict[str, Tensor]:
    return {name: torch.zeros(C, C) for name in names}


EAGLE3 = layer("layers.0", 2 * C, ("input_layernorm", "hidden_norm"))
EAGLE3 |= named("norm.weight", "fc.weight", "lm_head.weight")
MIDLAYER = {name.replace("layers.0", "midlayer"): tensor for name, tensor in EAGLE3.items()}
BLOCK = named("fc.weight", "hidden_norm.weight", "norm.weight") | layer(
    "layers.0", C, ("input_layernorm",), True) | layer("layers.1", C, ("input_layernorm",), True)
NESTED = {"architectures": ["Eagle3Speculator"], "speculators_model_type": "eagle3",
          "transformer_layer_config": {"hidden_size": C, "num_attention_heads": 4}}
DFLASH = tiny.SHAPE | {"architectures": ["DFlashDraftModel"], "dflash_config": {"mask_token_id": 3}}
WHOLE = named("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight") | layer(
    "model.layers.0", C, ("input_layernorm",))
D2T = {"d2t": torch.zeros(8, dtype=torch.int64), "t2d": torch.zeros(V, dtype=torch.bool)}
# Name in the error, tensors, config.json
KINDS = [
    ("an EAGLE-3 head", MIDLAYER | D2T, tiny.SHAPE), ("an EAGLE-3 head", EAGLE3, tiny.SHAPE),
    ("an EAGLE-3 head", EAGLE3 | D2T | named("embed_tokens.weight"), NESTED), ("an EAGLE-3 head", EAGLE3, {}),
    ("an EAGLE-3 head", {f"model.{name}": tensor for name, tensor in MIDLAYER.items()}, tiny.SHAPE),
    ("a P-EAGLE head", EAGLE3 | {"mask_hidden": torch.zeros(1, 1, 3 * C)}, NESTED),
    ("a block head", BLOCK, DFLASH), ("a block head", BLOCK | D2T | named("embed_tokens.weight"), NESTED),
    ("a block head", BLOCK | named("markov_head.markov_w1.weight", "markov_head.markov_w2.weight"), DFLASH),
    ("a DFlash head of the assistant kind", named("encoder.fc.weight", "encoder.output_norm_enc.weight"), DFLASH),
    *(("a DFlash head of Laguna's or MiMo's kind", BLOCK | named(name), DFLASH) for name in (
        "mask_embedding", "aux_hidden_norms.0.weight", "layers.0.self_attn.g_proj.weight", "layers.0.self_attn.sinks",
        "layers.1.self_attn.attention_sink_bias")),
    ("a Domino head", BLOCK | named("prefix_gru.weight_ih_l0"), DFLASH),
    ("a DFlare head", BLOCK | named("layer_fusion_weights"), DFLASH),
    ("a DFlash2 head", BLOCK | named("candidate_selector.hidden_projection"), DFLASH),
    ("Hydra heads", named("hydra_mlp.0.0.linear.weight", "hydra_lm_head.0.weight"), {"hydra_num_heads": 4}),
    ("an MTP head", layer("model.layers.61", C, ("input_layernorm", "enorm", "hnorm")) | named(
        "model.layers.61.eh_proj.weight"), tiny.SHAPE),
    ("an MTP head", layer("mtp.layers.0") | named("mtp.fc.weight", "mtp.pre_fc_norm_hidden.weight"), tiny.SHAPE),
    ("an MLP speculator", named("emb.0.weight", "proj.0.weight", "ln.0.weight", "head.0.weight"), {}),
    ("a whole model", WHOLE, tiny.SHAPE),
]


def save(folder: Path, tensors: dict[str, Tensor], raw: dict) -> None:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(raw))


def test_other_kinds_are_named(tmp_path: Path) -> None:
    """Fails if a head of another kind is refused for a tensor or a missing size alone, so that nobody learns what it
    is; or if it loads."""
    target = tiny.target()
    for kind, tensors, raw in KINDS:
        save(tmp_path, tensors, raw)
        for load in (load_medusa,) if kind in ("an EAGLE-3 head", "a block head") else (load_head, load_medusa):
            with pytest.raises(ValueError, match=f"model.safetensors: holds {kind}.*; only") as error:
                load(tmp_path, target)
            assert "\n" not in str(error.value)


def test_heads_are_not_converted_as_models(tmp_path: Path) -> None:
    """Fails if the converter, given a head's folder in place of a model's, complains of a tensor."""
    for kind, tensors, raw in KINDS[:9]:
        save(tmp_path, tensors, tiny.SHAPE | raw)
        with pytest.raises(ValueError, match=f"holds {kind}, not a model"):
            open_folder(tmp_path)
    tiny.save_head(tiny.head(tiny.target()), tmp_path)
    with pytest.raises(ValueError, match="holds an EAGLE-1/2 head, not a model"):
        open_folder(tmp_path)


def test_models_are_no_heads() -> None:
    """Fails if a model whose attention has sinks or gates is taken for a head that has them too."""
    for name in ("self_attn.sinks", "self_attn.g_proj.weight", "self_attn.attention_sink_bias"):
        assert kind_of_head(WHOLE | named(f"model.layers.0.{name}"), tiny.SHAPE).startswith("a whole model")


def test_each_option_names_the_other(tmp_path: Path) -> None:
    """Fails if Medusa heads given as an EAGLE head, or the other way round, are not told from a damaged file."""
    target = tiny.target()
    save(tmp_path, named("0.0.linear.weight", "1.0.linear.weight", "0.1.weight"), {"medusa_num_heads": 2})
    with pytest.raises(ValueError, match="Medusa heads .--medusa takes them"):
        load_head(tmp_path, target)
    tiny.save_head(tiny.head(target), tmp_path)
    with pytest.raises(ValueError, match="an EAGLE-1/2 head .--draft takes it"):
        load_medusa(tmp_path, target)


def test_weight_file_of_another_kind(tmp_path: Path) -> None:
    """Fails if a folder that holds only another kind's weight file is not told from an empty one."""
    for file, kind in (("hydra_lm_head.pt", "Hydra heads"), ("medusa_lm_head.pt", "Medusa heads")):
        (tmp_path / file).touch()
        with pytest.raises(FileNotFoundError, match=kind):
            load_head(tmp_path, tiny.target())
        (tmp_path / file).unlink()
    (tmp_path / "hydra_lm_head.pt").touch()
    with pytest.raises(FileNotFoundError, match="Hydra heads"):
        load_medusa(tmp_path, tiny.target())


def test_quantised_heads_are_refused(tmp_path: Path) -> None:
    """Fails if a head's integers or 8-bit floats are cast to the target's dtype without their scales."""
    target = tiny.target()
    folder = tiny.save_head(tiny.head(target), tmp_path)
    tensors = tiny.published(tiny.head(target))
    name = "layers.0.mlp.down_proj.weight"
    for kind in (torch.float8_e4m3fn, torch.int8):
        save_file(tensors | {name: tensors[name].to(kind)}, folder / "model.safetensors")
        with pytest.raises(ValueError, match="down_proj.weight is .*8.*no scales"):
            load_head(folder, target)
    save_file({"0.0.linear.weight": torch.zeros(C, C).to(torch.float8_e4m3fn)}, folder / "model.safetensors")
    with pytest.raises(ValueError, match="float8_e4m3fn"):
        load_medusa(folder, target)
    raw = json.loads((folder / "config.json").read_text()) | {"quantization_config": {"quant_method": "fp8"}}
    (folder / "config.json").write_text(json.dumps(raw))
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match="FP8"):
        load_head(folder, target)


def test_heads_with_odd_configs_load(tmp_path: Path) -> None:
    """Fails if a head is refused for what its config says of biases, or of an architecture: its tensors decide."""
    target = tiny.target()
    folder = tiny.save_head(tiny.head(target), tmp_path)
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(
        raw | {"attention_bias": True, "model_type": "qwen2", "architectures": ["EagleModel"], "bias": True}))
    load_head(folder, target)
