"""The rows of the lm_head that a head drafts from: its draft vocabulary, and the prompt's own tokens.

A draft vocabulary makes drafting cheap: 16,384 rows in place of 151,936. But it lists what is frequent everywhere, and
a prompt brings words of its own. A text that is summarised or edited repeats them, and each one that is not listed ends
a draft. So beside the listed rows there is room for a few more, which hold the tokens of the prompt that are not
listed; where a prompt has fewer of them, those of the lowest ids. docs/experiments.md, "Draft vocabulary", has what
that gains.
"""
import torch
from torch import Tensor

from ops.cpu_integers import PACKED
from ops.quantized import Quantized, to_tiles
from quant.linear import drafting_rows

PROMPT_ROWS = 512  # rows; if a prompt has more unlisted tokens, its latest ones get them
LISTED = -2**40  # below every other rank


class DraftRows:
    """`weights`: a list of one weight [Vd, C], the rows of lm_head [V, C] used for drafting. A caller that stacks them
    with other rows adds the stacked weight, so that `add_prompt` updates it too. `ids` [Vd] int64: their tokens, or
    None.

    vocab [any] int64: the draft vocabulary; None: all rows. If it has a token for each row of lm_head, row i is token
    vocab[i]. If it has fewer, the first `prompt_rows` of the Vd rows are for the prompt's tokens: a multiple of 64,
    whole tiles of every kernel; it may be 0. with_prompt=False: no such rows. quantized: see drafting_rows.
    """

    def __init__(self, lm_head: Tensor | Quantized, vocab: Tensor | None, quantized: bool,
                 with_prompt: bool = True) -> None:
        self.lm_head, self.quantized = lm_head, quantized
        self.ids = vocab
        others = 0 if vocab is None else lm_head.shape[0] - len(vocab)
        self.prompt_rows = min(PROMPT_ROWS, others) // 64 * 64 if with_prompt else 0
        if self.prompt_rows:
            self.rank = -torch.arange(lm_head.shape[0], device=vocab.device) - 1  # [V]: which token comes first
            self.rank[vocab] = LISTED
            self.ids = torch.cat((self.rank.topk(self.prompt_rows).indices, vocab))
        self.weights = [drafting_rows(lm_head, self.ids if others else None, quantized)]

    def add_prompt(self, tokens: Tensor, length: Tensor) -> None:
        """Put the tokens of a prompt that are not listed into the first rows. tokens [any] int64, the first `length`
        count (0-d int64). On a GPU nothing is read on the host."""
        if not self.prompt_rows:
            return
        place = torch.arange(len(tokens), device=tokens.device)
        last = self.rank.scatter_reduce(0, tokens, torch.where(place < length, place, LISTED), "amax")
        ids = last.where(self.rank > LISTED, LISTED).topk(self.prompt_rows).indices
        if not ids.is_cuda and torch.equal(ids, self.ids[:self.prompt_rows]):
            return  # the weights may be packed in FBGEMM's order: after a change all of them are packed again
        self.ids[:self.prompt_rows] = ids
        for weight in self.weights:
            overwrite(weight, drafting_rows(self.lm_head, ids, self.quantized))


def overwrite(weight: Tensor | Quantized, rows: Tensor | Quantized) -> None:
    """Replace the first rows of a weight by others of its kind, a multiple of 64."""
    if not isinstance(weight, Quantized):
        weight[:len(rows)] = rows
        return
    data = to_tiles(rows) if weight.data.dim() == 4 else rows.data
    weight.data[:len(data)] = data
    PACKED.pop(weight.data, None)
    scale = weight.scale[:, :rows.shape[0]] if weight.group else weight.scale[:rows.shape[0]]
    scale.copy_(rows.scale)
