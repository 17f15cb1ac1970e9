"""config.json: what it says about the architecture, and what this engine refuses to run.

    python -c "from formats.config import Config; print(Config.load('checkpoints/ORG/NAME'))"
"""
import json
import re
from dataclasses import dataclass
from pathlib import Path

from formats.foreign import quantized_by_config

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
LLAMA3_ROPE = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
DEFAULT_WINDOW = 4096  # of transformers' MistralConfig, Qwen2Config and Qwen3Config, where the key is missing
# What rope_scaling or rope_parameters may hold for any type. mrope_section places images; in a text it changes nothing.
ROPE_KEYS = {"rope_type", "type", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings",
             "mrope_section"}
# Keys that other families use for numbers which change the computation, such as Granite's residual_multiplier.
CHANGES = re.compile(r"(^|_)(rope|nope|rotary|yarn|ntk|mup)|scal|multiplier|soft_?cap|_cap(ping)?(_|$)|window|clip")
CUTS_OFF = re.compile(r"cap|window|clip")  # those of them that 0 switches off; the others are neutral at 1
# Keys that match too: read elsewhere in this file, or saying what other keys say.
KNOWN = {"rope_scaling", "rope_parameters", "rope_theta", "use_rope", "sliding_window", "use_sliding_window",
         "max_window_layers", "ffn_dim_multiplier"}
# What would change the model where it is true, a number, or an object; and where it is false.
IF_SET = ("per_layer_config", "text_config", "attention_chunk_size", "attn_temperature_tuning", "alibi", "use_alibi",
          "use_bidirectional_attention", "parallel_attn", "use_parallel_residual")
IF_FALSE = ("is_causal", "causal", "use_rope")
QK_NORM = ("use_qk_norm", "qk_norm", "qk_layernorm")
# Of a draft head the tensors say these, since configs have been wrong.
SAID_BY_TENSORS = ("architectures", "attention_bias", "mlp_bias")


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
            if model_type:
                raw = {key: value for key, value in raw.items() if key not in SAID_BY_TENSORS}
                raw["model_type"] = model_type
            return cls.from_dict(raw)
        except KeyError as e:
            raise ValueError(f"{path}: {e.args[0]} is missing") from None
        except (ValueError, TypeError, RecursionError, OverflowError) as e:
            raise ValueError(f"{path}: {e}") from None

    @classmethod
    def from_dict(cls, raw: dict) -> "Config":
        """The Config of a parsed config.json. Raises KeyError for a missing entry, ValueError or TypeError for a wrong
        one, ValueError for one that asks for what is not implemented."""
        refuse_unsupported(raw)
        hidden_size = positive(raw, "hidden_size")
        num_heads = positive(raw, "num_attention_heads")
        num_layers = positive(raw, "num_hidden_layers")
        rope_theta, rope_scaling = read_rope(raw)
        cfg = cls(
            vocab_size=positive(raw, "vocab_size"), hidden_size=hidden_size,
            intermediate_size=positive(raw, "intermediate_size"), num_layers=num_layers,
            num_heads=num_heads, num_kv_heads=positive(raw, "num_key_value_heads", num_heads),
            head_dim=positive(raw, "head_dim", hidden_size // num_heads),
            rope_theta=rope_theta, rope_scaling=rope_scaling, rms_norm_eps=positive(raw, "rms_norm_eps", 1e-6, float),
            tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)), qk_norm=raw["model_type"] == "qwen3",
            max_position_embeddings=positive(raw, "max_position_embeddings", 2048),
            sliding_window=read_window(raw, num_layers))
        refuse_other_families(raw, cfg)
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


# ----- Two spellings of one fact -------------------------------------------------------------------------------------


