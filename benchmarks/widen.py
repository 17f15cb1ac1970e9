"""The demo model in the shape of a large one, for benchmarks: the cost of a 7B, the text of a small model.

How much drafting speeds up a 7B depends on what a 7B costs and on how often real drafts of real text are accepted. A
small trained model, embedded exactly in the large shape, has both: every weight of the large one is read and
multiplied, and text and acceptance are those of the small one. Numbers measured with it must say so.

    wide = widen_model(model, SHAPES["llama-3-8b"], device="cuda", dtype=torch.bfloat16)
    wide_head = widen_head(head, SHAPES["llama-3-8b"], device="cuda", dtype=torch.bfloat16)

A unit of the large model (a channel, a head dimension, an MLP unit) is either live, with its value from the small
model, or dead and exactly zero. Weights from live units to dead ones are zero. Weights that read dead units do not
matter, so they are noise; so are the queries and keys of heads without values, and gates without ups. Noise costs a
GPU as much power as trained weights do; zeros would cost less. Sizes go from C to C', from D to D':
  channels   RMSNorm divides by C' instead of C: its weights are scaled by sqrt(C / C') and eps by C / C'.
  RoPE       Frequency i of the small table, base^(-2i / D), is frequency i D'/D of the wide one, so its pair of
             dimensions goes there. Scores are divided by sqrt(D') instead of sqrt(D), so keys grow by sqrt(D' / D);
             queries could grow instead, but a model has more of them to round.
  heads      A query head goes to a slot (a wide query head) that reads its key/value head. If the wide shape has fewer
             query heads per key/value head, that key/value head is repeated. A slot without a query reads live values
             too, but its columns of `wo` are zero.
  padding    Ids that the small model does not have must never be chosen, nor take probability. A padding row of the
             lm_head is the mean of all real rows, and a mean of logits is never above the highest. In addition it has a
             large negative weight on a spare channel that holds a constant (bias_channel), which takes it far below.
In half precision two things are rounded that the small model has exactly: norm weights, and keys where D' / D is no
power of 4 (a bf16 number times sqrt(2) is not a bf16 number). A small model in fp32 is rounded once, here.
"""
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from draft import EagleHead
from formats.config import Config
from model import Layer, Llama, RMSNorm
from quant.linear import quantize_linears

# The fields of Config that make a shape. All others stay the small model's, RoPE above all: the text depends on them.
FIELDS = ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "head_dim")
SHAPES = {"llama-2-7b": dict(zip(FIELDS, (32000, 4096, 11008, 32, 32, 32, 128))),
          "llama-2-13b": dict(zip(FIELDS, (32000, 5120, 13824, 40, 40, 40, 128))),
          "llama-3-8b": dict(zip(FIELDS, (128256, 4096, 14336, 32, 32, 8, 128)))}
PADDING = -2.0**15  # the weight of padding rows of the lm_head on the constant channel; fp16 can hold it

Noise = Callable[[tuple[int, ...]], Tensor]  # from a shape to random weights


# ----- Models and heads --------------------------------------------------------------------------------------------


def widen_model(model: Llama, shape: dict[str, int], kept_ids: list[int] | None = None,
                device: torch.device | str = "cpu", dtype: torch.dtype = torch.bfloat16,
                generator: torch.Generator | None = None, quantize: tuple[str, int] | None = None) -> Llama:
    """`model` in `shape`, with untied embeddings, built on `device` tensor by tensor.

    kept_ids: id i of the wide model is id kept_ids[i] of the small one, so the list also translates back; None keeps
    all ids in place. Ids beyond the list are padding. generator: makes the noise, on `device`. quantize (mode, group):
    quantises layer by layer, so that never more than one layer is in memory unquantised.

    ValueError where the shape or the ids do not fit.
    """
    small, wide = model.cfg, wide_config(model.cfg, shape)
    kept_ids = list(range(small.vocab_size)) if kept_ids is None else kept_ids
    kept = len(kept_ids)
    size = small.hidden_size
    if not 0 < kept <= wide.vocab_size or len(set(kept_ids) & set(range(small.vocab_size))) < kept:
        raise ValueError(f"kept_ids should be 1 to {wide.vocab_size} distinct ids below {small.vocab_size}")
    noise = partial(torch.normal, 0.0, 0.02, generator=generator, device=device, dtype=dtype)
    embed = torch.zeros(wide.vocab_size, wide.hidden_size, device=device, dtype=dtype)  # dead channels start at zero
    embed[:kept, :size] = model.embed.weight[kept_ids].to(embed)
    embed[:, size] = bias_channel(small)
    lm_head = noise((wide.vocab_size, wide.hidden_size))
    rows = model.lm_head.weight[kept_ids]
    write_live_columns(lm_head, slice(kept), rows)
    write_live_columns(lm_head, slice(kept, None), rows.double().mean(0, keepdim=True), PADDING)
    norm = widen_norm(model.norm, wide, embed)
    norm[size] = 64  # the constant is small beside a residual stream of many layers
    with torch.device("meta"):
        result = Llama(wide)
    added = wide.num_layers - small.num_layers
    for i, layer in enumerate([*model.layers] + [None] * added):
        result.layers[i] = build(partial(Layer, wide), widen_layer(layer, small, wide, noise), quantize)
    result.load_state_dict({"embed.weight": embed, "lm_head.weight": lm_head, "norm.weight": norm}, False, assign=True)
    if quantize:
        quantize_linears(result, *quantize)  # only the lm_head is left
    return result.requires_grad_(False).eval()


