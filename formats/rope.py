"""RoPE, as config.json describes it: the base, a scaling of one of five kinds, and how much of a head is rotated.

What the numbers do to the frequencies: ops/frequencies.py.
"""
import math
from typing import NamedTuple

from formats.fields import is_neutral, positive

ORIGINAL = "original_max_position_embeddings"  # the context that the model had before its RoPE was scaled
LLAMA3_ROPE = ("factor", "low_freq_factor", "high_freq_factor", ORIGINAL)
# What rope_scaling or rope_parameters may hold for any type. mrope_section places images; in a text it changes nothing.
# "finetuned" is a note.
ANY_TYPE = {"rope_type", "type", "rope_theta", "partial_rotary_factor", ORIGINAL, "mrope_section", "finetuned"}
# What it may hold besides, by type.
TYPES = {
    "default": set(),
    "linear": {"factor"},
    "dynamic": {"factor"},
    "llama3": set(LLAMA3_ROPE),
    "yarn": {"factor", "attention_factor", "attn_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim",
             "truncate"},
    "longrope": {"factor", "attention_factor", "short_factor", "long_factor"},
}
PARTIAL = ("phi3", "glm")  # the families in which transformers rotates a part of each head, where the config says so
QUERY_SCALE = "llama_4_scaling_beta"  # Ministral 3's queries grow by 1 + beta * ln(1 + floor(position / ORIGINAL))


class Rope(NamedTuple):
    """theta: the base. scaling: None, or "rope_type" (linear, llama3, yarn or longrope) and its numbers, all of them.
    rotary_dim: None, or how many elements of a head are rotated, if not all. limit: None, or the number of tokens up to
    which what is not implemented changes nothing."""
    theta: float
    scaling: dict | None
    rotary_dim: int | None
    limit: int | None


def read_rope(raw: dict, head_dim: int) -> Rope:
    """What a config.json says about RoPE.

    transformers 5 writes rope_parameters, and 4 wrote rope_scaling. Where both are there, 5 reads rope_scaling and
    forgets the other one's rope_theta (modeling_rope_utils.py, convert_rope_params_to_dict). So both must say the same.
    Raises ValueError where they do not, and for all that ops/frequencies.py does not compute.
    """
    found = [read_one(raw, key, raw[key], head_dim) for key in ("rope_scaling", "rope_parameters") if raw.get(key)]
    if not found:
        return read_one(raw, "rope_parameters", {}, head_dim)
    if found[0] != found[-1]:
        raise ValueError("rope_scaling and rope_parameters say different things: keep the right one in config.json")
    return found[0]


def read_one(raw: dict, name: str, rope: dict, head_dim: int) -> Rope:
    """The same, of the object `rope`, which is raw[name]."""
    if not isinstance(rope, dict):
        raise ValueError(f"{name} should be an object, not {rope!r}")
    if any(isinstance(value, dict) for value in rope.values()):
        raise ValueError(f"{name} for each kind of layer is not implemented")
    family = raw["model_type"]
    kind = rope.get("rope_type", rope.get("type", "default"))
    if family == "phi3" and kind in ("su", "yarn"):  # LongRoPE's older names in Phi-3
        kind = "longrope"
    if kind == "linear" and rope.get("factor") == 1:
        kind = "default"  # positions divided by 1
    if not isinstance(kind, str) or kind not in TYPES:
        raise ValueError(f"RoPE type {kind!r} is not implemented")
    used = TYPES[kind] | ({QUERY_SCALE, "max_position_embeddings"} if family == "ministral3" else set())
    for key in sorted(rope.keys() - ANY_TYPE - used):
        if not is_neutral(key, rope[key]):
            raise ValueError(f"{name} has {key} {rope[key]!r}, which RoPE type {kind!r} does not use: correct one of "
                             "the two")
    theta = positive(raw if rope.get("rope_theta") is None else rope, "rope_theta", 10000.0, float)
    if kind == "yarn" and theta <= 1:
        raise ValueError(f"rope_theta should be more than 1, not {theta}")
    rotary_dim = read_rotary_dim(raw, rope, head_dim)
    context = positive(raw, "max_position_embeddings", 2048)
    numbers = {**rope, ORIGINAL: original_context(raw, rope, name) if kind in ("llama3", "yarn", "longrope") else None}
    if kind == "dynamic":
        positive(rope, "factor", kind=float)
        return Rope(theta, None, rotary_dim, context)  # plain RoPE up to there
    scaling = read_scaling(numbers, kind, context, rotary_dim or head_dim)
    grows = family == "ministral3" and rope.get(QUERY_SCALE)
    return Rope(theta, scaling, rotary_dim, original_context(raw, rope, name) if grows else None)