def read_rope(raw: dict) -> tuple[float, dict | None]:
    """rope_theta, and the four numbers of Llama 3's scaling, or None.

    transformers 5 writes rope_parameters, and 4 wrote rope_scaling. Where both are there, 5 reads rope_scaling and
    forgets the other one's rope_theta (modeling_rope_utils.py, convert_rope_params_to_dict). So both must say the same.
    Raises ValueError where they do not, and for all that model.rope_table does not compute.
    """
    found = [read_one_rope(raw, key, raw[key]) for key in ("rope_scaling", "rope_parameters") if raw.get(key)]
    if not found:
        return read_one_rope(raw, "rope_parameters", {})
    if found[0] != found[-1]:
        raise ValueError("rope_scaling and rope_parameters say different things: keep the right one in config.json")
    return found[0]


def read_one_rope(raw: dict, name: str, rope: dict) -> tuple[float, dict | None]:
    """The same, of the object `rope`, which is raw[name]."""
    if not isinstance(rope, dict):
        raise ValueError(f"{name} should be an object, not {rope!r}")
    if any(isinstance(value, dict) for value in rope.values()):
        raise ValueError(f"{name} for each kind of layer is not implemented")
    kind = rope.get("rope_type", rope.get("type", "default"))
    used = set()
    if kind == "llama3":
        used = set(LLAMA3_ROPE)
    elif kind == "linear" and rope.get("factor") == 1:
        kind = "default"  # positions divided by 1
    if kind not in ("default", "llama3"):  # YaRN, linear, dynamic and LongRoPE: other angles
        raise ValueError(f"RoPE type {kind!r} is not implemented")
    theta = positive(raw if rope.get("rope_theta") is None else rope, "rope_theta", 10000.0, float)
    partial = rope.get("partial_rotary_factor", raw.get("partial_rotary_factor"))
    if partial not in (None, 1):  # RoPE that rotates only some of a head's elements
        raise ValueError(f"partial_rotary_factor {partial!r} is not implemented")
    for key in sorted(rope.keys() - ROPE_KEYS - used):
        if not is_neutral(key, rope[key]):
            raise ValueError(f"{name} has {key} {rope[key]!r}, which RoPE type {kind!r} does not use: correct one of "
                             "the two")
    if kind == "default":
        return theta, None
    # transformers takes the old context from beside the object, then from inside, then from the model's own context.
    key = LLAMA3_ROPE[-1]
    sources = (raw.get(key), rope.get(key))
    if None not in sources and sources[0] != sources[1]:
        raise ValueError(f"{key} is {sources[0]!r} and, in {name}, {sources[1]!r}: remove the wrong one")
    old_context = {key: next((n for n in (*sources, raw.get("max_position_embeddings")) if n is not None), 2048)}
    return theta, {k: positive(rope | old_context, k, kind=float) for k in LLAMA3_ROPE}


def read_window(raw: dict, num_layers: int) -> int | None:
    """The number of tokens up to which attention that slides in some layer changes nothing; None if none slides.

    Mistral's layers slide if there is a size, which is 4096 where the key is missing. Qwen's slide from layer
    max_window_layers on, or as layer_types says, if use_sliding_window is true. Of Llama's, transformers lets none
    slide; a config that asks for it is taken by its word.
    """
    model_type = raw["model_type"]
    layer_types = raw.get("layer_types")
    if layer_types is not None:
        others = [kind for kind in layer_types if kind not in ("full_attention", "sliding_attention")]
        if others:
            raise ValueError(f"layer_types {others[0]!r} is not implemented")
    size = raw.get("sliding_window", DEFAULT_WINDOW if model_type != "llama" else None)
    if model_type == "mistral":
        slides = size is not None
    elif layer_types is not None:
        slides = "sliding_attention" in layer_types
        if slides and size is None:
            raise ValueError("layer_types has sliding_attention, but there is no sliding_window")
    else:
        first = 0 if model_type == "llama" else raw.get("max_window_layers", 28)
        slides = bool(raw.get("use_sliding_window")) and size is not None and first < num_layers
    return positive({"sliding_window": size}, "sliding_window") if slides else None


# ----- Refusals ------------------------------------------------------------------------------------------------------


