"""Families that are Llamas by conversion: transformers' logits, trees that write what plain decoding writes, and what
is refused. Each starts from a folder as transformers saves it.

    python -m pytest tests/formats/test_families.py
"""
import json
from functools import cache
from pathlib import Path

import pytest
import tiny
import torch
import transformers
from helpers import GREEDY, SAMPLINGS, write
from torch import Tensor, nn

from convert_hf_checkpoint import convert
from draft import Eagle2, Vanilla
from engine import Engine
from model import Llama, load_model

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