def read_rotary_dim(raw: dict, rope: dict, head_dim: int) -> int | None:
    """How many elements of a head are rotated; None if all."""
    partial = rope.get("partial_rotary_factor", raw.get("partial_rotary_factor"))
    if partial is None or (partial == 1 and not isinstance(partial, bool)):
        return None
    if raw["model_type"] not in PARTIAL:
        raise ValueError(f"partial_rotary_factor {partial!r} is not implemented in a {raw['model_type']} model")
    rotary_dim = int(head_dim * positive({"partial_rotary_factor": partial}, "partial_rotary_factor", kind=float))
    if not 2 <= rotary_dim < head_dim or rotary_dim % 2:
        raise ValueError(f"partial_rotary_factor {partial!r} would rotate {rotary_dim} of a head's {head_dim} elements")
    return rotary_dim


def original_context(raw: dict, rope: dict, name: str) -> int:
    """transformers looks beside the object, inside it, then takes the model's context. ValueError if the two differ."""
    sources = (raw.get(ORIGINAL), rope.get(ORIGINAL))
    if None not in sources and sources[0] != sources[1]:
        raise ValueError(f"{ORIGINAL} is {sources[0]!r} and, in {name}, {sources[1]!r}: remove the wrong one")
    found = next((n for n in (*sources, raw.get("max_position_embeddings")) if n is not None), 2048)
    found = int(found) if isinstance(found, float) and found.is_integer() else found
    return positive({ORIGINAL: found}, ORIGINAL)


def read_scaling(numbers: dict, kind: str, context: int, rotary_dim: int) -> dict | None:
    """All numbers of a scaling, with transformers' defaults (modeling_rope_utils.py), or None for plain RoPE."""
    if kind == "default":
        return None
    if kind == "linear":
        return {"rope_type": kind, "factor": positive(numbers, "factor", kind=float)}
    if kind == "llama3":
        scaling = {key: positive(numbers, key, kind=float) for key in LLAMA3_ROPE[:3]}
        if not scaling["low_freq_factor"] < scaling["high_freq_factor"]:
            raise ValueError("low_freq_factor should be below high_freq_factor")
        return {"rope_type": kind, **scaling, ORIGINAL: numbers[ORIGINAL]}
    factor = positive(numbers, "factor", context / numbers[ORIGINAL], float)
    if numbers[ORIGINAL] == 1:
        raise ValueError(f"{ORIGINAL} should be more than 1")
    if kind == "longrope":
        length = math.sqrt(1 + math.log(factor) / math.log(numbers[ORIGINAL])) if factor > 1 else 1.0
        return {"rope_type": kind, "short_factor": divisors(numbers, "short_factor", rotary_dim),
                "long_factor": divisors(numbers, "long_factor", rotary_dim), ORIGINAL: numbers[ORIGINAL],
                "attention_factor": positive(numbers, "attention_factor", length, float)}
    fast, slow = (positive(numbers, key, default, float) for key, default in (("beta_fast", 32), ("beta_slow", 1)))
    truncate = numbers.get("truncate", True)
    if slow > fast or not isinstance(truncate, bool):
        raise ValueError(f"beta_fast {fast}, beta_slow {slow} and truncate {truncate!r} do not fit together")
    return {"rope_type": kind, "factor": factor, ORIGINAL: numbers[ORIGINAL], "beta_fast": fast, "beta_slow": slow,
            "truncate": truncate, "attention_factor": yarn_length(numbers, factor)}


def yarn_length(numbers: dict, factor: float) -> float:
    """What YaRN multiplies cos and sin by. An attn_factor multiplies it once more: transformers ignores that entry, but
    vLLM and llama.cpp use it, as its authors intend (DeepSeek-R1-0528-Qwen3-8B, where the product is 1)."""
    def grown(mscale: float) -> float:
        return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0

    both = numbers.get("mscale") and numbers.get("mscale_all_dim")
    mscales = [positive(numbers, key, kind=float) for key in ("mscale", "mscale_all_dim")] if both else [1.0, 0.0]
    length = positive(numbers, "attention_factor", grown(mscales[0]) / grown(mscales[1]), float)
    return length * positive(numbers, "attn_factor", 1.0, float)


def divisors(numbers: dict, key: str, rotary_dim: int) -> list[float]:
    """LongRoPE's divisor of each frequency."""
    values = numbers.get(key)
    if not isinstance(values, list) or len(values) != rotary_dim // 2:
        raise ValueError(f"{key} should be a list of {rotary_dim // 2} numbers, one for each pair that is rotated")
    return [positive({key: value}, key, kind=float) for value in values]