def refuse_unsupported(raw: dict) -> None:
    """Raise ValueError for anything in config.json that would make this engine compute another model."""
    model_type = raw["model_type"]
    experts = ("num_experts", "num_local_experts", "n_routed_experts")
    has_attention_bias = model_type in ("llama", "qwen3") and bool(raw.get("attention_bias"))
    refusals = {
        # Another architecture: other norms, activations or embeddings.
        f"model_type {model_type!r}": model_type not in MODEL_TYPES,
        # The gate of the MLP is silu in every kernel.
        f"hidden_act {raw.get('hidden_act')!r}": raw.get("hidden_act", "silu") not in ("silu", "swish"),
        # The MLP of a layer is one, not chosen token by token.
        "a mixture of experts (num_experts)": any(raw.get(key) for key in experts),
        # Biases that the layers have no place for. Those of q, k and v, as in Qwen2, are implemented.
        "biases in the MLP (mlp_bias)": model_type == "llama" and bool(raw.get("mlp_bias")),
        "a bias in the attention output (attention_bias)": has_attention_bias,
        **{f"{key} {repr(raw.get(key))[:60]}": bool(raw.get(key)) for key in IF_SET},
        **{f"{key} false": raw.get(key) is False for key in IF_FALSE},
        **{f"{key} in a {model_type} model": model_type != "qwen3" and bool(raw.get(key)) for key in QK_NORM},
    }
    for feature, is_asked_for in refusals.items():
        if is_asked_for:
            raise ValueError(f"{feature} is not implemented")
    if quantized := quantized_by_config(raw):
        raise ValueError(quantized)
    if not isinstance(raw.get("tie_word_embeddings", False), bool | None):
        raise ValueError(f"tie_word_embeddings should be true or false, not {raw['tie_word_embeddings']!r}")
    refuse_other_architecture(raw)


def refuse_other_architecture(raw: dict) -> None:
    """Raise ValueError if `architectures`, such as ["Qwen2ForCausalLM"], is of another family than model_type."""
    names = raw.get("architectures") or []
    for name in [names] if isinstance(names, str) else names:
        family = re.sub(r"(For[A-Z]|LMHead|PreTrained|Model).*", "", str(name)).lower()
        if family != raw["model_type"]:
            raise ValueError(f"architectures {name!r} contradicts model_type {raw['model_type']!r}: one of them is "
                             "wrong, and only Llama, Mistral, Qwen2 and Qwen3 are implemented")


def refuse_other_families(raw: dict, cfg: Config) -> None:
    """Raise ValueError for a number by which another family changes the computation, unless it changes nothing.

    Such a config is of Granite, Cohere, Gemma, SmolLM3, MiniCPM or a relative, under a model_type of ours: the weights
    have the same names and would load.
    """
    neutral = {"query_pre_attn_scalar": cfg.head_dim, "attention_multiplier": cfg.head_dim ** -0.5,
               "dim_model_base": cfg.hidden_size, "scale_depth": cfg.num_layers ** 0.5}
    for key, value in raw.items():
        if key in KNOWN or key.startswith("init"):  # how weights were initialised is over
            continue
        if key in neutral and isinstance(value, int | float) and abs(value / neutral[key] - 1) < 1e-6:
            continue
        if (key in neutral and value is not None) or (CHANGES.search(key.lower()) and not is_neutral(key, value)):
            raise ValueError(f"{key} {repr(value)[:60]} is not implemented: no field of a {raw['model_type']} model, "
                             "but of a family that computes something else")


def is_neutral(key: str, value: object) -> bool:
    """Whether a value that another family would use, under a key that CHANGES knows, changes nothing here."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return all(is_neutral(key, inner) for inner in value)
    if isinstance(value, str):
        return value in ("", "none", "default")
    if value is None or isinstance(value, bool):
        return not value
    return value == (0 if CUTS_OFF.search(key.lower()) else 1)


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
