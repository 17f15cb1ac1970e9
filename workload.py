"""What bench.py and cycle.py measure: a checkpoint with its draft heads, as it is or in a large shape, and prompts.

A widened model whose vocabulary is smaller than the checkpoint's (Llama-2 has 32,000 ids) keeps the ids that matter:
those of the prompts, of the template, of the stops, and of what the checkpoint itself answers. So prompts come first,
second turns with the answers to the first among them, and are then moved to the ids of the wide model.
"""
import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from draft import EagleHead, find_head, folder_of, load_head
from engine import Engine, Vanilla
from medusa import MedusaHeads, load_medusa
from methods import DTYPES
from model import Llama, load_model
from qlinears import Quantized
from speculate import load_draft_model
from tokenizer import Tokenizer
from widen import PADDING, SHAPES, put, widen_head, widen_model


class Question(NamedTuple):
    name: str  # its question_id, or the number of its line
    category: str
    turns: list[str]


class Prompt(NamedTuple):
    question: str
    turn: int  # from 1
    category: str
    ids: list[int]


def read_lines(path: Path) -> Iterator[tuple[int, dict | None]]:
    """The objects of a file of JSON lines, with their line numbers; None for what is none. Empty lines are left out."""
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):  # str.splitlines cuts at U+2028, in a text too
        if line.strip():
            try:
                raw = json.loads(line)
            except (ValueError, RecursionError):
                raw = None
            yield number, raw if isinstance(raw, dict) else None


def are_turns(turns: object) -> bool:
    return bool(turns) and isinstance(turns, list) and all(isinstance(turn, str) for turn in turns)


def read_questions(path: Path) -> list[Question]:
    """JSON lines as Spec-Bench and MT-bench have them: `turns`, and perhaps `question_id` and `category`."""
    questions = []
    for number, raw in read_lines(path):
        if raw is None or not are_turns(raw.get("turns")):
            raise ValueError(f'{path}: each line should be a JSON object with "turns", a list of texts; '
                             f"line {number} is not")
        name, category = (str(raw.get(key, other)) for key, other in (("question_id", number), ("category", "all")))
        questions.append(Question(name, category, raw["turns"]))
    if not questions:
        raise ValueError(f"{path}: no questions in it")
    return questions


def subject(args: argparse.Namespace) -> str:
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


def wrapped(tokenizer: Tokenizer, texts: list[str]) -> list[int]:
    """A dialogue whose turns are the user's and the assistant's in turn, up to where the next answer starts."""
    if not tokenizer.has_chat_template:
        return tokenizer.encode("\n\n".join(texts))
    return tokenizer.chat([{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)])


def ask(model: Llama, tokenizer: Tokenizer, questions: list[Question], new_tokens: int) -> list[Prompt]:
    """A prompt for each turn: later ones hold the earlier questions and the model's own greedy answers, so that all
    who are measured answer the same. ValueError names a question whose answer would not fit the model's context."""
    cfg, prompts, engine = model.cfg, [], None
    most = min(cfg.max_position_embeddings, cfg.sliding_window or cfg.max_position_embeddings)
    slots = min(most, max(len(wrapped(tokenizer, q.turns)) + 2 * len(q.turns) * new_tokens for q in questions))
    for question in questions:
        texts = []
        for turn, text in enumerate(question.turns, 1):
            ids = wrapped(tokenizer, texts + [text])
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
        return wrapped(tokenizer, [text])

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


