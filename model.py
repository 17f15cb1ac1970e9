"""The Llama family, small enough to read: config, RoPE, attention over a static KV cache, one forward.

Runs Llama 1-3.2, Vicuna, TinyLlama, SmolLM2, Mistral, Qwen2/2.5 and Qwen3 from `config.json` and the one
`model.safetensors` that convert_hf_checkpoint.py writes. What it does not implement it refuses by name.

The one thing tree verification asks of a model: `forward` takes three separate things where an ordinary
model needs one. `rope_pos` is a token's place in the text, `cache_pos` the slot its key and value are
written to, and `mask` which slots it sees. Two drafts of the same next token share a place, never a slot.

Legend for the shapes at line ends:
  B batch   T tokens of this call   W cache slots looked at   S cache slots   L layers
  C hidden size   I intermediate size   V vocabulary   H query heads   K key/value heads   D head dim

    python -c "import model; print(model.load_model('checkpoints/HuggingFaceTB/SmolLM2-135M-Instruct'))"
"""
import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor

from kernels import TreeMask, embed, rope_store, tree_attention
from linears import linear, rms_norm
from quantizers import GROUPS, MODES, quantize_linears

FORMAT = "eagle2-native-1"  # the safetensors metadata entry that tells a converted file from any other
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


def rope_table(cfg: Config, length: int, device: torch.device | None = None) -> Tensor:
    """cos and sin of every position, fp32 [2, length, D]: both halves of D hold the same D/2 angles.

    Llama 3.1's scaling: wavelengths beyond the old context are slowed by `factor`, short ones kept, and
    those between blended (transformers, modeling_rope_utils.py, _compute_llama3_parameters).
    """
    inv_freq = cfg.rope_theta ** -(torch.arange(0, cfg.head_dim, 2, dtype=torch.float32, device=device) / cfg.head_dim)
    if cfg.rope_scaling:
        factor, low, high, context = (cfg.rope_scaling[k] for k in (
            "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"))
        turns = context * inv_freq / (2 * math.pi)  # how often a frequency turns within the old context
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        inv_freq = keep * inv_freq + (1 - keep) * inv_freq / factor
    angles = torch.arange(length, dtype=torch.float32, device=device)[:, None] * inv_freq  # [length, D/2]
    return torch.stack((angles.cos(), angles.sin())).repeat(1, 1, 2)


