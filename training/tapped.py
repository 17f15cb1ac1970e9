"""What the trainers of heads that read taps share (training/eagle3.py, training/block.py): a draft vocabulary that is a
part of the head, and taps whose channels are brought to one size.

Shapes: B dialogues, S tokens of one, T tokens, N places, C the target's width, k taps, V tokens, Vd draft tokens.
"""
import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from formats.config import Config
from formats.eagle3 import HeadFiles
from model import Llama
from quant.draft_rows import DraftRows
from training.dialogues import unmark
from training.trainer import DRAFT_VOCAB, Trainer

SAMPLE = 4  # dialogues that the sizes of the taps are measured on


def draft_tokens(args: argparse.Namespace, target: Config) -> int:
    """How many tokens a new head drafts."""
    if args.draft_vocab is None:
        return min(DRAFT_VOCAB, target.vocab_size)
    return args.draft_vocab or target.vocab_size


def frequent_tokens(data: Tensor, size: int, vocab_size: int) -> Tensor | None:
    """The ids of the `size` tokens that occur most often in the answers of data [dialogues, S], marked: [size] int64,
    ascending. None if these are all tokens."""
    if size == vocab_size:
        return None
    counts = torch.bincount(data[data >= 0].long(), minlength=vocab_size)
    return counts.argsort(descending=True, stable=True)[:size].sort().values


def channel_scales(x: Tensor) -> Tensor:
    """Per-channel scales [C] fp32, 1 / median |x| of each channel of x [T, C]. A few channels of a residual stream are
    100 times larger than the others: unscaled, they would decide every training step. Medians, since the first
    token of a text is an outlier too. No scale is above ten times that of the median channel. All-zero channels (see
    benchmarks/widen.py) do not count for that median."""
    size = x.float().abs().median(0).values
    return 1 / size.clamp(min=0.1 * size[size > 0].median())


def sample_hidden(target: Llama, data: Tensor, taps: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """The embedded tokens of a few dialogues of data [dialogues, S], marked: [T, C], and their taps [T, k * C], both
    fp32."""
    device = target.embed.weight.device
    tokens = unmark(data[:SAMPLE].to(device, torch.int64))
    with torch.compiler.set_stance("force_eager"):  # this shape comes once
        found = target.forward_with_taps(tokens, torch.arange(tokens.shape[1], device=device), taps=taps)
    return target.embed(tokens).flatten(0, 1).float(), found[1].flatten(0, 1).float()


def check_key_heads(args: argparse.Namespace, target: Config) -> None:
    """Raise ValueError for --kv_heads that the target's query heads cannot share evenly."""
    if args.kv_heads is not None and (args.kv_heads < 1 or target.num_heads % args.kv_heads):
        raise ValueError(f"--kv_heads {args.kv_heads}: must divide the model's {target.num_heads} query heads evenly")


class TappedTrainer(Trainer):
    """Trains a module with two extra buffers: `vocab`, so that a saved state has the draft vocabulary it was trained
    with, and `tap_scale` [k * C], which `published` multiplies into fc."""
    open_files: Callable[[Path, Config], HeadFiles]  # of a published head

    @classmethod
    def listed(cls, args: argparse.Namespace, target: Config) -> int:
        """As Trainer.listed, only for a trained head that drafts all tokens, and only with --draft_vocab. ValueError
        for one with another draft vocabulary of its own."""
        if args.steps or not args.draft_vocab or not (args.out / "config.json").exists():
            return 0
        ids = cls.open_files(args.out, target).ids
        if ids is not None and len(ids) != args.draft_vocab:
            raise ValueError(f"{args.out}: this head has a draft vocabulary of {len(ids)} tokens, which --draft_vocab "
                             "cannot change")
        return args.draft_vocab if ids is None else 0

    def __init__(self, model: Llama, args: argparse.Namespace, data: Tensor, held_out: Tensor | None = None) -> None:
        super().__init__(model, args, data, held_out)
        self.use_vocab()

    @property
    def taps(self) -> tuple[int, ...]:
        return self.module.cfg.taps

    @property
    def layer_config(self):
        return self.module.cfg.layer

    @property
    def with_prompt(self) -> bool:
        """Whether drafting will have rows for tokens of the prompt that are not in the draft vocabulary."""
        return self.module.lm_head is None

    def use_vocab(self) -> None:
        """Take the draft vocabulary from the head."""
        self.draft_rows = DraftRows(self.model.lm_head.weight, self.module.vocab, False, self.with_prompt)
        self.target_rows = self.draft_rows.weights[0]  # [Vd, C]

    def resume(self, work: Path) -> None:
        super().resume(work)
        self.use_vocab()

    def known(self, tokens: Tensor) -> Tensor:
        """If `with_prompt`, put tokens of these dialogues [B, S] that are not draft tokens into `target_rows` (at most
        draft_rows.prompt_rows). Returns which tokens have a row, [V] bool. Where the text's next token has none,
        nothing is learned. (Testing the target's best token instead would cost a product with its whole lm_head, for a
        few positions that differ.)"""
        known = torch.zeros(self.model.cfg.vocab_size, dtype=torch.bool, device=self.device)
        if self.draft_rows.ids is None:
            return ~known
        self.draft_rows.add_prompt(tokens.flatten(), torch.full((), tokens.numel(), device=self.device))
        return known.index_fill(0, self.draft_rows.ids, True)

    def published(self) -> tuple[dict[str, Tensor], Tensor | None]:
        """The module's tensors as a head has them, and the draft vocabulary, [Vd] int64 or None."""
        state = self.module.state_dict()
        ids = state.pop("vocab", None)
        state["fc.weight"] = state["fc.weight"] * state.pop("tap_scale")
        return state, ids
