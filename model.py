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
import math
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from formats.config import Config
from formats.weights import FORMAT, fill, read_tensors
from ops.attention import TreeMask, tree_attention
from ops.embed_rope import embed, rope_store
from ops.linear import linear, rms_norm
from quant.linear import quantize_linears, stored_mode


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
