"""One timed answer, and the lines that are printed about it."""
import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import nn

from app.watch import View, Watch
from draft import Vanilla
from drafters.methods import BASELINE
from engine import Engine, first_difference
from ops.device import device_name, peak_gb
from ops.quantized import Quantized
from ops.startup import parts_so_far
from quant.linear import QuantizedLinear, is_quantized
from sampling import Sampling
from tokenizer import Tokenizer


class Run(NamedTuple):
    """One timed generation."""
    tokens: list[int]  # up to the stop id, if there was one
    gained: list[int]  # tokens that each cycle committed; the first token, which prefill chose, is not among them
    prefill_s: float  # until the first token was there
    decode_s: float  # from then on
    said: dict | None = None  # only of an engine behind HTTP, which gives a text: see benchmarks/http_engines.py


def run(engine: Engine, ids: list[int], new_tokens: int, sampling: Sampling = Sampling(),
        show: Callable[[list[int]], bool | None] = lambda new: None, reuse: bool = False) -> Run:
    """Generate and time it. `show` is given the tokens as they come and ends the text by returning True. reuse: see
    Engine.generate."""
    tokens: list[int] = []
    gained = []
    if engine.cuda:
        torch.cuda.synchronize()  # a cycle may still run ahead of the end of the last text
    start = time.perf_counter()
    for new in engine.generate(ids, new_tokens, sampling, reuse):
        if tokens:
            gained.append(len(new))
        else:
            first = time.perf_counter()  # reading `new` back has waited for the device
        tokens += new
        if show(new):
            break
    return Run(tokens, gained, first - start, time.perf_counter() - first)


def generate(engine: Engine, ids: list[int], max_new_tokens: int, sampling: Sampling, tokenizer: Tokenizer,
             method: str = BASELINE, show: bool = False, stops: Sequence[str] = (), view: View | None = None,
             push: Callable[[str], bool] | None = None, reuse: bool = False) -> dict:
    """Answer one prompt. Returns the object that --json prints, without the keys that answer_and_report adds.

    show: stream the text to stdout. stops: end before the first of these texts. view: give it every cycle's tree; the
    drafter must be a Watch then (app/watch.py). push: called with the text of every cycle, which may be "", and with
    the rest at the end; if it returns True, the answer ends. reuse: see Engine.generate.
    """
    stream = tokenizer.stream(stops)
    pieces: list[str] = []  # decoding all tokens at the end would keep a server's last event waiting

    def take(new: list[int]) -> bool:
        if view:
            view.push(new)
        pieces.append(text := stream.push(new))
        if show:
            print(text, end="", flush=True)
        left = bool(push and push(text))
        return stream.stopped or left

    tokens, gained, prefill_s, decode_s, _ = run(engine, ids, max_new_tokens, sampling, take, reuse)
    rest = stream.flush()
    if push:
        push(rest)
    if view:
        view.finish()
    if show:
        print(rest, flush=True)
    if stream.stopped and len(tokens) > stream.tokens:  # the cycle wrote beyond the stop text
        gained[-1] -= len(tokens) - stream.tokens
        tokens = tokens[:stream.tokens]
    if stream.stopped:
        stop = "string"
    elif tokens[-1] in tokenizer.stop_ids:
        stop = "eos"
    else:
        stop = "length" if len(tokens) == max_new_tokens else "context"
    depths = range(1, engine.drafter.max_depth + 1)
    result = {
        "method": method, "text": "".join(pieces) + rest, "tokens": tokens,
        "prompt_tokens": len(ids), "new_tokens": len(tokens), "cycles": len(gained), "gained": gained,
        "mean_gained": sum(gained) / len(gained) if gained else 0.0,
        "accept_by_depth": [sum(g > depth for g in gained) / max(len(gained), 1) for depth in depths],
        "prefill_s": prefill_s, "decode_s": decode_s,
        "tokens_per_sec": (len(tokens) - 1) / decode_s if gained else 0.0, "compile_s": engine.compile_s,
        "memory_gb": peak_gb(engine.device), "device": device_name(engine.device),
        "dtype": str(engine.model.embed.weight.dtype).removeprefix("torch."), "torch": torch.__version__,
        "seed": sampling.seed, "stop": stop}
    return result | ({"trees": view.record()} if view else {})


