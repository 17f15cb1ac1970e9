"""How good a trained head is, on prompts that it was not trained on: tokens per step, of trees of all sizes, and speed.

train.py prints all of it; `train.py --steps 0` measures a head that is there already.
"""
import json
import sys
from pathlib import Path

import torch
from torch import Tensor

from app.answer import run
from draft import Vanilla
from drafters.heads import load_head, tree_drafter
from drafters.methods import CPU_TREE, GPU_TREE
from drafters.tree_size import NODES, TOPK, fastest_tree, largest_tree, read_curve, tokens_by_size
from engine import Engine
from formats.eagle import CURVE
from formats.writing import replace_files
from model import Llama
from sampling import Sampling
from tree import MAX_NODES, Candidates


def evaluate(model: Llama, out: Path, prompts: list[list[int]], stop_ids: frozenset[int], temperature: float,
             new_tokens: int = 128) -> float:
    """Tokens per step with the head in `out` and the tree of GPU_TREE, 60/6/10, on any device: all tokens committed
    after prefill, divided by all cycles."""
    longest = max(map(len, prompts), default=0) + new_tokens
    model.free_cache()
    engine = Engine(model, tree_drafter(load_head(out, model), model, *GPU_TREE), longest, stop_ids)
    committed = []  # tokens of each cycle
    for ids in prompts:
        prefill, *cycles = engine.generate(ids, new_tokens, Sampling(temperature=temperature))
        committed += map(len, cycles)
    return sum(committed) / max(len(committed), 1)


def save_curve(model: Llama, out: Path, prompts: list[list[int]], stop_ids: frozenset[int],
               new_tokens: int = 128) -> None:
    """Write acceptance.json beside the head in `out`: the tokens per step of trees of all sizes, greedily. All are read
    from the candidates of the largest tree, which is drafted here (drafters/tree_size.py). If no answer to `prompts`
    has a second token, nothing is written, and a message says so."""
    longest = max(map(len, prompts), default=0) + new_tokens
    model.free_cache()
    engine = Engine(model, largest_tree(load_head(out, model), model, MAX_NODES), longest, stop_ids)
    cycle = engine.captured(engine.cycle, "cycle")
    counts = []  # of each cycle, [sizes, levels]
    for ids in prompts:
        state = engine.prefill(ids, new_tokens, Sampling())
        drafted = []  # of each cycle: the length of the text before it, and its candidates
        while not state.done:
            length = int(state.length)
            cycle()
            drafted.append((length, Candidates(*(t.to("cpu", copy=True) for t in engine.drafter.scores()[:3]))))
        # The whole text, not what each cycle committed: another tree might have had more of it accepted.
        text = state.tokens[:int(state.length)].tolist()
        counts += [tokens_by_size(candidates, text[length:]) for length, candidates in drafted]
    if not counts:
        print(f"{out / CURVE} is not written: there is no answer of two tokens to measure on (--eval_prompts is too "
              "low, or --length too short for an answer)", file=sys.stderr)
        return
    mean = torch.stack(counts).double().mean(0)
    curve = {"nodes": NODES, "topk": TOPK, "gained": [[round(x, 3) for x in row] for row in mean.tolist()]}
    with replace_files(out) as part:
        (part / CURVE).write_text(json.dumps(curve) + "\n", encoding="utf-8")


def compare_speeds(model: Llama, out: Path, prompts: list[list[int]], stop_ids: frozenset[int],
                   new_tokens: int = 128) -> str:
    """One line: tokens per step and per second of plain decoding, and with the head in `out` and the tree that the
    engine chooses for it. Greedily."""
    device = model.embed.weight.device
    longest = max(map(len, prompts)) + new_tokens
    model.free_cache()
    head = load_head(out, model)
    tree = (fastest_tree(model, head, read_curve(out), longest) or GPU_TREE) if device.type == "cuda" else CPU_TREE
    steps = []
    speeds = []
    for drafter in (Vanilla(device), tree_drafter(head, model, *tree)):
        engine = Engine(model, drafter, longest, stop_ids)
        run(engine, prompts[0], 2)  # captures the graph of a cycle
        runs = [run(engine, ids, new_tokens) for ids in prompts]
        gained = [count for answer in runs for count in answer.gained]
        steps.append(f"{sum(gained) / max(len(gained), 1):.2f}")
        speeds.append(f"{sum(gained) / sum(answer.decode_s for answer in runs):.0f}")
    return (f"tokens per step {' -> '.join(steps)}, tokens/s {' -> '.join(speeds)} "
            f"({len(prompts)} held-out prompts, a tree of {drafter.num_nodes} nodes and {drafter.max_depth} levels)")


def held_out_prompts(data: Tensor) -> list[list[int]]:
    """The ids of each dialogue in data [dialogues, S], marked, up to its first answer. Dialogues without an answer are
    left out."""
    prompts = []
    for marked in data.tolist():
        first_answer = next((i for i, t in enumerate(marked) if t >= 0), 0)
        if first_answer:
            prompts.append([~t for t in marked[:first_answer]])
    return prompts
