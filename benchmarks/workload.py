"""What bench.py and benchmarks/cycle.py measure: a model with its draft weights, and prompts.

With --shape the model is the checkpoint's, widened to a larger shape (benchmarks/widen.py). Where the shape has a
smaller vocabulary than the checkpoint (Llama-2 has 32,000 ids), the wide model keeps the ids in use (of the prompts,
the stops, the checkpoint's answers, a block head's mask token), and fills up with the lowest other ids. So the small
model is loaded first and writes the prompts, whose later turns hold its answers to the earlier ones. Then it is
widened, and the prompts are translated to the wide model's ids.
"""
import argparse
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from app.options import DTYPES
from benchmarks.shape import Widening
from draft import Vanilla
from drafters.methods import METHODS, Weights
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
    texts: tuple[str, ...] = ()  # what the user and the model said in turn, for engines with a template of their own


def describe_subject(args: argparse.Namespace) -> str:
    """What the numbers are of, for people: dtype, weight format and, with --shape, whose cost and whose text."""
    weights = args.quantize
    if weights is None and args.checkpoint.is_file():
        weights = args.checkpoint.stem
    text = args.dtype + (f", weights {weights}." if weights else ".")
    if args.shape:
        text += f" {args.shape} is a shape: its cost, with the text and acceptance of {args.checkpoint.name}."
    return text


# ----- Sizes -------------------------------------------------------------------------------------------------------


def tensors_of(part: nn.Module | Tensor | Quantized) -> list[Tensor]:
    if isinstance(part, nn.Module):
        return [*part.parameters(), *part.buffers()]
    return [t for t in (part.data, part.scale, part.order) if t is not None] if isinstance(part, Quantized) else [part]


def gigabytes(*parts: nn.Module | Tensor | Quantized) -> float:
    """Size of these weights in GB, scales included."""
    return sum(t.nbytes for part in parts for t in tensors_of(part)) / 1e9


def kv_gigabytes(kv: Tensor, length: int) -> float:
    """Size in GB of the first `length` slots of a cache [..., S, D]."""
    return kv.nbytes / 1e9 * length / kv.shape[-2]


def step_gb(model: Llama, length: int) -> float:
    """GB that one forward reads after a text of `length` tokens: layers, lm_head, keys and values."""
    return gigabytes(model.layers, model.lm_head) + kv_gigabytes(model.kv, length)


# ----- Prompts -----------------------------------------------------------------------------------------------------


def ask(model: Llama, tokenizer: Tokenizer, questions: list[Question], new_tokens: int) -> list[Prompt]:
    """A prompt for each turn of each question. Later turns hold the earlier questions and the model's own greedy
    answers to them, so that all methods answer the same prompts.

    ValueError names the question whose answer would not fit the model's context.
    """
    cfg = model.cfg
    context = min(cfg.max_position_embeddings, cfg.context_limit or cfg.max_position_embeddings)
    longest = max(len(tokenizer.dialogue(q.turns)) + 2 * len(q.turns) * new_tokens for q in questions)
    prompts = []
    engine = None
    for question in questions:
        texts = []
        for turn, text in enumerate(question.turns, 1):
            ids = tokenizer.dialogue(texts + [text])
            if len(ids) + new_tokens > context:
                raise ValueError(f"question {question.name}, turn {turn}: its {len(ids)} tokens and --max_new_tokens "
                                 f"{new_tokens} do not fit the model's context of {context}: leave it out")
            prompts.append(Prompt(question.name, turn, question.category, ids, (*texts, text)))
            if turn < len(question.turns):
                if engine is None:
                    device = model.embed.weight.device
                    engine = Engine(model, Vanilla(device), min(context, longest), tokenizer.stop_ids)
                texts += [text, tokenizer.decode(sum(engine.generate(ids, new_tokens), []))]
    return prompts


