"""config.json: what real checkpoints carry is read, and what would make another model is refused by name.

tests/formats/test_against_transformers.py compares logits; here is what no comparison shows: fields that transformers
ignores too, since it takes the model for a Llama, and quantised weights.

    python -m pytest tests/formats/test_config.py
"""
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import tiny
import torch
from published import SIZES, hf_folder
from safetensors.torch import save_file
from transformers import MistralConfig, Qwen2Config

from convert_hf_checkpoint import convert
from formats.config import Config
from formats.hf import open_folder
from model import load_model

LLAMA3 = {"factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192,
          "rope_type": "llama3"}
COMMON = {"attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu", "use_cache": True,
          "initializer_range": 0.02, "rms_norm_eps": 1e-5, "torch_dtype": "bfloat16", "transformers_version": "4.43.0",
          "tie_word_embeddings": False, "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48,
          "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}


def of_family(name: str, **fields: object) -> dict:
    return COMMON | {"architectures": [f"{name}ForCausalLM"], "model_type": name.lower()} | fields


# The keys of published config.json files, with the sizes of COMMON.
REAL = {
    "Llama 1": of_family("Llama", architectures=["LLaMAForCausalLM"], max_sequence_length=2048, pad_token_id=-1),
    "Llama 2": of_family("Llama", _name_or_path="x", max_position_embeddings=4096, pretraining_tp=1, rope_scaling=None),
    "Llama 2, first upload": of_family("Llama", max_length=4096, temperature=0.9, top_p=0.6, pretraining_tp=1),
    "Llama 3.1": of_family("Llama", attention_bias=False, mlp_bias=False, eos_token_id=[1, 2], pretraining_tp=1,
                           rope_scaling=LLAMA3, rope_theta=5e5, max_position_embeddings=131072),
    "Llama 3.2": of_family("Llama", head_dim=8, rope_scaling=LLAMA3 | {"factor": 32.0}, rope_theta=5e5,
                           tie_word_embeddings=True, attention_bias=False, mlp_bias=False),
    "Vicuna": of_family("Llama", _name_or_path="vicuna-7b", pad_token_id=0, max_position_embeddings=2048,
                        transformers_version="4.28.1"),
    "SmolLM2": of_family("Llama", attention_bias=False, is_llama_config=True, mlp_bias=False, pretraining_tp=1,
                         rope_interleaved=False, rope_scaling=None, rope_theta=100000, tie_word_embeddings=True,
                         **{"transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"}}}),
    "unsloth": of_family("Llama", unsloth_fixed=True, unsloth_version="2025.1", rope_scaling=LLAMA3, rope_theta=5e5),
    "Mistral v0.1": of_family("Mistral", sliding_window=4096, rope_theta=1e4, max_position_embeddings=32768),
    "Mistral Nemo": of_family("Mistral", head_dim=16, sliding_window=None, rope_theta=1e6,
                              max_position_embeddings=1024000),
    "Qwen2.5": of_family("Qwen2", max_window_layers=28, sliding_window=131072, use_sliding_window=False,
                         rope_theta=1e6, use_mrope=False, max_position_embeddings=131072),
    "Qwen2.5-1M": of_family("Qwen2", max_window_layers=28, sliding_window=32768, use_sliding_window=False,
                            dual_chunk_attention_config={"chunk_size": 262144, "local_size": 8192,
                                                         "original_max_position_embeddings": 262144}),
    "Qwen3": of_family("Qwen3", attention_bias=False, head_dim=16, max_window_layers=36, rope_scaling=None,
                       rope_theta=1000000, sliding_window=None, use_sliding_window=False),
    "transformers 5": of_family("Qwen3", dtype="bfloat16", head_dim=16, layer_types=["full_attention"] * 2,
                                rope_parameters={"rope_theta": 1e6, "rope_type": "default"}, sliding_window=None),
    "left behind": of_family("Llama", quantization_config={}, quantization=None, compression_config=False,
                             num_experts=0, logit_scale=1.0, final_logit_softcapping=None, attn_logit_softcapping=0,
                             residual_multiplier=1, no_rope_layers=[1, 1], query_pre_attn_scalar=8, clip_qkv=None,
                             attention_multiplier=8 ** -0.5, rope_scaling={"type": "linear", "factor": 1.0}),
}


