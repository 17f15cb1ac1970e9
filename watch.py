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
import os
import shutil
import sys
import unicodedata
from pathlib import Path
from typing import TextIO

import torch
from torch import Tensor

from draft import Eagle2
from drafter import Drafter
from engine import Engine
from kernels import TreeMask
from tokenizer import Tokenizer
from tree import State, Tree, accept, best_first, build

RING = 4  # rows: the cycle that the host reads, the one that runs meanwhile, and two to spare
GREY, BLUE, ORANGE = "38;5;245", "1;38;5;32", "1;38;5;172"  # Okabe and Ito's, as plots.py has them, of a terminal's 256
DEPTHS = ("38;5;32", "38;5;36", "38;5;175", "38;5;74", "38;5;142")  # the last one: that deep or deeper
MARKS = "* drafted and accepted   + bonus: the model's own"
SHARES = "% the draft head's probability of the path to a node   ~ looked up in the text"
BONUS = -1  # in an outline: the target's own token after the last accepted node


class Watch(Drafter):
    """Drafts what `drafter` drafts, and remembers the last trees. Nothing in a cycle depends on what is remembered."""

    def __init__(self, drafter: Drafter, device: torch.device | str = "cpu") -> None:
        self.drafter, self.num_nodes, self.max_depth = drafter, drafter.num_nodes, drafter.max_depth
        self.deepest, self.blanks, self.rejection = drafter.deepest, drafter.blanks, drafter.rejection
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

    def propose(self, state: State) -> Tree:
        tree = self.drafter.propose(state)
        if isinstance(self.drafter, Eagle2):  # as rerank chose: the root's score is 0
            scores = self.drafter.start[1].scores
            kept = best_first(scores, self.num_nodes - 1).sort().values
            self.ranked[0, 1:] = scores[kept].view(torch.int32)
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
        if isinstance(self.drafter, Eagle2):
            scores = torch.tensor(scores, dtype=torch.int32).view(torch.float32).tolist()
            chain = self.drafter.retrieval.length if self.drafter.retrieval else 0
            first = len(self.drafter.start[1].scores) - chain  # of the candidates that are the chain's
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
    path, count, _ = accept(build(torch.tensor(tokens), torch.tensor(parents), most), torch.tensor(chosen), most)
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


# ----- In a terminal ---------------------------------------------------------------------------------------------


def wants_colour(out: TextIO) -> bool:
    """Only a terminal, and not where NO_COLOR is set (no-color.org)."""
    return out.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """A token in one line: spaces as ␣, what cannot be printed and bytes of half a character as Python escapes them."""
    raw = tokenizer.token_bytes(token)
    if not raw:  # a special token
        return tokenizer.bpe.id_to_token(token) or f"#{token}"
    shown = ""
    for c in raw.decode("utf-8", "surrogateescape"):
        escaped = f"\\x{ord(c) - 0xdc00:02x}" if "\udc80" <= c <= "\udcff" else repr(c)[1:-1] if c != "'" else c
        shown += "␣" if c == " " else escaped
    return "◌" * unicodedata.category(shown[0]).startswith("M") + shown  # an accent alone needs a base to stand on


def columns(text: str) -> int:
    """How many a terminal uses for it."""
    return sum(0 if unicodedata.category(c) in ("Mn", "Me") else 1 + (unicodedata.east_asian_width(c) in "WF")
               for c in text)


def clip(text: str, room: int) -> str:
    """The text in at most `room` columns, … where something is missing."""
    if columns(text) <= room:
        return text
    while text and columns(text) >= room:
        text = text[:-1]
    return text + "…" * (room > 0)


def paint(text: str, style: str, colour: bool) -> str:
    return f"\x1b[{style}m{text}\x1b[0m" if colour and style and text else text


def worth_showing(cycle: dict, room: int) -> set[int]:
    """The accepted path, and of the other nodes the most confident (without confidence: the first), `room` in all. A
    node comes after its parent, and never is more confident; so it is only shown below it."""
    tokens, confidence = cycle["tokens"], cycle["confidence"]
    shown = {0, *cycle["path"]}
    for node in sorted(range(len(tokens)), key=lambda i: -confidence[i] if confidence else i):
        if len(shown) < room and tokens[node] >= 0 and cycle["parents"][node] in shown:
            shown.add(node)
    return shown


def outline(cycle: dict, shown: set[int], step: int, node: int = 0, before: str = "") -> list[tuple[int, str]]:
    """The nodes below one, and the branches drawn in front of each. What was accepted is the last: so the path leads
    down to the bonus token, from which the next tree grows."""
    path = [0, *cycle["path"], *[BONUS] * (cycle["gained"] > len(cycle["path"]))]
    follows = path[path.index(node) + 1:][:1] if node in path else []
    below = [i for i in range(1, len(cycle["tokens"])) if i in shown and cycle["parents"][i] == node]
    below, lines = [i for i in below if i not in follows] + follows, []
    for i in below:
        end = i == below[-1]
        mark = "+" if i == BONUS else "*" if i in path else "─"
        lines.append((i, before + "├└"[end] + "─" * (step - 2) + mark + " "))
        if i != BONUS:
            lines += outline(cycle, shown, step, i, before + "│ "[end] + " " * (step - 1))
    return lines