def apply_rope(x: Tensor, rope: Tensor) -> Tensor:
    """Rotate x [B, T, heads, D] by rope [2, T, D] (Hugging Face's layout: element i pairs with i + D/2)."""
    cos, sin = rope[:, :, None].unbind(0)  # [T, 1, D]
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-b, a), dim=-1) * sin


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class Layer(nn.Module):
    """One decoder layer. `norm_input=False` is the EAGLE head's: its input is normed features already."""

    def __init__(self, cfg: Config, *, qkv_bias: bool = False, norm_input: bool = True) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = cfg.num_heads, cfg.num_kv_heads, cfg.head_dim
        self.attn_norm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps) if norm_input else None
        self.wqkv = nn.Linear(cfg.hidden_size, (cfg.num_heads + 2 * cfg.num_kv_heads) * cfg.head_dim, bias=qkv_bias)
        self.q_norm = RMSNorm(cfg.head_dim, cfg.rms_norm_eps) if cfg.qk_norm else None
        self.k_norm = RMSNorm(cfg.head_dim, cfg.rms_norm_eps) if cfg.qk_norm else None
        self.wo = nn.Linear(cfg.num_heads * cfg.head_dim, cfg.hidden_size, bias=False)
        self.mlp_norm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.w13 = nn.Linear(cfg.hidden_size, 2 * cfg.intermediate_size, bias=False)
        self.w2 = nn.Linear(cfg.intermediate_size, cfg.hidden_size, bias=False)

    def forward(self, x: Tensor, rope: Tensor, kv: Tensor | None, cache_pos: Tensor | None,
                mask: Tensor | TreeMask | None) -> Tensor:
        """x [B, T, C], rope [2, T, D], kv [2, B, K, S, D], cache_pos [T], mask [T, W] -> [B, T, C].

        Six kernels on a GPU, eight above 16 rows: RoPE, gates and residuals, and for few rows the norms, happen
        within the matrix products beside them."""
        x = linear(self.attention(x, rope, kv, cache_pos, mask), self.wo.weight, residual=x)
        return self.mlp(x)

    def mlp(self, x: Tensor) -> Tensor:
        """x + w2(silu(w1(norm(x))) * w3(norm(x)))"""
        gated = linear(x, self.w13.weight, norm=(self.mlp_norm.weight, self.mlp_norm.eps), gated=True)
        return linear(gated, self.w2.weight, residual=x)

    def project(self, x: Tensor, heads: tuple[Tensor, Tensor, Tensor] | None = None) -> Tensor:
        """x [..., C] -> queries, keys and values side by side, [..., (H + 2K) D]; the norm comes first. With `heads`,
        see `linear`: rotated queries alone, [T, H * D]."""
        norm = None if self.attn_norm is None else (self.attn_norm.weight, self.attn_norm.eps)
        if heads is None or self.q_norm is None:
            return linear(x, self.wqkv.weight, self.wqkv.bias, norm, heads=heads)
        norms = self.q_norm.weight, self.k_norm.weight, self.q_norm.eps
        return rope_store(linear(x, self.wqkv.weight, self.wqkv.bias, norm), *heads, *norms).flatten(1)

    def qkv(self, x: Tensor, rope: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated q [B, T, H, D], rotated k [B, T, K, D] and v [B, T, K, D] of x [B, T, C]."""
        heads, kv_heads = self.num_heads, self.num_kv_heads
        q, k, v = self.project(x).unflatten(-1, (-1, self.head_dim)).split((heads, kv_heads, kv_heads), dim=2)
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return apply_rope(q, rope), apply_rope(k, rope), v

    def attention(self, x: Tensor, rope: Tensor, kv: Tensor | None, cache_pos: Tensor | None,
                  mask: Tensor | TreeMask | None) -> Tensor:
        """What each head read, [B, T, H * D]. Without a cache: causal among the T tokens (training)."""
        if isinstance(mask, TreeMask):
            q = self.project(x[0], (rope, cache_pos, kv[:, 0])).unflatten(-1, (-1, self.head_dim))
            return tree_attention(q, kv[:, 0], *mask)[None]
        q, k, v = (y.transpose(1, 2) for y in self.qkv(x, rope))  # [B, heads, T, D]
        if kv is None:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        else:
            kv.index_copy_(3, cache_pos, torch.stack((k, v)))
            k, v = kv[:, :, :, :mask.shape[-1]].unbind(0)  # [B, K, W, D]
            # The H/K query heads that share a key become rows of one matrix: no key is ever repeated.
            q = q.reshape(q.shape[0], self.num_kv_heads, -1, self.head_dim)  # [B, K, H/K * T, D]
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask.repeat(self.num_heads // self.num_kv_heads, 1))
            y = y.reshape(y.shape[0], self.num_heads, -1, self.head_dim)
        return y.transpose(1, 2).flatten(2)


class Llama(nn.Module):
    def __init__(self, cfg: Config, *, qkv_bias: bool = False) -> None:
        super().__init__()
        self.cfg = cfg
        self.embed = nn.Embedding(cfg.vocab_size, cfg.hidden_size)
        self.layers = nn.ModuleList(Layer(cfg, qkv_bias=qkv_bias) for _ in range(cfg.num_layers))
        self.norm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.lm_head = nn.Linear(cfg.hidden_size, cfg.vocab_size, bias=False)
        if cfg.tie_word_embeddings:
            self.lm_head.weight = self.embed.weight
        self.kv = self.rope = None

    def allocate_cache(self, max_seq_len: int, spare: int = 0, batch: int = 1) -> None:
        """The static KV cache [L, 2, B, K, S, D] and the RoPE table, S = max_seq_len + spare: once, whatever
        prompts follow. The spare slots hold drafts that reach beyond the last token that may be committed."""
        cfg, like = self.cfg, self.embed.weight
        if cfg.sliding_window and max_seq_len > cfg.sliding_window:
            raise ValueError(f"this model's sliding window of {cfg.sliding_window} tokens is not implemented: "
                             f"use --max_seq_len {cfg.sliding_window} or less, where it makes no difference")
        slots = max_seq_len + spare
        kv = like.new_zeros(cfg.num_layers, 2, batch, cfg.num_kv_heads, slots, cfg.head_dim)
        self.rope = rope_table(cfg, slots, like.device).to(like.dtype)
        self.kv = kv  # last: where memory ran out in between, there are slots for no more than were there before

    def forward(self, tokens: Tensor, rope_pos: Tensor, cache_pos: Tensor | None = None,
                mask: Tensor | TreeMask | None = None) -> Tensor:
        """Hidden states after the final norm, [B, T, C]: what the lm_head reads and EAGLE calls features.

        tokens [B, T] int64; rope_pos [T] int64 places in the text; cache_pos [T] int64 distinct slots to
        write; mask [T, W] bool, or additive in the weights' dtype: which of the first W slots a row sees,
        after the write. On a GPU with B = 1 rather a TreeMask, which our own attention kernel reads.
        cache_pos=None, mask=None: no cache, causal among the T tokens.
        """
        x, rope = embed(self.embed.weight, tokens, self.rope, rope_pos)
        for i, layer in enumerate(self.layers):
            x = layer(x, rope, None if cache_pos is None else self.kv[i], cache_pos, mask)
        return rms_norm(x, self.norm.weight, self.norm.eps)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of a .safetensors or .bin file, memory-mapped, and the metadata; ValueError if it is damaged."""
    try:
        if path.suffix == ".bin":  # a pickle: weights_only admits tensors and refuses code
            tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            if not isinstance(tensors, dict) or not all(isinstance(t, Tensor) for t in tensors.values()):
                raise ValueError("not a dictionary of tensors")
            return tensors, {}
        with safe_open(path, framework="pt") as f:
            return {name: f.get_tensor(name) for name in f.keys()}, f.metadata() or {}
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file; run convert_hf_checkpoint.py first") from None
    except Exception as e:  # a damaged pickle raises anything
        reason = (str(e).strip() or type(e).__name__).splitlines()[0]
        raise ValueError(f"{path}: damaged, or not plain tensors ({reason}); convert or download it again") from None


def fill(module: nn.Module, tensors: dict[str, Tensor], path: Path, device: torch.device | str,
         dtype: torch.dtype | None) -> None:
    """Give a meta-device `module` its weights; every name and shape must match, or ValueError says which not."""
    wanted = module.state_dict()
    for problem, names in (("lacks", wanted.keys() - tensors.keys()), ("has unknown", tensors.keys() - wanted.keys())):
        if names:
            raise ValueError(f"{path}: {problem} {', '.join(sorted(names)[:3])} (config.json describes another model?)")
    for name, tensor in tensors.items():
        like, integers = wanted[name], name.endswith((".data", ".scale"))
        if tensor.shape != like.shape or (tensor.dtype != like.dtype if integers else not tensor.is_floating_point()):
            raise ValueError(f"{path}: {name} is {list(tensor.shape)} of {tensor.dtype}, config.json asks for "
                             f"{list(like.shape)}" + (f" in the file's mode, as {like.dtype}" if integers else ""))
        tensors[name] = tensor.to(device, None if integers else dtype)
    module.load_state_dict(tensors, assign=True)
    module.requires_grad_(False).eval()


def stored_mode(path: Path, metadata: dict[str, str], quantize: str | None) -> tuple[str | None, int]:
    """How a file says that it is quantised: mode and group. ValueError where that is unknown, or to be done again."""
    mode, group = metadata.get("mode"), metadata.get("group", "0")
    if mode and quantize:
        raise ValueError(f"{path}: holds {mode} already (group {group}); for {quantize} take model.safetensors")
    if mode and (mode not in MODES or mode == "int4" and group not in map(str, GROUPS)):
        raise ValueError(f"{path}: {mode} in groups of {group} is not implemented; run quantize.py again")
    return mode, int(group) if mode == "int4" else 0


def load_model(path: Path | str, device: torch.device | str = "cpu", dtype: torch.dtype | None = None,
               quantize: str | None = None, group: int = 128) -> Llama:
    """A converted checkpoint: its folder, or one model file in it, such as quantize.py writes. dtype None keeps the
    file's. quantize: to this mode, one tensor at a time, so that no more than the result need fit `device`.

    Raises FileNotFoundError or ValueError with one line that says what to do.
    """
    path = Path(path)
    if not path.exists():
        maker = "quantize.py" if path.name.startswith("model-int") else "convert_hf_checkpoint.py"
        raise FileNotFoundError(f"{path}: no such checkpoint; make one with {maker}")
    file = path / "model.safetensors" if path.is_dir() else path
    cfg = Config.load(file.parent)
    tensors, metadata = read_tensors(file)
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{file}: not a converted checkpoint; run `python convert_hf_checkpoint.py {file.parent}`")
    mode, stored = stored_mode(file, metadata, quantize)
    if (mode or quantize) and torch.device(device).type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        raise ValueError(f"{mode or quantize} needs a GPU that multiplies matrices of integers as ours are (compute "
                         "capability 8.0 or more): leave the weights as they are, or take --device cpu")
    tied = cfg.tie_word_embeddings and mode is None
    with torch.device("meta"):
        model = Llama(cfg, qkv_bias="layers.0.wqkv.bias" in tensors)
    if mode:
        quantize_linears(model, mode, stored)
    place = ("cpu", None) if quantize else (device, dtype)
    if tied and "embed.weight" in tensors:  # moved here, so that `fill` does not make two of it
        tensors["embed.weight"] = tensors["lm_head.weight"] = tensors["embed.weight"].to(*place)
    fill(model, tensors, file, *place)
    if quantize:
        quantize_linears(model, quantize, group, device)
        return model.to(device, dtype)
    if tied:
        model.lm_head.weight = model.embed.weight  # assign=True made two parameters of one tensor
    return model
