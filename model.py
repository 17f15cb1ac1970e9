"""The Llama family, small enough to read: RoPE, one decoder layer, a static KV cache, one forward.

Runs Llama, Mistral, Qwen2, Qwen3, and what is a Llama by conversion (formats/families.py), from the folder that
convert_hf_checkpoint.py writes. What config.json may ask for, and what is refused by name: formats/config.py.

Verifying a tree needs one thing of a model: `forward` takes three separate inputs where plain decoding has one number.
`rope_pos` is a token's position in the text, `cache_pos` is the slot that its key and value are written to, and `mask`
says which slots it sees. Two drafts of the same next token share a position, never a slot.

Shapes at line ends:
  B batch   T tokens of this call   W cache slots that are read   S cache slots   L layers
  C hidden size   I intermediate size   V vocabulary   H query heads   K key/value heads   D head size

    python -c "import model; print(model.load_model('checkpoints/HuggingFaceTB/SmolLM2-135M-Instruct'))"
"""
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from formats.config import Config
from formats.weights import FORMAT, empty_embedding, fill, read_tensors
from ops.attention import TreeMask, tree_attention
from ops.device import gpu_problem
from ops.embed_rope import embed, rope_store
from ops.frequencies import frequencies
from ops.linear import linear, rms_norm
from quant.linear import prepare_linears, quantize_linears, stored_mode


