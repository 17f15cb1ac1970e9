"""Dialogues that a model writes itself, both sides of them, thousands at a time: what a draft head learns from.

The model is given the chat template and, for most user turns, the first words of a question; the rest is its own.
All dialogues advance by one token together, so a step is one forward over `batch` rows, and on CUDA one graph.
They are stored as rows of int32: the token, or ~token (negative) where it is not part of an answer.
"""
import math
import time
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from model import Llama
from ops.graphs import capture
from tokenizer import Tokenizer

# Most user turns begin with one of these, because a model left alone asks the same few things.
OPENERS = """Write|Write a short|Write a Python function that|Write a story about|Write an email to|Explain|Explain why
Explain how|Explain the difference between|How do I|How does|How many|How can I|What is|What are|What are some
What would|What is the best way to|Why is|Why do|Can you|Could you explain|Give me|Give an example of|Give three
List|List five|Describe|Describe a|Summarize|Summarise the following text:|Translate|Compare|Create a|Design a|Make a
Suggest|Imagine you are|You are a|Pretend to be|Act as|Is it true that|Tell me about|Name|Identify|Classify
Rewrite the following sentence:|Edit the following|Find the|Calculate|Solve|If|A|The|In|I have a|I am|My|Who|When|Where
Which|Given|Consider|Suppose|def |import|Generate a|Generate a list of|Propose|Develop|Discuss|Do you|Should|Let's
Provide|Draft|Compose|Come up with|Help me|Read the passage below|Extract|Convert|Implement|What's"""
OPENERS = OPENERS.replace("\n", "|").split("|")
MAX_USER, MAX_ANSWER = 80, 256  # tokens a turn may take before it is cut short


class Script:
    """Which tokens a dialogue is forced to contain: what the chat template writes around the turns.

    Found by rendering: the ids around one-token contents are the template's. Without a template there are no
    turns, and the model writes on from the beginning of a text.
    """

    def __init__(self, tokenizer: Tokenizer, device: torch.device) -> None:
        stops = sorted(tokenizer.stop_ids)
        if tokenizer.has_chat_template:
            one, other = (tokenizer.chat([{"role": "user", "content": c}]) for c in "X7")
            head = next(i for i, (a, b) in enumerate(zip(one, other)) if a != b)
            tail = one[head + 1:]
            two = tokenizer.chat([{"role": "user", "content": "X"}, {"role": "assistant", "content": "X"},
                                  {"role": "user", "content": "X"}])
            between = two[len(one) + 1:len(two) - len(tail) - 1]
            openers = [[]] * (len(OPENERS) // 2) + [tokenizer.chat([{"role": "user", "content": o.strip()}])[
                head:-len(tail)] for o in OPENERS]
            sequences = [[*one[:head], *o] for o in openers] + [[*between, *o] for o in openers] + [tail]
            self.openers = len(openers)
        else:
            bos = tokenizer.bos_id if tokenizer.bos_id is not None else stops[0]
            sequences, self.openers, tail = [[bos]], 0, []
        width = max(map(len, sequences)) + 1
        self.forced = torch.tensor([s + [-1] * (width - len(s)) for s in sequences], device=device)  # [kinds, width]
        self.answer = len(sequences) - 1  # the kind that opens an answer
        self.ends = torch.tensor(sorted({*stops, *tail[:1]}), device=device)

    def start(self, batch: int, seed: int) -> dict[str, Tensor]:
        """The state of `batch` dialogues, each at its first token."""
        device = self.forced.device
        torch.manual_seed(seed)
        zero = torch.zeros(batch, dtype=torch.int64, device=device)
        kind = torch.randint(self.openers, (batch,), device=device) if self.openers else zero
        return {"kind": kind, "at": zero.clone(), "said": zero.clone(), "answering": zero.bool(),
                "temperature": torch.ones(batch, device=device)}

    def step(self, state: dict[str, Tensor], sampled: Tensor) -> Tensor:
        """Advance all dialogues by one token; returns what each of them says, as ~token where it is not the
        answer's own (so that one number carries both)."""
        forced = self.forced[state["kind"], state["at"]]
        free = forced < 0
        token = torch.where(free, sampled, forced)
        own = free & (state["answering"] if self.openers else True)
        if self.openers:
            state["said"] += free
            too_long = state["said"] >= torch.where(state["answering"], MAX_ANSWER, MAX_USER)
            ended = free & ((token[:, None] == self.ends).any(1) | too_long)
            next_user = self.openers + torch.randint_like(token, self.openers)
            kind = torch.where(ended, torch.where(state["answering"], next_user, self.answer), state["kind"])
            already = (self.forced[kind, 0] == token).long()  # the turn ended with the template's own first token
            state["at"].copy_(torch.where(ended, already, state["at"] + ~free))
            state["kind"].copy_(kind)
            state["answering"].copy_(state["answering"] ^ ended)
            state["said"].mul_(~ended)
            draw = torch.rand_like(state["temperature"])  # half of the answers greedy, the rest 0.7 or 1.0
            warm = torch.where(draw < 0.5, 0.0, torch.where(draw < 0.75, 0.7, 1.0))
            temperature = torch.where(ended, torch.where(state["answering"], warm, 1.0), state["temperature"])
            state["temperature"].copy_(temperature)
        else:
            state["at"] += ~free
        return torch.where(own, token, ~token)