def setting(engine: Engine) -> str:
    """One line: the device and the formats in which it computes."""
    weight = engine.model.layers[0].wqkv.weight
    weights = f"int{4 if weight.group else 8} weights, " if isinstance(weight, Quantized) else ""
    if head := integers_of_head(engine):
        weights = f"draft head in {head}, "
    return f"{device_name(engine.device)}: {weights}{str(engine.model.embed.weight.dtype).removeprefix('torch.')}"


def integers_of_head(engine: Engine) -> str | None:
    """"int8" or "int4" where the draft head has such weights beside a model that is not quantised."""
    head = getattr(engine.drafter, "head", nn.Module())
    groups = [part.weight.group for part in head.modules() if isinstance(part, QuantizedLinear)]
    return f"int{4 if any(groups) else 8}" if groups and not is_quantized(engine.model) else None


def report(result: dict) -> str:
    """One line: speed, tokens per step, and how often drafts were accepted to each depth."""
    drafting = "" if result["method"] == BASELINE else (
        f", {result['mean_gained']:.2f} tokens per step; accepted by depth "
        + " ".join(f"{share:.0%}" for share in result["accept_by_depth"]))
    return (f"{result['method']}: {result['tokens_per_sec']:.1f} tokens/s ({result['new_tokens']} tokens, "
            f"{result['decode_s']:.2f} s{drafting}); prompt of {result['prompt_tokens']} in "
            f"{result['prefill_s']:.2f} s")


def time_to_first_token(parts: dict[str, float], prefill_s: float) -> dict:
    """Keys for the result of a process's first text: the seconds since the command began, and their parts."""
    start_s = parts | {"prompt": prefill_s}
    return {"first_token_s": sum(start_s.values()), "start_s": start_s}


def start_report(result: dict) -> str:
    """One line: the time to the first token, and the parts that took 10 ms or more."""
    parts = ", ".join(f"{name} {s:.2f}" for name, s in result["start_s"].items() if s >= 0.01)
    return f"first token after {result['first_token_s']:.2f} s: {parts}"


def compare(engine: Engine, vanilla: dict, fast: dict, ids: list[int], sampling: Sampling) -> str:
    """One line: the speed-up, and whether the tokens are the same. If they differ, also the gap between vanilla's two
    best scores at the first difference. engine: a vanilla one, which computes the gap; this ends its text."""
    a, b = fast["tokens"], vanilla["tokens"]
    if a == b and not vanilla["tokens_per_sec"]:
        return "identical tokens"  # one alone, which prefill chose: no speed
    speed_up = fast["tokens_per_sec"] / (vanilla["tokens_per_sec"] or float("nan"))
    if a == b:
        return f"{speed_up:.2f}x vanilla, identical tokens"
    at = first_difference(a, b)
    gap = engine.top2_gap(ids + b[:at], sampling)
    return (f"{speed_up:.2f}x vanilla; differs at token {at}, where vanilla's two best scores are {gap:.3g} apart "
            f"({vanilla['dtype']} rounding; float32 does not differ)")


def answer_and_report(args: argparse.Namespace, engine: Engine, ids: list[int], sampling: Sampling) -> dict:
    """Answer one prompt, with what generate.py's options ask for, and print all of it. Returns the result. `engine` is
    one of app/options.py, which has a tokenizer."""
    tokenizer = engine.tokenizer
    if args.compare:
        print(setting(engine), file=sys.stderr)
    view = View(engine.drafter, tokenizer, args.show_tree) if isinstance(engine.drafter, Watch) else None
    parts = parts_so_far()
    result = generate(engine, ids, args.max_new_tokens, sampling, tokenizer, args.method, not args.show_tree,
                      args.stop, view)
    result |= time_to_first_token(parts, result["prefill_s"])
    print(report(result), start_report(result), sep="\n", file=sys.stderr)
    if result["stop"] == "context":
        print(f"the context of {engine.max_seq_len} tokens (--max_seq_len) ended the answer", file=sys.stderr)
    if args.compare:
        plain = Engine(engine.model, Vanilla(engine.device), engine.max_seq_len, tokenizer.stop_ids,
                       not args.no_compile)
        plain.warm_up(sampling)
        vanilla = generate(plain, ids, args.max_new_tokens, sampling, tokenizer, stops=args.stop)
        result["vanilla"] = vanilla
        result["identical"] = result["tokens"] == vanilla["tokens"]
        print(report(vanilla), compare(plain, vanilla, result, ids, sampling), sep="\n", file=sys.stderr)
    if args.json:
        print(json.dumps(result))
    return result
