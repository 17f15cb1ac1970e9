"""What the training commands share: their options, and the target with its dialogues."""
import argparse
import logging
import math
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from model import Llama, load_model
from ops.quantized import dequantize
from quant.linear import QuantizedLinear, is_quantized
from tokenizer import Tokenizer
from training.dialogues import Script, check_dialogues, read_openers, write_dialogues

MINUTES = 12  # of training, where neither --steps nor --minutes says when it ends


def options(description: str) -> argparse.ArgumentParser:
    """The options of every training command: the target, its dialogues, how long to train."""
    p = argparse.ArgumentParser(description=description)
    p.add_argument("--checkpoint", type=Path, required=True, help="folder of the converted target model")
    p.add_argument("--work", type=Path, help="dialogues and training state (default: <checkpoint>/training)")
    p.add_argument("--tokens", type=at_least(0, float), default=24e6, help="dialogue tokens that the model writes")
    p.add_argument("--openers", type=Path, metavar="FILE", help="a JSON list of the first words of user turns, such as "
                   "training/coding_openers.json (default: those in training/dialogues.py, of general questions)")
    p.add_argument("--minutes", type=at_least(0, float), help=f"end training after this time (default: {MINUTES}, or "
                   "with --steps any time)")
    p.add_argument("--steps", type=at_least(0), help="end training after this many steps, if that comes sooner; 0: do "
                   "not train, only evaluate what is there already")
    p.add_argument("--length", type=at_least(3), default=640, help="tokens of a dialogue")
    p.add_argument("--batch", type=at_least(1), default=32, help="dialogues per training step (train.py: fewer if "
                   "memory is short)")
    p.add_argument("--generate_batch", type=at_least(1), default=2048, help="dialogues written at the same time, fewer "
                   "if memory is short; so many are held out")
    p.add_argument("--decay", type=float, default=0.8, help="weight in the loss of each draft step, or position ahead, "
                   "relative to the one before")
    p.add_argument("--places", type=at_least(1), default=8192, help="positions per training step that the loss looks "
                   "at")
    p.add_argument("--lr", type=float, default=2e-3, help="peak learning rate (Muon)")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--eval_prompts", type=at_least(0), default=80, help="held-out dialogues to evaluate on; 0: do not "
                   "evaluate")
    return p


def read_options(p: argparse.ArgumentParser, words: list[str] | None = None) -> argparse.Namespace:
    """What the words (default: the command line's) ask for, by the parser that `options` made."""
    args = p.parse_args(words)
    if args.minutes is None:
        args.minutes = MINUTES if args.steps is None else math.inf
    if args.steps is None:
        args.steps = math.inf
    return args


def at_least(least: int, kind: type = int) -> Callable[[str], float]:
    """For argparse: a function that reads a number, int or float, and refuses one below `least`."""
    def read(text: str) -> float:
        number = kind(text)
        if not least <= number < math.inf:  # also for nan
            raise argparse.ArgumentTypeError(f"must be {least} or more, not {text}")
        return number
    read.__name__ = kind.__name__  # argparse says "invalid int value"
    return read


def prepare(args: argparse.Namespace, quantize: str | None = None) -> tuple[Llama, Tokenizer, Tensor]:
    """The target, its tokenizer, and its dialogues [rows, length] int32, marked. Writes those that are missing.

    quantize: the mode of the target's linears, except of the lm_head, which the loss reads as a whole."""
    torch.set_float32_matmul_precision("high")
    quieten()
    model = load_model(args.checkpoint, args.device, torch.bfloat16, quantize)
    if isinstance(model.lm_head, QuantizedLinear):
        model.lm_head = plain_lm_head(model)
    tokenizer = Tokenizer(args.checkpoint)
    script = Script(tokenizer, model.embed.weight.device, read_openers(args.openers))
    args.work.mkdir(parents=True, exist_ok=True)
    if args.device == "cuda":
        torch._dynamo.config.recompile_limit = 64
        for layer in () if is_quantized(model) else model.layers:  # compiled once for all: their shapes are the same
            layer.compile(dynamic=False)
    path = args.work / "dialogues.bin"
    rows = max(int(args.tokens / args.length), args.generate_batch + args.batch)
    check_dialogues(path, script, args.length)
    write_dialogues(model, script, path, rows, args.length, args.generate_batch)
    dialogues = torch.from_file(str(path), size=rows * args.length, dtype=torch.int32)
    return model, tokenizer, dialogues.view(rows, args.length)


def quieten() -> None:
    """Leave out PyTorch's remarks on what is meant as it is, hundreds of lines on a Hopper GPU. Where a kernel of ours
    has inline assembly, it prints a traceback, and then assumes, rightly, that the kernel may write to its arguments.
    """
    logging.getLogger("torch._dynamo").addFilter(lambda record: "every input is mutated" not in record.getMessage())
    for remark in ("Dynamo detected a call to a `functools.lru_cache`", "Mismatch dtype between input and weight"):
        warnings.filterwarnings("ignore", remark)


def plain_lm_head(model: Llama) -> nn.Linear:
    """The lm_head of a quantised model with bf16 weights [V, C]: the embedding if the two are tied, else dequantised.
    """
    plain = nn.Linear(1, 1, bias=False, device="meta")
    if model.cfg.tie_word_embeddings:
        plain.weight = model.embed.weight
    else:
        values = dequantize(model.lm_head.weight, torch.bfloat16)[:, :model.cfg.hidden_size]
        plain.weight = nn.Parameter(values, False)
    return plain
