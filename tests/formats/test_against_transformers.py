"""Some two hundred config.json files, each with random weights: transformers' logits, or a refusal.

The configs are what other programs and other people's edits leave behind: RoPE spelled in two ways at once, biases that
the config denies, windows, tied embeddings stored under the other name. Wrong and silent is the one thing that must not
happen. tests/test_model.py compares whole folders; here models are made in memory, so that many can be.

    python -m pytest tests/formats/test_against_transformers.py
"""
import random
from copy import deepcopy

import pytest
import tiny
import torch
import transformers
from torch import Tensor, nn

from formats.config import Config
from formats.hf import NAMES, hf_names, usual_names
from model import Llama

SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "hidden_act": "silu",
         "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
         "rms_norm_eps": 1e-4}
LENGTH = 48
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
NEW = {"rope_type": "llama3", "rope_theta": 500.0, **LLAMA3}
OLD = {"rope_theta": 500.0, "rope_scaling": {"type": "llama3", **LLAMA3}}
NO_CONTEXT = {key: value for key, value in NEW.items() if key != "original_max_position_embeddings"}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
PLAIN = {"rope_type": "default", "rope_theta": 500.0}
ROPES = [
    {}, {"rope_theta": 500.0}, {"rope_theta": 500.0, "rope_scaling": None}, {"rope_parameters": PLAIN},
    {"rope_theta": 7.0, "rope_parameters": PLAIN}, {"rope_theta": 500.0, "rope_parameters": {"rope_type": "default"}},
    {"rope_theta": 500.0, "rope_parameters": {}}, {"rope_parameters": None, "rope_scaling": None},
    # Llama 3's scaling
    OLD, {"rope_theta": 500.0, "rope_scaling": {"rope_type": "llama3", **LLAMA3}}, {"rope_scaling": NEW},
    {"rope_parameters": NEW}, {"rope_parameters": NEW, "rope_theta": 7.0}, {"rope_parameters": NO_CONTEXT},
    {"rope_parameters": NO_CONTEXT, "original_max_position_embeddings": 32},
    {"rope_parameters": NEW, "original_max_position_embeddings": 32},
    {"rope_parameters": NEW, "original_max_position_embeddings": 16},
    {"rope_parameters": NEW | {"partial_rotary_factor": 0.5}}, {"rope_parameters": NEW, "partial_rotary_factor": 0.5},
    {"rope_parameters": NEW | {"partial_rotary_factor": 1.0}}, {"rope_parameters": NEW | {"attention_factor": 2.0}},
    # both keys
    {"rope_parameters": NEW, **OLD}, {"rope_parameters": PLAIN, **OLD}, {"rope_parameters": NEW, "rope_scaling": PLAIN},
    {"rope_parameters": PLAIN, "rope_scaling": YARN}, {"rope_parameters": YARN, "rope_scaling": PLAIN},
    {"rope_parameters": PLAIN, "rope_scaling": {"rope_type": "default"}}, {"rope_parameters": NEW, "rope_scaling": {}},
    {"rope_parameters": PLAIN, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
    {"rope_parameters": PLAIN, "rope_scaling": PLAIN | {"rope_theta": 7.0}}, {"rope_parameters": {}, **OLD},
    {"rope_parameters": NEW, "rope_scaling": NEW | {"factor": 4.0}}, {"rope_parameters": PLAIN, "rope_scaling": None},
    # other types, and types that contradict their numbers
    {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0}},
    {"rope_scaling": {"type": "linear", "factor": 1.0}}, {"rope_scaling": {"type": "linear", "factor": 4.0}},
    {"rope_scaling": {"type": "dynamic", "factor": 4.0}}, {"rope_scaling": YARN}, {"rope_scaling": {"factor": 4.0}},
    {"rope_scaling": {"type": "linear", "rope_type": "default"}}, {"rope_scaling": {"rope_type": "linear"}},
    {"rope_scaling": {"type": "default", "rope_type": "default", "mrope_section": [2, 1, 1]}},
    {"rope_parameters": PLAIN | {"factor": 4.0}}, {"rope_parameters": PLAIN | LLAMA3},
    {"rope_scaling": {"rope_type": "longrope", "short_factor": [2.0] * 4, "long_factor": [2.0] * 4}},
    {"partial_rotary_factor": 0.5}, {"partial_rotary_factor": 1.0}, {"rope_scaling": {"type": None}},
    # one for each kind of layer
    {"rope_parameters": {"full_attention": PLAIN}},
    {"rope_parameters": {"full_attention": NEW, "sliding_attention": PLAIN}},
    {"rope_parameters": {"full_attention": PLAIN, "sliding_attention": PLAIN},
     "layer_types": ["full_attention", "full_attention"]},
]
HEADS = [{}, {"num_key_value_heads": 4}, {"num_key_value_heads": 1}, {"head_dim": 16}, {"num_key_value_heads": None},
         {"hidden_act": "swish"}]
