"""Families that are Llamas by conversion: transformers' logits, trees that write what plain decoding writes, and what
is refused. Each starts from a folder as transformers saves it.

    python -m pytest tests/formats/test_families.py
"""
import json
import math
from functools import cache
from pathlib import Path

import gguf
import pytest
import tiny
import torch
import transformers
from helpers import GREEDY, SAMPLINGS, write
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import quantize
from convert_hf_checkpoint import convert
from draft import Eagle2, Vanilla
from engine import Engine
from formats.config import Config
from formats.families import FAMILIES
from formats.fold import row_order
from formats.tokenizer_files import CHAR_OF
from model import Llama, load_model, rope_table
from training.steps import new_head

SIZES = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "pad_token_id": None,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "rms_norm_eps": 1e-3,
         "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False}
YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 32}
LONG = {"rope_type": "longrope", "rope_theta": 500.0, "short_factor": [1.0, 1.5, 2.0], "long_factor": [1.0, 3.0, 9.0]}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 16}
GRANITE = {"embedding_multiplier": 12.0, "residual_multiplier": 0.22, "attention_multiplier": 0.25,
           "logits_scaling": 8.0}
MINISTRAL = YARN | {"mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1, "factor": 2.0,
                    "original_max_position_embeddings": 64}
VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 8,
          "image_size": 16, "patch_size": 8}
# name: transformers' config class, and what differs from SIZES; for a wrapper the entries of text_config.
CASES = {
    "yarn": ("Llama", {"rope_parameters": YARN}),
    "yarn, all numbers": ("Qwen3", {"rope_parameters": YARN | {
        "beta_fast": 8.0, "beta_slow": 0.5, "truncate": False, "mscale": 0.7, "mscale_all_dim": 0.4}}),
    "yarn, attention_factor": ("Qwen2", {"rope_parameters": YARN | {"attention_factor": 0.8}}),
    "linear": ("Llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0}}),
    "dynamic": ("Llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 500.0}}),
    "longrope": ("Llama", {"head_dim": 6, "rope_parameters": LONG | {"original_max_position_embeddings": 16}}),
    "Phi-4": ("Phi3", {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}),
    "Phi-3-mini": ("Phi3", {"sliding_window": 100}),
    "Phi-4-mini": ("Phi3", {"tie_word_embeddings": True, "original_max_position_embeddings": 128,
                            "max_position_embeddings": 1024, "rope_parameters": LONG | {"partial_rotary_factor": .75}}),
    "Phi-4-mini, long": ("Phi3", {"original_max_position_embeddings": 16, "rope_parameters": LONG | {
        "partial_rotary_factor": .75}}),
    "Granite": ("Granite", GRANITE | {"tie_word_embeddings": True}),
    "Granite, untied": ("Granite", GRANITE),
    "SmolLM3": ("SmolLM3", {"tie_word_embeddings": True}),
    "SmolLM3, a list": ("SmolLM3", {"no_rope_layers": [0, 1, 1, 0], "rope_parameters": YARN}),
    "GLM": ("Glm", {"head_dim": 12}),
    "GLM, no biases": ("Glm", {"head_dim": 16, "attention_bias": False}),
    "ERNIE 4.5": ("Ernie4_5", {"head_dim": 16, "tie_word_embeddings": True}),
    "Helium": ("Helium", {"head_dim": 8, "num_key_value_heads": 4}),
    "Ministral": ("Ministral", {"head_dim": 16, "sliding_window": 100}),
    "Ministral 3": ("Ministral3", {"head_dim": 16, "rope_parameters": MINISTRAL}),
    "Seed-OSS": ("SeedOss", {"head_dim": 16}),
    "CWM": ("Cwm", {"head_dim": 16, "sliding_window": 100, "rope_parameters": LLAMA3}),
    "InternLM3": ("InternLM3", {"head_dim": 16}),
    "IQuest-Coder": ("IQuestCoder", {"head_dim": 16}),
    "Mistral Small 3.1": ("Mistral3", {"model_type": "mistral", "head_dim": 16, "sliding_window": None}),
    "Ministral 3 with images": ("Mistral3", {"model_type": "ministral3", "head_dim": 16, "rope_parameters": MINISTRAL}),
}
LENGTH = 60


def oracle(name: str) -> nn.Module:
    """transformers' model of a case, with random weights."""
    kind, changes = CASES[name]
    sizes = SIZES | changes
    if kind == "Mistral3":
        config = transformers.Mistral3Config(text_config=sizes, vision_config=VISION | {"model_type": "pixtral"},
                                             tie_word_embeddings=False)
        model = transformers.Mistral3ForConditionalGeneration(config)
    else:
        model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, f"{kind}Config")(**sizes))
    for part in (model.model.language_model, model.lm_head) if kind == "Mistral3" else (model,):
        tiny.randomise(part.eval(), seed=len(name), dtype=torch.float32)
    if model.config.tie_word_embeddings:
        model.tie_weights()
    return model


