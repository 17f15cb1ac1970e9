"""Who takes part in the race of bench.py: its options become contestants, which are built and warmed up here."""
import argparse
import time
from collections.abc import Callable
from functools import partial

import torch

from app.answer import Run, run
from benchmarks.engines import gpt_fast_decoder, llamacpp_decoder, transformers_decoder
from benchmarks.http_engines import http_decoder
from benchmarks.race import Contestant, split_cycle
from benchmarks.workload import Prompt, Subject, load_weights
from drafters.methods import make_drafter
from engine import Engine
from sampling import Sampling


def our_method(name: str, args: argparse.Namespace, subject: Subject, slots: int) -> Contestant:
    """A method of this engine. It loads its own weights, even where two methods draft with the same, so that the
    memory of each is known."""
    drafter = make_drafter(name, args, subject.model, slots, load_weights(name, args, subject))
    engine = Engine(subject.model, drafter, slots, subject.stop_ids)
    return Contestant(partial(run, engine), engine)


def other_engine(decode: Callable[[list[int], int], Run]) -> Contestant:
    return Contestant(lambda ids, new_tokens, sampling: decode(ids, new_tokens))


def makers(args: argparse.Namespace, subject: Subject, slots: int) -> dict[str, Callable[[], Contestant]]:
    """By its name, a function that builds each contestant."""
    model, stop_ids = subject.model, subject.stop_ids
    found = {name: partial(our_method, name, args, subject, slots) for name in args.methods}
    if args.transformers:
        for cache in ("dynamic", "static"):
            found[f"transformers, {cache} cache (greedy)"] = lambda cache=cache: other_engine(
                transformers_decoder(model, stop_ids, cache))
    if args.gpt_fast:
        found["gpt-fast (greedy)"] = lambda: other_engine(gpt_fast_decoder(model, stop_ids, args.gpt_fast))
    if args.llamacpp:
        found[f"llama.cpp, {args.llamacpp.name}"] = lambda: other_engine(llamacpp_decoder(args.llamacpp, slots))
    for endpoint in args.endpoint:
        found[endpoint.name] = lambda endpoint=endpoint: other_engine(http_decoder(endpoint, subject))
    return found


def set_up(make: Callable[[], Contestant], prompts: list[Prompt], args: argparse.Namespace) -> tuple[Contestant, dict]:
    """Build a contestant, and do what is done only once: compile, and capture. Returns it and what is known about it
    (result["methods"], see benchmarks/race.py)."""
    memory_before = torch.cuda.memory_allocated()  # 0 without a GPU
    start = time.perf_counter()
    contestant = make()
    engine = contestant.engine
    temperatures = args.temperature if engine else [0.0]
    longest = max((p.ids for p in prompts), key=len)
    for t in temperatures:
        if engine:
            engine.warm_up(Sampling(t))
        contestant.decode(longest, args.max_new_tokens, Sampling(t))  # other engines compile for the longest text
    about = {"prepare_s": time.perf_counter() - start}
    if engine:
        drafter = engine.drafter
        own_bytes = torch.cuda.memory_allocated() - memory_before
        split_ms = {str(t): split_cycle(engine, prompts[0].ids, args.max_new_tokens, t) for t in temperatures}
        about |= {"nodes": drafter.num_nodes, "max_depth": drafter.max_depth, "rejection": drafter.rejection_sampling,
                  "own_gb": own_bytes / 1e9 or None, "split_ms": split_ms}
    return contestant, about
