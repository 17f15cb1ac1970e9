"""Watch a drafter: the tree of every cycle, which of its nodes were accepted, and the answer that came of them.

    python generate.py --checkpoint checkpoints/HuggingFaceTB/SmolLM2-135M-Instruct --eagle2 --show_tree \\
        --tree_html page.html --prompt "Write a Python function that checks whether a word is a palindrome."
    python -m app.watch RUN.json PAGE.html      writes the page from what `generate.py --show_tree --json` printed

`Watch` wraps any drafter. On a GPU a cycle is one CUDA graph, and the host reads one cycle behind. So each cycle writes
its tree into a row of a ring on the device, and the host later reads the row of the cycle whose tokens it was given.

    watch(engine)
    view = View(engine.drafter, tokenizer)           # a new one for each answer
    for new in engine.generate(ids, 256):
        view.push(new)                               # prints the cycle's tree
    view.finish()                                    # prints the answer, each token coloured by how it came
    write_page({"method": "eagle2", "trees": view.record()}, Path("page.html"))
"""
from app.command import before_imports, run_command

if __name__ == "__main__":
    before_imports()

import json
import math
import shutil
import sys
from pathlib import Path
from typing import TextIO

import torch
from torch import Tensor

from app.draw_tree import LEGEND, SCORES_LEGEND, answer_text, token_text, tree_lines, wants_colour, write_page
from draft import Drafter
from engine import Engine
from ops.attention import TreeMask
from tokenizer import Tokenizer
from tree import Candidates, State, Tree, accept, best_first, build_tree

RING = 4  # rows: the cycle that the host reads, the one that runs meanwhile, and two to spare


class Watch(Drafter):
    """Drafts what `drafter` drafts and records the last RING trees. Recording changes nothing in a cycle."""

    def __init__(self, drafter: Drafter, device: torch.device | str = "cpu") -> None:
        self.drafter = drafter
        self.num_nodes = drafter.num_nodes
        self.max_depth = drafter.max_depth
        self.noise_depth = drafter.noise_depth
        self.taps = drafter.taps
        self.has_blocked_nodes = drafter.has_blocked_nodes
        self.rejection_sampling = drafter.rejection_sampling
        # A row holds the cycle's number, the length of the text before it, and then six values of each node: token,
        # parent, depth, the target's choice after it, the bits of its fp32 score, and the index of its candidate.
        self.ring = torch.zeros(RING, 2 + 6 * self.num_nodes, dtype=torch.int64, device=device)
        self.count = torch.zeros((), dtype=torch.int64, device=device)  # cycles since the prompt
        self.ranked = torch.zeros(2, self.num_nodes, dtype=torch.int64, device=device)  # the last two values of a row
        self.copy_stream = torch.cuda.Stream(self.ring.device) if self.ring.is_cuda else None
        self.next_read = -1  # the number of the cycle that `read` is called for next; -1: prefill

    # The drafter's own hooks

    def allocate(self, slots: int) -> None:
        self.drafter.allocate(slots)

    def caches(self) -> tuple[Tensor, ...]:
        return self.drafter.caches()

    def prefill(self, state: State, hidden: Tensor, slots: Tensor, mask: Tensor | TreeMask) -> None:
        self.drafter.prefill(state, hidden, slots, mask)

    def choose(self, state: State, tree: Tree, logits: Tensor) -> Tensor:
        return self.drafter.choose(state, tree, logits)

    def scores(self) -> Candidates | None:
        return self.drafter.scores()

    # The same, recorded

    def reset(self, state: State) -> None:
        self.next_read = -1
        self.count.zero_()
        self.drafter.reset(state)

    def propose(self, state: State) -> Tree:
        tree = self.drafter.propose(state)
        candidates = self.drafter.scores()
        if candidates:  # find the nodes as tree.rerank does; the root's entries stay 0
            kept = best_first(candidates.scores, self.num_nodes - 1).sort().values
            self.ranked[0, 1:] = candidates.scores[kept].view(torch.int32)
            self.ranked[1, 1:] = kept
        return tree

    def learn(self, state: State, tree: Tree, next_tokens: Tensor) -> None:
        self.drafter.learn(state, tree, next_tokens)
        if len(next_tokens) != self.num_nodes:
            return  # not a cycle: Engine.compile verifies chains of other sizes
        head = torch.stack((self.count, state.length))
        row = torch.cat((head, tree.tokens, tree.parents, tree.depth, next_tokens, *self.ranked))
        self.ring.index_copy_(0, (self.count % RING)[None], row[None])
        self.count.add_(~state.done)  # after the end of the text, cycles write to one row that nobody reads

    # What the host reads

    def read(self, new: list[int]) -> dict | None:
        """The cycle that committed `new`. Call it once, in order, for everything that Engine.generate yields. Returns
        None for the first, which prefill chose without a tree. Of the cycle's T nodes:

          tokens, parents, depth, next   [T], as in tree.Tree and Drafter.learn; ~t is a node that must not be accepted
          confidence                     [T] or None: EAGLE-2's probability of the path to each node, by which it ranks
                                         them; when sampling, the probability given the noise to be sampled with
          looked_up                      [any] the nodes that were found in the text (--lookup together with --eagle2)
          path                           [any] the nodes that were committed, in order, without the root
          gained                         len(new): the path and the bonus token, unless the text ended within the path
          length                         of the text before the cycle
        """
        expected = self.next_read
        self.next_read += 1
        if expected < 0:
            return None
        number, length, *values = self.read_row(expected % RING)
        if number != expected:
            raise RuntimeError(f"the tree of cycle {expected + 1} is gone: call Watch.read for each cycle as soon as "
                               "Engine.generate yields its tokens")
        n = self.num_nodes
        tokens, parents, depth, next_tokens, score_bits, kept = (values[i * n:(i + 1) * n] for i in range(6))
        path = accepted_path(tokens, parents, next_tokens)[:len(new)]
        cycle = {"tokens": tokens, "parents": parents, "depth": depth, "next": next_tokens, "confidence": None,
                 "looked_up": [], "path": path, "gained": len(new), "length": length}
        candidates = self.drafter.scores()
        if candidates:
            scores = torch.tensor(score_bits, dtype=torch.int32).view(torch.float32).tolist()
            first_retrieved = len(candidates.scores) - candidates.retrieved
            cycle["confidence"] = [round(math.exp(score), 4) for score in scores]
            cycle["looked_up"] = [node for node in range(1, n) if kept[node] >= first_retrieved]
        return cycle

    def read_row(self, index: int) -> list[int]:
        row = self.ring[index]
        if self.copy_stream is not None:
            # The host has waited for this cycle already. On a stream of its own, the copy need not wait for the next.
            with torch.cuda.stream(self.copy_stream):
                row = row.to("cpu")
        return row.tolist()