def tree_lines(cycle: dict, texts: dict[int, str], number: int, width: int = 80, colour: bool = False,
               most: int = 16) -> list[str]:
    """A cycle as `Watch.read` tells of it: a line of figures, and a line for each of up to `most` nodes (the accepted
    path is shown whole). `texts` of all tokens; `number`: 1 for the first cycle. No line is wider than `width`, from
    32 on."""
    width, tokens, path, confidence = max(width, 32), cycle["tokens"], cycle["path"], cycle["confidence"]
    shown, title = worth_showing(cycle, most), f"cycle {number}"
    folded = dict.fromkeys([*shown, BONUS], 0)  # how many nodes are hidden below each
    for node in range(1, len(tokens)):
        if tokens[node] >= 0 and node not in shown:
            while node not in shown:
                node = cycle["parents"][node]
            folded[node] += 1
    drafted = sum(token >= 0 for token in tokens[1:])
    figures = f": +{cycle['gained']}, {len(path)} of {drafted} drafts accepted"
    figures += ", the end" * (cycle["gained"] == len(path))
    bar = 10 if confidence and width >= 60 else 0
    room = width - 11 - (bool(confidence) * (6 + bar))  # for branches and token; 11: for a note
    rows = []
    for node, before in [(0, ""), *outline(cycle, shown, 3 if width >= 60 else 2)]:
        token = cycle["next"][path[-1] if path else 0] if node == BONUS else tokens[node]
        before = before if len(before) <= room - 4 else "…" + before[5 - room:]
        rows.append((node, before, clip(texts[token], room - len(before))))
    column = max(len(before) + columns(text) for _, before, text in rows)
    lines = [paint(title, "1", colour) + clip(figures, width - len(title))]
    for node, before, text in rows:
        style = ORANGE if node == BONUS else BLUE if node in path else GREY if node else "1"
        figure = f" {percent(confidence[node]):>4} {blocks(confidence[node], bar):{bar}}" if confidence else ""
        note = "bonus" if node == BONUS else "~ " * (node in cycle["looked_up"])
        note += f"+{folded[node]} more" * (folded[node] > 0)
        rest = " " * (column - len(before) - columns(text)) + (figure if node > 0 else " " * len(figure) * (node == 0))
        rest = f"{rest} {note}".rstrip()
        lines.append(paint(before[:-2], GREY, colour) + paint(before[-2:] + text + rest, style, colour))
    return lines


def percent(share: float) -> str:
    return f"{share:.0%}" if share >= 0.01 else "<1%"


def blocks(share: float, size: int) -> str:
    """A bar of up to `size` columns, in eighths of one."""
    eighths = round(8 * size * share)
    return "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()


def came(cycles: list[dict]) -> list[int]:
    """How each token of an answer came: the depth at which it was drafted, 0 for a bonus, as is prefill's."""
    ways = [0]
    for cycle in cycles:
        drafted = len(cycle["path"])
        ways += [*range(1, drafted + 1), *[0] * (cycle["gained"] - drafted)]
    return ways


def answer(cycles: list[dict], pieces: list[str], colour: bool) -> str:
    """The answer, each token coloured by how it came, and a legend; without colour the target's own in ⟨⟩."""
    ways = came(cycles)
    styles = [ORANGE if way == 0 else DEPTHS[min(way, len(DEPTHS)) - 1] for way in ways]
    text = "".join(paint(piece, style, colour) if way or colour or not piece else f"⟨{piece}⟩"
                   for piece, way, style in zip(pieces, ways, styles))
    counts = {way: ways.count(way) for way in sorted(set(ways) - {0})}
    legend = [paint(f"{way}: {n}", DEPTHS[min(way, len(DEPTHS)) - 1], colour) for way, n in counts.items()]
    own = paint(f"{ways.count(0)} of the model's own" + " ⟨⟩" * (not colour), ORANGE, colour)
    drafted = ", drafted at depth " * bool(legend) + ", ".join(legend)
    return f"{text}\n\n{len(ways)} tokens in {len(cycles)} cycles: {own}{drafted}"


# ----- On a page -------------------------------------------------------------------------------------------------


def page(result: dict, path: Path) -> None:
    """Write a page that steps through the cycles: tree_page.html with the run in it. result: what --json prints."""
    run = {key: result[key] for key in ("method", "trees")}
    # "<" as JSON's \u003c: no token can end the script that the data stand in
    data = json.dumps(run, separators=(",", ":")).replace("<", "\\u003c")
    template = Path(__file__).with_name("tree_page.html").read_text(encoding="utf-8")
    before, after = template.split("RUN_AS_JSON")
    path.write_text(before + data + after, encoding="utf-8")


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
