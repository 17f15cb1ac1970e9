"""One timed answer, and the lines that are printed about it."""
import resource
from collections.abc import Sequence

import torch

from app.watch import View
from engine import Engine, parted, run
from ops.device import device_name
from sampling import Sampling
from tokenizer import Tokenizer


def generate(engine: Engine, ids: list[int], max_new_tokens: int, sampling: Sampling, tokenizer: Tokenizer,
             method: str = "vanilla", show: bool = False, stops: Sequence[str] = (), view: View | None = None) -> dict:
    """One generation, timed, to the first of the texts `stops` at most. Returns the object that --json prints; `show`
    streams the text to stdout; `view`, of an engine whose drafter is watched, takes every cycle's tree."""
    stream = tokenizer.stream(stops)

    def take(new: list[int]) -> bool:
        if view:
            view.push(new)
        text = stream.push(new) if show or stops else ""
        if show:
            print(text, end="", flush=True)
        return stream.stopped

    tokens, gained, prefill_s, decode_s = run(engine, ids, max_new_tokens, sampling, take)
    rest = stream.flush()
    if view:
        view.finish()
    if show:
        print(rest, flush=True)
    if stream.stopped and len(tokens) > stream.tokens:  # the rest of a cycle
        gained[-1] -= len(tokens) - stream.tokens
        tokens = tokens[:stream.tokens]
    cuda = engine.device.type == "cuda"
    if stream.stopped:
        stop = "string"
    elif tokens[-1] in tokenizer.stop_ids:
        stop = "eos"
    else:
        stop = "length" if len(tokens) == max_new_tokens else "context"
    depths = range(1, engine.drafter.max_depth + 1)
    return {
        "method": method, "text": tokenizer.decode(tokens, stops), "tokens": tokens,
        "prompt_tokens": len(ids), "new_tokens": len(tokens), "cycles": len(gained), "gained": gained,
        "mean_gained": sum(gained) / len(gained) if gained else 0.0,
        "accept_by_depth": [sum(g > d for g in gained) / max(len(gained), 1) for d in depths],
        "prefill_s": prefill_s, "decode_s": decode_s,
        "tokens_per_sec": (len(tokens) - 1) / decode_s if gained else 0.0, "compile_s": engine.compile_s,
        "memory_gb": (torch.cuda.max_memory_allocated() if cuda else
                      1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) / 1e9,
        "device": device_name(engine.device),
        "dtype": str(engine.model.embed.weight.dtype).removeprefix("torch."), "torch": torch.__version__,
        "seed": sampling.seed, "stop": stop} | ({"trees": view.record()} if view else {})


def report(result: dict) -> str:
    tree = "" if result["method"] == "vanilla" else (
        f", {result['mean_gained']:.2f} tokens a cycle; accepted by depth "
        + " ".join(f"{share:.0%}" for share in result["accept_by_depth"]))
    return (f"{result['method']}: {result['tokens_per_sec']:.1f} tokens/s ({result['new_tokens']} tokens, "
            f"{result['decode_s']:.2f} s{tree}); prompt of {result['prompt_tokens']} in {result['prefill_s']:.2f} s")


def compare(engine: Engine, vanilla: dict, fast: dict, ids: list[int]) -> str:
    """One line: the speed-up, and whether the tokens are the same; if not, how near a tie the first difference is."""
    a, b = fast["tokens"], vanilla["tokens"]
    speed_up = fast["tokens_per_sec"] / vanilla["tokens_per_sec"] if vanilla["tokens_per_sec"] else float("nan")
    if a == b:
        return f"{speed_up:.2f}x vanilla, identical tokens"
    at = parted(a, b)
    return (f"{speed_up:.2f}x vanilla; the tokens differ from number {at} on, where vanilla's two best tokens are "
            f"{engine.top2_gap(ids + b[:at]):.3g} apart ({vanilla['dtype']} rounding; float32 does not differ)")
