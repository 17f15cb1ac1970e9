"""The demo model in the clothes of a large one: any shape, a small model's text, for benchmarks.

How fast drafting makes a 7B depends on what a 7B costs and on how often real drafts of real text are accepted. A
small trained model, embedded exactly in the large shape, has both: every weight of the large one is read and
multiplied, and text and acceptance are those of the small one. Numbers measured with it must say what they are.

    wide = widen_model(model, SHAPES["llama-3-8b"], device="cuda", dtype=torch.bfloat16)
    wide_head = widen_head(head, SHAPES["llama-3-8b"], device="cuda", dtype=torch.bfloat16)

A unit of the large model (a channel, a head dimension, an MLP unit) is either live, with its value from the small
model, or dead and exactly zero. Weights from live units to dead ones are zero; weights that read dead ones do
not matter, so they are noise, as are queries and keys of heads without values and gates without ups. Noise moves
through a GPU as trained weights do; zeros would draw less power. Where sizes go from C to C', D to D':
  channels   RMSNorm divides by C' instead of C: its weights are scaled by sqrt(C / C') and eps by C / C'.
  RoPE       frequency i of the small table, base^(-2i / D), is frequency i D'/D of the wide one, and its pair goes
             there. Scores are divided by sqrt(D') instead of sqrt(D), so keys grow by sqrt(D' / D); queries could
             as well, but a model has more of them to round.
  heads      a query head goes to a slot that reads its key/value head, which is repeated where fewer slots share
             one than before. A slot without a query of its own reads live values all the same: `wo` ignores it.
  padding    ids that the small model does not have must never be chosen, nor take probability. A padding row is the
             mean of all real rows, and a mean of logits is never above the highest; and it has a large negative
             weight on a spare channel that holds a constant (bias_channel), which takes it far below.
In half precision two things are rounded that the small model has exactly: norm weights, and keys where D' / D is no
power of 4 (sqrt(2) times a bf16 number is none). A small model in fp32 is rounded once, here, and never before.
"""
import argparse
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from app.options import DTYPES
from draft import EagleHead, Vanilla
from drafters.medusa import MedusaHeads
from engine import Engine
from formats.config import Config
from model import Layer, Llama, RMSNorm
from ops.quantized import Quantized
from quant.linear import quantize_linears

# The fields of Config that make a shape. The others stay the small model's, RoPE above all: the text is its own.
FIELDS = ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "head_dim")
SHAPES = {"llama-2-7b": dict(zip(FIELDS, (32000, 4096, 11008, 32, 32, 32, 128))),
          "llama-2-13b": dict(zip(FIELDS, (32000, 5120, 13824, 40, 40, 40, 128))),
          "llama-3-8b": dict(zip(FIELDS, (128256, 4096, 14336, 32, 32, 8, 128)))}
PADDING = -2.0**15  # what padding rows of the lm_head weigh the constant channel with; fp16 holds it


def widen_model(model: Llama, shape: dict[str, int], keep_ids: list[int] | None = None,
                device: torch.device | str = "cpu", dtype: torch.dtype = torch.bfloat16,
                generator: torch.Generator | None = None, quantize: tuple[str, int] | None = None) -> Llama:
    """`model` in `shape`, untied, built on `device` tensor by tensor. `generator`, of that device, makes the noise.
    Id i of the wide model is id keep_ids[i] of the small one, so keep_ids is also the map that decodes; None keeps
    all in place. Ids beyond are padding. quantize (mode, group): layer by layer, so that at most one is there
    unquantised. Raises ValueError where the shape or the ids do not fit."""
    small, wide = model.cfg, wide_config(model.cfg, shape)
    keep_ids = list(range(small.vocab_size)) if keep_ids is None else keep_ids
    kept, size = len(keep_ids), small.hidden_size
    if not 0 < kept <= wide.vocab_size or len(set(keep_ids) & set(range(small.vocab_size))) < kept:
        raise ValueError(f"keep_ids should be 1 to {wide.vocab_size} distinct ids below {small.vocab_size}")
    noise = partial(torch.normal, 0.0, 0.02, generator=generator, device=device, dtype=dtype)
    embed = torch.zeros(wide.vocab_size, wide.hidden_size, device=device, dtype=dtype)  # dead channels start at zero
    embed[:kept, :size] = model.embed.weight[keep_ids].to(embed)
    embed[:, size] = bias_channel(small)
    rows, lm_head = model.lm_head.weight[keep_ids], noise((wide.vocab_size, wide.hidden_size))
    put(lm_head, slice(kept), rows)
    put(lm_head, slice(kept, None), rows.double().mean(0, keepdim=True), PADDING)
    norm = widen_norm(model.norm, wide, embed)
    norm[size] = 64  # the constant is small against a residual stream of many layers
    with torch.device("meta"):
        result = Llama(wide)
    for i, layer in enumerate([*model.layers] + [None] * (wide.num_layers - small.num_layers)):
        result.layers[i] = build(partial(Layer, wide), widen_layer(layer, small, wide, noise), quantize)
    result.load_state_dict({"embed.weight": embed, "lm_head.weight": lm_head, "norm.weight": norm}, False, assign=True)
    if quantize:
        quantize_linears(result, *quantize)  # the one that is left is the lm_head
    return result.requires_grad_(False).eval()


