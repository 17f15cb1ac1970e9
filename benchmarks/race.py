"""The race of bench.py: all methods take turns over the same prompts, and their runs become numbers.

All that bench.py measures is one dict, `result`, which --json writes. bench.py fills it, benchmarks/report.py and
benchmarks/plots.py read it. Units are in the names: _s seconds, _ms milliseconds, _gb 10^9 bytes.

    command      str, the command line
    note         str: checkpoint, dtype, weight format and, with --shape, whose cost and whose text is measured
    settings     {option: its value as a string}; --against compares them
    before       {name: str}, device, clocks and versions when the race began (benchmarks/environment.py)
    after        the same when it ended
    memory_gb    peak memory: on a GPU of the tensors during the race, on a CPU of the process since its start
    prompts      [{question, turn, category, ids, texts}], one for each turn of each question
    endpoints    {method: {url, model, prompts}}, the engines behind HTTP
    methods      {method: see below}
    failed       {method: its error, as one line}
    measured     [see below], an entry for each method at each temperature
    interrupted  str, what Ctrl-C cut off; absent otherwise
    unfinished   {"temperature": t, method: [a Run as a dict]}, the run that Ctrl-C cut off; it counts for nothing

methods[name], where engines of other projects have the first key only:

    prepare_s   building, compiling, capturing and a first text at each temperature
    nodes       rows that a verification has, the root included
    max_depth   drafted tokens that a cycle accepts at most
    rejection   True if sampling follows the papers' rejection rule and so writes other texts than vanilla
    own_gb      memory that the method needs besides the target; None without a GPU
    split_ms    {temperature as a string: {draft, verify, other, cycle}}, see split_cycle

measured[i], about all runs of one method at one temperature (`speeds` and `summarise` compute it):

    method, temperature
    tokens_per_sec   {median, q1, q3, runs}: tokens committed after prefill / seconds of decoding
    with_prefill     the same with prefill: all new tokens / all seconds
    prefill_ms       time to the first token, mean of the prompts, median of the runs
    cycle_ms         wall-clock of decoding / cycles, median of the runs; None if an endpoint does not count cycles
    mean_gained      tokens per step, first run: tokens after the first / verifications; None if cycle_ms is None
    histogram        how many cycles of the first run committed 0, 1, 2, ... tokens; [0] for an endpoint
    by_category      {category: the six entries above, tokens_per_sec to histogram, for its prompts}
    split_ms         that of methods[method] at this temperature, or None
    accept_by_depth  the share of cycles that accepted at least 1, 2, ... drafted tokens
    distinct4        see distinct4
    steady           True if all runs wrote the same texts
    same             how many texts equal vanilla's; None where they need not
    gaps             [{prompt, token, gap}] for each text that differs: index of the prompt, index of vanilla's first
                     token that differs, how far apart vanilla's two best scores are there (near 0: rounding decided)
    texts, gained    for each prompt of the first run: its token ids; how many of them each cycle committed. An
                     endpoint gives text: the ids are our tokenizer's, and one number says how many came after the
                     first piece (benchmarks/http_engines.py)
    said             for each prompt of the first run, what an endpoint said (the same file); [] for our methods
    runs             for each run {prefill_s, decode_s}, each a list with one number for each prompt
"""
import argparse
import sys
from collections.abc import Callable
from functools import partial
from statistics import median, quantiles
from typing import NamedTuple

import torch
from tqdm import tqdm

from app.answer import Run
from benchmarks.http_engines import text_parts_at
from benchmarks.workload import Prompt, freeze
from drafters.methods import BASELINE
from engine import Engine, first_difference
from ops.graphs import timed
from sampling import Sampling
from tokenizer import Tokenizer

# Errors that end one method, not the race. Running out of memory is a RuntimeError.
FAILURES = (ValueError, OSError, RuntimeError, ImportError)


