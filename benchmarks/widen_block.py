"""A block head in the shape of a large model, as benchmarks/widen.py does it for models and EAGLE-1/2 heads.

    wide_head = widen_block(head, model.cfg, SHAPES["llama-2-7b"], kept_ids, device="cuda", dtype=torch.bfloat16)

The head reads the wide model's embedding, so its mask token must be among the kept ids, and the wide model's lm_head:
its last norm passes on the constant of channel C, which keeps padding away. The other new things are
  fc         Each tap has its own live channels and holds the constant. One column of fc passes it on to hidden_norm,
             which divides by C' as every norm does, and counts on it.
  q, k norm  They divide by D' instead of D. Keys grow by sqrt(D' / D) in widen.py; queries do too, here. So the means
             of squares stay what they were, and epsilon with them. The weights of q_norm shrink by as much. A norm sees
             all elements: the spare ones of a query are zero, not noise.
  Markov     W1 has rows for the kept tokens, W2 for those that are drafted. The rank stays the small head's.
"""
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.widen import Noise, build, wide_config, widen_layer, widen_norm, write_live_columns
from drafters.block import BlockHead, Markov
from formats.config import Config
from model import Layer


def widen_block(head: BlockHead, target: Config, shape: dict[str, int], kept_ids: list[int],
                device: torch.device | str = "cpu", dtype: torch.dtype = torch.bfloat16,
                generator: torch.Generator | None = None) -> BlockHead:
    """The head for the model that widen_model makes of `target` with the same `shape` and `kept_ids`. It drafts the
    same, but for tokens that were cut. ValueError for variants that do not widen, or if the mask token was cut."""
    cfg, small = head.cfg, head.cfg.layer
    refuse(head, target, kept_ids)
    sizes = wide_config(replace(small, qk_norm=False), shape | {"num_layers": small.num_layers})
    wide = replace(sizes, qk_norm=True)
    wide_ids = {small_id: i for i, small_id in enumerate(kept_ids)}
    drafted = range(target.vocab_size) if head.vocab is None else head.vocab.tolist()
    rows = kept_ids if head.vocab is None else [row for row, token in enumerate(drafted) if token in wide_ids]
    wide_cfg = replace(cfg, layer=wide, target_size=wide.hidden_size, target_layers=shape["num_layers"],
                       mask_token=wide_ids[cfg.mask_token],
                       draft_vocab_size=wide.vocab_size if head.vocab is None else len(rows))
    noise = partial(torch.normal, 0.0, 0.02, generator=generator, device=device, dtype=dtype)
    fc = widen_fc(head.fc.weight, len(cfg.taps), small, wide, noise)
    norms = {f"{name}.weight": widen_norm(getattr(head, name), wide, fc) for name in ("hidden_norm", "norm")}
    norms["norm.weight"][small.hidden_size] = 64  # as widen_model's last norm
    tensors = {"fc.weight": fc, **norms}
    for i, layer in enumerate(head.layers):
        widened = widen_block_layer(layer, small, wide, noise)
        tensors |= {f"layers.{i}.{name}": tensor for name, tensor in widened.items()}
    if head.markov:
        tensors |= widen_markov(head.markov, kept_ids, rows, wide, wide_cfg.draft_vocab_size, noise)
    result = build(partial(BlockHead, wide_cfg), tensors)
    for layer in result.layers:
        layer.q_norm.eps = layer.k_norm.eps = small.rms_norm_eps
    if head.vocab is not None:
        result.vocab = torch.tensor([wide_ids[drafted[row]] for row in rows], device=device)
    return result


def refuse(head: BlockHead, target: Config, kept_ids: list[int]) -> None:
    """ValueError for a head that does not widen."""
    layer = head.cfg.layer
    parts = {"another epsilon than the model's": layer.rms_norm_eps != target.rms_norm_eps,
             "an embedding of its own": head.embed is not None, "an lm_head of its own": head.lm_head is not None,
             "biases": head.layers[0].wqkv.bias is not None, "quantised weights": head.quantized,
             f"a Markov head of kind {head.cfg.markov}": head.cfg.markov in ("gated", "rnn")}
    found = [part for part, is_there in parts.items() if is_there]
    if found:
        raise ValueError(f"--shape does not widen a block head with {', '.join(found)}")
    if head.cfg.mask_token not in kept_ids:
        raise ValueError(f"--shape cut the mask token of the head, {head.cfg.mask_token}: use a shape with more tokens")


def widen_fc(weight: Tensor, taps: int, small: Config, wide: Config, noise: Noise) -> Tensor:
    """fc [C', k * C'] of fc [C, k * C]. The first tap's constant is passed on."""
    fc = noise((wide.hidden_size, taps * wide.hidden_size))
    dead = wide.hidden_size - small.hidden_size
    for columns, small_columns in zip(fc.chunk(taps, 1), weight.chunk(taps, 1)):
        write_live_columns(columns, slice(None), F.pad(small_columns, (0, 0, 0, dead)))
    fc[small.hidden_size, small.hidden_size] = 1
    return fc


def widen_block_layer(layer: Layer, small: Config, wide: Config, noise: Noise) -> dict[str, Tensor]:
    """The tensors of a layer with norms of q and k."""
    ratio = wide.head_dim // small.head_dim
    tensors = {name: t for name, t in layer.state_dict().items() if name not in ("q_norm.weight", "k_norm.weight")}
    heads = (small.num_heads, 2 * small.num_kv_heads)
    queries, others = tensors["wqkv.weight"].split([n * small.head_dim for n in heads])
    tensors["wqkv.weight"] = torch.cat((queries * ratio**0.5, others))
    normless = replace(small, qk_norm=False)
    widened = widen_layer(build(partial(Layer, normless), tensors), normless, wide, noise)
    wqkv = widened["wqkv.weight"]
    spare = torch.arange(wide.num_heads * wide.head_dim, device=wqkv.device) % ratio > 0
    wqkv[:len(spare), :small.hidden_size + 1][spare] = 0
    for name, scale in (("q_norm", ratio**-0.5), ("k_norm", 1)):
        weight = widened[f"{name}.weight"] = wqkv.new_ones(wide.head_dim)
        weight[::ratio] = (getattr(layer, name).weight.double() * scale).to(weight)
    return widened


def widen_markov(markov: Markov, kept_ids: list[int], rows: list[int], wide: Config, draft_vocab_size: int, noise: Noise
                 ) -> dict[str, Tensor]:
    """The tensors of a Markov head. rows: those of the small w2 that are drafted. What is beyond them is padding."""
    rank = markov.w1.weight.shape[1]
    w1, w2 = noise((wide.vocab_size, rank)), noise((draft_vocab_size, rank))
    w1[:len(kept_ids)] = markov.w1.weight[kept_ids].to(w1)
    w2[:len(rows)] = markov.w2.weight[rows].to(w2)
    return {"markov.w1.weight": w1, "markov.w2.weight": w2}
