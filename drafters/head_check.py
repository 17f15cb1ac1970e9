"""Does a draft head fit its target? What it guesses is compared with what the target writes.

A head that reads the wrong layers, turns by other RoPE angles or skips a norm is silent: the text stays right, and
fewer drafts are accepted. So the converter asks it: the target writes a few answers, and the head guesses each of their
tokens from the tokens and the true hidden states before it. For an EAGLE-3 or block head this also decides what its
files leave open (formats/eagle3.py, formats/block.py): a tap one layer off costs tens of points of the first guesses, a
wrong RoPE base one to three, a wrong `norm_output` shows from the second guess on, and a block head that is read in the
wrong layout guesses next to nothing.
"""
import math
from dataclasses import replace
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from draft import BoundHead, Vanilla
from drafters.block import BlockHead, BoundBlock
from drafters.eagle3 import BoundHead3, Eagle3Head
from drafters.heads import Head
from engine import Engine
from model import Llama
from tokenizer import Tokenizer

QUESTIONS = ("Why is the sky blue?", "Write a Python function that counts the words in a text.",
             "What is 12 times 15, step by step?", "Name three things to see in a small harbour town.",
             "Write a short letter that declines an invitation.", "How does a bicycle stay upright?",
             "List the planets from the sun outwards.", "What does the HTTP status 404 mean?")
STEPS = 3  # guesses that are compared: the first, from true hidden states, and two more from the head's own
EXPECTED = 0.7  # the share of first guesses that a trained head has right


class Answer(NamedTuple):
    ids: list[int]  # of the question and the answer
    start: int  # the first one of the answer


class Variant(NamedTuple):
    """A head's fields, and which of its guesses are right: for each step, bool [tokens of all answers]."""
    fields: dict[str, object]
    right: list[Tensor]

    @property
    def shares(self) -> list[float]:
        """The share of right guesses of each step."""
        return [float(r.float().mean()) for r in self.right]


def write_answers(model: Llama, tokenizer: Tokenizer, questions: int, new_tokens: int) -> list[Answer]:
    """What the target writes, greedily, after the first of QUESTIONS."""
    prompts = [tokenizer.dialogue([text]) for text in QUESTIONS[:questions]]
    engine = Engine(model, Vanilla(model.embed.weight.device), max(map(len, prompts)) + new_tokens, tokenizer.stop_ids)
    answers = [Answer(ids + sum(engine.generate(ids, new_tokens), []), len(ids)) for ids in prompts]
    model.free_cache()
    return answers


@torch.inference_mode()
def right_guesses(head: Head, model: Llama, answers: list[Answer]) -> list[Tensor]:
    """Which of the head's guesses are the target's own tokens: for each step, bool [tokens of all answers]."""
    if isinstance(head, BlockHead):
        return right_guesses_of_blocks(head, model, answers)
    bound = head.bind(model)
    device = model.embed.weight.device
    longest = max(len(answer.ids) for answer in answers)
    head.allocate_cache(STEPS * longest)
    model.allocate_rope(longest)
    right = [[] for _ in range(STEPS)]
    for answer in answers:
        ids = torch.tensor(answer.ids, device=device)
        positions = torch.arange(len(ids), device=device)
        inputs = bound.make_inputs(model.forward_with_taps(ids[None], positions, taps=bound.taps)[1][0])
        for step in range(STEPS):
            told = ids[2 + step:]  # row i is fed token i + 1 + step and guesses the one after it
            predicted = run_step(bound, ids, inputs[:len(told)], step)
            logits, inputs = bound.read_logits(predicted, False)
            guesses = logits.argmax(-1)
            guesses = guesses if bound.ids is None else bound.ids[guesses]
            right[step].append((guesses == told)[max(0, answer.start - 2 - step):].cpu())
    return [torch.cat(parts) for parts in right]


def run_step(bound: BoundHead | BoundHead3, ids: Tensor, inputs: Tensor, step: int) -> Tensor:
    """One step of drafting for all rows at once: what is predicted, [rows, H]. A row sees the first step's entries up
    to its own, made of true hidden states, and its own entries of the later steps."""
    rows, n = len(inputs), len(ids)
    row = torch.arange(rows, device=ids.device)
    slot = torch.arange((step + 1) * n, device=ids.device)
    mask = torch.where(slot < n, slot <= row[:, None], slot % n == row[:, None])
    return bound.predict(ids[1 + step:1 + step + rows], inputs, None, row + step, step * n + row, mask)


