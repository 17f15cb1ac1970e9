"""Watch a drafter think: the tree of every cycle, what became of it, and the answer that it made.

    python generate.py --checkpoint checkpoints/HuggingFaceTB/SmolLM2-135M-Instruct --eagle2 --show_tree \\
        --tree_html page.html --prompt "Write a Python function that checks whether a word is a palindrome."
    python watch.py RUN.json PAGE.html      draws the page from what `generate.py --show_tree --json` printed

`Watch` wraps any drafter. On a GPU it works within the cycle's CUDA graph, and the host reads one cycle behind: so a
cycle's tree goes into a ring of rows, and the host reads the row of the cycle whose tokens it has just been given.

    watch(engine)
    view = View(engine.drafter, tokenizer)           # for each answer a new one
    for new in engine.generate(ids, 256):
        view.push(new)                               # prints the cycle's tree
    view.finish()                                    # prints the answer, coloured by how each token came
    page(view.record(), Path("page.html"))
"""
import json
import math
import shutil
import sys
from pathlib import Path
from typing import TextIO

import torch
from torch import Tensor

from app.draw_tree import MARKS, SHARES, answer, page, token_text, tree_lines, wants_colour
from draft import Drafter
from engine import Engine
from ops.attention import TreeMask
from tokenizer import Tokenizer
from tree import Candidates, State, Tree, accept, best_first, build_tree

RING = 4  # rows: the cycle that the host reads, the one that runs meanwhile, and two to spare


class Watch(Drafter):
    """Drafts what `drafter` drafts, and remembers the last trees. Nothing in a cycle depends on what is remembered."""

    def __init__(self, drafter: Drafter, device: torch.device | str = "cpu") -> None:
        self.drafter, self.num_nodes, self.max_depth = drafter, drafter.num_nodes, drafter.max_depth
        self.noise_depth = drafter.noise_depth
        self.has_blocked_nodes = drafter.has_blocked_nodes
        self.rejection_sampling = drafter.rejection_sampling
        # A row: its number, the length of the text before, and for each node token, parent, depth, the target's choice
        # after it, the bits of its fp32 score, and which candidate it was
        self.ring = torch.zeros(RING, 2 + 6 * self.num_nodes, dtype=torch.int64, device=device)
        self.count = torch.zeros((), dtype=torch.int64, device=device)  # of cycles since the prompt
        self.ranked = torch.zeros(2, self.num_nodes, dtype=torch.int64, device=device)  # score bits and candidates
        self.side = torch.cuda.Stream(self.ring.device) if self.ring.is_cuda else None
        self.turn = 0  # how often `read` was called since the prompt

    def allocate(self, slots: int) -> None:
        self.drafter.allocate(slots)

    def caches(self) -> tuple[Tensor, ...]:
        return self.drafter.caches()

    def reset(self, state: State) -> None:
        self.turn = 0
        self.count.zero_()
        self.drafter.reset(state)

    def prefill(self, state: State, features: Tensor, slots: Tensor, mask: Tensor | TreeMask) -> None:
        self.drafter.prefill(state, features, slots, mask)

    def choose(self, state: State, tree: Tree, logits: Tensor) -> Tensor:
        return self.drafter.choose(state, tree, logits)

    def scores(self) -> Candidates | None:
        return self.drafter.scores()

    def propose(self, state: State) -> Tree:
        tree = self.drafter.propose(state)
        candidates = self.drafter.scores()
        if candidates:  # as rerank chose: the root's score is 0
            kept = best_first(candidates.scores, self.num_nodes - 1).sort().values
            self.ranked[0, 1:] = candidates.scores[kept].view(torch.int32)
            self.ranked[1, 1:] = kept
        return tree

    def learn(self, state: State, tree: Tree, next_tokens: Tensor) -> None:
        self.drafter.learn(state, tree, next_tokens)
        if len(next_tokens) != self.num_nodes:
            return  # Engine.compile's
        head = torch.stack((self.count, state.length))
        row = torch.cat((head, tree.tokens, tree.parents, tree.depth, next_tokens, *self.ranked))
        self.ring.index_copy_(0, (self.count % RING)[None], row[None])
        self.count.add_(~state.done)  # what runs past the end takes a row that nobody reads

    def read(self, new: list[int]) -> dict | None:
        """The cycle that committed `new`; call it for everything that Engine.generate yields, in its order. None for
        the first, which prefill chose without a tree. Of the cycle's T nodes:

          tokens, parents, depth, next   [T], as in tree.Tree and Drafter.learn; ~t is a node that cannot be accepted
          confidence                     [T] or None: EAGLE-2's probability of the path to each, by which it ranks; when
                                         sampling, given the noise that tokens will be chosen with
          looked_up                      [any] the nodes that the text itself suggested (--lookup beside --eagle2)
          path                           [any] the nodes that were committed, in order, without the root
          gained                         len(new): one more than the path, but where the text ended within it
          length                         of the text before
        """
        turn, self.turn = self.turn - 1, self.turn + 1
        if turn < 0:
            return None
        row = self.ring[turn % RING]
        if self.side is not None:  # the host has waited for this cycle, and need not wait for the one that runs
            with torch.cuda.stream(self.side):
                row = row.to("cpu")
        (number, length, *row), n = row.tolist(), self.num_nodes
        if number != turn:
            raise RuntimeError(f"the tree of cycle {turn + 1} is gone: Watch.read follows Engine.generate step by step")
        tokens, parents, depth, chosen, scores, kept = (row[i * n:(i + 1) * n] for i in range(6))
        cycle = {"tokens": tokens, "parents": parents, "depth": depth, "next": chosen, "confidence": None,
                 "looked_up": [], "path": accepted(tokens, parents, chosen)[:len(new)], "gained": len(new),
                 "length": length}
        candidates = self.drafter.scores()
        if candidates:
            scores = torch.tensor(scores, dtype=torch.int32).view(torch.float32).tolist()
            first = len(candidates.scores) - candidates.retrieved  # of the candidates that are the chain's
            cycle["confidence"] = [round(math.exp(score), 4) for score in scores]
            cycle["looked_up"] = [node for node in range(1, n) if kept[node] >= first]
        return cycle