def sample(logits: Tensor, temperature: Tensor, answering: Tensor) -> Tensor:
    """[B, V] -> [B] tokens at each row's temperature; user turns without the unlikely tail (min-p 0.02)."""
    logits, warm = logits.float(), temperature[:, None]
    gumbel = -torch.log(-torch.log(torch.rand_like(logits).clamp(1e-10, 1 - 1e-7)))
    floor = logits.amax(-1, keepdim=True) + warm * torch.where(answering, -1e4, math.log(0.02))[:, None]
    return torch.where(logits < floor, -torch.inf, logits + warm * gumbel).argmax(-1)


@torch.inference_mode()
def write_dialogues(model: Llama, script: Script, path: Path, rows: int, length: int, batch: int) -> None:
    """Append dialogues to `path` until it holds `rows` of `length` int32; the batches there are kept."""
    device, bucket = model.embed.weight.device, 128
    have = path.stat().st_size // (4 * length) if path.exists() else 0
    if have >= rows:
        return
    with path.open("ab") as f:
        f.truncate(have * 4 * length)  # a row that was cut short would shift all that follow
    model.allocate_cache(length, -length % bucket, batch)
    state = script.start(batch, 0)
    token = torch.zeros(batch, 1, dtype=torch.int64, device=device)
    said, at = torch.zeros(batch, dtype=torch.int64, device=device), torch.zeros(1, dtype=torch.int64, device=device)
    draw = torch.compile(sample, dynamic=False) if device.type == "cuda" else sample

    def step(width: int) -> None:
        mask = torch.arange(width, device=device)[None] <= at
        logits = model.lm_head(model(token, at, at, mask)[:, -1])
        said.copy_(script.step(state, draw(logits, state["temperature"], state["answering"])))
        token.copy_(torch.where(said < 0, ~said, said)[:, None])
        at.add_(1)

    steps = {width: partial(step, width) for width in range(bucket, length + bucket, bucket)}
    if device.type == "cuda":
        steps = {width: capture(at_width) for width, at_width in steps.items()}
    while have < rows:
        start, fresh = time.perf_counter(), script.start(batch, have)
        for name, value in fresh.items():
            state[name].copy_(value)
        said.copy_(script.step(state, token[:, 0]))  # every dialogue begins with a forced token
        token.copy_(~said[:, None])
        at.zero_()
        columns = [said.clone()]
        for i in range(length - 1):
            steps[(i // bucket + 1) * bucket]()
            columns.append(said.clone())
        block = torch.stack(columns, 1).int().cpu()[:rows - have]
        with path.open("ab") as f:
            f.write(block.numpy().tobytes())
        have += len(block)
        print(f"dialogues {have}/{rows}  {have * length / 1e6:.1f}M tokens  "
              f"{batch * length / (time.perf_counter() - start):,.0f} tokens/s  "
              f"{(block >= 0).float().mean():.0%} answers", flush=True)
    model.free_cache()
