"""What heads that draft from taps share (drafters/eagle3.py, drafters/block.py): an embedding and an lm_head that may
be the target's, a draft vocabulary, and a cache of a few layers.
"""
from collections.abc import Collection

import torch
from torch import Tensor, nn

from formats.block_config import BlockConfig
from formats.eagle3_config import Eagle3Config
from formats.weights import empty_embedding
from model import rope_table
from quant.linear import quantize_linears


class TappedHead(nn.Module):
    """names: those of its tensors, which decide whether it has an embedding and an lm_head, or uses the target's."""

    def __init__(self, cfg: Eagle3Config | BlockConfig, names: Collection[str]) -> None:
        super().__init__()
        size = cfg.layer.hidden_size
        self.cfg = cfg
        self.embed = empty_embedding(cfg.layer.vocab_size, size) if "embed.weight" in names else None
        own = not {"lm_head.weight", "lm_head.data"}.isdisjoint(names)
        self.lm_head = nn.Linear(size, cfg.draft_vocab_size, bias=False) if own else None
        self.vocab: Tensor | None = None  # [any] int64: the draft vocabulary, in the order of the lm_head's rows
        self.quantized = False
        self.fc_in_integers = "fc.data" in names  # as in files that quantize.py wrote before 2026-12-01
        self.kv: Tensor | None = None  # [L, 2, 1, K, S, D]
        self.rope: Tensor | None = None  # [2, S, D]

    def allocate_cache(self, slots: int) -> None:
        """As EagleHead.allocate_cache. Layers with a sliding window keep all entries too, and read the last ones."""
        if self.kv is not None and self.kv.shape[4] >= slots:
            return
        layer, weight = self.cfg.layer, self.layers[0].mlp_norm.weight
        kv = weight.new_zeros(layer.num_layers, 2, 1, layer.num_kv_heads, slots, layer.head_dim)
        self.rope = rope_table(layer, slots, weight.device).to(weight.dtype)
        self.kv = kv  # last, as in Llama.allocate_cache

    def quantize(self, mode: str, group: int = 128, device: torch.device | str | None = None) -> None:
        """Quantise all linears but fc. int8 means int8dyn, as in EagleHead.quantize; the lm_head is int8 in every mode.

        fc is needed once a cycle, and reads taps of different sizes side by side: of 8 bits for all of them little may
        be left for the smallest (docs/experiments.md, "Heads in int8")."""
        but = None if self.fc_in_integers else "fc"
        quantize_linears(self, "int8dyn" if mode == "int8" else mode, group, device, but=but)
        self.quantized = True
