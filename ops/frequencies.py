"""RoPE's frequencies: how far a position turns each pair of a head's elements.
"""
import math

import torch
from torch import Tensor


def frequencies(theta: float, size: int, scaling: dict | None, context: int, device: torch.device | None = None
                ) -> tuple[Tensor, float]:
    """Each pair's angle at position 1, in radians, fp32 [size / 2]; and the factor that cos and sin are multiplied by.

    size: a head's rotated elements. scaling: None for plain RoPE, or as formats/rope.py reads it. context: the longest
    text, in tokens; LongRoPE chooses by it, as vLLM and llama.cpp do. (transformers chooses by the current length, so
    a text may have keys of both kinds.) Source of the formulas: transformers, modeling_rope_utils.py.
    """
    inv_freq = theta ** -(torch.arange(0, size, 2, dtype=torch.float32, device=device) / size)
    if scaling is None:
        return inv_freq, 1.0
    kind, factor, old_context = (scaling.get(key) for key in (
        "rope_type", "factor", "original_max_position_embeddings"))
    if kind == "linear":
        return inv_freq / factor, 1.0
    if kind == "longrope":
        divisors = scaling["long_factor" if context > old_context else "short_factor"]
        return inv_freq / torch.tensor(divisors, dtype=torch.float32, device=device), scaling["attention_factor"]
    if kind == "llama3":
        # Frequencies of up to `low` turns are divided by factor, those of `high` or more kept, those between blended.
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        turns = old_context * inv_freq / (2 * math.pi)  # full turns of each frequency within the old context
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        return keep * inv_freq + (1 - keep) * inv_freq / factor, 1.0
    # YaRN (arXiv 2309.00071) does so between two pairs: the ones that turn beta_fast and beta_slow times in the old
    # context, by default 32 times and once.
    first, last = (size * math.log(old_context / (2 * math.pi * scaling[beta])) / (2 * math.log(theta))
                   for beta in ("beta_fast", "beta_slow"))
    if scaling["truncate"]:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, size - 1)
    pair = torch.arange(size // 2, dtype=torch.float32, device=device)
    slow = ((pair - first) / (last - first or 0.001)).clamp(0, 1)
    return (1 - slow) * inv_freq + slow * inv_freq / factor, scaling["attention_factor"]
