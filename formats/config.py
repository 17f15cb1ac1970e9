"""config.json: what it says about the architecture, and what this engine refuses to run.

    python -c "from formats.config import Config; print(Config.load('checkpoints/ORG/NAME'))"
"""
import json
from dataclasses import dataclass, replace
from pathlib import Path

from formats.families import (
    FAMILIES,
    layers_without_rope,
    llama_words,
    refuse_other_architecture,
    refuse_other_families,
)
from formats.fields import positive
from formats.foreign import quantized_by_config
from formats.rope import read_rope

# Refused entries of config.json: IF_SET where they are set (true, a number, an object), IF_FALSE where they are false.
IF_SET = ("per_layer_config", "text_config", "attention_chunk_size", "attn_temperature_tuning", "alibi", "use_alibi",
          "use_bidirectional_attention", "parallel_attn", "use_parallel_residual")
IF_FALSE = ("is_causal", "causal", "use_rope")
QK_NORM = ("use_qk_norm", "qk_norm", "qk_layernorm")
# Of a draft head the tensors say these, since configs have been wrong.
SAID_BY_TENSORS = ("architectures", "attention_bias", "mlp_bias")


@dataclass(frozen=True)
class Config:
    """The architecture of a Llama-like model, in the words of config.json. What a family has besides is folded into the
    weights (formats/fold.py).

    rope_scaling: None, or "rope_type" and its numbers (formats/rope.py). rotary_dim: None, or how many elements of a
    head are rotated, if not all. nope_layers: the layers without RoPE. sliding_window: None, or the size in tokens of
    the window that some layers have; model.py implements no window. rope_limit: None, or the number of tokens up to
    which dynamic RoPE and Ministral 3's growing queries, which are not implemented either, change nothing.
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
    rotary_dim: int | None = None
    nope_layers: tuple[int, ...] = ()
    rope_limit: int | None = None

    @classmethod
    def load(cls, path: Path | str, *, model_type: str | None = None) -> "Config":
        """Read a config.json, or the one in a folder.

        `model_type`, given for draft heads, replaces the file's; the entries SAID_BY_TENSORS are then ignored.
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
        raw = llama_words(raw)
        refuse_unsupported(raw)
        hidden_size = positive(raw, "hidden_size")
        num_heads = positive(raw, "num_attention_heads")
        num_layers = positive(raw, "num_hidden_layers")
        head_dim = positive(raw, "head_dim", hidden_size // num_heads)
        rope = read_rope(raw, head_dim)
        is_granite = raw["model_type"] == "granite"  # its embedding and its lm_head are multiplied by two numbers
        cfg = cls(
            vocab_size=positive(raw, "vocab_size"), hidden_size=hidden_size,
            intermediate_size=positive(raw, "intermediate_size"), num_layers=num_layers,
            num_heads=num_heads, num_kv_heads=positive(raw, "num_key_value_heads", num_heads), head_dim=head_dim,
            rope_theta=rope.theta, rope_scaling=rope.scaling, rms_norm_eps=positive(raw, "rms_norm_eps", 1e-6, float),
            tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)) and not is_granite,
            qk_norm=raw["model_type"] == "qwen3",
            max_position_embeddings=positive(raw, "max_position_embeddings", 2048),
            sliding_window=read_window(raw, num_layers), rotary_dim=rope.rotary_dim,
            nope_layers=layers_without_rope(raw, num_layers), rope_limit=rope.limit)
        refuse_other_families(raw, {
            "query_pre_attn_scalar": head_dim, "attention_multiplier": head_dim ** -0.5,
            "dim_model_base": hidden_size, "scale_depth": num_layers ** 0.5})
        cfg.check_sizes()
        return cfg

    @property
    def rotated(self) -> int:
        """How many elements of a head RoPE rotates."""
        return self.rotary_dim or self.head_dim

    @property
    def context_limit(self) -> int | None:
        """The number of tokens up to which all that is not implemented changes nothing; None if everything is."""
        return min((n for n in (self.sliding_window, self.rope_limit) if n), default=None)

    def check_length(self, tokens: int) -> None:
        """Raise ValueError if texts of so many tokens need what is not implemented."""
        limit = self.context_limit
        if limit and tokens > limit:
            what = "sliding window of" if limit == self.sliding_window else "other attention in texts beyond"
            raise ValueError(f"this model's {what} {limit} tokens is not implemented: use --max_seq_len {limit} or "
                             "less, where it makes no difference")

    def plain(self, **changes) -> "Config":
        """A copy without QK norm, tied embeddings, window and special RoPE, for a draft head; `changes` come last."""
        return replace(self, **{
            "qk_norm": False, "tie_word_embeddings": False, "sliding_window": None, "rope_scaling": None,
            "rotary_dim": None, "nope_layers": (), "rope_limit": None, **changes})

    def check_sizes(self) -> None:
        """Raise ValueError for sizes that contradict each other or that no model has."""
        if self.num_heads % self.num_kv_heads or self.head_dim % 2:
            raise ValueError(f"{self.num_heads} heads, {self.num_kv_heads} key/value heads, head_dim {self.head_dim} "
                             "do not fit together")
        # Such sizes overflow in PyTorch, or take minutes to build, before the weight file is even opened.
        most_rows = max(self.vocab_size, 2 * self.intermediate_size, 3 * self.num_heads * self.head_dim)
        largest = self.hidden_size * most_rows
        if self.num_layers > 1000 or largest > 2**40:
            raise ValueError(f"{self.num_layers} layers, {largest:.0e} weights in one matrix: no model is that large")


def read_window(raw: dict, num_layers: int) -> int | None:
    """The number of tokens up to which attention that slides in some layer changes nothing; None if none slides.

    How a family says which layers slide: Family.slides. Qwen's slide from layer max_window_layers on, if
    use_sliding_window is true. Of Llama's, transformers lets none slide; a config that asks for it is taken by its
    word.
    """
    how = FAMILIES[raw["model_type"]].slides
    layer_types = raw.get("layer_types")
    if layer_types is not None:
        others = [kind for kind in layer_types if kind not in ("full_attention", "sliding_attention")]
        if others:
            raise ValueError(f"layer_types {others[0]!r} is not implemented")
    size = raw.get("sliding_window")
    if layer_types is not None and how != "size":
        slides = "sliding_attention" in layer_types
        if slides and size is None:
            raise ValueError("layer_types has sliding_attention, but there is no sliding_window")
    else:
        first = raw["max_window_layers"] if "max_window_layers" in FAMILIES[raw["model_type"]].defaults else 0
        slides = size is not None and (how != "flag" or (bool(raw.get("use_sliding_window")) and first < num_layers))
    return positive({"sliding_window": size}, "sliding_window") if slides else None


# ----- Refusals ------------------------------------------------------------------------------------------------------


def refuse_unsupported(raw: dict) -> None:
    """Raise ValueError for anything in config.json that would make this engine compute another model."""
    model_type = raw["model_type"]
    experts = ("num_experts", "num_local_experts", "n_routed_experts")
    refusals = {
        # The gate of the MLP is silu in every kernel.
        f"hidden_act {raw.get('hidden_act')!r}": raw.get("hidden_act", "silu") not in ("silu", "swish"),
        # The MLP of a layer is one, not chosen token by token.
        "a mixture of experts (num_experts)": any(raw.get(key) for key in experts),
        # The layers have no place for these biases. Those of q, k and v are implemented.
        **{f"biases in the MLP or the attention output ({key})": bool(raw.get(key))
           for key in FAMILIES[model_type].refused},
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