def saved(model: nn.Module, folder: Path, **changes: object) -> Path:
    """The folder that transformers saves, with changes to config.json."""
    model.save_pretrained(folder)
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | changes))
    return folder


def native(folder: Path) -> Llama:
    convert(folder, folder / "native", torch.float32)
    return load_model(folder / "native")


@cache
def ids() -> Tensor:
    return torch.tensor([tiny.prompt(seed, LENGTH, SIZES["vocab_size"]) for seed in range(2)])


@torch.inference_mode()
def difference(ours: Llama, theirs: nn.Module) -> float:
    """The largest difference of a logit, as a share of the largest logit."""
    ours.allocate_cache(LENGTH)
    logits, expected = ours.lm_head(ours(ids(), torch.arange(LENGTH))), theirs(ids()).logits
    assert expected.std() > 0.2 * expected.abs().max() / 4  # else the comparison would show little
    return float((logits - expected).abs().max() / expected.abs().max())


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_logits_equal_transformers_and_trees_write_the_same(name: str, tmp_path: Path) -> None:
    """Fails if a row is split off, reordered or multiplied in the wrong way, if an angle, a bias or a default is wrong,
    or if EAGLE-2's text is not plain decoding's."""
    theirs = oracle(name)
    ours = native(saved(theirs, tmp_path))
    assert difference(ours, theirs) < 1e-4
    prompt = ids()[0, :20].tolist()
    how = SAMPLINGS[1] if "SmolLM3" in name else GREEDY
    text = write(Engine(ours, Vanilla(), LENGTH), prompt, 24, how)
    assert write(Engine(ours, Eagle2(tiny.head(ours), ours, 16, 3, 4), LENGTH), prompt, 24, how) == text


# ----- config.json ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_left_out(family: str) -> None:
    """Fails if an entry that config.json leaves out is not what transformers' config class takes it for."""
    sizes = {"vocab_size": 60, "hidden_size": 256, "intermediate_size": 48, "num_hidden_layers": 6,
             "num_attention_heads": 20 if family == "helium" else 8}
    sizes |= {"head_dim": 8} if family == "helium" else {}
    if family in ("mistral", "qwen2", "qwen3"):  # whose class has other defaults: tests/formats/test_defaults.py
        sizes |= {"num_key_value_heads": 2, "max_position_embeddings": 99, "head_dim": 32}
    theirs = transformers.AutoConfig.for_model(family, **sizes)
    ours = Config.from_dict({"model_type": family, **sizes})
    rope = theirs.rope_parameters
    head_dim = getattr(theirs, "head_dim", None) or 256 // theirs.num_attention_heads
    assert (ours.num_kv_heads, ours.head_dim) == (theirs.num_key_value_heads or theirs.num_attention_heads, head_dim)
    assert (ours.rms_norm_eps, ours.rope_theta) == (theirs.rms_norm_eps, rope["rope_theta"])
    assert ours.rotated == head_dim * rope.get("partial_rotary_factor", 1)
    assert (ours.rope_scaling or {}).get("rope_type", "default") == rope["rope_type"]
    assert ours.rope_limit == (rope["original_max_position_embeddings"] if family == "ministral3" else None)
    assert ours.tie_word_embeddings == theirs.tie_word_embeddings
    assert ours.nope_layers == tuple(
        i for i, has_rope in enumerate(getattr(theirs, "no_rope_layers", None) or []) if not has_rope)
    kinds = getattr(theirs, "layer_types", None) or []
    slides = theirs.sliding_window if "sliding_attention" in kinds or family == "mistral" else None
    assert ours.sliding_window == slides
    if "max_position_embeddings" in FAMILIES[family].defaults:
        assert ours.max_position_embeddings == theirs.max_position_embeddings