def widen_head(head: EagleHead, shape: dict[str, int], device: torch.device | str = "cpu",
               dtype: torch.dtype = torch.bfloat16, generator: torch.Generator | None = None) -> EagleHead:
    """A small model's draft head for the model that widen_model makes of it, with the same `shape`. Its fc has a
    bias, as in published heads, whether or not the small one has: it writes the constant channel."""
    small, wide = head.cfg, wide_config(head.cfg, shape | {"num_layers": 1})
    noise = partial(torch.normal, 0.0, 0.02, generator=generator, device=device, dtype=dtype)
    tensors = {f"layer.{name}": tensor for name, tensor in widen_layer(head.layer, small, wide, noise).items()}
    fc = noise((wide.hidden_size, 2 * wide.hidden_size))
    for half, old in zip(fc.chunk(2, dim=1), head.fc.weight.chunk(2, dim=1)):  # of the embedding, of the feature
        put(half, slice(None), F.pad(old, (0, 0, 0, wide.hidden_size - small.hidden_size)))
    bias = fc.new_zeros(wide.hidden_size)
    bias[:small.hidden_size] = 0 if head.fc.bias is None else head.fc.bias.to(bias)
    bias[small.hidden_size] = bias_channel(small)
    return build(partial(EagleHead, wide, fc_bias=True), tensors | {"fc.weight": fc, "fc.bias": bias})


def build(module: Callable[[], nn.Module], tensors: dict[str, Tensor], quantize: tuple[str, int] | None = None
          ) -> nn.Module:
    with torch.device("meta"):
        result = module()
    result.load_state_dict(tensors, assign=True)
    if quantize:
        quantize_linears(result, *quantize)
    return result.requires_grad_(False).eval()


