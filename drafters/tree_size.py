"""The best tree size for this GPU: how many nodes and levels to draft, with this model and head.

Of all sizes, take the one with the highest estimate of

    tokens per second = tokens per step(nodes, levels)
                        / (first level + (levels - 1) * further level + verification(nodes) + rest)

The times below the line depend on the device. They are measured here once, in a few seconds, and kept in
~/.cache/eagle2/trees.json. The tokens per step depend on the head. train.py measures them and writes them beside the
head, as the curve acceptance.json: of greedy text, unquantised weights, and trees of top-k 10.

    python generate.py --checkpoint checkpoints/HuggingFaceTB/SmolLM2-135M-Instruct --eagle2 --tree_table --prompt "Hi"

One run with one large tree gives the whole curve. What is drafted at a level depends neither on how many levels follow
nor on how many nodes are kept in the end. So every smaller tree is a choice among the same candidates.
"""
import contextlib
import json
import os
import shlex
import sys
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from draft import Drafter, Eagle2
from drafters.heads import Head, tree_drafter
from engine import Engine
from formats.eagle import CURVE, folder_of
from formats.writing import replace_when_whole
from model import Llama
from ops.device import device_name, triton
from ops.graphs import Timer, timed
from ops.startup import part
from quant.linear import is_quantized
from tree import Candidates, best_first

NODES = (8, 16, 24, 32, 48, 60, 96, 128)  # the sizes of a curve, the root included; an older curve ends at 60
LEVELS = 10  # columns of a curve: 1 to LEVELS levels; the last one is all levels of a block head that has more
TOPK = 10
LIMIT_MS = 10_000  # nobody wants to wait longer for a better tree


# ----- What a tree costs: the device's times -----------------------------------------------------------------------


@torch.inference_mode()
def verify_by_rows(engine: Engine, counts: tuple[int, ...], timer: Timer = timed) -> dict[int, float]:
    """Milliseconds in which an engine whose text has ended (Engine.freeze) verifies each of these counts of nodes."""
    base = engine.state.length - 1
    return {rows: timer(partial(engine.verify, base, engine.chain(rows)), engine.device) for rows in counts}


@part("tree size")
def measure(model: Llama, head: Head, max_seq_len: int, sizes: tuple[int, ...] = NODES) -> list[float] | None:
    """The profile of a device: milliseconds of the first drafted level, of each further level (0 for a block head), of
    the rest of a cycle, and of verifying trees of these sizes, after a text of 512 tokens. None if measuring would take
    longer than LIMIT_MS."""
    engine = Engine(model, largest_tree(head, model, sizes[-1]), max_seq_len)
    state = engine.state
    drafter = engine.drafter
    cuda = engine.device.type == "cuda"
    if cuda:
        engine.compile(rows=sizes)
    engine.freeze(min(512, max_seq_len))
    once = verify_by_rows(engine, sizes[:1], partial(timed, unroll=1, rounds=1, calls=1))[sizes[0]]
    if once * (200 if cuda else 40) > LIMIT_MS:  # all measurements below take about as long as so many verifications
        return None
    timer = partial(timed, unroll=5, rounds=3, calls=5 if cuda else 1)

    def part_ms(function, *inputs) -> float:
        return timer(partial(function, *inputs), engine.device)

    with torch.inference_mode():  # not above: other engines go on with the caches that were allocated there
        if isinstance(drafter, Eagle2):
            scratch, inputs, level = drafter.begin(state)
            first = part_ms(drafter.begin, state)
            further = part_ms(drafter.expand, state, scratch, inputs, level, 1)
            last = part_ms(drafter.expand, state, scratch, inputs, level, LEVELS - 1)
            # An EAGLE-2 head's levels but the last also compute fc's share, which the next level reads. It takes
            # further - last and is counted with the level that reads it, so that a tree of one level has none.
            first -= further - last
        else:
            first, further = part_ms(drafter.draft, state), 0.0
        base = state.length - 1  # the root's slot
        tree = drafter.propose(state)
        rest = part_ms(drafter.rerank, state)
        rest += part_ms(engine.commit, base, tree, *engine.verify(base, tree))
    return [first, further, rest, *verify_by_rows(engine, sizes, timer).values()]


def largest_tree(head: Head, model: Llama, nodes: int = NODES[-1]) -> Drafter:
    """The drafter of the largest tree that a curve tells of, or of one with as many levels and fewer nodes."""
    return tree_drafter(head, model, nodes, LEVELS, TOPK)


def profile_key(model: Llama, head: Head, paths: Iterable[Path], *settings: object) -> str:
    """Everything that decides how long a cycle takes: device, versions, shapes, dtype, settings, and the weight files
    at `paths` (a folder stands for the weight files in it)."""
    files = []
    for path in paths:
        files += [path] if path.is_file() else sorted(p for p in path.iterdir() if p.suffix in (".safetensors", ".bin"))
    stamps = [(str(file.resolve()), (stat := file.stat()).st_size, stat.st_mtime_ns) for file in files]
    weight = model.embed.weight
    return json.dumps([device_name(weight.device), str(model.cfg), str(weight.dtype), torch.__version__,
                       getattr(triton, "__version__", None), 0 if head.vocab is None else len(head.vocab),
                       is_quantized(head), settings, stamps])


