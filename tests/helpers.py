"""What several tests share: tiny checkpoints, ways of running an engine, scripted drafters."""
import contextlib
import json
import random
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest
import tiny
import torch
from tokenizers import Tokenizer as BPE
from tokenizers import decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import cycle
from benchmarks.widen import FIELDS
from draft import Vanilla
from engine import Engine
from model import Llama, rope_table
from sampling import Sampling
from training import block, commands, trainer
from tree import State, Tree, build_tree

EOS, BOS, USER, ASSISTANT, END = range(5)


class Letters:
    """A tokenizer with one token a letter and the template BOS (USER text END | ASSISTANT text END)* ASSISTANT.
    Private-use characters stand for single ids, so that any ids can be written as text."""
    has_chat_template, stop_ids, bos_id = True, frozenset([EOS, END]), BOS
    head, between, tail = [BOS, USER], [USER], [END, ASSISTANT]
    added: dict[int, object] = {}

    def chat(self, messages: list[dict[str, str]]) -> list[int]:
        ids = [BOS]
        for message in messages:
            text = [ord(c) - 0xE000 if ord(c) >= 0xE000 else 8 + ord(c) % 16 for c in message["content"]]
            ids += [USER if message["role"] == "user" else ASSISTANT, *text, END]
        return [*ids, ASSISTANT]

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(0xE000 + i) for i in ids)


def slow_but(quick: int, values: Iterable) -> list:
    """For pytest.mark.parametrize: these values, all but the first `quick` of them marked as slow."""
    return [value if i < quick else pytest.param(value, marks=pytest.mark.slow) for i, value in enumerate(values)]


class Payload:
    """What a hostile pickle looks like: unpickling it creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def read(path: Path, length: int) -> Tensor:
    """The rows of a training file, [any, length] int64."""
    return torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.int32).view(-1, length).long()


def marked(batch: int, length: int) -> Tensor:
    """[batch, length] random tokens, about half of them answers."""
    tokens = torch.tensor([tiny.prompt(seed, length) for seed in range(batch)])
    return torch.where(torch.rand(tokens.shape, generator=torch.Generator().manual_seed(9)) < 0.5, ~tokens, tokens)


def tiny_command(main: Callable[[], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable]:
    """For fixtures: a function that runs a training command's main on a tiny checkpoint, in this process, with some
    words added, and returns the checkpoint's folder."""
    precision = torch.get_float32_matmul_precision()
    folder = tiny.save_target(tiny.target(dtype=torch.bfloat16), tmp_path / "model")
    for module in (commands, block):
        monkeypatch.setattr(module, "Tokenizer", lambda path: Letters())

    def run(*words: object) -> Path:
        small = ("--checkpoint", folder, "--tokens", 1200, "--length", 48, "--batch", 4, "--generate_batch", 10,
                 "--places", 32, "--device", "cpu", "--eval_prompts", 2)
        monkeypatch.setattr(sys, "argv", [str(word) for word in ("train", *small, *words)])
        main()
        return folder
    yield run
    torch.set_float32_matmul_precision(precision)


def arguments(folder: Path, *words: str) -> list[str]:
    """Words of a command line that generate.py accepts, and some more."""
    return ["--checkpoint", str(folder), "--prompt", "x", "--device", "cpu", *words]


def bits_of(words: list[int]) -> int:
    """One number of the bits of several int64."""
    return sum(word % 2**64 << 64 * i for i, word in enumerate(words))


FLAGS = {"vanilla": (), "lookup": ("--lookup",), "lookahead": ("--lookahead",), "medusa": ("--medusa", "medusa"),
         "speculate": ("--speculate", "."), "speculate+rejection": ("--speculate", ".", "--rejection"),
         "speculate+lookup": ("--speculate", ".", "--lookup"), "eagle": ("--eagle",), "eagle2": ("--eagle2",),
         "eagle2+lookup": ("--eagle2", "--lookup"), "eagle3": ("--eagle3",),
         "eagle3+lookup": ("--eagle3", "--lookup"), "block": ("--block",),
         "block+lookup": ("--block", "--lookup")}  # "medusa" and "." stand for folders of weights

# What --json prints
KEYS = {"method", "text", "tokens", "prompt_tokens", "new_tokens", "cycles", "gained", "mean_gained", "accept_by_depth",
        "prefill_s", "decode_s", "tokens_per_sec", "compile_s", "memory_gb", "device", "dtype", "torch", "seed", "stop"}

V = 300  # tokens of the tokenizer of `tiny_checkpoint`
CPU = torch.device("cpu")
STOPS = [1, 250]  # the end of a turn, and a byte that no prompt has
SHAPE = dict(zip(FIELDS, (200, 64, 64, 3, 8, 4, 8)))  # a widened shape: a third of the ids is cut away
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>reply\n"