TIES = [{}, {"tie_word_embeddings": False}, {"tie_word_embeddings": True}]
WINDOWS = [
    {"sliding_window": None}, {}, {"sliding_window": 64}, {"sliding_window": 16}, {"use_sliding_window": False},
    {"sliding_window": 16, "use_sliding_window": False}, {"sliding_window": 16, "use_sliding_window": True},
    {"sliding_window": 16, "use_sliding_window": True, "max_window_layers": 2}, {"use_sliding_window": True},
    {"sliding_window": 16, "use_sliding_window": True, "max_window_layers": 1},
    {"sliding_window": 64, "use_sliding_window": True, "max_window_layers": 0},
    {"sliding_window": 16, "use_sliding_window": True, "layer_types": ["full_attention", "sliding_attention"]},
    {"sliding_window": 16, "use_sliding_window": True, "layer_types": ["full_attention", "full_attention"]},
    {"sliding_window": 16, "layer_types": ["full_attention", "sliding_attention"]},
    {"layer_types": ["full_attention", "linear_attention"]},
]
OTHERS = [{}, {"attention_bias": False}, {"attention_bias": True}, {"mlp_bias": True}, {"is_causal": False},
          {"architectures": None}, {"pretraining_tp": 4}, {"rms_norm_eps": None}, {"use_cache": False}]
# What is done to the tensors: names without "model.", a tied matrix as lm_head alone, biases added or left out.
TENSORS = ["as they are", "no prefix", "lm_head alone", "q, k, v biases", "no biases", "no lm_head"]
FAMILIES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}


def cases(family: str) -> list[tuple[dict, str]]:
    """Every entry of every list once, with something drawn from the other lists; and 12 in which all are drawn."""
    draw = random.Random(family)
    lists = (ROPES, HEADS, TIES, WINDOWS, OTHERS, TENSORS)
    chosen = []
    for number, entries in enumerate((*lists, range(12))):
        for entry in entries:
            # most of the others at their plain value, so that most configs are refused for one reason or for none
            picked = [draw.choice(options) if draw.random() < 0.25 else options[0] for options in lists]
            if number < len(lists):
                picked[number] = entry
            *changes, how = picked
            raw = {"model_type": family, **SIZES}
            for change in changes:
                raw |= change
            chosen.append(({key: value for key, value in raw.items() if (key, value) != ("rms_norm_eps", None)}, how))
    return chosen


def oracle(raw: dict) -> nn.Module:
    """transformers' model of a config.json, with random weights."""
    name = FAMILIES[raw["model_type"]]
    config = getattr(transformers, f"{name}Config").from_dict(deepcopy(raw))  # which it changes
    config._attn_implementation = "eager"
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    tiny.randomise(model, seed=3, dtype=torch.float32)
    if config.tie_word_embeddings:
        model.tie_weights()
    model(torch.tensor([[1, 2]]))  # some configs fail only here
    return model


