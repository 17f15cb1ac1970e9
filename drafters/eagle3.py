"""EAGLE-3 draft heads (arXiv 2503.01840), as six publishers write them (formats/eagle3.py).

    python generate.py --checkpoint checkpoints/Qwen/Qwen2.5-Coder-1.5B-Instruct --eagle3 --prompt "Write a queue."

Three things differ from EAGLE-1 and EAGLE-2 (draft.py). The head drafts from *taps*: the target's residual stream at
three depths, which one linear layer, fc, joins. Its own predictions are fed back as they are, without fc. And it has
an lm_head of its own, often over a part of the vocabulary. The trees are the same: EAGLE-2's, or EAGLE-1's fixed one.

    g      = fc([tap_1; ...; tap_k])              at the first level; at later levels the parent's h
    x      = [norm(embedding(token)); norm(g)]    2H wide
    h      = g + attention(x);  h = h + mlp(norm(h))
    logits = lm_head(norm(h))

Row i pairs the taps of token i with token i + 1 and has RoPE position i, as in EAGLE-2.

Shapes: T rows, H the head's width, C the target's, k taps, V tokens, S cache slots, D head size.
"""
from collections.abc import Collection

import torch
from torch import Tensor, nn

from drafters.tapped import TappedHead
from formats.eagle3 import Eagle3Config
from model import Layer, Llama, RMSNorm
from ops.attention import TreeMask
from ops.embed_rope import embed_pair
from ops.linear import linear, rms_norm
from quant.draft_rows import DraftRows

PLAIN = ("fc.weight", "norm.weight", "lm_head.weight")  # the optional tensors that the original EAGLE-3 has


class Eagle3Layer(Layer):
    """A Llama layer. `wide`: it reads an embedding and a feature side by side, each normed, as the first layer does."""

    def __init__(self, cfg: Eagle3Config, i: int, names: Collection[str]) -> None:
        size, sizes = cfg.layer.hidden_size, cfg.layer
        bias = {name: f"layers.{i}.{name}.bias" in names for name in ("wqkv", "wo", "w13", "w2")}
        self.wide = cfg.wide[i]
        super().__init__(sizes, qkv_bias=bias["wqkv"], norm_input=not self.wide)
        if self.wide:
            self.wqkv = nn.Linear(2 * size, self.wqkv.out_features, bias=bias["wqkv"])
            self.embed_norm = RMSNorm(size, sizes.rms_norm_eps)
            self.feature_norm = RMSNorm(size, sizes.rms_norm_eps)
        for name in ("wo", "w13", "w2"):
            if bias[name]:
                plain = getattr(self, name)
                setattr(self, name, nn.Linear(plain.in_features, plain.out_features))


class Eagle3Head(TappedHead):
    """The weights of a head, and its KV cache. `names`: those of its tensors, which decide what parts there are."""
    folder = "eagle3"

    def __init__(self, cfg: Eagle3Config, names: Collection[str] = PLAIN) -> None:
        super().__init__(cfg, names)
        size, eps = cfg.layer.hidden_size, cfg.layer.rms_norm_eps
        inputs = len(cfg.taps) * cfg.target_size
        self.input_norm = RMSNorm(inputs, eps) if "input_norm.weight" in names else None
        per_tap = [RMSNorm(cfg.target_size, eps) for _ in cfg.taps] if "fc_norms.0.weight" in names else []
        self.fc_norms = nn.ModuleList(per_tap)
        self.fc = nn.Linear(inputs, size, bias="fc.bias" in names) if cfg.taps else None
        self.layers = nn.ModuleList(Eagle3Layer(cfg, i, names) for i in range(cfg.layer.num_layers))
        self.norm = RMSNorm(size, eps) if "norm.weight" in names else None

    def allocate_cache(self, slots: int) -> None:
        """As TappedHead.allocate_cache. ValueError beyond the head's own sliding window, and beyond the length up to
        which dynamic RoPE is plain RoPE."""
        limit = self.cfg.layer.context_limit
        if limit and slots > limit:
            raise ValueError(f"this head's attention beyond {limit} tokens is not implemented: use a smaller "
                             "--max_seq_len")
        super().allocate_cache(slots)

    def bind(self, target: Llama) -> "BoundHead3":
        return BoundHead3(self, target)

    def join(self, taps: Tensor) -> Tensor:
        """The first step's input g [..., H]: fc of the target's taps [..., k * C], normed first if the head has norms.
        A head without fc: its features [..., C], unchanged."""
        if self.fc is None:
            return taps
        if self.fc_norms:
            parts = taps.chunk(len(self.fc_norms), -1)
            taps = torch.cat([rms_norm(part, norm.weight, norm.eps)
                              for part, norm in zip(parts, self.fc_norms)], -1)
        norm = None if self.input_norm is None else (self.input_norm.weight, self.input_norm.eps)
        return linear(taps, self.fc.weight, self.fc.bias, norm)


class BoundHead3:
    """An EAGLE-3 head with the target that it drafts for, as draft.BoundHead. The head's inputs are g: fc of the
    target's taps, or from the second level on its own hidden states h, without fc."""

    def __init__(self, head: Eagle3Head, target: Llama) -> None:
        self.head = head
        self.taps = head.cfg.taps
        self.table = (target if head.embed is None else head).embed.weight
        lm_head = (target if head.lm_head is None else head).lm_head.weight
        self.draft_rows = DraftRows(lm_head, head.vocab, head.quantized)
        self.ids, self.lm_head = self.draft_rows.ids, self.draft_rows.weights[0]

    def weights(self) -> tuple[tuple, tuple, tuple]:
        """As BoundHead.weights."""
        return (self.head.fc,) if self.taps else (), (self.head.layers, self.lm_head), ()

    def make_inputs(self, hidden: Tensor) -> Tensor:
        """What the head drafts from, [T, H], of the target's taps or features."""
        return self.head.join(hidden)

    def predict(self, tokens: Tensor, inputs: Tensor, parent_rows: Tensor | None, rope_pos: Tensor, cache_pos: Tensor,
                mask: Tensor | TreeMask) -> Tensor:
        """The hidden states h [T, H] after tokens [T]. Row parent_rows[i] of `inputs` [any, H] (without parent_rows:
        row i) is g before token i."""
        head = self.head
        h, rows = inputs, parent_rows
        for layer, kv in zip(head.layers, head.kv):
            if layer.wide:
                x, residual, rope = embed_pair(self.table, tokens, layer.embed_norm.weight, h, rows,
                                               layer.feature_norm.weight, layer.embed_norm.eps, head.rope, rope_pos,
                                               head.cfg.norm_before_residual)
                h = layer(x[None], rope, kv, cache_pos, mask, residual[None])[0]
            else:
                h = layer(h[None], rope, kv, cache_pos, mask)[0]
            rows = None
        return h

    def read_logits(self, h: Tensor, last: bool) -> tuple[Tensor, Tensor]:
        """The logits [N, Vd] of the tokens below hidden states h [N, H], at least fp32, and the inputs of the next
        level, [N, H]."""
        norm = None if self.head.norm is None else (self.head.norm.weight, self.head.norm.eps)
        if self.head.cfg.norm_output:
            h = rms_norm(h, *norm)
            norm = None
        dtype = torch.promote_types(h.dtype, torch.float32)
        return linear(h, self.lm_head, norm=norm, dtype=dtype), h