def cached_profile(key: str, model: Llama, head: Head, max_seq_len: int, sizes: tuple[int, ...] = NODES
                   ) -> list[float] | None:
    """The profile, measured once for each key. A damaged cache is written anew. A cache that cannot be written is no
    error."""
    path = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "eagle2/trees.json")
    profile = read_profiles(path).get(key)
    if isinstance(profile, list) and len(profile) == 3 + len(sizes) and all(
            isinstance(ms, float) and 0 <= ms < float("inf") and (ms or i == 1) for i, ms in enumerate(profile)):
        return profile
    profile = measure(model, head, max_seq_len, sizes)
    if profile:
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            with replace_when_whole(path) as part:  # with what other runs wrote meanwhile
                part.write_text(json.dumps(read_profiles(path) | {key: profile}), encoding="utf-8")
    return profile


def read_profiles(path: Path) -> dict:
    """What is in the cache; {} if it is missing or damaged."""
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        known = None
    return known if isinstance(known, dict) else {}


# ----- What a tree gains: the head's curve -------------------------------------------------------------------------


def tokens_by_size(candidates: Candidates, text: list[int]) -> Tensor:
    """How many tokens a cycle commits with each of NODES and 1 to LEVELS levels, [8, LEVELS] int64.

    candidates: those of the largest tree. text: what the target writes after the root.
    """
    depth = torch.ones_like(candidates.parents)
    above = candidates.parents
    while (above >= 0).any():
        depth += above >= 0
        above = torch.where(above >= 0, candidates.parents[above], -1)
    path = []  # the candidates that the text follows, from the root down
    node = -1
    for token in text[:int(depth.max())]:
        found = ((candidates.parents == node) & (candidates.tokens == token)).nonzero()
        if not len(found):
            break
        node = int(found[0])
        path.append(node)
    room = torch.tensor(NODES)[:, None] - 1  # the root takes one node
    counts = []
    for levels in (*range(1, LEVELS), int(depth.max())):  # parents rank above children
        scores = candidates.scores.where(depth <= levels, -torch.inf)
        rank = best_first(scores, len(scores)).argsort()
        counts.append(1 + (rank[path[:levels]] < room).sum(1))
    return torch.stack(counts, 1).clamp(max=len(text))


def curve_path(head: Path) -> Path:
    """The file of a head's curve. `head` is a folder, or a file in it."""
    return folder_of(head) / CURVE


def read_curve(head: Path) -> list[list[float]]:
    """A head's tokens per step, curve[i][levels - 1] for NODES[i] nodes. A file with fewer levels tells of no gain by
    further ones; one of fewer sizes of NODES gives fewer rows. FileNotFoundError or ValueError where the file is not
    there or damaged."""
    path = curve_path(head)
    again = ("`python train.py --checkpoint MODEL_FOLDER --steps 0 --tokens 0 --generate_batch 128 --out "
             f"{shlex.quote(str(path.parent))}` measures it")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: not there, so --draft_tokens auto cannot tell how many tokens a tree gains; "
                                f"{again}")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        nodes, topk, rows = (raw[key] for key in ("nodes", "topk", "gained"))
        sound = ([nodes, topk] == [[*NODES[:len(rows)]], TOPK] and 1 <= len(rows[0]) <= LEVELS
                 and [len(row) for row in rows] == [len(rows[0])] * len(nodes)
                 and all(1 <= x <= nodes[-1] for row in rows for x in row))
    except (ValueError, LookupError, TypeError, RecursionError):
        sound = False
    if not sound:
        raise ValueError(f"{path}: damaged; {again} again")
    return [row + row[-1:] * (LEVELS - len(row)) for row in rows]


# ----- The best size -----------------------------------------------------------------------------------------------


def best_size(profile: list[float], curve: list[list[float]]) -> tuple[int, int, str]:
    """The nodes and levels with the most tokens per second, and a table of all sizes to print."""
    first, further, rest, *verify = profile
    speeds = []  # tokens per second, [sizes][LEVELS]
    for tokens_per_step, verify_ms in zip(curve, verify):
        speeds.append([1e3 * tokens / (first + i * further + verify_ms + rest)
                       for i, tokens in enumerate(tokens_per_step)])
    best = max(max(row) for row in speeds)
    row = next(i for i, row in enumerate(speeds) if best in row)
    lines = [f"Drafting the first level takes {first:.3f} ms, each further one {further:.3f}, verifying as below, the "
             f"rest {rest:.3f}.", "Tokens/s to expect, by nodes and levels (top-k 10):",
             "nodes  verify, ms" + "".join(f"{levels:8}" for levels in range(1, LEVELS + 1))]
    for nodes, verify_ms, speed in zip(NODES, verify, speeds):
        cells = (f"*{x:.1f}" if x == best else f"{x:.1f}" for x in speed)
        lines.append(f"{nodes:5}  {verify_ms:10.3f}" + "".join(f"{cell:>8}" for cell in cells))
    return NODES[row], speeds[row].index(best) + 1, "\n".join(lines)


def fastest_tree(model: Llama, head: Head, curve: list[list[float]], max_seq_len: int, key: str | None = None,
                 show: bool = False) -> tuple[int, int, int] | None:
    """Nodes, levels and top-k of the best tree. If measuring would take too long: None, and a line on stderr.

    key: the profile's key in the cache; without it the device is measured each time. show: print the table to stderr.
    """
    inputs = model, head, max_seq_len, NODES[:len(curve)]
    profile = cached_profile(key, *inputs) if key else measure(*inputs)
    if profile is None:
        print("using the default tree size: measuring for the best one would take more than 10 s on this device",
              file=sys.stderr)
        return None
    nodes, levels, table = best_size(profile, curve)
    if show:
        print(table, file=sys.stderr)
    return nodes, levels, TOPK