# model_type, entries, and what the error must name.
REFUSED = [
    ("ernie4_5", {"use_bias": True}, "use_bias"), ("granite", {"attention_bias": True}, "attention_bias"),
    ("granite", {"mlp_bias": True}, "mlp_bias"), ("smollm3", {"attention_bias": True}, "attention_bias"),
    ("seed_oss", {"attention_out_bias": True}, "attention_out_bias"), ("helium", {"mlp_bias": True}, "mlp_bias"),
    ("internlm3", {"qkv_bias": True}, "qkv_bias"), ("internlm3", {"bias": True}, "bias"),
    ("iquestcoder", {"attention_bias": True}, "attention_bias"), ("iquestcoder", {"clip_qkv": 8.0}, "clip_qkv"),
    ("cwm", {"mlp_bias": True}, "mlp_bias"), ("helium", {"embedding_multiplier": 2.0}, "embedding_multiplier"),
    ("llama", GRANITE, "embedding_multiplier"), ("llama", {"no_rope_layers": [1, 0]}, "no_rope_layers"),
    ("smollm3", {"no_rope_layers": [1, 0, 1]}, "no_rope_layers"), ("smollm3", {"no_rope_layers": [2] * 4}, "no_rope"),
    ("smollm3", {"no_rope_layer_interval": 0}, "no_rope_layer_interval"),
    ("granite", {"my_scale": 2.0}, "my_scale"), ("granite", {"final_logit_softcapping": 30.0}, "final_logit_softc"),
    ("helium", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ("glm", {"partial_rotary_factor": 0.4}, "would rotate 51 of"),
    ("glm", {"partial_rotary_factor": 0.01}, "partial_rotary_factor"), ("glm", {"partial_rotary_factor": 2}, "partial"),
    ("phi3", {"rope_scaling": LONG, "partial_rotary_factor": 0.5}, "short_factor"),
    ("phi3", {"rope_scaling": LONG | {"original_max_position_embeddings": 64}}, "original_max_position_embeddings"),
    ("ministral3", {"rope_parameters": YARN | {"my_beta": 2.0}}, "my_beta"),
    ("llama", {"rope_parameters": YARN | {"llama_4_scaling_beta": 0.1}}, "llama_4_scaling_beta"),
    ("granite", {"architectures": ["LlamaForCausalLM"]}, "LlamaForCausalLM"),
    ("mistral3", {}, "text_config"), ("mistral3", {"text_config": [1]}, "text_config"),
    ("mistral3", {"text_config": {"model_type": "gemma3"}}, "gemma3"),
    ("mistral3", {"text_config": SIZES, "rope_scaling": YARN}, "rope_scaling is beside text_config"),
    ("mistral3", {"text_config": SIZES, "sliding_window": 9}, "sliding_window is beside text_config"),
    ("mistral3", {"text_config": SIZES, "architectures": ["LlavaForConditionalGeneration"]}, "Llava"),
    ("mistral3", {"text_config": SIZES, "quantization_config": {"quant_method": "exl3"}}, "EXL3"),
    ("glm4", {}, "norms"), ("gemma3", {}, "soft caps"), ("qwen3_moe", {}, "mixture of experts"),
    ("chatglm", {}, "glm-4-9b-chat-hf"), ("qwen3_5", {}, "state"), (["llama"], {}, "not implemented"),
]


def test_what_is_not_honoured_is_refused(tmp_path: Path) -> None:
    """Fails if a family's entry that changes the model is passed over, or the error does not name it in one line."""
    for model_type, entries, words in REFUSED:
        (tmp_path / "config.json").write_text(json.dumps(SIZES | {"model_type": model_type} | entries))
        with pytest.raises(ValueError) as error:
            Config.load(tmp_path)
        assert words in str(error.value) and "\n" not in str(error.value), (model_type, entries, error.value)


def test_entries_that_are_null() -> None:
    """Fails if null is not what transformers takes it for; or if the embedding of a model that sees images is tied
    otherwise than with transformers, which looks beside text_config."""
    cfg = Config.from_dict(SIZES | {"model_type": "smollm3", "tie_word_embeddings": None, "no_rope_layers": None,
                                    "rope_parameters": None})
    assert (cfg.tie_word_embeddings, cfg.nope_layers, cfg.rope_theta) == (True, (3,), 2e6)
    for beside in ({}, {"tie_word_embeddings": True}, {"tie_word_embeddings": False}):
        theirs = transformers.Mistral3Config(text_config=SIZES | {"model_type": "mistral"}, **beside)
        raw = {"model_type": "mistral3", "text_config": SIZES | {"head_dim": 8}} | beside
        assert Config.from_dict(raw).tie_word_embeddings == theirs.tie_word_embeddings


def test_limits() -> None:
    """Fails if a text may be longer than one for which a family's attention is plain."""
    for model_type, entries, limit in (
            ("ministral3", {"rope_parameters": MINISTRAL}, 64), ("phi3", {"sliding_window": 100}, 100),
            ("ministral3", {"rope_parameters": MINISTRAL, "sliding_window": 50}, 50),
            ("ministral3", {"rope_parameters": MINISTRAL | {"llama_4_scaling_beta": 0}}, None),
            ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, 128), ("cwm", {"sliding_window": 100}, 100),
            ("cwm", {"sliding_window": 100, "layer_types": ["full_attention"] * 4}, None), ("granite", GRANITE, None),
            ("smollm3", {"sliding_window": 9}, None),
            ("smollm3", {"sliding_window": 9, "use_sliding_window": True}, 9)):
        cfg = Config.from_dict(SIZES | {"model_type": model_type} | entries)
        assert cfg.context_limit == limit, model_type
        cfg.check_length(limit or 128)
        if limit:
            with pytest.raises(ValueError, match=f"--max_seq_len {limit}"):
                cfg.check_length(limit + 1)