def rope_table(cfg: Config, length: int, device: torch.device | None = None, context: int | None = None) -> Tensor:
    """cos and sin of every position, fp32 [2, length, D]; both halves of D hold the same D/2 angles. context: the
    longest text, by which LongRoPE chooses its frequencies; None: length."""
    inv_freq, factor = frequencies(cfg.rope_theta, cfg.rotated, cfg.rope_scaling, context or length, device)
    angles = torch.arange(length, dtype=torch.float32, device=device)[:, None] * inv_freq  # [length, rotated pairs]
    padding = (0, (cfg.head_dim - cfg.rotated) // 2)  # pairs that are not rotated: cos 1, sin 0
    cos, sin = F.pad(angles.cos() * factor, padding, value=1.0), F.pad(angles.sin() * factor, padding)
    return torch.stack((cos, sin)).repeat(1, 1, 2)


def layer_ropes(cfg: Config, rope: Tensor) -> list[Tensor]:
    """The angles of each layer: `rope` [2, T, D], and for a layer without RoPE (SmolLM3) cos 1 and sin 0."""
    if not cfg.nope_layers:
        return [rope] * cfg.num_layers
    no_rope = torch.zeros_like(rope)
    no_rope[0] = 1
    return [no_rope if i in cfg.nope_layers else rope for i in range(cfg.num_layers)]


def apply_rope(x: Tensor, rope: Tensor) -> Tensor:
    """Rotate x [..., T, heads, D] by rope [2, ..., T, D] (Hugging Face's layout: element i pairs with i + D/2)."""
    cos, sin = rope.unsqueeze(-2).unbind(0)  # [..., T, 1, D]
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
    """One decoder layer. The EAGLE head's has norm_input=False, since its input is made of normed features."""

    def __init__(self, cfg: Config, *, qkv_bias: bool = False, norm_input: bool = True) -> None:
        super().__init__()
        self.num_heads = cfg.num_heads
        self.num_kv_heads = cfg.num_kv_heads
        self.head_dim = cfg.head_dim
        self.attn_norm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps) if norm_input else None
        self.wqkv = nn.Linear(cfg.hidden_size, (cfg.num_heads + 2 * cfg.num_kv_heads) * cfg.head_dim, bias=qkv_bias)
        self.q_norm = RMSNorm(cfg.head_dim, cfg.rms_norm_eps) if cfg.qk_norm else None
        self.k_norm = RMSNorm(cfg.head_dim, cfg.rms_norm_eps) if cfg.qk_norm else None
        self.wo = nn.Linear(cfg.num_heads * cfg.head_dim, cfg.hidden_size, bias=False)
        self.mlp_norm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.w13 = nn.Linear(cfg.hidden_size, 2 * cfg.intermediate_size, bias=False)  # gate and up, one below the other
        self.w2 = nn.Linear(cfg.intermediate_size, cfg.hidden_size, bias=False)

    def forward(self, x: Tensor, rope: Tensor, kv: Tensor | None, cache_pos: Tensor | None,
                mask: Tensor | TreeMask | None, residual: Tensor | None = None) -> Tensor:
        """x [B, T, C], rope [2, T, D], kv [2, B, K, S, D], cache_pos [T], mask [T, W] -> [B, T, C].

        residual [B, T, C]: what attention's output is added to, by default x (an EAGLE-3 head reads more than that).
        GPU, bf16 weights, no q/k norms: 5 kernels, 6 with split attention, 2 more for 17 to 128 rows. RoPE, the gate,
        the residuals and, up to 16 rows, the norms are fused into the matrix products."""
        residual = x if residual is None else residual
        return self.mlp(linear(self.attention(x, rope, kv, cache_pos, mask), self.wo.weight, self.wo.bias,
                               residual=residual))

    def mlp(self, x: Tensor) -> Tensor:
        """x + w2(silu(w1(norm(x))) * w3(norm(x)))"""
        gated = linear(x, self.w13.weight, self.w13.bias, (self.mlp_norm.weight, self.mlp_norm.eps), gated=True)
        return linear(gated, self.w2.weight, self.w2.bias, residual=x)

    def attention(self, x: Tensor, rope: Tensor, kv: Tensor | None, cache_pos: Tensor | None,
                  mask: Tensor | TreeMask | None) -> Tensor:
        """The attention output before wo, [B, T, H * D]. Without a cache: causal among the T tokens, for training."""
        if isinstance(mask, TreeMask):  # our kernels store keys and values and read the mask as bits
            q = self.project(x[0], (rope, cache_pos, kv[:, 0])).unflatten(-1, (-1, self.head_dim))
            return tree_attention(q, kv[:, 0], *mask)[None]
        q, k, v = (y.transpose(1, 2) for y in self.qkv(x, rope))  # [B, heads, T, D]
        if kv is None:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        else:
            kv.index_copy_(3, cache_pos, torch.stack((k, v)))
            k, v = kv[:, :, :, :mask.shape[-1]].unbind(0)  # [B, K, W, D]
            # The H/K query heads that share a key become rows of one matrix, so that no key is repeated.
            q = q.reshape(q.shape[0], self.num_kv_heads, -1, self.head_dim)  # [B, K, H/K * T, D]
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask.repeat(self.num_heads // self.num_kv_heads, 1))
            y = y.reshape(y.shape[0], self.num_heads, -1, self.head_dim)
        return y.transpose(1, 2).flatten(2)

    def qkv(self, x: Tensor, rope: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated q [B, T, H, D], rotated k [B, T, K, D] and v [B, T, K, D] of x [B, T, C]."""
        sizes = (self.num_heads, self.num_kv_heads, self.num_kv_heads)
        q, k, v = self.project(x).unflatten(-1, (-1, self.head_dim)).split(sizes, dim=2)
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return apply_rope(q, rope), apply_rope(k, rope), v

    def project(self, x: Tensor, rope_cache: tuple[Tensor, Tensor, Tensor] | None = None) -> Tensor:
        """Norm x [..., C] and project it to queries, keys and values side by side, [..., (H + 2K) D].

        With `rope_cache` (rope, cache_pos, kv: see ops.linear.linear) keys and values go to the cache, and only the
        rotated queries are returned, [T, H * D]."""
        norm = None if self.attn_norm is None else (self.attn_norm.weight, self.attn_norm.eps)
        if rope_cache is None or self.q_norm is None:
            return linear(x, self.wqkv.weight, self.wqkv.bias, norm, rope_cache=rope_cache)
        qk_norms = (self.q_norm.weight, self.k_norm.weight, self.q_norm.eps)
        return rope_store(linear(x, self.wqkv.weight, self.wqkv.bias, norm), *rope_cache, *qk_norms).flatten(1)


class Llama(nn.Module):
    """The target model and its KV cache. Several engines may share it; one of them writes a sequence at a time. They
    share the RoPE table too. LongRoPE's depends on max_seq_len, which must be the same for all of them."""

    def __init__(self, cfg: Config, *, qkv_bias: bool = False) -> None:
        super().__init__()
        self.cfg = cfg
        self.embed = empty_embedding(cfg.vocab_size, cfg.hidden_size)
        self.layers = nn.ModuleList(Layer(cfg, qkv_bias=qkv_bias) for _ in range(cfg.num_layers))
        self.norm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.lm_head = nn.Linear(cfg.hidden_size, cfg.vocab_size, bias=False)
        if cfg.tie_word_embeddings:
            self.lm_head.weight = self.embed.weight
        self.kv: Tensor | None = None  # [L, 2, B, K, S, D]
        self.rope: Tensor | None = None  # [2, S, D]

    def allocate_cache(self, max_seq_len: int, spare: int = 0, batch: int = 1) -> None:
        """Allocate the KV cache and the RoPE table for max_seq_len + spare slots, once for all prompts that follow. The
        spare slots hold drafts that reach beyond the last token that may be committed."""
        cfg, weight = self.cfg, self.embed.weight
        cfg.check_length(max_seq_len)
        slots = max_seq_len + spare
        kv = weight.new_zeros(cfg.num_layers, 2, batch, cfg.num_kv_heads, slots, cfg.head_dim)
        self.allocate_rope(slots, max_seq_len)
        self.kv = kv  # last: if memory runs out before, the old cache and its size stay valid

    def allocate_rope(self, length: int, context: int | None = None) -> None:
        """All that a forward without a cache needs, of texts up to this length. context: see rope_table."""
        weight = self.embed.weight
        self.rope = rope_table(self.cfg, length, weight.device, context).to(weight.dtype)

    def free_cache(self) -> None:
        self.kv = None

    def forward(self, tokens: Tensor, rope_pos: Tensor, cache_pos: Tensor | None = None,
                mask: Tensor | TreeMask | None = None) -> Tensor:
        """The features, [B, T, C]: hidden states after the final norm, which the lm_head reads.

        tokens [B, T] int64; rope_pos [T] int64, positions in the text; cache_pos [T] int64, distinct slots to write;
        mask [T, W] bool, or additive in the weights' dtype: which of the first W slots each row sees after the write.
        With B = 1 better a TreeMask, which our attention kernels read as it is.
        Without cache_pos and mask: no cache, causal among the T tokens.
        """
        return self.forward_with_taps(tokens, rope_pos, cache_pos, mask)[0]

    def forward_with_taps(self, tokens: Tensor, rope_pos: Tensor, cache_pos: Tensor | None = None,
                          mask: Tensor | TreeMask | None = None, taps: tuple[int, ...] = ()
                          ) -> tuple[Tensor, Tensor]:
        """The features, as `forward` returns them, and the drafter's input: the residual stream at each of `taps`,
        concatenated, [B, T, len(taps) * C]; without taps the features. taps are ascending: i is the input of layer i
        (0: the embeddings), num_layers the last layer's output before the final norm."""
        x, rope = embed(self.embed.weight, tokens, self.rope, rope_pos)
        tapped = []
        for i, (layer, angles) in enumerate(zip(self.layers, layer_ropes(self.cfg, rope))):
            if i in taps:
                tapped.append(x)
            x = layer(x, angles, None if cache_pos is None else self.kv[i], cache_pos, mask)
        if len(self.layers) in taps:
            tapped.append(x)
        features = rms_norm(x, self.norm.weight, self.norm.eps)
        return features, torch.cat(tapped, -1) if tapped else features


def load_model(path: Path | str, device: torch.device | str = "cpu", dtype: torch.dtype | None = None,
               quantize: str | None = None, group: int = 128) -> Llama:
    """Load a converted checkpoint: its folder, or one model file in it, such as quantize.py writes.

    dtype None keeps the file's. quantize: convert to this mode while loading, one tensor at a time, so that `device`
    needs room for the result only. Raises FileNotFoundError or ValueError with one line that says what to do."""
    path = Path(path)
    if not path.exists():
        maker = "quantize.py" if path.name.startswith("model-int") else "convert_hf_checkpoint.py"
        raise FileNotFoundError(f"{path}: no such checkpoint; make one with {maker}")
    file = path / "model.safetensors" if path.is_dir() else path
    cfg = Config.load(file.parent)
    tensors, metadata = read_tensors(file)
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{file}: not a converted checkpoint; run `python convert_hf_checkpoint.py {file.parent}`")
    mode, stored_group = stored_mode(file, metadata, quantize)
    if problem := gpu_problem(torch.device(device).type):
        raise ValueError(problem)
    with torch.device("meta"):
        model = Llama(cfg, qkv_bias="layers.0.wqkv.bias" in tensors)
    prepare_linears(model, tensors, mode, stored_group)
    tied = cfg.tie_word_embeddings and "lm_head.data" not in tensors
    placement = ("cpu", None) if quantize else (device, dtype)
    if tied and "embed.weight" in tensors:  # moved once here: `fill` would make two tensors of it
        tensors["embed.weight"] = tensors["lm_head.weight"] = tensors["embed.weight"].to(*placement)
    fill(model, tensors, file, *placement)
    if quantize:
        quantize_linears(model, quantize, group, device)
        return model.to(device, dtype)
    if tied:
        model.lm_head.weight = model.embed.weight  # `fill` made two parameters of the one tensor
    return model
