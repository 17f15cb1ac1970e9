"""Dialogues that a model writes itself, user turns and answers, thousands at a time: the data for training draft heads.

The model is given the chat template and, for most user turns, the first words of a question. It writes the rest. All
dialogues advance by one token together, so a step is one forward over `batch` rows, and on a GPU one CUDA graph.

A dialogue is stored as a row of *marked* tokens: token t of an answer is stored as t, and every other token (template,
user turn) as ~t, which is negative. So one number says which token it is and whether training should learn it.
"""
import json
import math
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from formats.writing import write_text
from model import Llama
from ops.graphs import capture, graph_memory
from tokenizer import Tokenizer
from training.memory import fit_generate_batch

# Most user turns begin with one of these. Without them a model asks the same few questions.
OPENERS = """Write|Write a short|Write a Python function that|Write a story about|Write an email to|Explain|Explain why
Explain how|Explain the difference between|How do I|How does|How many|How can I|What is|What are|What are some
What would|What is the best way to|Why is|Why do|Can you|Could you explain|Give me|Give an example of|Give three
List|List five|Describe|Describe a|Summarize|Summarise the following text:|Translate|Compare|Create a|Design a|Make a
Suggest|Imagine you are|You are a|Pretend to be|Act as|Is it true that|Tell me about|Name|Identify|Classify
Rewrite the following sentence:|Edit the following|Find the|Calculate|Solve|If|A|The|In|I have a|I am|My|Who|When|Where
Which|Given|Consider|Suppose|def |import|Generate a|Generate a list of|Propose|Develop|Discuss|Do you|Should|Let's
Provide|Draft|Compose|Come up with|Help me|Read the passage below|Extract|Convert|Implement|What's"""
OPENERS = OPENERS.replace("\n", "|").split("|")
MAX_USER = 80  # tokens after which a user turn is cut short
MAX_ANSWER = 400  # the same for an answer


def read_openers(path: Path | None) -> list[str]:
    """The openers in a JSON file, a list of texts; without a file OPENERS. ValueError for any other file."""
    if path is None:
        return OPENERS
    try:
        openers = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        openers = None
    if not openers or not isinstance(openers, list) or not all(isinstance(o, str) and o.strip() for o in openers):
        raise ValueError(f"{path}: should be a JSON list of texts, the first words of user turns")
    return openers


def unmark(marked: Tensor) -> Tensor:
    """The tokens of marked tokens: ~t back to t."""
    return torch.where(marked < 0, ~marked, marked)


# ----- What is said next -------------------------------------------------------------------------------------------


class Turns(NamedTuple):
    """Where each of B dialogues is."""
    sequence: Tensor  # [B] int64, the forced tokens that its turn begins with: a row of Script.forced
    index: Tensor  # [B] int64, the next token of that sequence; past its end the model writes freely
    written: Tensor  # [B] int64, tokens that the model has written in this turn
    answering: Tensor  # [B] bool: the turn is an answer
    temperature: Tensor  # [B] fp32