class Contestant(NamedTuple):
    """A method that takes part in the race."""
    decode: Callable[[list[int], int, Sampling], Run]  # (prompt ids, max_new_tokens, sampling) -> Run
    engine: Engine | None = None  # None: an engine of another project, which decodes greedily only


def record_failure(result: dict, name: str, error: Exception) -> None:
    """Store the error as one line in result["failed"], and print it."""
    result["failed"][name] = (" ".join(str(error).split()) or type(error).__name__)[:300]
    print(f"{name} failed, the others go on: {result['failed'][name]}", file=sys.stderr)


@torch.inference_mode()
def split_cycle(engine: Engine, ids: list[int], new_tokens: int, temperature: float) -> dict[str, float]:
    """Milliseconds of one cycle, in the middle of an answer of `new_tokens` tokens, and of its parts: drafting,
    verifying (choosing the next tokens included), and the rest."""
    freeze(engine, ids, new_tokens // 2, Sampling(temperature))
    engine.draw_noise()
    state, drafter = engine.state, engine.drafter
    draft_ms = timed(partial(drafter.propose, state), engine.device) if drafter.num_nodes > 1 else 0.0
    verify_ms = timed(partial(engine.verify, state.length - 1, drafter.propose(state)), engine.device)
    cycle_ms = timed(engine.cycle, engine.device, 1)
    return {"draft": draft_ms, "verify": verify_ms, "other": cycle_ms - draft_ms - verify_ms, "cycle": cycle_ms}


def race(contestants: dict[str, Contestant], prompts: list[Prompt], args: argparse.Namespace, result: dict
         ) -> dict[float, dict[str, list[list[Run]]]]:
    """Let all contestants answer all prompts, in turns, --runs times at each --temperature.

    Returns runs[temperature][method][i][j], the Run of prompt j in run i. The seed of a text is the index of its
    prompt, the same in every run. A contestant that fails is removed from `contestants`; its complete runs count.
    After Ctrl-C, the run that was cut off counts for no method.
    """
    def contestants_at(t: float) -> list[tuple[str, Contestant]]:
        """Those that can decode at this temperature."""
        return [(name, c) for name, c in contestants.items() if c.engine or t == 0]

    runs = {t: {} for t in args.temperature}
    texts = args.runs * len(prompts) * sum(len(contestants_at(t)) for t in args.temperature)
    bar = tqdm(total=texts, desc="prompts", disable=None)
    try:
        for i in range(args.runs):
            for t in args.temperature:
                current: dict[str, list[Run]] = {}
                for name, contestant in contestants_at(t):
                    bar.set_postfix_str(f"run {i + 1} of {args.runs}, temperature {t:g}, {name}")
                    try:
                        for seed, prompt in enumerate(prompts):
                            current.setdefault(name, []).append(
                                contestant.decode(prompt.ids, args.max_new_tokens, Sampling(t, seed=seed)))
                            bar.update()
                    except FAILURES as error:
                        record_failure(result, name, error)
                        del contestants[name]
                        current.pop(name, None)
                for name, run in current.items():
                    runs[t].setdefault(name, []).append(run)
    except KeyboardInterrupt:
        result["interrupted"] = f"run {i + 1} of {args.runs} at temperature {t:g} and everything after it"
        result["unfinished"] = {"temperature": t,
                                **{name: [r._asdict() for r in run] for name, run in current.items()}}
    bar.close()
    return runs


def spread(values: list[float]) -> dict:
    """Median and quartiles of a number that was measured once a run, and the values themselves."""
    low, _, high = quantiles(values, method="inclusive") if len(values) > 1 else values * 3
    return {"median": median(values), "q1": low, "q3": high, "runs": values}


def steps(run: list[Run]) -> int | None:
    """Verifications of a run; None where an endpoint does not say how many."""
    counts = [r.said["steps"] if r.said else len(r.gained) for r in run]
    return None if None in counts else sum(counts)


def speeds(runs: list[list[Run]]) -> dict:
    """Speed, time per cycle and tokens per step of runs[i][j], prompt j in run i. A run's speed is all of its tokens /
    all of its seconds, not a mean over prompts."""
    decoded = [sum(sum(r.gained) for r in run) for run in runs]
    written = [sum(len(r.tokens) for r in run) for run in runs]  # the tokens that prefill chose too
    cycles = [steps(run) for run in runs]
    prefill_s = [sum(r.prefill_s for r in run) for run in runs]
    decode_s = [max(sum(r.decode_s for r in run), 1e-9) for run in runs]
    gained = [n for r in runs[0] if not r.said for n in r.gained]
    counted = None not in cycles
    return {"tokens_per_sec": spread([n / s for n, s in zip(decoded, decode_s)]),
            "with_prefill": spread([n / (a + b) for n, a, b in zip(written, prefill_s, decode_s)]),
            "prefill_ms": 1e3 * median(s / len(run) for run, s in zip(runs, prefill_s)),
            "cycle_ms": 1e3 * median(s / max(n, 1) for s, n in zip(decode_s, cycles)) if counted else None,
            "mean_gained": (written[0] - len(runs[0])) / max(cycles[0], 1) if counted else None,
            "histogram": [gained.count(n) for n in range(max(gained, default=0) + 1)]}


def distinct4(texts: list[list[int]]) -> float:
    """The share of 4-grams that are new in their text. Where it is low, the texts repeat themselves, so that they are
    easy to draft and the speeds flatter."""
    grams = [[tuple(ids[i:i + 4]) for i in range(len(ids) - 3)] for ids in texts]
    return sum(len(set(each)) for each in grams) / max(1, sum(map(len, grams)))


def parts_at(run: Run, expected: list[int], tokenizer: Tokenizer | None) -> int | None:
    """The index of the first of the ids `expected` that a run's text does not have; None where they are equal."""
    if run.said:
        return text_parts_at(run.said["text"], expected, tokenizer)
    return None if run.tokens == expected else first_difference(run.tokens, expected)


def summarise(name: str, t: float, runs: dict[str, list[list[Run]]], prompts: list[Prompt], vanilla: Engine,
              about: dict, tokenizer: Tokenizer | None = None) -> dict:
    """The entry of result["measured"] for one method at one temperature. `runs` holds the runs of all methods there;
    `about` is result["methods"][name]. `vanilla` computes the gaps. tokenizer: needed for endpoints."""
    own = runs[name]
    texts = [r.tokens for r in own[0]]
    indices = {}  # of each category's prompts
    for i, prompt in enumerate(prompts):
        indices.setdefault(prompt.category, []).append(i)
    numbers = speeds(own)
    histogram = numbers["histogram"]
    depths = range(1, about.get("max_depth", 0) + 1)
    same = None
    gaps = []
    draws_otherwise = t > 0 and about.get("rejection")  # other texts, from the same distribution
    if BASELINE in runs and not draws_otherwise:
        expected = [r.tokens for r in runs[BASELINE][0]]
        for i, ids in enumerate(expected):
            at = parts_at(own[0][i], ids, tokenizer)
            if at is not None:
                gap = vanilla.top2_gap(prompts[i].ids + ids[:at], Sampling(t, seed=i))
                gaps.append({"prompt": i, "token": at, "gap": gap})
        same = len(texts) - len(gaps)
    return {"method": name, "temperature": t, **numbers, "split_ms": about.get("split_ms", {}).get(str(t)),
            "by_category": {category: speeds([[run[i] for i in chosen] for run in own])
                            for category, chosen in indices.items()},
            "distinct4": distinct4(texts), "steady": all([r.tokens for r in run] == texts for run in own),
            "accept_by_depth": [sum(histogram[d + 1:]) / max(1, sum(histogram)) for d in depths],
            "same": same, "gaps": gaps, "texts": texts, "gained": [r.gained for r in own[0]],
            "said": [r.said for r in own[0] if r.said],
            "runs": [{"prefill_s": [r.prefill_s for r in run], "decode_s": [r.decode_s for r in run]} for run in own]}
