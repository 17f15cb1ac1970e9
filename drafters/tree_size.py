"""The tree that fits: how many nodes and levels EAGLE-2 should draft with this head, on this device.

What a tree costs, the device says; what it gains, the head. So: a few milliseconds measured here, a curve measured when
the head was made (train.py writes it beside the head), and of all sizes the one with the most tokens a second,

    gained(nodes, levels) / (first level + (levels - 1) * further level + verify(nodes) + rest)

The times are kept in ~/.cache/eagle2/trees.json. The curve is of greedy text and unquantised weights, and trees of
top-k 10. One run with one large tree gives all of it: what is drafted at a level depends neither on how many levels
follow nor on how many nodes are kept in the end, so every smaller tree is a choice among the same candidates.
"""
import contextlib
import json
import os
import sys
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from draft import Eagle2, EagleHead
from engine import Engine
from formats.eagle import CURVE, folder_of
from model import Llama
from ops.device import device_name, triton
from ops.graphs import Timer, timed
from tree import Candidates, best_first


@torch.inference_mode()
def verify_by_rows(engine: Engine, counts: tuple[int, ...], timer: Timer = timed) -> dict[int, float]:
    """ms of a frozen engine's verification of so many nodes, a chain of any tokens."""
    base = engine.state.length - 1
    return {rows: timer(partial(engine.verify, base, engine.chain(rows)), engine.device) for rows in counts}


NODES, LEVELS, TOPK = (8, 16, 24, 32, 48, 60), 8, 10  # what a curve is of
LIMIT_MS = 10_000  # nobody wants to wait longer for a better tree


def measure(model: Llama, head: EagleHead, max_seq_len: int) -> list[float] | None:
    """The profile of a device: ms of the first drafted level, of each further one, of the rest of a cycle, and of
    verifying each of NODES; in the middle of a text of 512 tokens. None where all that would take too long."""
    engine = Engine(model, Eagle2(head, model, NODES[-1], LEVELS, TOPK), max_seq_len)
    state, drafter, cuda = engine.state, engine.drafter, engine.device.type == "cuda"
    length = min(512, max_seq_len)
    if cuda:
        engine.compile(*NODES)
    engine.freeze(length)
    once = verify_by_rows(engine, NODES[:1], partial(timed, unroll=1, rounds=1, calls=1))[NODES[0]]
    if once * (200 if cuda else 40) > LIMIT_MS:  # all that follows takes about as long as so many of these
        return None
    timer = partial(timed, unroll=5, rounds=3, calls=5 if cuda else 1)
    part = partial(timer, device=engine.device)
    with torch.inference_mode():  # not for what is allocated above, which other engines go on with
        scratch, fc_of_feature, level = drafter.begin(state)
        first, further, last = part(partial(drafter.begin, state)), *(
            part(partial(drafter.expand, state, scratch, fc_of_feature, level, depth)) for depth in (1, LEVELS - 1))
        first -= further - last  # what the next level reads is made with a level, but counts with the next
        tree = drafter.propose(state)
        rest = part(partial(drafter.rerank, state)) + part(
            partial(engine.commit, scratch[0, 0], tree, *engine.verify(scratch[0, 0], tree)))
    return [first, further, rest, *verify_by_rows(engine, NODES, timer).values()]


def gained(candidates: Candidates, text: list[int]) -> Tensor:
    """Tokens that a cycle commits with each of NODES and 1 to LEVELS levels, [6, 8] int64, where the largest tree has
    these candidates and `text` is what the target writes."""
    path, node = [], -1
    for token in text[:LEVELS]:
        found = ((candidates.parents == node) & (candidates.tokens == token)).nonzero()
        if not len(found):
            break
        path.append(node := int(found[0]))
    counts, room = [], torch.tensor(NODES)[:, None] - 1
    for depth in range(1, LEVELS + 1):  # the candidates of these levels come first, and parents rank above children
        first = TOPK + (depth - 1) * TOPK**2
        rank = best_first(candidates.scores[:first], first).argsort()
        counts.append(1 + (rank[path[:depth]] < room).sum(1))
    return torch.stack(counts, 1).clamp(max=len(text))