def widen_head(head: EagleHead, shape: dict[str, int], device: torch.device | str = "cpu",
               dtype: torch.dtype = torch.bfloat16, generator: torch.Generator | None = None) -> EagleHead:
    """The draft head for the model that widen_model makes with the same `shape`. Its fc has a bias, as in published
    heads, even if the small one has none: the bias writes the constant channel."""
    small, wide = head.cfg, wide_config(head.cfg, shape | {"num_layers": 1})
    noise = partial(torch.normal, 0.0, 0.02, generator=generator, device=device, dtype=dtype)
    tensors = {f"layer.{name}": tensor for name, tensor in widen_layer(head.layer, small, wide, noise).items()}
    fc = noise((wide.hidden_size, 2 * wide.hidden_size))
    dead = wide.hidden_size - small.hidden_size
    for half, small_half in zip(fc.chunk(2, dim=1), head.fc.weight.chunk(2, dim=1)):  # of the embedding, of the feature
        write_live_columns(half, slice(None), F.pad(small_half, (0, 0, 0, dead)))
    bias = fc.new_zeros(wide.hidden_size)
    bias[:small.hidden_size] = 0 if head.fc.bias is None else head.fc.bias.to(bias)
    bias[small.hidden_size] = bias_channel(small)
    return build(partial(EagleHead, wide, fc_bias=True), tensors | {"fc.weight": fc, "fc.bias": bias})


def build(make: Callable[[], nn.Module], tensors: dict[str, Tensor], quantize: tuple[str, int] | None = None
          ) -> nn.Module:
    """The module that `make` makes, with these tensors as its parameters (not copies of them)."""
    with torch.device("meta"):
        result = make()
    result.load_state_dict(tensors, assign=True)
    if quantize:
        quantize_linears(result, *quantize)
    return result.requires_grad_(False).eval()


