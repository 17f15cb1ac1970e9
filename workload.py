"""What bench.py measures: a checkpoint with its draft head, as it is or in a large shape, and prompts of exact lengths.

A widened model whose vocabulary is smaller than the checkpoint's (Llama-2 has 32,000 ids) keeps the ids that matter:
those of the prompts, of the template, of the stops, and of what the checkpoint itself answers.
"""
import argparse
import json

import torch
from torch import Tensor, nn

from draft import EagleHead, find_head, load_head
from engine import Engine, Vanilla
from generate import DTYPES
from model import Llama, load_model
from qlinears import Quantized
from tokenizer import Tokenizer
from widen import SHAPES, widen_head, widen_model


def gigabytes(*parts: nn.Module | Tensor | Quantized) -> float:
    """Of all weights, their scales included."""
    tensors = [t for part in parts for t in (
        (*part.parameters(), *part.buffers()) if isinstance(part, nn.Module) else
        (part.data, part.scale) if isinstance(part, Quantized) else (part,))]
    return sum(t.nbytes for t in tensors) / 1e9


def kv_gigabytes(kv: Tensor, length: int) -> float:
    """Of the first `length` slots of a cache [..., S, D]."""
    return kv.nbytes / 1e9 * length / kv.shape[-2]


def step_gb(model: Llama, length: int) -> float:
    """What one forward of the model reads after a text of this length."""
    return gigabytes(model.layers, model.lm_head) + kv_gigabytes(model.kv, length)


def fill_context(tokenizer: Tokenizer, questions: list[str], length: int) -> list[list[int]]:
    """A prompt of exactly `length` tokens for each question: in one turn of the user the other questions, as often as
    it takes, then this one. (What is repeated is easy to draft: give a long context many questions.) 0: this one."""
    def wrap(text: str) -> list[int]:
        return tokenizer.chat([{"role": "user", "content": text}]) if tokenizer.has_chat_template else (
            tokenizer.encode(text))

    if not length:
        return [wrap(text) for text in questions]
    one, other = wrap("X"), wrap("7")
    before = next(i for i, (a, b) in enumerate(zip(one, other)) if a != b)
    after = one[before + 1:]
    room, prompts = length - before - len(after), []
    if room < 1:
        raise ValueError(f"--contexts {length}: the chat template alone takes {before + len(after)} tokens")
    for i in range(len(questions)):
        text = "\n\n".join(["", *questions[i + 1:], *questions[:i + 1]])
        ids = wrap(text)
        ids = ids[before:len(ids) - len(after)]
        prompts.append(one[:before] + (ids * (room // len(ids) + 1))[-room:] + after)
    return prompts


def keep_ids(used: set[int], vocab_size: int, size: int) -> list[int]:
    """Which ids of a small vocabulary a model of `size` ids keeps, ascending: those in use, then the lowest, which are
    the special ones, the bytes and the earliest merges, so the most frequent."""
    if len(used) > size:
        raise ValueError(f"prompts and answers use {len(used)} different ids, the shape has {size}: fewer --questions")
    rest = (i for i in range(vocab_size) if i not in used)
    return sorted(used | {i for i, _ in zip(rest, range(size - len(used)))})


def load(args: argparse.Namespace) -> tuple[Llama, EagleHead, list[list[list[int]]], frozenset[int]]:
    """Target, head, prompts of each context, stop ids; with --shape all in the ids of the widened model."""
    folder = args.checkpoint.parent if args.checkpoint.is_file() else args.checkpoint
    tokenizer, lines = Tokenizer(folder), args.questions.read_text(encoding="utf-8").splitlines()
    try:
        questions = [json.loads(line)["turns"][0] for line in lines]
    except (ValueError, KeyError, IndexError, TypeError):
        raise ValueError(f'{args.questions}: each line should be a JSON object with "turns", a list of texts') from None
    prompts, stop = [fill_context(tokenizer, questions, n) for n in args.contexts], tokenizer.stop_ids
    dtype, device, how = DTYPES[args.dtype], args.device, (args.quantize, args.group or 128)
    first = (None,) if args.shape else how
    model = load_model(args.checkpoint, device, torch.float32 if args.shape else dtype, *first)  # widening rounds once
    head = load_head(args.draft or find_head(args.checkpoint), model, args.draft_vocab, *first)
    if args.shape is None:
        return model, head, prompts, stop
    if isinstance(model.lm_head.weight, Quantized) or head.of_embedding is not None:
        raise ValueError("--shape widens unquantised weights: quantise the result with --quantize")
    shape, used = SHAPES[args.shape], {*stop, *(i for group in prompts for ids in group for i in ids)}
    if shape["vocab_size"] < model.cfg.vocab_size:  # what does the model write?
        longest = max(len(ids) for group in prompts for ids in group)
        engine = Engine(model, Vanilla(device), longest + args.max_new_tokens, stop)
        for ids in (ids for group in prompts for ids in group):
            used.update(*engine.generate(ids, args.max_new_tokens))
    keep = keep_ids(used, model.cfg.vocab_size, shape["vocab_size"])
    place, noise = {old: new for new, old in enumerate(keep)}, torch.Generator(device).manual_seed(0)
    wide = widen_model(model, shape, keep, device, dtype, noise, how if args.quantize else None)
    wide_head = widen_head(head, shape, device, dtype, noise)
    if args.quantize:
        wide_head.quantize(*how)
    if head.vocab is not None:
        wide_head.vocab = torch.tensor([place[i] for i in head.vocab.tolist() if i in place], device=device)
    return (wide, wide_head,
            [[[place[i] for i in ids] for ids in group] for group in prompts], frozenset(place[i] for i in stop))
