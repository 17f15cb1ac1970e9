"""An EAGLE-3 head in the shape of a large model, as benchmarks/widen.py does it for models and EAGLE-1/2 heads.

The wide model's added layers lie behind the small one's, so the taps stay where they are. Three things are new:
  fc        Each tap has its own live channels. Every tap holds the constant of channel C too, and one column of fc
            passes it on to the head's residual stream.
  layers    The first one reads an embedding and a feature side by side: its wqkv is widened half by half.
  lm_head   It has rows for draft tokens only, so there is no padding: tokens that the wide model lacks are left out.
Norms of taps, biases and normed residuals would change the constant: such heads are refused.
"""
import copy
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.widen import Noise, build, wide_config, widen_layer, widen_norm, write_live_columns
from drafters.eagle3 import Eagle3Head, Eagle3Layer
from formats.config import Config


def widen_head3(head: Eagle3Head, target: Config, shape: dict[str, int], kept_ids: list[int],
                device: torch.device | str = "cpu", dtype: torch.dtype = torch.bfloat16,
                generator: torch.Generator | None = None) -> Eagle3Head:
    """The head for the model that widen_model makes of `target` with the same `shape` and `kept_ids`. ValueError for
    variants that do not widen."""
    cfg = head.cfg
    small = cfg.layer
    refuse(head, target)
    wide = wide_config(small, shape | {"num_layers": small.num_layers})
    noise = partial(torch.normal, 0.0, 0.02, generator=generator, device=device, dtype=dtype)
    tensors = {}
    for i, layer in enumerate(head.layers):
        widened = widen_first_layer(layer, small, wide, noise) if layer.wide else widen_layer(layer, small, wide, noise)
        tensors |= {f"layers.{i}.{name}": tensor for name, tensor in widened.items()}
    dead = wide.hidden_size - small.hidden_size
    fc = noise((wide.hidden_size, len(cfg.taps) * wide.hidden_size))
    parts = zip(fc.chunk(len(cfg.taps), dim=1), head.fc.weight.chunk(len(cfg.taps), dim=1))
    for i, (columns, small_columns) in enumerate(parts):
        write_live_columns(columns, slice(None), F.pad(small_columns, (0, 0, 0, dead)))
        columns[small.hidden_size, small.hidden_size] = i == 0
    wide_ids = {small_id: i for i, small_id in enumerate(kept_ids)}
    drafted = range(target.vocab_size) if head.vocab is None else head.vocab.tolist()
    rows = [row for row, token in enumerate(drafted) if token in wide_ids]
    lm_head = noise((len(rows), wide.hidden_size))
    write_live_columns(lm_head, slice(None), head.lm_head.weight[rows])
    wide_cfg = replace(cfg, layer=wide, target_size=wide.hidden_size, target_layers=shape["num_layers"],
                       draft_vocab_size=len(rows))
    tensors |= {"fc.weight": fc, "lm_head.weight": lm_head, "norm.weight": widen_norm(head.norm, wide, fc)}
    result = build(partial(Eagle3Head, wide_cfg), tensors)
    result.vocab = torch.tensor([wide_ids[drafted[row]] for row in rows], device=device)
    return result


def refuse(head: Eagle3Head, target: Config) -> None:
    """ValueError for a head that does not widen."""
    cfg = head.cfg
    parts = {"another width or epsilon than the model's":
             (cfg.layer.hidden_size, cfg.layer.rms_norm_eps) != (target.hidden_size, target.rms_norm_eps),
             "no taps": head.fc is None, "norms of its taps": head.input_norm is not None or len(head.fc_norms) > 0,
             "an embedding of its own": head.embed is not None, "the model's lm_head": head.lm_head is None,
             "no last norm": head.norm is None, "norm_output": cfg.norm_output,
             "norm_before_residual": cfg.norm_before_residual, "quantised weights": head.quantized,
             "biases": any(name.endswith("bias") for name, _ in head.named_parameters()),
             "a second layer that reads embeddings": any(cfg.wide[1:])}
    found = [part for part, is_there in parts.items() if is_there]
    if found:
        raise ValueError(f"--shape does not widen an EAGLE-3 head with {', '.join(found)}")


def widen_first_layer(layer: Eagle3Layer, small: Config, wide: Config, noise: Noise) -> dict[str, Tensor]:
    """The tensors of a layer that reads [embedding; feature]."""
    halves = []
    for columns in layer.wqkv.weight.chunk(2, dim=1):
        half = copy.copy(layer)
        half._modules = {**layer._modules, "wqkv": nn.Linear(1, 1, bias=False, device="meta")}
        half.wqkv.weight = nn.Parameter(columns, False)
        halves.append(widen_layer(half, small, wide, noise))
    return halves[1] | {"wqkv.weight": torch.cat([half["wqkv.weight"] for half in halves], 1)}