def curve_path(head: Path) -> Path:
    """Where the curve of a head lies, which is a folder or a file in it."""
    return folder_of(head) / CURVE


def read_curve(head: Path) -> list[list[float]]:
    """gained[nodes][levels - 1] of a head, one row for each of NODES."""
    path = curve_path(head)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: not there, so --draft_tokens auto cannot tell what a tree gains; `train.py "
                                "--steps 0 --tokens 0` measures it")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        nodes, topk, rows = (raw[key] for key in ("nodes", "topk", "gained"))
        sound = (nodes, topk) == ([*NODES], TOPK) and [len(row) for row in rows] == [LEVELS] * len(NODES) and all(
            1 <= x <= LEVELS + 1 for row in rows for x in row)
    except (ValueError, KeyError, TypeError):
        sound = False
    if not sound:
        raise ValueError(f"{path}: damaged; `train.py --steps 0 --tokens 0` makes it anew")
    return rows


def choose(profile: list[float], curve: list[list[float]]) -> tuple[int, int, str]:
    """The nodes and levels with the most tokens a second, and a table of all."""
    first, further, rest, *verify = profile
    speed = [[1e3 * x / (first + i * further + ms + rest) for i, x in enumerate(row)] for row, ms in zip(curve, verify)]
    best = max(max(row) for row in speed)
    row = next(i for i, row in enumerate(speed) if best in row)
    lines = [f"Drafting a level takes {first:.3f} ms, each further one {further:.3f}, verifying as below, the rest "
             f"{rest:.3f}.", "Tokens/s to expect, by nodes and levels (top-k 10):",
             "nodes  verify, ms" + "".join(f"{i:8}" for i in range(1, LEVELS + 1))]
    lines += [f"{nodes:5}  {ms:10.3f}" + "".join(f"{f'*{x:.1f}' if x == best else f'{x:.1f}':>8}" for x in row)
              for nodes, ms, row in zip(NODES, verify, speed)]
    return NODES[row], speed[row].index(best) + 1, "\n".join(lines)


def profile_key(model: Llama, head: EagleHead, paths: Iterable[Path], *settings: object) -> str:
    """Whatever decides how long things take: device, versions, shape, dtype, files (a folder stands for the weights in
    it)."""
    files = [file for path in paths for file in (
        [path] if path.is_file() else sorted(p for p in path.iterdir() if p.suffix in (".safetensors", ".bin")))]
    stamps = [(str(file.resolve()), (stat := file.stat()).st_size, stat.st_mtime_ns) for file in files]
    weight = model.embed.weight
    return json.dumps([device_name(weight.device), str(model.cfg), str(weight.dtype), torch.__version__,
                       getattr(triton, "__version__", None), 0 if head.vocab is None else len(head.vocab),
                       settings, stamps])


def cached(key: str, model: Llama, head: EagleHead, max_seq_len: int) -> list[float] | None:
    """What `measure` found, once for each key: a cache that is damaged is written anew, and none is no error."""
    path = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "eagle2/trees.json")
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        known = {}
    known = known if isinstance(known, dict) else {}
    found = known.get(key)
    if isinstance(found, list) and len(found) == 3 + len(NODES) and all(
            isinstance(ms, float) and 0 < ms < float("inf") for ms in found):
        return found
    profile, part = measure(model, head, max_seq_len), path.with_suffix(f".{os.getpid()}")
    if profile:
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            part.write_text(json.dumps(known | {key: profile}), encoding="utf-8")
            part.replace(path)  # so that nobody ever reads half of it
    return profile


def fit(model: Llama, head: EagleHead, curve: list[list[float]], max_seq_len: int, key: str | None = None,
        show: bool = False) -> tuple[int, int, int] | None:
    """Nodes, levels and top-k of the tree that fits; None, and a line on stderr, where finding out would take too long.
    key: look into the cache first. show: print the table to stderr."""
    profile = cached(key, model, head, max_seq_len) if key else measure(model, head, max_seq_len)
    if profile is None:
        print("drafting the default tree: to measure others would take more than 10 s here", file=sys.stderr)
        return None
    nodes, levels, table = choose(profile, curve)
    if show:
        print(table, file=sys.stderr)
    return nodes, levels, TOPK