def test_longrope_chooses_by_the_longest_text() -> None:
    """Fails if the slots for drafts beyond the text decide, or a table is made for another length than the context."""
    cfg = Config.from_dict(SIZES | {"model_type": "llama", "head_dim": 6, "original_max_position_embeddings": 32,
                                    "rope_scaling": LONG})
    model = Llama(cfg)
    model.allocate_cache(32, spare=16)
    assert torch.equal(model.rope[:, :32], rope_table(cfg, 32)) and model.rope.shape[1] == 48
    model.allocate_cache(33)
    assert torch.equal(model.rope, rope_table(cfg, 33)) and not torch.equal(model.rope[:, :32], rope_table(cfg, 32))


# ----- Tensors -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size, rotated, interleaved, order", [
    (6, 6, True, [0, 2, 4, 1, 3, 5]), (8, 4, True, [0, 2, 4, 5, 1, 3, 6, 7]),
    (8, 6, False, [0, 1, 2, 6, 3, 4, 5, 7]), (4, 4, False, [0, 1, 2, 3])])
def test_order_of_rows(size: int, rotated: int, interleaved: bool, order: list[int]) -> None:
    """Fails if a pair that RoPE turns is not (j, j + size / 2) afterwards, or what does not turn is not last."""
    assert row_order(size, rotated, interleaved).tolist() == order