class Script:
    """The tokens that a dialogue is forced to contain: what the chat template writes around the turns.

    They are found by rendering contents of one token: the ids around it are the template's. A tokenizer without a
    template has no turns, and the model continues an empty text.
    """

    def __init__(self, tokenizer: Tokenizer, device: torch.device, openings: list[str] = OPENERS) -> None:
        stops = sorted(tokenizer.stop_ids)
        if tokenizer.has_chat_template:
            one, other = (tokenizer.chat([{"role": "user", "content": c}]) for c in "X7")
            head = next(i for i, (a, b) in enumerate(zip(one, other)) if a != b)  # ids before the user's content
            tail = one[head + 1:]  # ids between it and the answer
            two = tokenizer.chat([{"role": "user", "content": "X"}, {"role": "assistant", "content": "X"},
                                  {"role": "user", "content": "X"}])
            between = two[len(one) + 1:len(two) - len(tail) - 1]  # ids between an answer and the next user turn
            openers = [[]] * (len(openings) // 2)  # a third of the user turns has no opener
            openers += [tokenizer.chat([{"role": "user", "content": o.strip()}])[head:-len(tail)] for o in openings]
            first_turns = [[*one[:head], *opener] for opener in openers]
            later_turns = [[*between, *opener] for opener in openers]
            sequences = [*first_turns, *later_turns, tail]
            self.openers = len(openers)
        else:
            bos = tokenizer.bos_id if tokenizer.bos_id is not None else stops[0]
            sequences = [[bos]]
            self.openers = 0
            tail = []
        width = max(map(len, sequences)) + 1
        # [sequences, width] int64, filled up with -1. With a template: first user turns, later user turns, the answer
        self.forced = torch.tensor([s + [-1] * (width - len(s)) for s in sequences], device=device)
        self.answer = len(sequences) - 1  # the sequence that begins an answer
        self.ends = torch.tensor(sorted({*stops, *tail[:1]}), device=device)  # tokens that end a turn

    def start(self, batch: int, seed: int) -> Turns:
        """`batch` dialogues before their first token."""
        device = self.forced.device
        torch.manual_seed(seed)
        zero = torch.zeros(batch, dtype=torch.int64, device=device)
        sequence = torch.randint(self.openers, (batch,), device=device) if self.openers else zero
        return Turns(sequence, zero.clone(), zero.clone(), zero.bool(), torch.ones(batch, device=device))

    def step(self, turns: Turns, sampled: Tensor) -> Tensor:
        """Advance all dialogues by one token, in place: the next forced token, or past these the `sampled` one [B].
        Returns these tokens, marked, [B] int64."""
        forced = self.forced[turns.sequence, turns.index]
        free = forced < 0
        token = torch.where(free, sampled, forced)
        of_answer = free & (turns.answering if self.openers else True)
        if self.openers:
            self.end_turns(turns, token, free)
        else:
            turns.index.add_(~free)
        return torch.where(of_answer, token, ~token)

    def end_turns(self, turns: Turns, token: Tensor, free: Tensor) -> None:
        """Count this token [B], and let the other side begin where it ends the turn. free [B] bool: the model wrote
        it."""
        turns.written.add_(free)
        too_long = turns.written >= torch.where(turns.answering, MAX_ANSWER, MAX_USER)
        ended = free & ((token[:, None] == self.ends).any(1) | too_long)
        next_user = self.openers + torch.randint_like(token, self.openers)  # the sequences of later user turns
        next_sequence = torch.where(ended, torch.where(turns.answering, next_user, self.answer), turns.sequence)
        # If the model ended its turn with the token that the template would write next, that token is not repeated.
        skipped = (self.forced[next_sequence, 0] == token).long()
        turns.index.copy_(torch.where(ended, skipped, turns.index + ~free))
        turns.sequence.copy_(next_sequence)
        turns.answering.copy_(turns.answering ^ ended)
        turns.written.mul_(~ended)
        # Half of the answers are greedy, the others at temperature 0.7 or 1. User turns are at temperature 1.
        draw = torch.rand_like(turns.temperature)
        of_answer = torch.where(draw < 0.5, 0.0, torch.where(draw < 0.75, 0.7, 1.0))
        temperature = torch.where(ended, torch.where(turns.answering, of_answer, 1.0), turns.temperature)
        turns.temperature.copy_(temperature)


def sample(logits: Tensor, temperature: Tensor, answering: Tensor) -> Tensor:
    """Sample a token for each row: [B] int64. logits [B, V]; temperature [B] fp32, 0 is greedy; answering [B] bool,
    false in user turns, where min-p 0.02 excludes unlikely tokens."""
    logits = logits.float()
    temperature = temperature[:, None]
    gumbel = -torch.log(-torch.log(torch.rand_like(logits).clamp(1e-10, 1 - 1e-7)))
    log_min_p = torch.where(answering, -1e4, math.log(0.02))[:, None]
    floor = logits.amax(-1, keepdim=True) + temperature * log_min_p
    return torch.where(logits < floor, -torch.inf, logits + temperature * gumbel).argmax(-1)


# ----- Writing them ------------------------------------------------------------------------------------------------


def length_path(path: Path) -> Path:
    """The file beside the dialogues in `path` that says how many tokens each of them has."""
    return path.with_suffix(".length")


def check_dialogues(path: Path, script: Script, length: int) -> None:
    """Raise ValueError if a file of dialogues was written with another length of rows or for another model, as far as
    their first tokens tell."""
    if not path.exists():
        return
    known = length_path(path).read_text() if length_path(path).exists() else str(length)  # older versions wrote none
    fits = known.strip() == str(length)
    rows = min(path.stat().st_size // (4 * length), 100)
    if fits and rows:
        first = ~torch.from_file(str(path), size=rows * length, dtype=torch.int32).view(rows, length)[:, 0].long()
        fits = bool(torch.isin(first, script.forced[:max(script.openers, 1), 0].cpu()).all())
    if not fits:
        raise ValueError(f"{path}: its dialogues are of another --length or another model: move it away, or choose "
                         "another --work")


def check_answers(data: Tensor, path: Path) -> None:
    """Raise ValueError if no dialogue of data [dialogues, S], marked, from the file `path` has an answer."""
    if not (data >= 0).any():
        raise ValueError(f"{path}: no dialogue has an answer to learn from: move the file away, and use a larger "
                         "--length")


@torch.inference_mode()
def write_dialogues(model: Llama, script: Script, path: Path, rows: int, length: int, batch: int) -> None:
    """Append dialogues to `path` until it holds `rows` rows of `length` marked tokens, int32. Dialogues that are there
    already are kept. batch: how many are written at the same time, fewer where memory is short. A new file gets another
    one beside it that says the length, which the file itself does not tell."""
    device = model.embed.weight.device
    bucket = 128  # a forward reads a multiple of this many cache slots, so that few graphs serve all lengths
    done = path.stat().st_size // (4 * length) if path.exists() else 0
    if done >= rows:
        return
    if not done:
        write_text(length_path(path), f"{length}\n")
    with path.open("ab") as f:
        f.truncate(done * 4 * length)  # a row that was written in part would shift all that follow
    batch = fit_generate_batch(model, batch, length)
    model.allocate_cache(length, -length % bucket, batch)
    turns = script.start(batch, 0)
    token = torch.zeros(batch, 1, dtype=torch.int64, device=device)
    marked = torch.zeros(batch, dtype=torch.int64, device=device)
    position = torch.zeros(1, dtype=torch.int64, device=device)
    draw = torch.compile(sample, dynamic=False) if device.type == "cuda" else sample

    def step(width: int) -> None:
        mask = torch.arange(width, device=device)[None] <= position
        logits = model.lm_head(model(token, position, position, mask)[:, -1])
        marked.copy_(script.step(turns, draw(logits, turns.temperature, turns.answering)))
        token.copy_(unmark(marked)[:, None])
        position.add_(1)

    steps = {width: partial(step, width) for width in range(bucket, length + bucket, bucket)}
    if device.type == "cuda":
        steps = {width: capture(function) for width, function in steps.items()}
    batches = -(-(rows - done) // batch)
    bar = tqdm(total=batches * batch * length, desc="dialogues", unit=" tokens", unit_scale=True, disable=None,
               leave=False)
    while done < rows:
        start = time.perf_counter()
        for tensor, fresh in zip(turns, script.start(batch, done)):
            tensor.copy_(fresh)
        marked.copy_(script.step(turns, token[:, 0]))  # every dialogue begins with a forced token
        token.copy_(~marked[:, None])
        position.zero_()
        columns = [marked.clone()]
        for i in range(length - 1):
            steps[(i // bucket + 1) * bucket]()
            columns.append(marked.clone())
            bar.update(batch)
        block = torch.stack(columns, 1).int().cpu()[:rows - done]
        with path.open("ab") as f:
            f.write(block.numpy().tobytes())
        done += len(block)
        with bar.external_write_mode():
            print(f"dialogues {done}/{rows}  {done * length / 1e6:.1f}M tokens  "
                  f"{batch * length / (time.perf_counter() - start):,.0f} tokens/s  "
                  f"{(block >= 0).float().mean():.0%} answers", flush=True)
    bar.close()
    model.free_cache()
    graph_memory.cache_clear()  # with the last graph of a step its memory is given back: training needs it