def tiny_checkpoint(folder: Path) -> Path:
    """A tiny checkpoint with a head that guesses well, and a byte-level tokenizer with a chat template."""
    model, head = tiny.pair(4, 0.03, torch.float32, vocab_size=V)
    tiny.save_head(head, tiny.save_target(model, folder) / "eagle")
    tiny.save_head3(tiny.head3(model), folder / "eagle3")
    tiny.save_block(tiny.block(model), folder / "block")
    bpe = BPE(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    bpe.train_from_iterator(cycle.QUESTIONS.read_text().split("\n"), trainers.BpeTrainer(
        vocab_size=V, special_tokens=["<|im_start|>", "<|im_end|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    bpe.save(str(folder / "tokenizer.json"))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": STOPS}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE, "eos_token": "<|im_end|>"}))
    return folder


class Operations(TorchDispatchMode):
    """Counts operations on tensors."""
    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **kwargs or {})


def operations(function: Callable[[], object], calls: int = 1, device: torch.device = CPU) -> float:
    with Operations() as counted:
        function()
    return counted.count * calls


GREEDY = Sampling()


SAMPLINGS = [GREEDY, Sampling(temperature=0.7, top_p=0.9, seed=1), Sampling(temperature=1.0, top_p=0.9, seed=-5),
             Sampling(temperature=1.0, top_k=5, seed=2**40), Sampling(temperature=1.3, min_p=0.05, seed=3),
             Sampling(temperature=0.8, top_k=12, top_p=0.95, min_p=0.02, seed=4), Sampling(temperature=2.0, seed=5)]


def cycle_by_cycle(engine: Engine, ids: list[int], count: int, sampling: Sampling = GREEDY) -> list[list[int]]:
    """The tokens that prefill and each cycle after it committed."""
    cycles = []
    for new in engine.generate(ids, count, sampling):
        assert new, "a cycle that commits nothing"  # the loop would not end
        cycles.append(new)
    return cycles


def write(engine: Engine, ids: list[int], count: int, sampling: Sampling = GREEDY) -> list[int]:
    return sum(cycle_by_cycle(engine, ids, count, sampling), [])


def vanilla(model: Llama, ids: list[int], count: int, sampling: Sampling = GREEDY, max_seq_len: int = 256,
            stop_ids: frozenset[int] = frozenset()) -> list[int]:
    return write(Engine(model, Vanilla(), max_seq_len, stop_ids), ids, count, sampling)


class Scripted(Vanilla):
    """Drafts a tree of a random shape every cycle from the known rest of the text. Along one path the tokens are right,
    down to a random depth; `gains` lists how many tokens each cycle must therefore commit. All other nodes are wrong
    somewhere on their path, though often right by themselves."""

    def __init__(self, text: list[int], size: int, max_depth: int, seed: int, vocab_size: int = 24) -> None:
        self.text, self.num_nodes, self.max_depth, self.vocab_size = text, size, max_depth, vocab_size
        self.random, self.gains = random.Random(seed), []

    def propose(self, state: State) -> Tree:
        length, parents, depth = int(state.length), [0], [0]
        while len(parents) < self.num_nodes:
            shallow = [i for i, d in enumerate(depth) if d < self.max_depth]
            parents.append(self.random.choice(shallow[-4:] if self.random.random() < 0.5 else shallow))
            depth.append(depth[parents[-1]] + 1)
        tokens, right = [int(state.tokens[length - 1])] + [-1] * (self.num_nodes - 1), {0}
        for node in range(self.num_nodes):
            children = [i for i in range(node + 1, self.num_nodes) if parents[i] == node]
            due = self.text[length + depth[node]] if length + depth[node] < len(self.text) else 0
            lucky = self.random.choice(children) if children and self.random.random() < 0.8 else None
            wrong = self.random.sample([t for t in range(self.vocab_size) if t != due], min(len(children), 23))
            for child in children:
                tokens[child] = due if child == lucky else wrong.pop() if wrong else due
                if node in right and tokens[child] == due:
                    right.add(child)
        self.gains.append(1 + max(depth[node] for node in right))
        return build_tree(torch.tensor(tokens), torch.tensor(parents), self.max_depth)


class Event:
    def record(self) -> None:
        pass

    def synchronize(self) -> None:
        pass


def as_on_a_gpu(engine: Engine) -> Engine:
    """Make an engine's host side behave as on a GPU: prompts go in chunks of two sizes, and a cycle is enqueued before
    the report of the one before is read."""
    engine.cuda = True
    engine.mailbox.arrived = [Event(), Event()]
    return engine


def exact(made: trainer.Trainer) -> trainer.Trainer:
    """The trainer in float64, with weights that make a difference, and without optimizers: it takes no step."""
    tiny.randomise(made.module, 1, torch.float64)
    made.module.requires_grad_(True)
    made.rope = rope_table(made.module.cfg, made.args.length).double()
    made.amp = contextlib.nullcontext()
    made.optimizers = []
    return made