def watch(engine: Engine, on: bool = True) -> None:
    """Wrap the engine's drafter in a Watch, or with on=False unwrap it. Not while the engine generates."""
    if isinstance(engine.drafter, Watch):
        engine.drafter = engine.drafter.drafter
    if on:
        engine.drafter = Watch(engine.drafter, engine.device)
    if engine.graphs:
        engine.graphs.clear()  # they were captured with the other drafter


def accepted_path(tokens: list[int], parents: list[int], next_tokens: list[int]) -> list[int]:
    """The nodes of tree.accept's path, without the root."""
    most = len(tokens) - 1
    tree = build_tree(torch.tensor(tokens), torch.tensor(parents), most)
    path, count, _ = accept(tree, torch.tensor(next_tokens), most)
    return path[1:1 + count].tolist()


class View:
    """The trees of one answer: collected for `record` and, with `trees`, printed as they come."""

    def __init__(self, watch: Watch, tokenizer: Tokenizer, trees: bool = True, out: TextIO | None = None) -> None:
        self.watch = watch
        self.tokenizer = tokenizer
        self.trees = trees
        self.out = out or sys.stdout
        self.colour = wants_colour(self.out)
        self.stream = tokenizer.stream()
        self.texts: dict[int, str] = {}
        self.pieces: list[str] = []
        self.cycles: list[dict] = []

    def push(self, new: list[int]) -> None:
        """Takes what Engine.generate yields."""
        self.pieces += [self.stream.push([token]) for token in new]
        cycle = self.watch.read(new)
        if cycle is None:
            return
        self.cycles.append(cycle)
        tokens = {max(token, ~token) for token in cycle["tokens"] + cycle["next"]}  # ~t back to t
        for token in tokens - self.texts.keys():
            self.texts[token] = token_text(self.tokenizer, token)
        if self.trees:
            self.print_tree(cycle)

    def print_tree(self, cycle: dict) -> None:
        if len(self.cycles) == 1:
            legend = [LEGEND, SCORES_LEGEND] if cycle["confidence"] else [LEGEND]
            print(*legend, "", sep="\n", file=self.out)
        width = shutil.get_terminal_size().columns
        lines = tree_lines(cycle, self.texts, len(self.cycles), width, self.colour)
        print(*lines, "", sep="\n", file=self.out, flush=True)

    def finish(self) -> None:
        """Call it once, at the end of the answer."""
        if self.pieces:
            self.pieces[-1] += self.stream.flush()
        if self.trees:
            print(answer_text(self.cycles, self.pieces, self.colour), file=self.out, flush=True)

    def record(self) -> dict:
        """For JSON. pieces: the text that each token added; texts: every token as `token_text` shows it; cycles: what
        Watch.read returned."""
        return {"pieces": self.pieces, "texts": self.texts, "cycles": self.cycles}


def page_of(run: Path, out: Path) -> None:
    """Write the page of a run, a file whose last line is what generate.py --json prints. ValueError where it is not."""
    try:
        last_line = run.read_text(encoding="utf-8-sig").strip().rpartition("\n")[2]
        write_page(json.loads(last_line), out)
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ValueError(f"{run}: not what `generate.py --show_tree --json` prints") from None


def main() -> None:
    if len(sys.argv) != 3:
        raise ValueError("usage: python -m app.watch RUN.json PAGE.html")
    page_of(Path(sys.argv[1]), Path(sys.argv[2]))


if __name__ == "__main__":
    run_command(main)
