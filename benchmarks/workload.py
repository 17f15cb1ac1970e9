"""What bench.py and cycle.py measure: a checkpoint with its draft heads, as it is or in a large shape, and prompts.

A widened model whose vocabulary is smaller than the checkpoint's (Llama-2 has 32,000 ids) keeps the ids that matter:
those of the prompts, of the template, of the stops, and of what the checkpoint itself answers. So prompts come first,
second turns with the answers to the first among them, and are then moved to the ids of the wide model.
"""
import argparse
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from app.options import DTYPES
from benchmarks.widen import Widening
from draft import Vanilla
from drafters.methods import METHODS
from engine import Engine
from formats.eagle import folder_of
from formats.questions import Question
from model import Llama, load_model
from ops.quantized import Quantized
from sampling import Sampling
from tokenizer import Tokenizer


class Prompt(NamedTuple):
    question: str
    turn: int  # from 1
    category: str
    ids: list[int]


def describe_subject(args: argparse.Namespace) -> str:
    """What numbers are of: dtype, weights, and whose text and cost."""
    weights = args.quantize or (args.checkpoint.stem if args.checkpoint.is_file() else "")
    text = f"{args.dtype}{weights and ', weights ' + weights}."
    return text if args.shape is None else (
        f"{text} {args.shape} is a shape: its cost, with the text and acceptance of {args.checkpoint.name}.")


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


def ask(model: Llama, tokenizer: Tokenizer, questions: list[Question], new_tokens: int) -> list[Prompt]:
    """A prompt for each turn: later ones hold the earlier questions and the model's own greedy answers, so that all
    who are measured answer the same. ValueError names a question whose answer would not fit the model's context."""
    cfg, prompts, engine = model.cfg, [], None
    most = min(cfg.max_position_embeddings, cfg.sliding_window or cfg.max_position_embeddings)
    slots = min(most, max(len(tokenizer.dialogue(q.turns)) + 2 * len(q.turns) * new_tokens for q in questions))
    for question in questions:
        texts = []
        for turn, text in enumerate(question.turns, 1):
            ids = tokenizer.dialogue(texts + [text])
            if len(ids) + new_tokens > most:
                raise ValueError(f"question {question.name}, turn {turn}: its {len(ids)} tokens and --max_new_tokens "
                                 f"{new_tokens} do not fit the model's context of {most}: leave it out")
            prompts.append(Prompt(question.name, turn, question.category, ids))
            if turn < len(question.turns):
                engine = engine or Engine(model, Vanilla(model.embed.weight.device), slots, tokenizer.stop_ids)
                texts += [text, tokenizer.decode(sum(engine.generate(ids, new_tokens), []))]
    return prompts


def fill_context(tokenizer: Tokenizer, questions: list[str], length: int) -> list[list[int]]:
    """A prompt of exactly `length` tokens for each question: in one turn of the user the other questions, as often as
    it takes, then this one. (What is repeated is easy to draft: give a long context many questions.) 0: this one."""
    def wrap(text: str) -> list[int]:
        return tokenizer.dialogue([text])

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


class Subject(NamedTuple):
    """What is measured. All ids are those of the wide model, where there is one."""
    model: Llama
    prompts: list[Prompt]
    stop_ids: frozenset[int]
    widening: Widening | None  # with --shape; it holds the small model, so let go of it once all weights are loaded


def load(args: argparse.Namespace, make_prompts: Callable[[Llama, Tokenizer], list[Prompt]]) -> Subject:
    """The checkpoint, widened with --shape, and the prompts that make_prompts makes of it."""
    tokenizer = Tokenizer(folder_of(args.checkpoint))
    quantize = None if args.shape else args.quantize
    dtype = torch.float32 if args.shape else DTYPES[args.dtype]  # widening rounds, and once is enough
    model = load_model(args.checkpoint, args.device, dtype, quantize, args.group or 128)
    prompts = make_prompts(model, tokenizer)
    if args.shape is None:
        model.free_cache()  # it was for the answers to first turns: each engine's context has its own size
        return Subject(model, prompts, tokenizer.stop_ids, None)
    wide = Widening(args, model, [prompt.ids for prompt in prompts], tokenizer.stop_ids)
    return Subject(wide.model, [prompt._replace(ids=wide.ids(prompt.ids)) for prompt in prompts],
                   frozenset(wide.ids(sorted(tokenizer.stop_ids))), wide)


def load_weights(method: str, args: argparse.Namespace, subject: Subject) -> dict[str, nn.Module]:
    """The weights that a method drafts with, by their option, for drafters.methods.make_drafter; empty if it has
    none."""
    weights = METHODS[method].weights
    if weights is None:
        return {}
    if subject.widening is None:
        return {weights.option: weights.load(args, subject.model)}
    unquantised = argparse.Namespace(**vars(args) | {"quantize": None})  # quantised after widening
    small = weights.load(unquantised, subject.widening.small)
    return {weights.option: weights.widen(subject.widening, small)}


def freeze(engine: Engine, ids: list[int], new_tokens: int, sampling: Sampling = Sampling()) -> int:
    """Continue the prompt by at least `new_tokens` tokens and end the text there, in the middle of an answer (see
    Engine.freeze). Returns its length."""
    for new in engine.generate(ids, len(engine.state.tokens), sampling):
        new_tokens -= len(new)
        if new_tokens <= 0:
            break
    engine.freeze()
    return int(engine.state.length)