def fill_context(tokenizer: Tokenizer, questions: list[str], length: int) -> list[list[int]]:
    """For each question a prompt of exactly `length` tokens; 0: of the question alone.

    It is one turn of the user: the other questions, repeated as often as needed, then this one. Repeated text is easy
    to draft, so a long context needs many questions.
    """
    def chat_ids(text: str) -> list[int]:
        return tokenizer.dialogue([text])

    if not length:
        return [chat_ids(text) for text in questions]
    one, other = chat_ids("X"), chat_ids("7")  # one token each, so they differ where a text begins
    start = next(i for i, (a, b) in enumerate(zip(one, other)) if a != b)
    before, after = one[:start], one[start + 1:]
    room = length - len(before) - len(after)
    if room < 1:
        raise ValueError(f"--contexts {length}: the chat template alone takes {len(before) + len(after)} tokens")
    prompts = []
    for i in range(len(questions)):
        text = "\n\n".join(["", *questions[i + 1:], *questions[:i + 1]])
        ids = chat_ids(text)
        ids = ids[start:len(ids) - len(after)]
        repeated = ids * (room // len(ids) + 1)
        prompts.append(before + repeated[-room:] + after)
    return prompts


# ----- Models ------------------------------------------------------------------------------------------------------


class Subject(NamedTuple):
    """What is measured. With --shape, model and ids are those of the wide model."""
    model: Llama
    prompts: list[Prompt]
    stop_ids: frozenset[int]
    tokenizer: Tokenizer  # the checkpoint's
    widening: Widening | None  # with --shape; it keeps the small model alive: drop it once all weights are loaded


def load(args: argparse.Namespace, make_prompts: Callable[[Llama, Tokenizer], list[Prompt]]) -> Subject:
    """Load the checkpoint, let `make_prompts` make prompts with its model, and with --shape widen both."""
    tokenizer = Tokenizer(folder_of(args.checkpoint))
    if args.shape:  # widening rounds to --dtype and quantises: fp32 here, so that this happens once
        dtype, quantize = torch.float32, None
    else:
        dtype, quantize = DTYPES[args.dtype], args.quantize
    model = load_model(args.checkpoint, args.device, dtype, quantize, args.group or 128)
    prompts = make_prompts(model, tokenizer)
    if not args.shape:
        model.free_cache()  # make_prompts needed it to write answers; each engine chooses its own size
        return Subject(model, prompts, tokenizer.stop_ids, tokenizer, None)
    wide = Widening(args, model, [prompt.ids for prompt in prompts], tokenizer.stop_ids)
    wide_prompts = [prompt._replace(ids=wide.ids(prompt.ids)) for prompt in prompts]
    stop_ids = frozenset(wide.ids(sorted(tokenizer.stop_ids)))
    return Subject(wide.model, wide_prompts, stop_ids, tokenizer, wide)


def load_weights(method: str, args: argparse.Namespace, subject: Subject) -> dict[Weights, nn.Module]:
    """The weights that a method drafts with, as drafters.methods.make_drafter takes them, or {} if it has none. With
    --shape they are widened too."""
    weights = METHODS[method].weights
    if weights is None:
        return {}
    if subject.widening is None:
        return {weights: weights.load(args, subject.model)}
    # Widening quantises what it has widened.
    unquantised = argparse.Namespace(**vars(args) | {"quantize": None, "draft_weights": "stored"})
    small = weights.load(unquantised, subject.widening.small)
    return {weights: weights.widen(subject.widening, small)}


def freeze(engine: Engine, ids: list[int], new_tokens: int, sampling: Sampling = Sampling()) -> int:
    """Continue the prompt by `new_tokens` tokens (a few more, or fewer if a stop id comes first) and stop there. From
    then on a cycle does all of its work and commits nothing (Engine.freeze). Returns the text's length in tokens."""
    written = 0
    for new in engine.generate(ids, len(engine.state.tokens), sampling):
        written += len(new)
        if written >= new_tokens:
            break
    engine.freeze()
    return int(engine.state.length)