def stored(model: nn.Module, how: str) -> dict[str, Tensor]:
    """The tensors as a file holds them. Those that transformers would ignore, or make up, change the model too."""
    tensors = dict(model.state_dict())
    tied = model.config.tie_word_embeddings
    if how == "lm_head alone" and tied:
        del tensors["model.embed_tokens.weight"]
    elif tied or how == "no lm_head":
        del tensors["lm_head.weight"]
    if how == "q, k, v biases":
        for i, x in ((i, x) for i in range(2) for x in "qkv"):
            name = f"model.layers.{i}.self_attn.{x}_proj"
            tensors.setdefault(f"{name}.bias", torch.ones(len(tensors[f"{name}.weight"])))
    if how == "no biases":
        for name in [name for name in tensors if name.endswith("bias")]:
            tensors.pop(name).zero_()  # transformers starts missing biases at 0
    if how == "no prefix":
        tensors = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    return tensors


def native(raw: dict, tensors: dict[str, Tensor]) -> Llama:
    """Our model of a config.json and the tensors of a file, as the converter puts them together."""
    cfg = Config.from_dict(raw)
    named = usual_names({name: (tuple(t.shape), t.detach) for name, t in tensors.items()}, raw)
    model = Llama(cfg, qkv_bias="model.layers.0.self_attn.q_proj.bias" in named)
    state = model.state_dict()
    if cfg.tie_word_embeddings:
        del state["lm_head.weight"]
    ours = {name: torch.cat([named.pop(piece)[1]() for piece in hf_names(name, NAMES)]) for name in state}
    if named or any(ours[name].shape != like.shape for name, like in state.items()):
        raise ValueError(f"config.json does not fit the weights: {list(named)[:1]}")
    model.load_state_dict(ours, strict=False)
    return model.requires_grad_(False).eval()


@torch.inference_mode()
def outcome(raw: dict, how: str) -> str:
    """"equal", or why not; raises AssertionError for wrong logits."""
    try:
        theirs = oracle(raw)
    except Exception:  # which have many types: strict fields, missing keys, None where a number is used
        theirs = None
    tensors = stored(theirs or oracle({"model_type": raw["model_type"], **SIZES}), how)
    try:
        ours = native(raw, tensors)
    except (ValueError, KeyError) as error:
        return f"refused: {error}"
    if theirs is None:
        return "transformers fails"
    length = min(LENGTH, ours.cfg.sliding_window or LENGTH)
    ours.allocate_cache(length)
    ids = torch.tensor([tiny.prompt(1, length, 64)])
    logits, expected = ours.lm_head(ours(ids, torch.arange(length))), theirs(ids).logits
    assert expected.std() > 0.5  # else the comparison would show little
    assert (logits - expected).abs().max() < 1e-4 * expected.abs().max(), (raw, how)
    windows = [layer.self_attn.sliding_window for layer in theirs.model.layers if raw["model_type"].startswith("qwen")]
    windows += [theirs.config.sliding_window] if raw["model_type"] == "mistral" else []
    for window in set(windows) - {None}:  # it must be known, though texts here are too short to see it
        assert ours.cfg.sliding_window == window, raw
    return "equal"


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_equal_or_refused(family: str) -> None:
    """Fails if any config gives other logits than transformers gives, or if plain ones are refused."""
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    chosen = cases(family)
    assert len(chosen) * len(FAMILIES) >= 350
    outcomes = [outcome(raw, how) for raw, how in chosen]
    assert outcomes.count("equal") > len(chosen) / 4
    assert outcomes.count("transformers fails") < len(chosen) / 10
    assert not [text for text in outcomes if "\n" in text]
    for rope in (ROPES[0], ROPES[1], ROPES[3], OLD, {"rope_parameters": NEW}, {"rope_parameters": NEW, **OLD}):
        for how in TENSORS[:3]:
            assert outcome({"model_type": family, **SIZES, "tie_word_embeddings": True, **rope}, how) == "equal"
