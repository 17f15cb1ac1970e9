"""How much memory training takes, and how many dialogues at a time fit into what is free.

Weights and optimizer states are added up as they are. What autograd keeps is estimated by a formula for compiled
functions, as on a GPU: these keep bf16 tensors and recompute the rest. On a CPU, a step takes about 50 % more, and
logits 2.4 times as much.
"""
import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch

from app.memory import OVERHEAD, dequantized, exhausted, free_bytes, total_bytes
from model import Llama
from quant.linear import is_quantized
from training.steps import places_in_part

USABLE = 0.9  # of the free memory: the rest is lost to fragmentation


class Need(NamedTuple):
    """Bytes that a step of training takes."""
    target: int  # its weights, the copied rows of its lm_head, and what one of its layers takes in passing
    head: int  # weights, gradients and states of the optimizers, all fp32
    hidden: int  # features and taps of the target
    steps: int  # what autograd keeps of the unrolled draft steps
    loss: int  # the logits of a part of the places, the head's and the target's, and as much for gradients

    def __str__(self) -> str:
        return ", ".join(f"{name} {size / 1e9:.2f} GB" for name, size in self._asdict().items())


def training_need(trainer, batch: int) -> Need:
    """What `trainer`, a training.trainer.Trainer, needs for steps of `batch` dialogues.

    Of each draft step and each layer, autograd keeps for each position what the layer reads (2 C), norms and residuals
    (5 C), queries, keys, values and what they give, of all heads, before and after the own row is added (5 H D), and
    gate, up and their product (3 I).
    """
    args, cfg = trainer.args, trainer.layer_config
    passes, rows, places = trainer.kept_rows(batch)
    per_position = 7 * cfg.hidden_size + 5 * cfg.num_heads * cfg.head_dim + 3 * cfg.intermediate_size
    parameters = sum(p.numel() for p in trainer.module.parameters())
    states = sum((2 if isinstance(optimizer, torch.optim.AdamW) else 1) * p.numel()
                 for optimizer in trainer.optimizers for group in optimizer.param_groups for p in group["params"])
    hidden = batch * args.length * trainer.model.cfg.hidden_size * (1 + len(trainer.taps))
    tokens = len(trainer.target_rows)
    logits = 2 * min(places, places_in_part(places, tokens)) * tokens  # the head's and the target's
    target = total_bytes((trainer.model, trainer.target_rows))
    return Need(target=target + target_passing(trainer.model, batch * args.length),
                head=4 * (2 * parameters + states), hidden=2 * hidden,
                steps=2 * (passes * parameters + cfg.num_layers * rows * per_position),
                loss=2 * 2 * logits)  # bf16, and as much for gradients


def target_passing(model: Llama, tokens: int) -> int:
    """Bytes that a layer of the target takes for a while: hidden states, gate, up, quantised weights made dense."""
    cfg = model.cfg
    layer = 2 * tokens * (4 * cfg.hidden_size + 3 * cfg.intermediate_size)
    return layer + (dequantized(cfg, torch.bfloat16) if is_quantized(model) else 0)


def generating_need(model: Llama, length: int, batch: int) -> int:
    """Bytes that writing `batch` dialogues at a time takes: the weights, the cache, and the logits with their noise."""
    cfg = model.cfg
    cache = 4 * cfg.num_layers * cfg.num_kv_heads * cfg.head_dim * length
    return total_bytes(model) + target_passing(model, batch) + batch * (cache + 10 * cfg.vocab_size)


def fit(option: str, asked: int, need: Callable[[int], int], model: Llama, smaller: str) -> int:
    """The option's value, halved until need(value) bytes are free, which a line says. ValueError where none fits.
    smaller: the options with which less is needed."""
    device = model.embed.weight.device
    free = int(USABLE * free_bytes(device.type)) - (int(OVERHEAD) if device.type == "cuda" else 0)
    fitting = asked
    while fitting > 1 and need(fitting) > free:
        fitting //= 2
    if need(fitting) > free:
        raise ValueError(f"out of memory: {option} 1 needs {need(1) / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free; "
                         f"a smaller {smaller} needs less"
                         + ("" if is_quantized(model) else ", and train.py --target_quantize int8 halves the model"))
    if fitting < asked:
        print(f"{option} {fitting}: {asked} would need {need(asked) / 1e9:.1f} GB, and {free / 1e9:.1f} GB can be used",
              flush=True)
    return fitting


def fit_generate_batch(model: Llama, asked: int, length: int) -> int:
    """How many dialogues can be written at the same time: `asked`, or what fits."""
    need = partial(generating_need, model, length)
    return fit("--generate_batch", asked, need, model, "--length")


def fit_batch(trainer) -> int:
    """How many dialogues a step of this trainer can take: --batch, or what fits. Prints what that needs."""
    smaller = "--length or --anchors" if "anchors" in trainer.own_options else "--length"
    batch = fit("--batch", trainer.args.batch, lambda batch: sum(training_need(trainer, batch)), trainer.model, smaller)
    need = training_need(trainer, batch)
    free = free_bytes(trainer.device.type)
    print(f"memory: about {sum(need) / 1e9:.2f} GB of {free / 1e9:.2f} GB ({need})", flush=True)
    return batch


@contextmanager
def smaller_batches(args: argparse.Namespace) -> Iterator[None]:
    """A context in which a RuntimeError that means "out of memory" becomes a ValueError that says what to do."""
    try:
        yield
    except RuntimeError as error:
        if not exhausted(error):
            raise
        raise ValueError(f"out of memory: use a --batch below {args.batch}, or a --generate_batch below "
                         f"{args.generate_batch}") from error
