"""RoPE in the metadata of a GGUF file, as the entries of a config.json.

What fields mean, and what holds where one is missing, is llama.cpp's word (src/llama-model.cpp, src/llama-context.cpp).
"""
import math

import torch
from torch import Tensor

from formats.fields import positive
from formats.rope import ORIGINAL, QUERY_SCALE

FACTORS = ("rope_factors_short.weight", "rope_factors_long.weight")


def gguf_rope(metadata: dict, arch: str, head_dim: int, context: int, extra: dict[str, Tensor]) -> dict:
    """The RoPE entries of config.json. All that a GGUF file says about RoPE and that is implemented is read here.

    extra: the tensors rope_freqs.weight and FACTORS, those that are there. Where there is no type, it is "linear".
    Linear scaling by 1 or 0 is none; so is "none" with any factor. ValueError for any type but linear, yarn, longrope.
    """
    theta = positive(metadata, f"{arch}.rope.freq_base", 1e4, float)
    rotated = positive(metadata, f"{arch}.rope.dimension_count", head_dim)
    keys = [f"{arch}.rope.{key}" for key in ("scaling.type", "scaling.factor", "scale_linear")]
    type_key, factor_key, old_factor_key = keys
    scaling_type = metadata.get(type_key, "linear")
    factor = metadata.get(factor_key, metadata.get(old_factor_key, 0))
    is_plain = scaling_type == "none" or (scaling_type == "linear" and factor in (0, 1))
    given = ", ".join(f"{key} = {metadata[key]}" for key in keys if key in metadata)
    if set(FACTORS) & extra.keys():
        if not (arch == "phi3" and (is_plain or scaling_type == "longrope")):
            raise ValueError(f"{FACTORS[1]} is not implemented in a {arch} model with {given or 'no scaling'}")
        scaling = longrope(metadata, arch, context, extra)
    elif is_plain:
        scaling = {"rope_type": "default"}
    elif scaling_type == "linear":
        scaling = {"rope_type": "linear", "factor": positive({given: factor}, given, kind=float)}
    elif scaling_type == "yarn":
        scaling = yarn(metadata, arch, context, positive({given: factor or 1}, given, kind=float))
    else:
        raise ValueError(f"{given}: RoPE scaling of type {scaling_type!r} is not implemented; look for a version "
                         "without it")
    if "rope_freqs.weight" in extra:
        freqs = extra["rope_freqs.weight"]
        if not is_plain:
            raise ValueError(f"{given}: a second scaling beside rope_freqs.weight is not implemented")
        if freqs.shape != (head_dim // 2,):
            raise ValueError(f"rope_freqs.weight is {list(freqs.shape)}, for {head_dim // 2} frequencies")
        scaling = llama3_scaling(freqs, theta)
    if temperature := metadata.get(f"{arch}.attention.temperature_scale"):  # in mistral3; refused elsewhere
        scaling |= {QUERY_SCALE: temperature, ORIGINAL: old_context(metadata, arch, context)}
    entries = {"rope_theta": theta, "rope_scaling": scaling}
    if rotated != head_dim:
        entries["partial_rotary_factor"] = rotated / head_dim
    return entries


def scaling_field(metadata: dict, arch: str, name: str, default: float) -> float:
    key = f"{arch}.rope.scaling.{name}"
    return positive(metadata, key, default, float)


def old_context(metadata: dict, arch: str, context: int) -> int:
    return positive(metadata, f"{arch}.rope.scaling.original_context_length", context)


def yarn(metadata: dict, arch: str, context: int, factor: float) -> dict:
    """YaRN's numbers. attention_factor multiplies cos and sin; llama.cpp uses yarn_log_multiplier in mistral3 alone."""
    log_multiplier = metadata.get(f"{arch}.rope.scaling.yarn_log_multiplier", 0) if arch == "mistral3" else 0
    grown, shrunk = (0.1 * mscale * math.log(factor) + 1 if factor > 1 else 1.0 for mscale in (1.0, log_multiplier))
    return {"rope_type": "yarn", "factor": factor, ORIGINAL: old_context(metadata, arch, context),
            "beta_fast": scaling_field(metadata, arch, "yarn_beta_fast", 32.0),
            "beta_slow": scaling_field(metadata, arch, "yarn_beta_slow", 1.0),
            "attention_factor": grown / shrunk * scaling_field(metadata, arch, "attn_factor", 1.0)}


def longrope(metadata: dict, arch: str, context: int, extra: dict[str, Tensor]) -> dict:
    """LongRoPE's divisors and numbers. Raises ValueError if one of the two tensors is missing."""
    if not set(FACTORS) <= extra.keys():
        raise ValueError(f"of {FACTORS[0]} and {FACTORS[1]} one is missing")
    short, long = (extra[name].double().tolist() for name in FACTORS)
    return {"rope_type": "longrope", "short_factor": short, "long_factor": long,
            ORIGINAL: old_context(metadata, arch, context),
            "attention_factor": scaling_field(metadata, arch, "attn_factor", 1.0)}


def llama3_scaling(divisors: Tensor, theta: float) -> dict:
    """Hugging Face's rope_scaling of Llama 3.1 and 3.2, from what it divides each frequency by [head_dim / 2].

    GGUF stores only these divisors, fp32. The factor is the largest of them, and the other three numbers are the same
    in all releases. Raises ValueError if the four do not give the divisors (ops/frequencies.py has the formula).
    """
    divisors = divisors.double()
    factor, low, high, context = float(divisors.max()), 1.0, 4.0, 8192
    wavelengths = 2 * math.pi * theta ** (torch.arange(len(divisors), dtype=torch.float64) / len(divisors))
    turns = context / wavelengths  # full turns of each frequency within the old context
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    if not torch.allclose(divisors, 1 / (keep + (1 - keep) / factor), rtol=1e-5):
        raise ValueError("rope_freqs.weight is not the scaling of Llama 3.1 or 3.2: start from the HF folder")
    return {"rope_type": "llama3", "factor": factor, "low_freq_factor": low, "high_freq_factor": high,
            "original_max_position_embeddings": context}
