"""convert_hf_checkpoint.py on quantised checkpoints: whole folders and GGUF files with the names that others use.

    python -m pytest tests/test_convert_quantised.py

Bit formats one by one: tests/quant/test_published.py. Here the question is which tensors are found, what the converted
model computes, and what is said.
"""
import json
import re
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import packing
import pytest
import torch
from helpers import tiny_command
from safetensors.torch import load_file, save_file
from tiny import config_json, head, logits, save_head, save_tokenizer, target
from tiny_sources import add_tokenizer, published_target
from torch import Tensor

import convert_hf_checkpoint
import train
from app.install import add_head
from convert_hf_checkpoint import convert
from formats.config import Config
from generate import Engine
from model import Llama, load_model
from ops.quantized import Quantized, dequantize
from quant.linear import drafting_rows, quantize_weight

torch.set_num_threads(1)
WIDE = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 260, "num_attention_heads": 4,
        "num_key_value_heads": 2}
PROJECTIONS = re.compile(r"model\.layers\.\d\.(self_attn\.[qkvo]|mlp\.(gate|up|down))_proj\.weight")
Packer = Callable[[str, Tensor, torch.Generator], tuple[dict[str, Tensor], Tensor]]  # -> tensors and values


def quantised(w: Tensor, group: int, bits: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """u, scale and zero of each group of columns of w [N, K], rounded to the nearest."""
    x = w.float().unflatten(1, (-1, group))
    low, high = x.amin(2).clamp(max=0), x.amax(2).clamp(min=0)
    scale = ((high - low) / (2**bits - 2)).half().clamp(min=1e-4)
    zero = (-low / scale.float()).round().clamp(1, 2**bits - 2)
    u = (x / scale.float()[..., None] + zero[..., None]).round().clamp(0, 2**bits - 1)
    return u.flatten(1).int(), scale, zero.int()


def pack_awq(name: str, w: Tensor, generator: torch.Generator) -> tuple[dict[str, Tensor], Tensor]:
    u, scale, zero = quantised(w, 32)
    return packing.awq(u, scale, zero), packing.formula(u, scale, zero, torch.arange(w.shape[1]) // 32)


def pack_gptq(name: str, w: Tensor, generator: torch.Generator) -> tuple[dict[str, Tensor], Tensor]:
    """In order of activations: inputs of one layer share it, as q, k and v do. With a bias of zeros."""
    kind = re.sub(r"[qkv]_proj", "qkv", re.sub(r"(gate|up)_proj", "gate_up", name))
    order = torch.randperm(w.shape[1], generator=torch.Generator().manual_seed(sum(map(ord, kind))))
    groups = (torch.arange(w.shape[1]) // 32)[order.argsort()]
    u, scale, zero = quantised(w[:, order], 32)
    u = u[:, order.argsort()]
    parts = packing.gptq(u, scale, zero, groups)
    parts["bias"] = torch.zeros(len(w), dtype=torch.float16)
    return parts, packing.formula(u, scale, zero, groups)


def pack_w4a16(name: str, w: Tensor, generator: torch.Generator) -> tuple[dict[str, Tensor], Tensor]:
    u, scale, _ = quantised(w, 32)
    scale, zero = scale.bfloat16(), torch.full(scale.shape, 8)
    return packing.pack_quantized(u, scale, None), packing.formula(u, scale, zero, torch.arange(w.shape[1]) // 32)


def pack_w8a8(name: str, w: Tensor, generator: torch.Generator) -> tuple[dict[str, Tensor], Tensor]:
    scale = (w.float().abs().amax(1, keepdim=True) / 127).bfloat16()
    q = (w.float() / scale.float()).round().clamp(-128, 127).to(torch.int8)
    return {"weight": q, "weight_scale": scale, "input_scale": torch.ones(1)}, q * scale.float()


def pack_fp8(name: str, w: Tensor, generator: torch.Generator) -> tuple[dict[str, Tensor], Tensor]:
    scale = torch.rand(-(-len(w) // 24), -(-w.shape[1] // 24), generator=generator) + 0.5
    spread = scale.repeat_interleave(24, 0)[:len(w)].repeat_interleave(24, 1)[:, :w.shape[1]]
    q = (w.float() / spread).to(torch.float8_e4m3fn)
    return {"weight": q, "weight_scale_inv": scale}, q.float() * spread


def pack_fp8_one(name: str, w: Tensor, generator: torch.Generator) -> tuple[dict[str, Tensor], Tensor]:
    scale = torch.tensor(0.03)
    q = (w.float() / scale).to(torch.float8_e4m3fn)
    return {"weight": q, "weight_scale": scale, "input_scale": scale, "k_scale": scale}, q.float() * scale


def pack_int8(name: str, w: Tensor, generator: torch.Generator) -> tuple[dict[str, Tensor], Tensor]:
    largest = w.float().abs().amax(1)
    q = (w.float() * 127 / largest[:, None]).round().to(torch.int8)
    parts = {"weight": q, "SCB": largest, "weight_format": torch.zeros((), dtype=torch.uint8)}
    return parts, q * (largest / 127)[:, None]


def pack_nf4(name: str, w: Tensor, generator: torch.Generator) -> tuple[dict[str, Tensor], Tensor]:
    blocks = w.float().reshape(-1, 64)
    absmax = blocks.abs().amax(1)
    u = (blocks / absmax[:, None])[..., None].sub(packing.NF4).abs().argmin(2)
    return packing.nf4(u.view(w.shape), absmax, True)


# Name: (quantization_config, how a weight is packed, the words printed, the largest error)
FOLDERS: dict[str, tuple[dict, Packer, str, float]] = {
    "AWQ": ({"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}, pack_awq,
            "AWQ, groups of 32 -> int4 in groups of 32: 8 matrices, exactly", 0),
    "GPTQ": ({"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True}, pack_gptq,
             "act-order -> int4 in groups of 32: 8 matrices, exactly", 0),
    "W4A16": ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, pack_w4a16,
              "compressed-tensors of 4 bits, symmetric, groups of 32 -> int4 in groups of 32: 8 matrices, exactly", 0),
    "W8A8": ({"quant_method": "compressed-tensors", "format": "int-quantized"}, pack_w8a8,
             "compressed-tensors of 8 bits -> int8: 8 matrices, exactly", 0),
    "FP8": ({"quant_method": "fp8", "weight_block_size": [24, 24]}, pack_fp8,
            "FP8, a scale for 24 x 24 -> int8: 8 matrices, moved by", 0.02),
    "FP8, one scale": ({"quant_algo": "FP8", "producer": {"name": "modelopt"}}, pack_fp8_one,
                       "FP8, one scale -> int8: 8 matrices, moved by", 0.02),
    "int8": ({"quant_method": "bitsandbytes", "load_in_8bit": True}, pack_int8,
             "bitsandbytes of 8 bits -> int8: 8 matrices, exactly", 0),
    "nf4": ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, pack_nf4,
            "bitsandbytes nf4 -> int8: 8 matrices, moved by", 0.02)}


def save_quantised(folder: Path, kind: str, skip: str = "never", dtype: torch.dtype = torch.float16) -> Llama:
    """Save a folder as others publish it, all but `skip` of its projections packed. Returns a model in fp32 with the
    values that they have."""
    said, pack, *_ = FOLDERS[kind]
    model = target(3, torch.float32, **WIDE)
    generator = torch.Generator().manual_seed(0)
    tensors, values = {}, {}
    for name, w in published_target(model).items():
        w = w.to(dtype)
        if PROJECTIONS.fullmatch(name) and not re.search(skip, name):
            parts, values[name] = pack(name, w, generator)
            tensors |= {f"{name.removesuffix('.weight')}.{end}": t.clone().contiguous() for end, t in parts.items()}
        else:
            tensors[name], values[name] = w, w.float()
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config_json(model.cfg) | {"quantization_config": said}))
    save_tokenizer(folder)
    set_published(model, values)
    return model


def set_published(model: Llama, values: dict[str, Tensor]) -> None:
    """Give a model the weights of these published tensors."""
    for name, part in published_target(model).items():
        assert part.shape == values[name].shape
    state = {}
    for ours in model.state_dict():
        pieces = convert_hf_checkpoint.hf_names(ours, convert_hf_checkpoint.NAMES)
        state[ours] = torch.cat([values[name].float() for name in pieces])
    model.load_state_dict(state)


def weights_of(model: Llama) -> dict[str, Tensor]:
    """All weights of a model, fp32, whatever their kind."""
    found = {}
    for name, module in model.named_modules():
        if name and not list(module.children()) and hasattr(module, "weight"):
            w = module.weight
            is_packed = isinstance(w, Quantized)
            found[name] = dequantize(w, torch.float32)[:, :module_columns(model, name)] if is_packed else w.float()
    return found


def module_columns(model: Llama, name: str) -> int:
    with torch.device("meta"):
        return Llama(model.cfg).get_submodule(name).weight.shape[1]


def assert_same_weights(found: Llama, wanted: Llama, most: float) -> None:
    """All weights are equal or, if most > 0, moved by no more than that part of their root mean square."""
    wanted_weights = weights_of(wanted)
    for name, w in weights_of(found).items():
        error = (w - wanted_weights[name]).norm() / wanted_weights[name].norm()
        assert error <= (most if most and "layers" in name and "norm" not in name else 0), (name, error)


@pytest.mark.slow
@pytest.mark.parametrize("kind", FOLDERS)
def test_folders(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Fails if one weight of a checkpoint is lost, mixed up or moved by more than is said, or if what is not exact is
    not said. What is not quantised stays fp16."""
    wanted = save_quantised(tmp_path / "hf", kind)
    convert(tmp_path / "hf", tmp_path / "out", None)
    *_, words, most = FOLDERS[kind]
    assert words in capsys.readouterr().err
    model = load_model(tmp_path / "out", "cpu", torch.float32)
    assert_same_weights(model, wanted, most)
    ids = [1, 50, 7, 200, 3]
    # int8 rounds activations to 14 bits on a CPU
    torch.testing.assert_close(logits(model, ids), logits(wanted, ids), rtol=0.1 if most else 0.02,
                               atol=0.5 if most else 0.05)
    kept = load_file(tmp_path / "out/model.safetensors")
    assert kept["lm_head.weight"].dtype == kept["norm.weight"].dtype == torch.float16
    assert Config.load(tmp_path / "out").num_layers == 2


@pytest.mark.slow
@pytest.mark.parametrize("kind", FOLDERS)
def test_plain_numbers(kind: str, tmp_path: Path) -> None:
    """Fails if --dtype float32 does not give the values of the format, bit for bit."""
    wanted = save_quantised(tmp_path / "hf", kind)
    convert(tmp_path / "hf", tmp_path / "out", torch.float32)
    assert not any(name.endswith(".data") for name in load_file(tmp_path / "out/model.safetensors"))
    found = load_model(tmp_path / "out", "cpu", torch.float32)
    for (name, a), b in zip(found.state_dict().items(), wanted.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("skip", [r"layers\.1\.mlp", "o_proj", "k_proj"])
@pytest.mark.parametrize("kind", ["AWQ", "W8A8"])
def test_modules_that_were_skipped(kind: str, skip: str, tmp_path: Path) -> None:
    """Fails if a module that a method left alone is quantised or lost; or if a fused matrix with one such piece moves:
    it is not quantised then."""
    wanted = save_quantised(tmp_path / "hf", kind, skip, torch.bfloat16 if kind == "W8A8" else torch.float16)
    convert(tmp_path / "hf", tmp_path / "out", None)
    names = load_file(tmp_path / "out/model.safetensors").keys()
    plain = {r"layers\.1\.mlp": "layers.1.w13", "o_proj": "layers.0.wo", "k_proj": "layers.0.wqkv"}[skip]
    assert f"{plain}.weight" in names and "layers.0.w2.data" in names
    found = weights_of(load_model(tmp_path / "out", "cpu", torch.float32))
    for name, w in weights_of(wanted).items():
        rounding = 2**-8 if name.endswith(plain[8:]) and f"{name}.weight" in names else 0  # of its packed pieces
        assert ((found[name] - w).abs() <= rounding * w.abs()).all(), name


@pytest.mark.slow
@pytest.mark.parametrize("kind", FOLDERS)
def test_fused_and_reordered(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Fails if a matrix that is split (q, k and v in one, as Phi-3 has them) or of which rows are reordered (RoPE on a
    part of each head) loses its integers, or gets the rows of another."""
    said, pack, words, most = FOLDERS[kind]
    model = target(3, torch.float32, **WIDE)
    tensors = {name: w.half() for name, w in published_target(model).items()}
    generator = torch.Generator().manual_seed(0)
    for layer in range(2):
        for parent, fused, pieces in (("self_attn", "qkv_proj", "qkv"), ("mlp", "gate_up_proj", ("gate", "up"))):
            prefix = f"model.layers.{layer}.{parent}"
            tensors[f"{prefix}.{fused}.weight"] = torch.cat([tensors.pop(f"{prefix}.{piece}_proj.weight")
                                                             for piece in pieces])
    for name in [name for name in tensors if name.endswith("proj.weight")]:
        parts, _ = pack(name, tensors.pop(name), generator)
        tensors |= {f"{name.removesuffix('.weight')}.{end}": t.clone().contiguous() for end, t in parts.items()}
    (tmp_path / "hf").mkdir()
    save_file(tensors, tmp_path / "hf/model.safetensors")
    raw = config_json(model.cfg) | {"model_type": "phi3", "architectures": ["Phi3ForCausalLM"],
                                    "partial_rotary_factor": 0.5, "quantization_config": said}
    (tmp_path / "hf/config.json").write_text(json.dumps(raw))
    save_tokenizer(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "plain", torch.float32)
    capsys.readouterr()
    convert(tmp_path / "hf", tmp_path / "out", None)
    assert words in capsys.readouterr().err
    assert "layers.0.wqkv.data" in load_file(tmp_path / "out/model.safetensors")
    model = load_model(tmp_path / "out", "cpu", torch.float32)
    assert model.cfg.rotary_dim == model.cfg.head_dim // 2
    assert_same_weights(model, load_model(tmp_path / "plain", "cpu", torch.float32), most)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["AWQ", "W4A16", "W8A8", "FP8"])
def test_multiplied(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Fails if matrices that a family multiplies (Granite) lose their integers, or are not multiplied."""
    save_quantised(tmp_path / "hf", kind)
    raw = json.loads((tmp_path / "hf/config.json").read_text())
    factors = {"embedding_multiplier": 12.0, "residual_multiplier": 0.22, "attention_multiplier": 0.5,
               "logits_scaling": 8.0}
    raw |= {"model_type": "granite", "architectures": ["GraniteForCausalLM"], **factors}
    (tmp_path / "hf/config.json").write_text(json.dumps(raw))
    convert(tmp_path / "hf", tmp_path / "plain", torch.float32)
    capsys.readouterr()
    convert(tmp_path / "hf", tmp_path / "out", None)
    assert ("8 matrices, exactly" if kind == "W8A8" else "8 matrices, moved by") in capsys.readouterr().err
    names = load_file(tmp_path / "out/model.safetensors").keys()
    assert {f"layers.1.{name}.data" for name in ("wqkv", "wo", "w13", "w2")} <= names
    found, wanted = (weights_of(load_model(tmp_path / name, "cpu", torch.float32)) for name in ("out", "plain"))
    for name, w in found.items():
        rounded = 2**-8 if name in ("embed", "lm_head") or kind == "W4A16" else 0.02 if kind == "FP8" else 2**-10
        assert (w - wanted[name]).norm() <= rounded * wanted[name].norm(), name


def test_a_folder_of_2023(tmp_path: Path) -> None:
    """Fails if an AWQ folder without quantization_config, but with quant_config.json, is not read."""
    wanted = save_quantised(tmp_path / "hf", "AWQ")
    raw = json.loads((tmp_path / "hf/config.json").read_text())
    del raw["quantization_config"]
    (tmp_path / "hf/config.json").write_text(json.dumps(raw))
    with pytest.raises(ValueError, match="quantised with AWQ"):
        convert(tmp_path / "hf", tmp_path / "out", None)
    old = {"w_bit": 4, "q_group_size": 32, "version": "GEMM", "zero_point": True}
    (tmp_path / "hf/quant_config.json").write_text(json.dumps(old))
    convert(tmp_path / "hf", tmp_path / "out", None)
    assert_same_weights(load_model(tmp_path / "out", "cpu", torch.float32), wanted, 0)


@pytest.mark.parametrize(("kind", "change", "says"), [
    ("AWQ", lambda t: t.pop("model.layers.1.mlp.up_proj.scales"), "up_proj.weight: its tensor scales is missing"),
    ("AWQ", lambda t: t.update({"model.layers.0.self_attn.q_proj.qweight": torch.zeros(64, 9, dtype=torch.int32)}),
     "q_proj.weight: its tensors are"),
    ("GPTQ", lambda t: t.pop("model.layers.0.mlp.down_proj.qweight"), "down_proj is quantised in a way"),
    ("W4A16", lambda t: t.update({"model.layers.0.mlp.down_proj.weight_global_scale": torch.ones(1)}),
     "down_proj is quantised in a way that is not implemented"),
    ("W8A8", lambda t: t.pop("model.layers.0.mlp.down_proj.weight_scale"), "down_proj.weight is int8"),
    ("FP8", lambda t: t.update({"model.layers.0.mlp.down_proj.weight_scale_inv": torch.ones(2, 3)}),
     "down_proj.weight: its tensors are"),
    ("nf4", lambda t: t.pop("model.layers.0.mlp.down_proj.weight.absmax"), "weight.absmax is missing"),
    ("AWQ", lambda t: t.pop("model.norm.weight"), "missing"),
    ("AWQ", lambda t: t.update({"model.layers.0.self_attn.o_proj.qweight": torch.zeros(64, 7, dtype=torch.int32)}),
     "o_proj.weight: its tensors are"),
])
def test_damaged_folders(kind: str, change, says: str, tmp_path: Path) -> None:
    """Fails if a checkpoint with a wrong or missing tensor is converted, if the error has more than a line or does not
    name the weight, or if half a folder stays."""
    save_quantised(tmp_path / "hf", kind)
    file = tmp_path / "hf/model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    with pytest.raises(ValueError, match=says) as error:
        convert(tmp_path / "hf", tmp_path / "out", None)
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_truncated(tmp_path: Path) -> None:
    """Fails if a checkpoint that was cut off is converted."""
    save_quantised(tmp_path / "hf", "GPTQ")
    file = tmp_path / "hf/model.safetensors"
    file.write_bytes(file.read_bytes()[:-200])
    with pytest.raises(ValueError, match="damaged") as error:
        convert(tmp_path / "hf", tmp_path / "out", None)
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


# ----- GGUF --------------------------------------------------------------------------------------------------------


def save_mixed_gguf(path: Path, parts: int = 1) -> dict[str, Tensor]:
    """Save a file of llama.cpp with several types, as Q4_K_M has them: v and half of ffn_down Q6_K, the others Q4_K;
    also Q8_0, Q5_K and F16. In one file, or in several. Returns its weights in Hugging Face's names and rows."""
    size, mlp, vocab, heads = 256, 512, 260, 4
    rng = np.random.default_rng(0)
    types = {"attn_q": "Q4_K", "attn_k": "Q4_K", "attn_output": "Q4_K", "ffn_gate": "Q4_K", "ffn_up": "Q4_K",
             "output": "Q6_K", "token_embd": "Q4_K"}
    shapes = {"attn_q": (size, size), "attn_k": (size // 2, size), "attn_v": (size // 2, size),
              "attn_output": (size, size), "ffn_gate": (mlp, size), "ffn_up": (mlp, size), "ffn_down": (size, mlp)}
    every = {"token_embd": (vocab, size), "output": (vocab, size), "output_norm": (size,)}
    for i in range(2):
        every |= {f"blk.{i}.{name}": shape for name, shape in shapes.items()}
        every |= {f"blk.{i}.{name}": (size,) for name in ("attn_norm", "ffn_norm")}
        types |= {f"blk.{i}.attn_v": ["Q6_K", "Q4_K"][i], f"blk.{i}.ffn_down": ["Q5_K", "F16"][i]}
    names = {"token_embd": "model.embed_tokens", "output": "lm_head", "output_norm": "model.norm",
             "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
             "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
             "ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
    writer = gguf.GGUFWriter(path, "llama", split_max_tensors=-(-len(every) // parts) if parts > 1 else 0)
    writer.add_block_count(2)
    writer.add_context_length(512)
    writer.add_embedding_length(size)
    writer.add_feed_forward_length(mlp)
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads // 2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(size // heads)
    add_tokenizer(writer, "gpt2")
    weights = {}
    for name, shape in every.items():
        kind = types.get(name, types.get(name.split(".")[-1], "F32"))
        type_ = gguf.GGMLQuantizationType[kind]
        if kind in ("F32", "F16"):
            raw = rng.standard_normal(shape) / 16 + (len(shape) == 1)
            raw = raw.astype(np.float32 if kind == "F32" else np.float16)
        else:
            count, bytes_ = gguf.GGML_QUANT_SIZES[type_]
            raw = rng.integers(0, 256, (shape[0], shape[1] // count, bytes_), dtype=np.uint8)
            at = slice(208, 210) if kind == "Q6_K" else slice(0, 4)
            limits = (1e-4, 2e-4) if kind == "Q6_K" else (2e-4, 4e-4)
            raw[..., at] = rng.uniform(*limits, (*raw.shape[:2], (at.stop - at.start) // 2)).astype(
                np.float16).view(np.uint8)
            raw = raw.reshape(shape[0], -1)
        value = torch.from_numpy(gguf.dequantize(raw, type_).copy()) if kind not in ("F32", "F16") else (
            torch.from_numpy(raw).float())
        permuted = {"attn_q": heads, "attn_k": heads // 2}.get(name.split(".")[-1])
        if permuted:  # to llama.cpp's order of rows
            raw = raw.reshape(permuted, 2, len(raw) // permuted // 2, -1).swapaxes(1, 2).reshape(raw.shape)
        writer.add_tensor(f"{name}.weight", raw, raw_dtype=type_)
        layer = f"model.layers.{name.split('.')[1]}." if name.startswith("blk") else ""
        weights[f"{layer}{names[name.split('.')[-1]]}.weight"] = value
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


def gguf_model(folder: Path, weights: dict[str, Tensor]) -> Llama:
    model = Llama(Config.load(folder))
    set_published(model, weights)
    return model.eval()


def test_mixed_gguf(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Fails if a module of a file with several types gets another's kind, a row of q or k another's numbers, or a
    weight moves by more than is said."""
    weights = save_mixed_gguf(tmp_path / "m.gguf")
    convert(tmp_path / "m.gguf", tmp_path / "out", None)
    said = capsys.readouterr().err
    for line in ("Q4_K -> bfloat16: 1 matrix, rounded", "Q4_K + Q6_K -> int8: 1 matrix, moved by", "Q5_K -> int8",
                 "Q4_K -> int4 in groups of 32: 5 matrices, moved by 0.0", "Q6_K -> int8: 1 matrix, moved by"):
        assert line in said
    names = load_file(tmp_path / "out/model.safetensors").keys()
    assert {"embed.weight", "lm_head.data", "layers.1.w2.weight", "layers.0.w2.data", "layers.0.wqkv.data"} <= names
    model = load_model(tmp_path / "out", "cpu", torch.float32)
    wanted = weights_of(gguf_model(tmp_path / "out", weights))
    most = {"layers.0.wqkv": 0.03, "layers.0.w2": 0.03, "lm_head": 0.03, "layers.1.w2": 2**-8, "embed": 2**-8}
    for name, w in weights_of(model).items():
        error = (w - wanted[name]).norm() / wanted[name].norm()
        assert error <= most.get(name, 2**-8 if "norm" in name else 4e-4), (name, error)
    capsys.readouterr()
    convert(tmp_path / "m.gguf", tmp_path / "plain", torch.float32)
    for name, w in weights_of(load_model(tmp_path / "plain", "cpu", torch.float32)).items():
        assert w.equal(wanted[name]), name


@pytest.mark.slow
def test_split_gguf(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Fails if a model in several files is not what it is in one; or if a missing, damaged or foreign part is not
    named."""
    save_mixed_gguf(tmp_path / "one/m.gguf" if (tmp_path / "one").mkdir() is None else tmp_path)
    (tmp_path / "split").mkdir()
    save_mixed_gguf(tmp_path / "split/m.gguf", 3)
    files = sorted((tmp_path / "split").iterdir())
    assert [file.name for file in files] == [f"m-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    convert(tmp_path / "one/m.gguf", tmp_path / "out", None)
    wanted = load_file(tmp_path / "out/model.safetensors")
    for file in files[:2]:
        convert(file, tmp_path / "again", None)
        found = load_file(tmp_path / "again/model.safetensors")
        assert found.keys() == wanted.keys() and all(t.equal(wanted[name]) for name, t in found.items())
    whole = files[1].read_bytes()
    for change, says in ((lambda: files[1].write_bytes(whole[:-99]), "m-00002-of-00003.gguf: it is cut off"),
                         (lambda: files[1].write_bytes(files[2].read_bytes()), "says that it is number 2 of 3"),
                         (lambda: files[1].unlink(), "m-00002-of-00003.gguf should lie beside it")):
        change()
        with pytest.raises(ValueError, match=says) as error:
            convert(files[0], tmp_path / "bad", None)
        assert "\n" not in str(error.value) and not (tmp_path / "bad").exists()
    files[0].rename(tmp_path / "split/renamed.gguf")
    with pytest.raises(ValueError, match="give them their names back"):
        convert(tmp_path / "split/renamed.gguf", tmp_path / "bad", None)


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """Fails if the command without --dtype makes plain numbers of a quantised file, or with it does not."""
    save_mixed_gguf(tmp_path / "m.gguf")
    for words, kept in (([], True), (["--dtype", "bfloat16"], False)):
        out = tmp_path / f"out{kept}"
        monkeypatch.setattr("sys.argv", ["convert", str(tmp_path / "m.gguf"), "--out", str(out), *words])
        convert_hf_checkpoint.work()
        assert ("lm_head.data" in load_file(out / "model.safetensors")) == kept
    assert capsys.readouterr().err.count("matrices, moved by") == 1


# ----- Draft heads -------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["AWQ", "GPTQ"])
def test_a_head_for_it(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
                       ) -> None:
    """Fails if a head is not tried out on an int4 target, does not install there, drafts other text than it, or if
    train.py --steps 0 cannot judge it."""
    save_quantised(tmp_path / "hf", kind)
    out = tmp_path / "out"
    convert(tmp_path / "hf", out, None)
    model = load_model(out, "cpu", torch.float32)
    save_head(head(model, hidden_size=64, intermediate_size=128), tmp_path / "head")
    capsys.readouterr()
    add_head(tmp_path / "head", out)
    assert "of its first, second and third guesses" in capsys.readouterr().err
    engines = [Engine.load(out, method, device="cpu", dtype="float32", max_seq_len=200)
               for method in ("vanilla", "eagle2")]
    texts = [[i for tokens in engine.generate([1, 50, 7], 40) for i in tokens] for engine in engines]
    assert texts[0] == texts[1] and len(texts[0]) == 40
    for command in tiny_command(train.main, tmp_path / "unused", monkeypatch):
        command("--checkpoint", out, "--steps", 0, "--eval_prompts", 6)
    assert re.search(r"tokens per step on [1-9]\d* held-out dialogues: greedy 1", capsys.readouterr().out)
    assert (out / "eagle/acceptance.json").exists()


@pytest.mark.parametrize("ids", [None, [3, 9, 200]])
def test_an_lm_head_of_four_bits(ids: list[int] | None) -> None:
    """Fails if drafts read another lm_head than the target's where that is int4: its columns are filled up."""
    weight = quantize_weight(torch.randn(260, 64), "int4", 32)
    rows = None if ids is None else torch.tensor(ids)
    for quantized in (False, True):
        found = drafting_rows(weight, rows, quantized)
        wanted = dequantize(weight, torch.float32)[:, :64]
        assert (found.group, found.planes) == (32, 2)
        assert dequantize(found, torch.float32)[:, :64].equal(wanted if rows is None else wanted[rows])
