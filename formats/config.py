"""config.json: what it says of the architecture, and what this engine refuses."""
import json
from dataclasses import dataclass
from pathlib import Path

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")


@dataclass(frozen=True)
class Config:
    """What `config.json` says of the architecture. `sliding_window` is a limit on the context: up to it a
    sliding window changes nothing, beyond it we would be wrong, so `Llama.allocate_cache` refuses."""
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float
    rope_scaling: dict | None
    rms_norm_eps: float
    tie_word_embeddings: bool
    qk_norm: bool
    max_position_embeddings: int
    sliding_window: int | None

    @classmethod
    def load(cls, path: Path | str, *, model_type: str | None = None) -> "Config":
        """Read a config.json (or the folder that holds one).

        `model_type` overrides the file's: draft heads are Llama layers whatever their config calls them.
        Raises FileNotFoundError, or ValueError naming what the file asks for that is not implemented.
        """
        path = Path(path)
        path = path / "config.json" if path.is_dir() else path
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file; a checkpoint folder holds a config.json")
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(raw, dict):
                raise TypeError("not a JSON object")
            return cls.from_dict({**raw, "model_type": model_type} if model_type else raw)
        except KeyError as e:
            raise ValueError(f"{path}: {e.args[0]} is missing") from None
        except (ValueError, TypeError, RecursionError) as e:
            raise ValueError(f"{path}: {e}") from None

    @classmethod
    def from_dict(cls, raw: dict) -> "Config":
        kind = raw["model_type"]
        rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}  # transformers 5: the former
        if not isinstance(rope, dict):
            raise ValueError(f"rope_scaling should be an object, not {rope!r}")
        rope_type = rope.get("rope_type", rope.get("type", "default"))
        hidden, heads = positive(raw, "hidden_size"), positive(raw, "num_attention_heads")
        windows = raw.get("sliding_window") is not None and ("sliding_attention" in (raw.get("layer_types") or ()) or (
            raw.get("use_sliding_window", kind == "mistral")))  # only Mistral slides without saying so
        refusals = {
            f"model_type {kind!r}": kind not in MODEL_TYPES,
            f"hidden_act {raw.get('hidden_act')!r}": raw.get("hidden_act", "silu") != "silu",
            f"RoPE type {rope_type!r}": rope_type not in ("default", "llama3"),
            "a mixture of experts": any(raw.get(k) for k in ("num_experts", "num_local_experts", "n_routed_experts")),
            "quantization_config (start from the unquantised checkpoint)": raw.get("quantization_config") is not None,
            "biases in the MLP": bool(raw.get("mlp_bias")),
            "a bias in the attention output": bool(raw.get("attention_bias")),
            "partial_rotary_factor": rope.get("partial_rotary_factor", raw.get("partial_rotary_factor") or 1) != 1,
        }
        for what, refused in refusals.items():
            if refused:
                raise ValueError(f"{what} is not implemented")
        cfg = cls(
            vocab_size=positive(raw, "vocab_size"), hidden_size=hidden,
            intermediate_size=positive(raw, "intermediate_size"), num_layers=positive(raw, "num_hidden_layers"),
            num_heads=heads, num_kv_heads=positive(raw, "num_key_value_heads", heads),
            head_dim=positive(raw, "head_dim", hidden // heads),
            rope_theta=positive(raw if rope.get("rope_theta") is None else rope, "rope_theta", 10000.0, float),
            rope_scaling={k: positive(rope, k, kind=float) for k in (
                "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
            } if rope_type == "llama3" else None,
            rms_norm_eps=positive(raw, "rms_norm_eps", 1e-6, float),
            tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)), qk_norm=kind == "qwen3",
            max_position_embeddings=positive(raw, "max_position_embeddings", 2048),
            sliding_window=positive(raw, "sliding_window") if windows else None)
        if cfg.rope_scaling and not cfg.rope_scaling["low_freq_factor"] < cfg.rope_scaling["high_freq_factor"]:
            raise ValueError("low_freq_factor should be below high_freq_factor")
        if cfg.num_heads % cfg.num_kv_heads or cfg.head_dim % 2:
            raise ValueError(f"{cfg.num_heads} heads, {cfg.num_kv_heads} key/value heads, head_dim {cfg.head_dim} "
                             "do not fit together")
        widest = hidden * max(cfg.vocab_size, 2 * cfg.intermediate_size, 3 * heads * cfg.head_dim)
        if cfg.num_layers > 1000 or widest > 2**40:  # overflows, or takes minutes, before a file is looked at
            raise ValueError(f"{cfg.num_layers} layers, {widest:.0e} weights in a matrix: no model has so many")
        return cfg


def positive(raw: dict, key: str, default: float | None = None, kind: type = int) -> int | float:
    """raw[key], or the default where it is missing or null: a finite number above 0, whole unless `kind` is float."""
    value = raw[key] if default is None else raw.get(key)
    value = default if value is None and default is not None else value
    kinds, limit, whole = (int, 2**31, "whole ") if kind is int else ((int, float), 1e30, "")
    if not isinstance(value, kinds) or isinstance(value, bool) or not 0 < value < limit:  # NaN is not above 0 either
        raise ValueError(f"{key} should be a positive {whole}number, not {value!r}")
    return kind(value)