def test_names_of_models_that_see_images(tmp_path: Path) -> None:
    """Fails if the text model of a file with other prefixes, or with a tied lm_head, is another one, or if a tensor
    that is neither the text model's nor the vision tower's is passed over."""
    theirs = oracle("Mistral Small 3.1")
    saved(theirs, tmp_path / "a")
    plain = native(tmp_path / "a")
    tensors = load_file(tmp_path / "a/model.safetensors")
    text = {name.split("language_model.")[-1].removeprefix("model."): t for name, t in tensors.items()
            if "language_model." in name or name.startswith("lm_head")}
    vision = {name: t for name, t in tensors.items() if "vision_tower" in name}
    assert text and vision
    for folder, front, head, tower in (("b", "language_model.model.", "language_model.", ""),
                                       ("c", "model.language_model.", "", "model.")):
        saved(theirs, tmp_path / folder)
        named = {(head if name.startswith("lm_head") else front) + name: t for name, t in text.items()}
        named |= {tower + name.removeprefix("model."): t for name, t in vision.items()}
        save_file(named, tmp_path / folder / "model.safetensors")
        other = native(tmp_path / folder)
        assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), other.parameters(), strict=True))
    saved(theirs, tmp_path / "c", tie_word_embeddings=True)
    save_file({name: t for name, t in named.items() if "lm_head" not in name}, tmp_path / "c/model.safetensors")
    assert (tied := native(tmp_path / "c")).lm_head.weight is tied.embed.weight
    save_file(named | {"model.audio_tower.weight": torch.ones(2)}, tmp_path / "c/model.safetensors")
    with pytest.raises(ValueError, match="audio_tower"):
        convert(tmp_path / "c", tmp_path / "out")


def test_fused_rows_that_do_not_fit(tmp_path: Path) -> None:
    """Fails if a fused matrix with other rows than config.json says is cut somewhere."""
    saved(oracle("Phi-4"), tmp_path, num_key_value_heads=4)
    with pytest.raises(ValueError, match=r"layers.0.self_attn.qkv_proj.weight has 64 rows, not 96"):
        convert(tmp_path, tmp_path / "native")


def test_heads_are_plain_llamas() -> None:
    """Fails if a head trained for a family has layers that its published format cannot express."""
    for name in ("GLM", "SmolLM3", "Phi-4-mini", "Ministral 3"):
        kind, changes = CASES[name]
        cfg = Config.from_dict(SIZES | {"model_type": {"Glm": "glm", "Phi3": "phi3"}.get(kind, kind.lower())} | changes)
        head = new_head(cfg, torch.device("cpu")).cfg
        assert (head.rotary_dim, head.nope_layers, head.rope_limit, head.rope_scaling) == (None, (), None, None)
        assert head.head_dim == cfg.head_dim and (cfg.rotary_dim or cfg.nope_layers or cfg.rope_limit)


def test_layers_without_rope_are_calibrated_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if quantize.py's calibration rotates queries and keys in a layer that does not."""
    seen = []
    monkeypatch.setattr(quantize, "quantize_layer", lambda layer, x, original, rope, group: seen.append(rope) or ())
    monkeypatch.setattr(quantize, "LENGTH", 16)
    monkeypatch.setattr(quantize, "TEXTS", 2)
    monkeypatch.setattr(quantize, "BATCH", 2)
    model = native(saved(oracle("SmolLM3"), tmp_path))
    monkeypatch.setattr(quantize, "Tokenizer", lambda folder: None)
    monkeypatch.setattr(quantize, "first_token", lambda tokenizer: 1)
    list(quantize.quantize_calibrated(model, tmp_path / "native", 64, "cpu"))
    assert [bool((rope[1] == 0).all() and (rope[0] == 1).all()) for rope in seen] == [False, False, False, True]


# ----- GGUF ----------------------------------------------------------------------------------------------------------

# The case whose model is written, llama.cpp's architecture, and its fields besides the sizes.
GGUF_CASES = {
    "Phi-4-mini": ("phi3", {"rope.dimension_count": 6, "rope.scaling.attn_factor": math.sqrt(10 / 7),
                            "rope.scaling.original_context_length": 128, "attention.sliding_window": 0}),
    "Phi-3-mini": ("phi3", {"rope.dimension_count": 8, "attention.sliding_window": 100}),
    "Granite": ("granite", {"embedding_scale": 12.0, "residual_scale": 0.22, "attention.scale": 0.25,
                            "logit_scale": 8.0}),
    "SmolLM3": ("smollm3", {}),
    "GLM": ("chatglm", {"rope.dimension_count": 6}),
    "ERNIE 4.5": ("ernie4_5", {}),
    "Ministral 3": ("mistral3", {
        "rope.scaling.type": "yarn", "rope.scaling.factor": 2.0, "rope.scaling.original_context_length": 64,
        "rope.scaling.yarn_log_multiplier": 1.0, "rope.scaling.yarn_beta_fast": 32.0, "rope.freq_base": 500.0,
        "rope.scaling.yarn_beta_slow": 1.0, "attention.temperature_scale": 0.1}),
    "Seed-OSS": ("seed_oss", {}),
}
REORDERED = ("granite", "smollm3", "mistral3")  # llama.cpp's converter reorders the rows of q and k
LLAMA_CPP = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "mlp.gate_up_proj": "ffn_up",
    "self_attn.qkv_proj": "attn_qkv"}