def wide_config(small: Config, shape: dict[str, int]) -> Config:
    """`small` with the sizes of `shape`; ValueError where the small model does not fit in."""
    wide = replace(small, **shape, tie_word_embeddings=False)
    if wide.head_dim % small.head_dim or wide.num_heads % wide.num_kv_heads or small.qk_norm:
        raise ValueError(f"a shape with head_dim {wide.head_dim}, {wide.num_heads} heads and {wide.num_kv_heads} "
                         f"key/value heads cannot hold heads of {small.head_dim}, nor any that are normed")
    if small.rotary_dim and wide.head_dim != small.head_dim:  # the wide heads' frequencies would be others
        raise ValueError(f"heads of {small.head_dim}, of which {small.rotary_dim} are rotated, do not widen to a shape "
                         f"with head_dim {wide.head_dim}")
    repeat = -(-small.num_heads * wide.num_kv_heads // (small.num_kv_heads * wide.num_heads))  # see widen_attention
    needs = {"hidden_size": small.hidden_size + 1, "intermediate_size": small.intermediate_size,
             "num_layers": small.num_layers, "num_kv_heads": small.num_kv_heads * repeat}
    for field, least in needs.items():
        if getattr(wide, field) < least:
            raise ValueError(f"this model needs a shape with {field} {least} or more, not {getattr(wide, field)}")
    c = bias_channel(small)
    return replace(wide, rms_norm_eps=(small.hidden_size * small.rms_norm_eps - c * c) / wide.hidden_size)


def bias_channel(small: Config) -> float:
    """The constant c that channel C of the residual stream holds.

    RMSNorm sees sum x^2 + c^2 + C' eps' where the small model has sum x^2 + C eps. So a c with c^2 <= C eps changes
    nothing if eps' is reduced by as much. c is a power of 2, which is exact in every dtype.
    """
    return 2.0 ** math.floor(math.log2(small.hidden_size * small.rms_norm_eps) / 2)


# ----- Parts -------------------------------------------------------------------------------------------------------


def write_live_columns(weight: Tensor, rows: Tensor | slice, block: Tensor, constant: float = 0) -> None:
    """Write `block` [..., C] into the columns of weight[rows] [..., C'] that read live channels, and `constant` into
    the column that reads the constant channel. The other columns keep their noise."""
    weight[rows, ..., :block.shape[-1] + 1] = F.pad(block, (0, 1), value=constant).to(weight)


def widen_norm(norm: RMSNorm, wide: Config, like: Tensor) -> Tensor:
    """A norm's weights [C'], with the dtype and device of `like`."""
    weight = like.new_ones(wide.hidden_size)
    size = len(norm.weight)
    weight[:size] = (norm.weight.double() * (size / wide.hidden_size)**0.5).to(like)
    return weight


def widen_layer(layer: Layer | None, small: Config, wide: Config, noise: Noise) -> dict[str, Tensor]:
    """The tensors of `layer` in the wide shape. None: of a layer that adds exactly zero."""
    live = small.hidden_size + 1  # channels, the constant one included
    wqkv = noise(((wide.num_heads + 2 * wide.num_kv_heads) * wide.head_dim, wide.hidden_size))
    wo = noise((wide.hidden_size, wide.num_heads * wide.head_dim))
    w2 = noise((wide.hidden_size, wide.intermediate_size))
    w13 = noise((2 * wide.intermediate_size, wide.hidden_size))
    value_rows = wqkv[(wide.num_heads + wide.num_kv_heads) * wide.head_dim:]
    up_rows = w13[wide.intermediate_size:]
    value_rows[:, :live] = 0  # with values and ups of zero, attention and MLP add zero
    up_rows[:, :live] = 0
    tensors = {"wqkv.weight": wqkv, "wo.weight": wo, "w13.weight": w13, "w2.weight": w2}
    if layer is None:
        return tensors | {f"{norm}.weight": wqkv.new_ones(wide.hidden_size) for norm in ("attn_norm", "mlp_norm")}
    if layer.wqkv.bias is not None:
        raise ValueError("biases of queries, keys and values do not widen: the Llama shapes have none")
    widen_attention(layer, small, wide, wqkv, wo)
    for rows, block in zip(w13.chunk(2), layer.w13.weight.chunk(2)):  # gates, ups
        write_live_columns(rows, slice(small.intermediate_size), block)
    dead = wide.hidden_size - small.hidden_size
    w2[:, :small.intermediate_size] = F.pad(layer.w2.weight, (0, 0, 0, dead)).to(w2)
    norms = {name: widen_norm(norm, wide, wqkv) for name, norm in layer.named_children() if isinstance(norm, RMSNorm)}
    return tensors | {f"{name}.weight": weight for name, weight in norms.items()}


def widen_attention(layer: Layer, small: Config, wide: Config, wqkv: Tensor, wo: Tensor) -> None:
    """Write the heads of `layer` into wqkv and wo, which are noise so far, with values of zero."""
    heads, kv_heads, size = small.num_heads, small.num_kv_heads, small.hidden_size
    group, wide_group = heads // kv_heads, wide.num_heads // wide.num_kv_heads  # queries that share a key/value head
    repeat = -(-group // wide_group)  # how often a key/value head is repeated until each of its queries has a slot
    live_kv = kv_heads * repeat  # the first `live_kv` of the wide key/value heads are in use
    head = torch.arange(heads)
    kv_head, member = head // group, head % group
    slots = (kv_head * repeat + member // wide_group) * wide_group + member % wide_group  # each head's, among H' heads
    q, k, v = layer.wqkv.weight.unflatten(0, (-1, small.head_dim)).split((heads, kv_heads, kv_heads))  # [heads, D, C]
    q_rows, k_rows, v_rows = wqkv.unflatten(0, (-1, wide.head_dim)).split(  # views [heads, D', C']
        (wide.num_heads, wide.num_kv_heads, wide.num_kv_heads))
    ratio = wide.head_dim // small.head_dim  # element i of a half goes to i * ratio of a half: i * ratio of the whole
    k_rows[:live_kv, :, :size + 1] = 0  # else the spare elements of a live key would meet noise in its queries
    write_live_columns(q_rows[:, ::ratio], slots, q)
    write_live_columns(k_rows[:, ::ratio], slice(live_kv), k.repeat_interleave(repeat, 0).double() * ratio**0.5)
    write_live_columns(v_rows[:, ::ratio], slice(live_kv), v.repeat_interleave(repeat, 0))
    wo_columns = wo.unflatten(1, (-1, wide.head_dim))[:, :, ::ratio]  # a view [C', H', D]
    wo_columns[:, :live_kv * wide_group] = 0  # every slot that reads live values, also those without a query
    wo_columns[:size, slots] = layer.wo.weight.unflatten(1, (-1, small.head_dim)).to(wo)
