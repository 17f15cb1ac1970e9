"""config.json: what it says about the architecture, and what this engine refuses to run.

    python -c "from formats.config import Config; print(Config.load('checkpoints/ORG/NAME'))"
"""
import json
from dataclasses import dataclass
from pathlib import Path

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
LLAMA3_ROPE = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


@dataclass(frozen=True)
class Config:
    """The architecture of a Llama-like model, in the words of config.json.

    rope_scaling: None, or the four numbers of Llama 3's scaling (LLAMA3_ROPE). sliding_window: None, or the number of
    tokens up to which such a window changes nothing. It is not implemented, so Llama.allocate_cache refuses more.
    """
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
        """Read a config.json, or the one in a folder.

        `model_type` overrides the file's: draft heads are Llama layers, whatever their config calls them.
        Raises FileNotFoundError, or ValueError that names the file and what it asks for that is not implemented.
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
        """The Config of a parsed config.json. Raises KeyError for a missing entry, ValueError or TypeError for a wrong
        one, ValueError for one that asks for what is not implemented."""
        model_type = raw["model_type"]
        rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}  # transformers 5 writes rope_parameters
        if not isinstance(rope, dict):
            raise ValueError(f"rope_scaling should be an object, not {rope!r}")
        rope_type = rope.get("rope_type", rope.get("type", "default"))
        hidden_size = positive(raw, "hidden_size")
        num_heads = positive(raw, "num_attention_heads")
        slides = has_sliding_window(raw)
        refuse_unsupported(raw, rope, rope_type)
        cfg = cls(
            vocab_size=positive(raw, "vocab_size"), hidden_size=hidden_size,
            intermediate_size=positive(raw, "intermediate_size"), num_layers=positive(raw, "num_hidden_layers"),
            num_heads=num_heads, num_kv_heads=positive(raw, "num_key_value_heads", num_heads),
            head_dim=positive(raw, "head_dim", hidden_size // num_heads),
            rope_theta=positive(raw if rope.get("rope_theta") is None else rope, "rope_theta", 10000.0, float),
            rope_scaling={k: positive(rope, k, kind=float) for k in LLAMA3_ROPE} if rope_type == "llama3" else None,
            rms_norm_eps=positive(raw, "rms_norm_eps", 1e-6, float),
            tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)), qk_norm=model_type == "qwen3",
            max_position_embeddings=positive(raw, "max_position_embeddings", 2048),
            sliding_window=positive(raw, "sliding_window") if slides else None)
        cfg.check_sizes()
        return cfg

    def check_sizes(self) -> None:
        """Raise ValueError for sizes that contradict each other or that no model has."""
        if self.rope_scaling and not self.rope_scaling["low_freq_factor"] < self.rope_scaling["high_freq_factor"]:
            raise ValueError("low_freq_factor should be below high_freq_factor")
        if self.num_heads % self.num_kv_heads or self.head_dim % 2:
            raise ValueError(f"{self.num_heads} heads, {self.num_kv_heads} key/value heads, head_dim {self.head_dim} "
                             "do not fit together")
        # Such sizes overflow in PyTorch, or take minutes to build, before the weight file is even opened.
        most_rows = max(self.vocab_size, 2 * self.intermediate_size, 3 * self.num_heads * self.head_dim)
        largest = self.hidden_size * most_rows
        if self.num_layers > 1000 or largest > 2**40:
            raise ValueError(f"{self.num_layers} layers, {largest:.0e} weights in one matrix: no model is that large")


def has_sliding_window(raw: dict) -> bool:
    """Whether attention slides in some layer. Mistral's does if there is a size; other models must switch it on."""
    if raw.get("sliding_window") is None:
        return False
    if "sliding_attention" in (raw.get("layer_types") or ()):
        return True
    return bool(raw.get("use_sliding_window", raw["model_type"] == "mistral"))


def refuse_unsupported(raw: dict, rope: dict, rope_type: str) -> None:
    """Raise ValueError for anything in config.json that would make this engine compute another model."""
    experts = ("num_experts", "num_local_experts", "n_routed_experts")
    refusals = {
        # Another architecture: other norms, activations or embeddings.
        f"model_type {raw['model_type']!r}": raw["model_type"] not in MODEL_TYPES,
        # The gate of the MLP is silu in every kernel.
        f"hidden_act {raw.get('hidden_act')!r}": raw.get("hidden_act", "silu") != "silu",
        # YaRN, linear, dynamic and LongRoPE scaling: other angles than model.rope_table computes.
        f"RoPE type {rope_type!r}": rope_type not in ("default", "llama3"),
        # The MLP of a layer is one, not chosen token by token.
        "a mixture of experts": any(raw.get(key) for key in experts),
        # AWQ, GPTQ, FP8 and others: the weights are packed in formats that are not read.
        "quantization_config (start from the unquantised checkpoint)": raw.get("quantization_config") is not None,
        # Biases that the layers have no place for. Those of q, k and v, as in Qwen2, are implemented.
        "biases in the MLP": bool(raw.get("mlp_bias")),
        "a bias in the attention output": bool(raw.get("attention_bias")),
        # RoPE that rotates only some of a head's elements.
        "partial_rotary_factor": rope.get("partial_rotary_factor", raw.get("partial_rotary_factor") or 1) != 1,
    }
    for feature, is_asked_for in refusals.items():
        if is_asked_for:
            raise ValueError(f"{feature} is not implemented")


def positive(raw: dict, key: str, default: float | None = None, kind: type = int) -> int | float:
    """raw[key] as a finite number above 0, and a whole one unless `kind` is float. Where it is missing or null: the
    default. Raises KeyError if there is no default, ValueError for any other value."""
    value = raw[key] if default is None else raw.get(key)
    if value is None and default is not None:
        value = default
    if kind is int:
        kinds, limit, adjective = int, 2**31, "positive whole"
    else:
        kinds, limit, adjective = (int, float), 1e30, "positive"
    if not isinstance(value, kinds) or isinstance(value, bool) or not 0 < value < limit:  # NaN is not above 0 either
        raise ValueError(f"{key} should be a {adjective} number, not {value!r}")
    return kind(value)