class Widening:
    """--shape: the checkpoint's model in fp32, the wide one, and how prompts and drafts get from one to the other. What
    drafts is loaded for `small`, without --quantize, and then goes through `head`, `medusa` or `draft_model`."""

    def __init__(self, args: argparse.Namespace, small: Llama, prompts: list[list[int]], stop: frozenset[int]) -> None:
        if isinstance(small.lm_head.weight, Quantized):
            raise ValueError("--shape widens unquantised weights: quantise the result with --quantize")
        self.small, self.shape, size = small, SHAPES[args.shape], small.cfg.vocab_size
        self.how = (args.quantize, args.group or 128) if args.quantize else None
        used = {*stop, *(i for ids in prompts for i in ids)}
        if self.shape["vocab_size"] < size:  # what does the model write?
            engine = Engine(small, Vanilla(args.device), max(map(len, prompts)) + args.max_new_tokens, stop)
            for ids in prompts:
                used.update(*engine.generate(ids, args.max_new_tokens))
        self.keep = keep = keep_ids(used, size, self.shape["vocab_size"])
        self.place = {old: new for new, old in enumerate(keep)}
        self.where = (args.device, DTYPES[args.dtype], torch.Generator(args.device).manual_seed(0))  # the last: noise
        self.model = widen_model(small, self.shape, keep, *self.where, self.how)
        small.kv = None

    def ids(self, small: list[int]) -> list[int]:
        return [self.place[i] for i in small]

    def head(self, small: EagleHead) -> EagleHead:
        if small.of_embedding is not None:
            raise ValueError("--shape widens unquantised weights: quantise the result with --quantize")
        head = widen_head(small, self.shape, *self.where)
        if self.how:
            head.quantize(*self.how)
        if small.vocab is not None:
            kept = [self.place[i] for i in small.vocab.tolist() if i in self.place]
            head.vocab = torch.tensor(kept, device=self.where[0])
        return head

    def medusa(self, small: MedusaHeads) -> MedusaHeads:
        """Dead channels of a feature stay zero, and its constant channel what it is."""
        device, dtype, noise = self.where
        (layers, count, size, _), wide = small.weight.shape, self.shape["hidden_size"]
        own = small.projections is not None
        with torch.device("meta"):
            heads = MedusaHeads(wide, count, layers, self.shape["vocab_size"] if own else None)
        tensors = {name: torch.normal(0.0, 0.02, t.shape, generator=noise, device=device, dtype=dtype)
                   for name, t in heads.named_parameters()}
        put(tensors["weight"], slice(None), F.pad(small.weight, (0, 0, 0, wide - size)))
        tensors["bias"] = F.pad(small.bias, (0, wide - size)).to(dtype)
        if own:
            put(tensors["projections"][:, :len(self.keep)], slice(None), small.projections[:, self.keep])
            put(tensors["projections"][:, len(self.keep):], slice(None), small.projections.mean(1, True), PADDING)
        heads.load_state_dict(tensors, assign=True)
        return heads.requires_grad_(False)

    def draft_model(self, small: Llama) -> Llama:
        """As small as it is, with the wide model's ids. Ids beyond are copies of the first, which wins their ties."""
        rows = self.keep + self.keep[:1] * (self.shape["vocab_size"] - len(self.keep))
        embed, lm_head = (module.weight.detach()[rows] for module in (small.embed, small.lm_head))
        small.embed, small.lm_head = nn.Embedding.from_pretrained(embed), nn.Linear(1, 1, bias=False)
        small.lm_head.weight, small.cfg = nn.Parameter(lm_head, False), replace(small.cfg, vocab_size=len(rows))
        return small.to(self.where[1])


def widened_parts(method: str, args: argparse.Namespace) -> dict[str, nn.Module]:
    """With --shape: what methods.make_drafter would load for `method`, for the wide model."""
    wide, name = args.widening, method.partition("+")[0]
    if wide is None:
        return {}
    if name == "medusa" and args.medusa:
        return {name: wide.medusa(load_medusa(args.medusa, wide.small))}
    if name == "speculate" and args.speculate:
        return {name: wide.draft_model(load_draft_model(args.speculate, wide.small))}
    return {"eagle": load_eagle(args, wide.model)} if name.startswith("eagle") else {}


def load(args: argparse.Namespace, make_prompts: Callable[[Llama, Tokenizer], list[Prompt]]
         ) -> tuple[Llama, list[Prompt], frozenset[int]]:
    """Target, prompts and stop ids, all in the ids of the widened model with --shape. args.widening becomes what heads
    need, or None; set it to None again after loading them, for it holds the small model."""
    tokenizer = Tokenizer(folder_of(args.checkpoint))
    how = (None,) if args.shape else (args.quantize, args.group or 128)
    dtype = torch.float32 if args.shape else DTYPES[args.dtype]  # widening rounds, and once is enough
    model = load_model(args.checkpoint, args.device, dtype, *how)
    prompts, stop, args.widening = make_prompts(model, tokenizer), tokenizer.stop_ids, None
    if args.shape is None:
        model.kv = None  # of answers to first turns: an engine has its own size
        return model, prompts, stop
    wide = args.widening = Widening(args, model, [p.ids for p in prompts], stop)
    return wide.model, [p._replace(ids=wide.ids(p.ids)) for p in prompts], frozenset(wide.ids(sorted(stop)))


def load_eagle(args: argparse.Namespace, model: Llama) -> EagleHead:
    """EAGLE's head for the model that `load` made."""
    wide, draft = args.widening, args.draft or find_head(args.checkpoint)
    if wide:
        return wide.head(load_head(draft, wide.small, args.draft_vocab))
    return load_head(draft, model, args.draft_vocab, args.quantize, args.group or 128)