def wide_config(small: Config, shape: dict[str, int]) -> Config:
    """`small` with the sizes of `shape`; ValueError where it does not fit in."""
    wide, c = replace(small, **shape, tie_word_embeddings=False), bias_channel(small)
    if wide.head_dim % small.head_dim or wide.num_heads % wide.num_kv_heads or small.qk_norm:
        raise ValueError(f"a shape with head_dim {wide.head_dim}, {wide.num_heads} heads and {wide.num_kv_heads} "
                         f"key/value heads cannot hold heads of {small.head_dim}, nor any that are normed")
    repeat = -(-small.num_heads * wide.num_kv_heads // (small.num_kv_heads * wide.num_heads))  # as in widen_layer
    needs = {"hidden_size": small.hidden_size + 1, "intermediate_size": small.intermediate_size,
             "num_layers": small.num_layers, "num_kv_heads": small.num_kv_heads * repeat}
    for field, least in needs.items():
        if getattr(wide, field) < least:
            raise ValueError(f"this model needs a shape with {field} {least} or more, not {getattr(wide, field)}")
    return replace(wide, rms_norm_eps=(small.hidden_size * small.rms_norm_eps - c * c) / wide.hidden_size)


def bias_channel(small: Config) -> float:
    """The constant c that channel C of the residual stream holds. RMSNorm sees sum x^2 + c^2 + C' eps' where the small
    model has sum x^2 + C eps: no c^2 <= C eps is noticed if eps' gives way. A power of 2, exact in every dtype."""
    return 2.0 ** math.floor(math.log2(small.hidden_size * small.rms_norm_eps) / 2)


def put(weight: Tensor, rows: Tensor | slice, block: Tensor, constant: float = 0) -> None:
    """Let `rows` of a matrix [..., C'] that reads the residual stream read its live channels with `block` [..., C]."""
    weight[rows, ..., :block.shape[-1] + 1] = F.pad(block, (0, 1), value=constant).to(weight)


def widen_norm(norm: RMSNorm, wide: Config, like: Tensor) -> Tensor:
    weight, size = like.new_ones(wide.hidden_size), len(norm.weight)
    weight[:size] = (norm.weight.double() * (size / wide.hidden_size)**0.5).to(like)
    return weight


def widen_layer(layer: Layer | None, small: Config, wide: Config, noise: Callable[..., Tensor]) -> dict[str, Tensor]:
    """The tensors of `layer` in the wide shape; without one, those of a layer that adds exactly zero."""
    size, units, heads, kv_heads = small.hidden_size, small.intermediate_size, small.num_heads, small.num_kv_heads
    wqkv = noise(((wide.num_heads + 2 * wide.num_kv_heads) * wide.head_dim, wide.hidden_size))
    wo, w2 = (noise((wide.hidden_size, n)) for n in (wide.num_heads * wide.head_dim, wide.intermediate_size))
    w13 = noise((2 * wide.intermediate_size, wide.hidden_size))
    q_rows, k_rows, v_rows = wqkv.unflatten(0, (-1, wide.head_dim)).split(  # views [heads, D', C']
        (wide.num_heads, wide.num_kv_heads, wide.num_kv_heads))
    v_rows[:, :, :size + 1] = 0
    w13[wide.intermediate_size:, :size + 1] = 0
    tensors = {"wqkv.weight": wqkv, "wo.weight": wo, "w13.weight": w13, "w2.weight": w2}
    if layer is None:
        return tensors | {f"{norm}.weight": wqkv.new_ones(wide.hidden_size) for norm in ("attn_norm", "mlp_norm")}
    if layer.wqkv.bias is not None:
        raise ValueError("biases of queries, keys and values do not widen: the Llama shapes have none")
    group, wide_group, head = heads // kv_heads, wide.num_heads // wide.num_kv_heads, torch.arange(heads)
    repeat = -(-group // wide_group)  # how often a key/value head is repeated until each of its queries has a slot
    live = kv_heads * repeat  # of the wide key/value heads the first `live` are in use
    slots = (head // group * repeat + head % group // wide_group) * wide_group + head % group % wide_group
    q, k, v = layer.wqkv.weight.unflatten(0, (-1, small.head_dim)).split((heads, kv_heads, kv_heads))  # [heads, D, C]
    ratio = wide.head_dim // small.head_dim  # element i of a half goes to i * ratio of a half: i * ratio of the whole
    k_rows[:live, :, :size + 1] = 0  # the spare elements of a live key would meet noise in its queries
    put(q_rows[:, ::ratio], slots, q)
    put(k_rows[:, ::ratio], slice(live), k.repeat_interleave(repeat, 0).double() * ratio**0.5)
    put(v_rows[:, ::ratio], slice(live), v.repeat_interleave(repeat, 0))
    wo_columns = wo.unflatten(1, (-1, wide.head_dim))[:, :, ::ratio]  # a view [C', H', D]
    wo_columns[:, :live * wide_group] = 0  # all that live values reach
    wo_columns[:size, slots] = layer.wo.weight.unflatten(1, (-1, small.head_dim)).to(wo)
    for rows, block in zip(w13.chunk(2), layer.w13.weight.chunk(2)):  # gates, ups
        put(rows, slice(units), block)
    w2[:, :units] = F.pad(layer.w2.weight, (0, 0, 0, wide.hidden_size - size)).to(w2)
    norms = {name: widen_norm(norm, wide, wqkv) for name, norm in layer.named_children() if isinstance(norm, RMSNorm)}
    return tensors | {f"{name}.weight": weight for name, weight in norms.items()}


def keep_ids(used: set[int], vocab_size: int, size: int) -> list[int]:
    """Which ids of a small vocabulary a model of `size` ids keeps, ascending: those in use, then the lowest, which are
    the special ones, the bytes and the earliest merges, so the most frequent."""
    if len(used) > size:
        raise ValueError(f"prompts and answers use {len(used)} different ids, the shape has {size}: fewer --questions")
    rest = (i for i in range(vocab_size) if i not in used)
    return sorted(used | {i for i, _ in zip(rest, range(size - len(used)))})


class Widening:
    """--shape: the checkpoint's model in fp32, the wide one, and how prompts and drafts get from one to the other. What
    drafts is loaded for `small`, without --quantize, and then goes through `head`, `medusa` or `draft_model`."""

    def __init__(self, args: argparse.Namespace, small: Llama, prompts: list[list[int]], stop: frozenset[int]) -> None:
        if isinstance(small.lm_head.weight, Quantized):
            raise ValueError("--shape widens unquantised weights: quantise the result with --quantize")
        self.small, self.shape, size = small, SHAPES[args.shape], small.cfg.vocab_size
        self.how = (args.quantize, args.group or 128) if args.quantize else None
        used = {*stop, *(i for ids in prompts for i in ids)}
        if self.shape["vocab_size"] < size:  # what does the model write?
            engine = Engine(small, Vanilla(args.device), max(map(len, prompts)) + args.max_new_tokens, stop)
            for ids in prompts:
                used.update(*engine.generate(ids, args.max_new_tokens))
        self.keep = keep = keep_ids(used, size, self.shape["vocab_size"])
        self.place = {old: new for new, old in enumerate(keep)}
        self.where = (args.device, DTYPES[args.dtype], torch.Generator(args.device).manual_seed(0))  # the last: noise
        self.model = widen_model(small, self.shape, keep, *self.where, self.how)
        small.free_cache()

    def ids(self, small: list[int]) -> list[int]:
        return [self.place[i] for i in small]

    def head(self, small: EagleHead) -> EagleHead:
        if small.of_embedding is not None:
            raise ValueError("--shape widens unquantised weights: quantise the result with --quantize")
        head = widen_head(small, self.shape, *self.where)
        if self.how:
            head.quantize(*self.how)
        if small.vocab is not None:
            kept = [self.place[i] for i in small.vocab.tolist() if i in self.place]
            head.vocab = torch.tensor(kept, device=self.where[0])
        return head

    def medusa(self, small: MedusaHeads) -> MedusaHeads:
        """Dead channels of a feature stay zero, and its constant channel what it is."""
        device, dtype, noise = self.where
        (layers, count, size, _), wide = small.weight.shape, self.shape["hidden_size"]
        own = small.projections is not None
        with torch.device("meta"):
            heads = MedusaHeads(wide, count, layers, self.shape["vocab_size"] if own else None)
        tensors = {name: torch.normal(0.0, 0.02, t.shape, generator=noise, device=device, dtype=dtype)
                   for name, t in heads.named_parameters()}
        put(tensors["weight"], slice(None), F.pad(small.weight, (0, 0, 0, wide - size)))
        tensors["bias"] = F.pad(small.bias, (0, wide - size)).to(dtype)
        if own:
            put(tensors["projections"][:, :len(self.keep)], slice(None), small.projections[:, self.keep])
            put(tensors["projections"][:, len(self.keep):], slice(None), small.projections.mean(1, True), PADDING)
        heads.load_state_dict(tensors, assign=True)
        return heads.requires_grad_(False)

    def draft_model(self, small: Llama) -> Llama:
        """As small as it is, with the wide model's ids. Ids beyond are copies of the first, which wins their ties."""
        rows = self.keep + self.keep[:1] * (self.shape["vocab_size"] - len(self.keep))
        embed, lm_head = (module.weight.detach()[rows] for module in (small.embed, small.lm_head))
        small.embed, small.lm_head = nn.Embedding.from_pretrained(embed), nn.Linear(1, 1, bias=False)
        small.lm_head.weight, small.cfg = nn.Parameter(lm_head, False), replace(small.cfg, vocab_size=len(rows))
        return small.to(self.where[1])
