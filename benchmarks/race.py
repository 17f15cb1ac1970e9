"""Methods in turns over the same prompts, and what their runs add up to."""
import argparse
import sys
from collections.abc import Callable
from functools import partial
from statistics import median, quantiles
from typing import NamedTuple

import torch
from tqdm import tqdm

from app.answer import Run
from benchmarks.workload import Prompt, freeze
from engine import Engine, first_difference
from ops.graphs import timed
from sampling import Sampling

FAILURES = (ValueError, OSError, RuntimeError, ImportError)  # of one method, out of memory among them


class Method(NamedTuple):
    decode: Callable[[list[int], int, Sampling], Run]  # prompt, most new tokens, how
    engine: Engine | None = None  # None: another engine, and greedy


def complain(result: dict, name: str, error: Exception) -> None:
    result["failed"][name] = (" ".join(str(error).split()) or type(error).__name__)[:300]
    print(f"{name} failed, the others go on: {result['failed'][name]}", file=sys.stderr)


@torch.inference_mode()
def split_cycle(engine: Engine, ids: list[int], new_tokens: int, temperature: float) -> dict[str, float]:
    """ms of a cycle in the middle of a text, and of its parts: drafting, verifying (with the choice), the rest."""
    freeze(engine, ids, new_tokens // 2, Sampling(temperature))
    engine.draw_noise()
    state, drafter = engine.state, engine.drafter
    draft = timed(partial(drafter.propose, state), engine.device) if drafter.num_nodes > 1 else 0.0
    verify = timed(partial(engine.verify, state.length - 1, drafter.propose(state)), engine.device)
    cycle = timed(engine.cycle, engine.device, 1)
    return {"draft": draft, "verify": verify, "other": cycle - draft - verify, "cycle": cycle}


def race(methods: dict[str, Method], prompts: list[Prompt], args: argparse.Namespace, result: dict
         ) -> dict[float, dict[str, list[list[Run]]]]:
    """runs[temperature][method]: a list for each run, with a Run for each prompt. A text's seed is its prompt's place,
    at every run. Runs in which not every method got through count for none; Ctrl-C ends the last of them."""
    runs = {t: {} for t in args.temperature}
    turns = sum(1 for t in args.temperature for method in methods.values() if method.engine or not t)
    bar = tqdm(total=args.runs * turns * len(prompts), desc="prompts", disable=None)
    try:
        for turn in range(args.runs):
            for t in args.temperature:
                part = {}
                for name, method in [(n, m) for n, m in methods.items() if m.engine or not t]:
                    bar.set_postfix_str(f"run {turn + 1} of {args.runs}, temperature {t:g}, {name}")
                    try:
                        for seed, prompt in enumerate(prompts):
                            part.setdefault(name, []).append(
                                method.decode(prompt.ids, args.max_new_tokens, Sampling(t, seed=seed)))
                            bar.update()
                    except FAILURES as error:
                        complain(result, name, error)
                        del methods[name]
                        part.pop(name, None)
                for name, each in part.items():
                    runs[t].setdefault(name, []).append(each)
    except KeyboardInterrupt:
        result["interrupted"] = f"run {turn + 1} of {args.runs} at temperature {t:g} and all that was to follow"
        result["unfinished"] = {"temperature": t, **{name: [r._asdict() for r in each] for name, each in part.items()}}
    bar.close()
    return runs


def spread(values: list[float]) -> dict:
    low, _, high = quantiles(values, method="inclusive") if len(values) > 1 else values * 3
    return {"median": median(values), "q1": low, "q3": high, "runs": values}


def speeds(runs: list[list[Run]]) -> dict:
    """The numbers of some prompts: of each run all tokens / all seconds."""
    def total(each: list[Run], what: str) -> float:
        return sum(getattr(r, what) for r in each)

    gained = [g for r in runs[0] for g in r.gained]
    decoded, cycles = ([sum(count(r.gained) for r in each) for each in runs] for count in (sum, len))
    seconds = [max(total(each, "decode_s"), 1e-9) for each in runs]
    return {"tokens_per_sec": spread([n / s for n, s in zip(decoded, seconds)]),
            "with_prefill": spread([(n + len(each)) / (s + total(each, "prefill_s"))
                                    for n, s, each in zip(decoded, seconds, runs)]),
            "prefill_ms": 1e3 * median(total(each, "prefill_s") / len(each) for each in runs),
            "cycle_ms": 1e3 * median(s / max(n, 1) for n, s in zip(cycles, seconds)),
            "mean_gained": sum(gained) / max(len(gained), 1),
            "histogram": [gained.count(n) for n in range(max(gained, default=0) + 1)]}  # cycles that gained 0, 1, 2...


def distinct4(texts: list[list[int]]) -> float:
    """The share of 4-grams that a text has not written before: where it is low, drafts are easy and speeds flatter."""
    grams = [[tuple(ids[i:i + 4]) for i in range(len(ids) - 3)] for ids in texts]
    return sum(len(set(each)) for each in grams) / max(1, sum(map(len, grams)))


def gap(vanilla: Engine, ids: list[int], sampling: Sampling) -> float:
    """How far apart plain decoding's two best scores are after `ids`, what two texts have in common."""
    return vanilla.top2_gap(ids, sampling)


def summary(name: str, t: float, runs: dict[str, list[list[Run]]], prompts: list[Prompt], vanilla: Engine,
            known: dict) -> dict:
    """All about one method at one temperature; `runs` are those of all methods there, `known` is about this one."""
    own, texts = runs[name], [r.tokens for r in runs[name][0]]
    places = {}
    for i, prompt in enumerate(prompts):
        places.setdefault(prompt.category, []).append(i)
    entry = {"method": name, "temperature": t, **speeds(own), "split_ms": known.get("split_ms", {}).get(str(t)),
             "by_category": {c: speeds([[each[i] for i in at] for each in own]) for c, at in places.items()},
             "distinct4": distinct4(texts), "steady": all([r.tokens for r in each] == texts for each in own),
             "accept_by_depth": [], "same": None, "gaps": [], "texts": texts, "gained": [r.gained for r in own[0]],
             "runs": [{what: [getattr(r, what) for r in each] for what in ("prefill_s", "decode_s")} for each in own]}
    histogram, depths = entry["histogram"], range(1, known.get("max_depth", 0) + 1)
    entry["accept_by_depth"] = [sum(histogram[d + 1:]) / max(1, sum(histogram)) for d in depths]
    if "vanilla" in runs and not (t and known.get("rejection")):  # which draws otherwise, from the same distribution
        base = [r.tokens for r in runs["vanilla"][0]]
        apart = [(i, first_difference(a, b)) for i, (a, b) in enumerate(zip(texts, base)) if a != b]
        entry["same"] = len(texts) - len(apart)
        entry["gaps"] = [{"prompt": i, "token": at, "gap": gap(
            vanilla, prompts[i].ids + base[i][:at], Sampling(t, seed=i))} for i, at in apart]
    return entry