@pytest.mark.parametrize("name", REAL)
def test_real_configs_are_read(name: str) -> None:
    """Fails if a field that published models of these families carry is taken for one that changes the model."""
    cfg = Config.from_dict(REAL[name])
    assert cfg.num_layers == 2 and cfg.sliding_window == (4096 if name == "Mistral v0.1" else None)


# One field that another family, or a user, may add to a Llama; and what the error must name.
OTHERS = {
    "embedding_multiplier": 12.0, "residual_multiplier": 0.22, "attention_multiplier": 0.0078, "logits_scaling": 8.0,
    "logit_scale": 0.0625, "final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0, "clip_qkv": 8.0,
    "query_pre_attn_scalar": 256, "no_rope_layers": [1, 0], "no_rope_layer_interval": 4, "scale_emb": 12,
    "scale_depth": 1.4, "dim_model_base": 256, "rope_ratio": 500, "rotary_pct": 0.25, "rotary_dim": 4,
    "rope_local_base_freq": 1e4, "rope_interleaved": True, "lm_head_multiplier": 0.04, "mlp_multipliers": [0.9, 0.6],
    "attention_window_size": 1024, "sliding_window_pattern": 6, "attn_scale": 0.1, "mup_denominator": 32,
    "attn_logit_cap": 50.0, "logits_soft_cap": 30.0, "attention_chunk_size": 8192, "attn_temperature_tuning": True,
    "use_qk_norm": True, "alibi": True, "is_causal": False, "use_bidirectional_attention": True,
    "text_config": {"a": 1}, "per_layer_config": {"0": {"num_key_value_heads": 1}}, "my_new_scale": 2,
    "my_rope_base": {"a": [10.0]}, "embedding_scale": 5.6, "yarn_alpha": 1.5, "logit_multiplier": 10**400,
    "tie_word_embeddings": "false", "layer_types": ["full_attention", "linear_attention"],
}
# Fields that cannot all be true, and what the error must say.
CONTRADICTIONS = [
    ({"rope_scaling": LLAMA3, "rope_parameters": {"rope_type": "default"}}, "rope_scaling and rope_parameters"),
    ({"rope_scaling": {"rope_type": "default"}, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
     "rope_scaling and rope_parameters"),
    ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "each kind of layer"),
    ({"rope_parameters": {"rope_type": "default", "factor": 4.0}}, "factor 4.0"),
    ({"rope_scaling": LLAMA3, "original_max_position_embeddings": 4096}, "original_max_position_embeddings"),
    ({"architectures": ["GraniteForCausalLM"]}, "GraniteForCausalLM"),
    ({"architectures": ["MistralForCausalLM"]}, "MistralForCausalLM"),
    ({"model_type": "qwen3", "architectures": ["Qwen2ForCausalLM"]}, "Qwen2ForCausalLM"),
    ({"model_type": "qwen3", "attention_bias": True}, "attention_bias"),
    ({"model_type": "qwen3", "layer_types": ["sliding_attention"] * 2, "sliding_window": None}, "no sliding_window"),
]


def test_other_families_are_refused(tmp_path: Path) -> None:
    """Fails if a field by which another family scales, caps, clips or turns something is ignored, as transformers does
    once model_type says llama; or if the error does not name the field in one line."""
    for fields, words in [*(({key: value}, key) for key, value in OTHERS.items()), *CONTRADICTIONS]:
        (tmp_path / "config.json").write_text(json.dumps(tiny.SHAPE | fields))
        with pytest.raises(ValueError) as error:
            Config.load(tmp_path)
        text = str(error.value)
        assert words in text, text
        assert str(tmp_path) in text and "\n" not in text and len(text) < 500