def gguf_tensors(theirs: nn.Module, arch: str) -> dict[str, Tensor]:
    """The tensors of transformers' model as llama.cpp's converter writes them."""
    tensors = {}
    for name, tensor in theirs.state_dict().items():
        if name == "lm_head.weight" and theirs.config.tie_word_embeddings:
            continue
        module, _, kind = name.rpartition(".")
        layer, _, rest = module.removeprefix("model.layers.").partition(".")
        module = LLAMA_CPP[rest if name.startswith("model.layers.") else module]
        if arch == "seed_oss" and module == "ffn_norm":
            module = "post_attention_norm"
        if arch in REORDERED and module in ("attn_q", "attn_k"):  # (half, j) -> (j, half) within a head
            size = getattr(theirs.config, "head_dim", None) or SIZES["hidden_size"] // SIZES["num_attention_heads"]
            tensor = tensor.unflatten(0, (-1, 2, size // 2)).transpose(1, 2).flatten(0, 2)
        tensors[f"blk.{layer}.{module}.{kind}" if name.startswith("model.layers.") else f"{module}.{kind}"] = tensor
    if arch == "chatglm":
        for name in [name for name in tensors if ".attn_q." in name]:
            pieces = [tensors.pop(name.replace("attn_q", f"attn_{x}")) for x in "qkv"]
            tensors[name.replace("attn_q", "attn_qkv")] = torch.cat(pieces)
    if arch == "phi3" and theirs.config.rope_parameters["rope_type"] == "longrope":
        tensors |= {f"rope_factors_{x}.weight": torch.tensor(LONG[f"{x}_factor"]) for x in ("long", "short")}
    return tensors


def write_gguf(path: Path, theirs: nn.Module, arch: str, fields: dict) -> None:
    config = theirs.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    sizes = {
        "block_count": config.num_hidden_layers, "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size, "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads, "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps, "attention.key_length": head_dim,
        "attention.value_length": head_dim, "rope.freq_base": config.rope_parameters["rope_theta"]}
    writer = gguf.GGUFWriter(path, arch)
    add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string, bool: writer.add_bool}
    for key, value in (sizes | fields).items():
        add[type(value)](f"{arch}.{key}", value)
    tokens = [CHAR_OF[i] for i in range(SIZES["vocab_size"] - 1)]
    tokens.append(tokens[0] + tokens[1])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * len(tokens))
    writer.add_token_merges([f"{tokens[0]} {tokens[1]}"])
    writer.add_eos_token_id(2)
    for name, tensor in gguf_tensors(theirs, arch).items():
        writer.add_tensor(name, tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.slow
@pytest.mark.parametrize("name", GGUF_CASES)
def test_gguf_files(name: str, tmp_path: Path) -> None:
    """Fails if a field of llama.cpp is read with another meaning, or rows are reordered where its converter left them
    alone. Fails too if transformers does not read the config.json that is written."""
    arch, fields = GGUF_CASES[name]
    theirs = oracle(name)
    write_gguf(tmp_path / "a.gguf", theirs, arch, fields)
    convert(tmp_path / "a.gguf", tmp_path / "out", torch.float32)
    ours = load_model(tmp_path / "out")
    assert difference(ours, theirs) < 1e-4
    assert transformers.AutoConfig.from_pretrained(tmp_path / "out").model_type == theirs.config.model_type
    assert ours.cfg.context_limit == {"Ministral 3": 64, "Phi-3-mini": 100}.get(name)