@torch.inference_mode()
def right_guesses_of_blocks(head: BlockHead, model: Llama, answers: list[Answer]) -> list[Tensor]:
    """The same of a block head. Anchors: the question's last token, and the answer's tokens but the last STEPS."""
    bound = BoundBlock(head, model)
    device, size = model.embed.weight.device, head.cfg.block_size
    skipped = 0 if head.cfg.anchor_first else 1
    longest = max(len(answer.ids) for answer in answers)
    head.allocate_cache(longest * (1 + size))
    model.allocate_rope(longest)
    right = [[] for _ in range(STEPS)]
    for answer in answers:
        ids = torch.tensor(answer.ids, device=device)
        n = len(ids)
        slots = torch.arange(n, device=device)
        bound.add_context(model.forward_with_taps(ids[None], slots, taps=head.cfg.taps)[1][0], slots)
        anchors = torch.arange(answer.start - 1, max(answer.start - 1, n - STEPS), device=device)
        x = run_blocks(bound, ids, anchors).unflatten(0, (-1, size))[:, skipped:]
        states = x.new_zeros(len(anchors), head.cfg.markov_rank)
        for step in range(min(STEPS, x.shape[1])):
            logits = bound.read_logits(x[:, step])
            if head.markov:
                added, states = bound.markov_logits(ids[anchors + step], bound.last_norm(x[:, step]), states)
                logits = logits + added
            guesses = logits.argmax(-1)
            guesses = guesses if bound.ids is None else bound.ids[guesses]
            right[step].append((guesses == ids[anchors + step + 1]).cpu())
    return [torch.cat(parts) for parts in right if parts]


def run_blocks(bound: BoundBlock, ids: Tensor, anchors: Tensor) -> Tensor:
    """The hidden states of the rows of a block behind each of the anchors, indices of ids [n]: [anchors * b, H]. The
    rows lie in cache slots from n on; each sees the context before its anchor, in a layer with a sliding window the
    last of it, and rows of its own block."""
    cfg, n = bound.head.cfg, len(ids)
    size = cfg.block_size
    row = torch.arange(size, device=ids.device)
    tokens = torch.full((len(anchors), size), cfg.mask_token, device=ids.device)
    tokens[:, 0] = ids[anchors]
    block = torch.arange(len(anchors), device=ids.device).repeat_interleave(size)
    row = row.repeat(len(anchors))
    slot = torch.arange(n + len(block), device=ids.device)
    seen = slot[n:] - n  # of a block's slots: which row of all blocks lies there
    in_block = (block[seen] == block[:, None]) & (row[seen] <= row[:, None] if cfg.causal else True)
    place = anchors[block] + row
    masks = {}
    for window in set(cfg.windows):
        in_context = slot[:n] < anchors[block][:, None]
        if window is not None:
            in_context &= slot[:n] > place[:, None] - window
        masks[window] = torch.cat((in_context, in_block), 1)
    return bound.predict(tokens.flatten(), place, slot[n:], masks)


def compare(head: Eagle3Head | BlockHead, open_fields: dict[str, tuple], model: Llama, answers: list[Answer]
            ) -> list[Variant]:
    """How well the head guesses with each combination of the values of `open_fields`, the best first. As many steps are
    compared as all have: a short block guesses one token more where its anchor's row guesses too."""
    variants = []
    for values in product(*open_fields.values()):
        fields = dict(zip(open_fields, values))
        variants.append(Variant(fields, right_guesses(with_fields(head, fields), model, answers)))
    steps = min(len(variant.right) for variant in variants)
    variants = [variant._replace(right=variant.right[:steps]) for variant in variants]
    return sorted(variants, key=lambda variant: -sum(variant.shares))


def is_clear(best: Variant, other: Variant) -> bool:
    """Whether `best` guesses better than `other` by more than chance: of the guesses that only one of the two has
    right, its part exceeds half by two standard deviations."""
    a, b = torch.cat(best.right), torch.cat(other.right)
    return float((a & ~b).sum() - (b & ~a).sum()) > 2 * math.sqrt((a ^ b).sum())


def with_fields(head: Eagle3Head | BlockHead, fields: dict) -> Eagle3Head | BlockHead:
    """The same weights under a config with other fields."""
    others = dict(fields)
    layer = replace(head.cfg.layer, rope_theta=others.pop("rope_theta", head.cfg.layer.rope_theta))
    with torch.device("meta"):
        other = type(head)(replace(head.cfg, layer=layer, **others), dict(head.named_parameters()))
    other.load_state_dict(head.state_dict(), assign=True)
    other.vocab = head.vocab
    return other.requires_grad_(False).eval()


def table(variants: list[Variant]) -> str:
    """The variants, a line each: the fields and the shares of right guesses."""
    rows = [[f"{name} {list(value) if isinstance(value, tuple) else value}" for name, value in variant.fields.items()]
            + [f"{share:.1%}" for share in variant.shares] for variant in variants]
    return "\n".join("  " + "  ".join(row) for row in rows)