def test_windows() -> None:
    """Fails if a Mistral without the key sees further than transformers' Mistral, if use_sliding_window switches
    Mistral's window off, or if a window that no layer has limits the text."""
    assert MistralConfig().sliding_window == 4096 == Qwen2Config(use_sliding_window=True).sliding_window
    for fields, window in (
            ({"model_type": "mistral"}, 4096), ({"model_type": "mistral", "sliding_window": None}, None),
            ({"model_type": "mistral", "sliding_window": 64, "use_sliding_window": False}, 64),
            ({"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 1}, 4096),
            ({"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 2}, None),
            ({"model_type": "qwen2", "use_sliding_window": True}, None), ({"sliding_window": 64}, None)):
        assert Config.from_dict(tiny.SHAPE | fields).sliding_window == window, fields


def test_heads_may_say_what_they_like(tmp_path: Path) -> None:
    """Fails if a draft head is refused for biases or an architecture of its config: its tensors say it."""
    config = tiny.SHAPE | {"model_type": "qwen2", "architectures": ["Eagle"], "attention_bias": True, "mlp_bias": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert Config.load(tmp_path, model_type="llama").num_layers == 2


def test_rope_in_other_words() -> None:
    """Fails if YaRN's attn_factor of a published Qwen3 is lost, an older name of Phi-3's LongRoPE is read as another
    scaling, or a context that is written with a point is refused."""
    def rope(model_type: str, **scaling: object) -> dict:
        return Config.from_dict(tiny.SHAPE | {"model_type": model_type, "rope_scaling": scaling}).rope_scaling

    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    assert rope("qwen3", **yarn)["attention_factor"] == pytest.approx(1.1386294361)
    assert rope("qwen3", **yarn, attn_factor=0.8782488562869419)["attention_factor"] == pytest.approx(1)
    assert rope("qwen3", **yarn, beta_fast=1, beta_slow=1)["beta_fast"] == 1, "no blending, as some write it"
    short = {key: value for key, value in tiny.SHAPE.items() if key != "max_position_embeddings"}
    assert Config.from_dict(short | {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}).rope_scaling[
        "original_max_position_embeddings"] == 2048, "of LlamaConfig"
    lists = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    su, yarn3, longrope = (rope("phi3", type=name, **lists) for name in ("su", "yarn", "longrope"))
    assert su == yarn3 == longrope and longrope["rope_type"] == "longrope"
    assert rope("llama", **LLAMA3 | {"original_max_position_embeddings": 8192.0}) == rope("llama", **LLAMA3)
    with pytest.raises(ValueError, match="original_max_position_embeddings should be a positive whole number"):
        rope("llama", **LLAMA3 | {"original_max_position_embeddings": 8192.5})


# ----- Quantised weights -----------------------------------------------------------------------------------------

# quantization_config, or all that is in config.json under another key -> what the error must name.
QUANTIZED = [
    ({"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemv", "zero_point": True},
     ["AWQ", "4 bits", "groups of 128", "gemv", "-AWQ"]),
    ({"quant_method": "awq", "bits": 3, "group_size": 64, "version": "gemm"}, ["AWQ", "3 bits", "groups of 64"]),
    ({"quant_method": "gptq", "bits": 4, "group_size": 128, "checkpoint_format": "marlin"}, ["GPTQ", "marlin"]),
    ({"quant_method": "gptq", "bits": 3, "group_size": 128, "desc_act": True}, ["GPTQ", "3 bits", "groups of 128"]),
    ({"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized", "config_groups": {"group_0": {
        "targets": ["Linear"], "weights": {"num_bits": 4, "group_size": 16, "type": "float"}}}},
     ["compressed-tensors", "4 bits", "groups of 16", "nvfp4-pack-quantized"]),
    ({"quant_method": "compressed-tensors", "format": "marlin-24"}, ["compressed-tensors", "marlin-24"]),
    ({"quant_method": "compressed-tensors", "format": "pack-quantized", "sparsity_config": {
        "format": "sparse-24-bitmask"}}, ["compressed-tensors"]),
    ({"quant_method": "compressed-tensors", "format": "pack-quantized", "transform_config": {"config_groups": {
        "v": {"type": "hadamard"}}}}, ["compressed-tensors"]),
    ({"quant_method": "exl2", "bits": 4.65, "version": "0.0.13"}, ["EXL2", "4.65 bits"]),
    ({"quant_method": "exl3", "bits": 3.0}, ["EXL3", "3.0 bits"]),
    ({"quant_method": "hqq", "quant_config": {"weight_quant_params": {"nbits": 4, "group_size": 64}}},
     ["HQQ", "4 bits", "groups of 64"]),
    ({"quant_method": "torchao", "quant_type": {"default": {"_type": "Int4WeightOnlyConfig", "_data": {
        "group_size": 128}}}}, ["torchao", "groups of 128", "Int4WeightOnlyConfig"]),
    ({"quant_algo": "NVFP4", "producer": {"name": "modelopt"}}, ["ModelOpt", "NVFP4"]),
    ({"quant_method": "something_new"}, ["something_new"]),
    ("int4", ["unknown"]),
    ({"quantization": {"group_size": 64, "bits": 4}}, ["MLX", "4 bits", "groups of 64", "quantization in"]),
    ({"compression_config": {"format": "mxfp4-pack-quantized", "config_groups": {}}}, ["compressed-tensors"]),
]
# What formats/packed.py reads.
READ = [
    {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm", "zero_point": True},
    {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": True},
    {"quant_method": "gptq", "bits": 8, "group_size": -1, "checkpoint_format": "gptq_v2"},
    {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"group_0": {
        "targets": ["Linear"], "weights": {"num_bits": 4, "group_size": 64, "type": "int"}}}},
    {"quant_method": "fp8", "weight_block_size": [128, 128], "fmt": "e4m3"},
    {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    {"load_in_8bit": True, "load_in_4bit": False},
    {"quant_algo": "FP8", "producer": {"name": "modelopt"}},
]


def test_quantised_by_config() -> None:
    """Fails if the error does not say how the weights are quantised, and what to download instead."""
    for said, words in QUANTIZED:
        other_key = isinstance(said, dict) and said.keys() & {"quantization", "compression_config"}
        with pytest.raises(ValueError, match="download the unquantised model") as error:
            Config.from_dict(tiny.SHAPE | (said if other_key else {"quantization_config": said}))
        assert all(word in str(error.value) for word in words), error.value


def test_what_is_read_passes() -> None:
    """Fails if the config.json of a quantised checkpoint that is read is refused: converted folders keep it."""
    for said in READ:
        assert Config.from_dict(tiny.SHAPE | {"quantization_config": said}).num_layers == 2
    assert Config.from_dict(tiny.SHAPE | {"compression_config": {"format": "float-quantized"}})


def words(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.int32)


def test_quantised_by_tensors(tmp_path: Path) -> None:
    """Fails if quantised weights without a word in config.json are not recognised, or are cast to bf16."""
    tensors = hf_folder(tmp_path)
    name = "model.layers.0.mlp.up_proj"  # [48, 32]
    half = torch.ones(1, dtype=torch.float16)
    cases = [
        ({"qweight": words(32, 6), "qzeros": words(2, 6), "scales": half.expand(2, 48)},
         ["AWQ (4 bits, groups of 16)"]),
        ({"qweight": words(4, 48), "qzeros": words(1, 6), "scales": half.expand(1, 48)},
         ["GPTQ (4 bits, groups of 32)"]),
        ({"qweight": words(8, 48), "qzeros": words(1, 12), "scales": half.expand(1, 48), "g_idx": words(32)},
         ["GPTQ (8 bits, groups of 32)"]),
        ({"weight_packed": words(48, 4), "weight_scale": half.expand(48, 1)}, ["compressed-tensors"]),
        ({"weight": torch.zeros(48, 32).to(torch.float8_e4m3fn), "weight_scale_inv": torch.ones(1, 1)}, ["FP8"]),
        ({"weight": torch.zeros(48, 32).to(torch.float8_e4m3fn), "weight_scale": torch.ones(1)}, ["FP8"]),
        ({"weight": torch.zeros(48, 32, dtype=torch.int8), "weight_scale": torch.ones(48, 1)}, ["compressed", "int8"]),
        ({"weight": torch.zeros(768, 1, dtype=torch.uint8), "weight.absmax": torch.ones(24)}, ["bitsandbytes"]),
        ({"weight": torch.zeros(48, 32, dtype=torch.int8), "SCB": torch.ones(48)}, ["bitsandbytes"]),
        ({"weight": words(48, 4), "scales": half.expand(48, 1), "biases": half.expand(48, 1)}, ["MLX"]),
        ({"trellis": torch.zeros(2, 3, 64, dtype=torch.int16), "suh": half}, ["EXL3"]),
        ({"q_weight": words(4, 48), "q_groups": words(2)}, ["EXL2"]), ({"W_q": words(4, 48), "meta": half}, ["HQQ"]),
        ({"_weight_qdata": words(48, 4), "_weight_scale": half}, ["torchao"]),
        *(({"weight": torch.zeros(48, 32).to(getattr(torch, kind))}, [kind, likely]) for kind, likely in (
            ("int8", "INT8"), ("uint8", "bitsandbytes"), ("float8_e4m3fn", "FP8"), ("float8_e5m2", "FP8"),
            ("int32", "packed"), ("int64", "packed"))),
    ]
    for pieces, expected in cases:
        changed = {key: tensor for key, tensor in tensors.items() if not key.startswith(name)}
        changed |= {f"{name}.{end}": tensor.contiguous() for end, tensor in pieces.items()}
        save_file(changed, tmp_path / "model.safetensors")
        with pytest.raises(ValueError, match="download the unquantised") as error:
            open_folder(tmp_path)
        assert all(word in str(error.value) for word in expected), error.value
    assert not (tmp_path / "out").exists()


def test_torchao_pickle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a pickle of a quantising library is called damaged, or is run."""
    hf_folder(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    module = ModuleType("torchao")
    monkeypatch.setitem(sys.modules, "torchao", module)
    module.AffineQuantizedTensor = type("AffineQuantizedTensor", (), {"__module__": "torchao"})
    torch.save({"model.norm.weight": module.AffineQuantizedTensor()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="torchao"):
        open_folder(tmp_path)


def test_no_weights_says_what_is_there(tmp_path: Path) -> None:
    """Fails if a folder without the usual weight files is not described by what it holds."""
    for file, word in (("gptq_model-4bit-128g.safetensors", "GPTQ"), ("llama-7b-4bit-128g.safetensors", "quantised"),
                       ("x.Q4_K_M.gguf", "path of that file"), ("adapter_model.safetensors", "LoRA"),
                       ("consolidated.00.pth", "Meta"), ("qmodel.pt", "HQQ"), ("weights.safetensors", "rename")):
        (tmp_path / file).touch()
        with pytest.raises(ValueError, match=word) as error:
            open_folder(tmp_path)
        assert file in str(error.value)
        (tmp_path / file).unlink()


# ----- Names -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["lm_head alone", "no prefix", "no prefix, lm_head alone"])
def test_other_names_of_the_same_weights(how: str, tmp_path: Path) -> None:
    """Fails if a tied model that stores its one matrix as lm_head, or a model saved without its head class, is refused
    or loads other weights."""
    tensors = hf_folder(tmp_path / "hf", "llama-tied")
    convert(tmp_path / "hf", tmp_path / "plain", torch.float32)
    if "lm_head alone" in how:
        tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    if "no prefix" in how:
        tensors = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    save_file(tensors, tmp_path / "hf/model.safetensors")
    convert(tmp_path / "hf", tmp_path / "other", torch.float32)
    plain, other = load_model(tmp_path / "plain"), load_model(tmp_path / "other")
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), other.parameters(), strict=True))
    assert other.lm_head.weight.data_ptr() == other.embed.weight.data_ptr()


def test_no_lm_head(tmp_path: Path) -> None:
    """Fails if nobody says what to do about a model whose config does not tie the lm_head that its file lacks."""
    tensors = hf_folder(tmp_path)
    del tensors["lm_head.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match='missing lm_head.weight; .* set "tie_word_embeddings": true'):
        open_folder(tmp_path)


def test_denied_biases(tmp_path: Path) -> None:
    """Fails if biases are used that transformers ignores: the model would be another one in each program."""
    tensors = hf_folder(tmp_path)
    for x in "qkv":
        for i in range(SIZES["num_hidden_layers"]):
            name = f"model.layers.{i}.self_attn.{x}_proj"
            tensors[f"{name}.bias"] = torch.ones(len(tensors[f"{name}.weight"]))
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="bias is there, but transformers ignores it in a llama model"):
        open_folder(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    raw |= {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert any(name.endswith("bias") for name in open_folder(tmp_path))