def watch(engine: Engine, on: bool = True) -> None:
    """Wrap the engine's drafter, or unwrap it again; not while it generates."""
    if isinstance(engine.drafter, Watch):
        engine.drafter = engine.drafter.drafter
    if on:
        engine.drafter = Watch(engine.drafter, engine.device)
    if engine.graphs:
        engine.graphs.clear()  # what was captured has the other drafter in it


def accepted(tokens: list[int], parents: list[int], chosen: list[int]) -> list[int]:
    """The nodes of tree.accept's path, without the root."""
    most = len(tokens) - 1
    path, count, _ = accept(build_tree(torch.tensor(tokens), torch.tensor(parents), most), torch.tensor(chosen), most)
    return path[1:1 + count].tolist()


class View:
    """One answer: prints its trees as they come (unless not `trees`), and keeps them for `record`."""

    def __init__(self, watch: Watch, tokenizer: Tokenizer, trees: bool = True, out: TextIO | None = None) -> None:
        self.watch, self.tokenizer, self.trees, self.out = watch, tokenizer, trees, out or sys.stdout
        self.stream, self.texts, self.pieces, self.cycles = tokenizer.stream(), {}, [], []
        self.colour = wants_colour(self.out)

    def push(self, new: list[int]) -> None:
        """`new`: what Engine.generate yields."""
        self.pieces += [self.stream.push([token]) for token in new]
        cycle = self.watch.read(new)
        if cycle is None:
            return
        self.cycles.append(cycle)
        for token in {max(token, ~token) for token in cycle["tokens"] + cycle["next"]} - self.texts.keys():
            self.texts[token] = token_text(self.tokenizer, token)
        if self.trees:
            if len(self.cycles) == 1:
                print(MARKS, *[SHARES] * bool(cycle["confidence"]), "", sep="\n", file=self.out)
            width = shutil.get_terminal_size().columns
            lines = tree_lines(cycle, self.texts, len(self.cycles), width, self.colour)
            print(*lines, "", sep="\n", file=self.out, flush=True)

    def finish(self) -> None:
        """The end of the answer."""
        if self.pieces:
            self.pieces[-1] += self.stream.flush()
        if self.trees:
            print(answer(self.cycles, self.pieces, self.colour), file=self.out, flush=True)

    def record(self) -> dict:
        """For JSON. pieces: the text that each token added; texts: any token as `token_text` shows it."""
        return {"pieces": self.pieces, "texts": self.texts, "cycles": self.cycles}


def main(run: Path, out: Path) -> None:
    """The page of a run: a file whose last line is what generate.py --json prints. ValueError where it is not."""
    try:
        result = json.loads(run.read_text(encoding="utf-8").strip().rpartition("\n")[2])
        page(result, out)
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{run}: not what `generate.py --show_tree --json` prints") from None


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python watch.py RUN.json PAGE.html")
    try:
        main(Path(sys.argv[1]), Path(sys.argv[2]))
    except (ValueError, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
