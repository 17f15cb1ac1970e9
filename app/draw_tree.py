"""Draw a cycle's tree: as lines for a terminal, and as a page for a browser. A cycle is what app/watch.py records."""
import json
import os
import unicodedata
from pathlib import Path
from typing import TextIO

from formats.writing import write_text
from tokenizer import Tokenizer

# Styles of a terminal with 256 colours: Okabe and Ito's colours, as in benchmarks/plots.py
GREY, BLUE, ORANGE, BOLD = "38;5;245", "1;38;5;32", "1;38;5;172", "1"
DEPTHS = ("38;5;32", "38;5;36", "38;5;175", "38;5;74", "38;5;142")  # drafted at depth 1, 2 ...; the last: and deeper
LEGEND = "* drafted and accepted   + bonus: the model's own token"
SCORES_LEGEND = "% the draft head's probability of the path to a node   ~ looked up in the text"
BONUS = -1  # stands for a node: the target's own token after the last accepted node


# ----- Text in a terminal ----------------------------------------------------------------------------------------


def wants_colour(out: TextIO) -> bool:
    """True for a terminal, unless NO_COLOR is set (no-color.org)."""
    return out.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """A token on one line: a space as ␣; unprintable characters and bytes of half a character as Python escapes."""
    raw = tokenizer.token_bytes(token)
    if not raw:  # a special token
        return tokenizer.bpe.id_to_token(token) or f"#{token}"
    shown = "".join(map(visible, raw.decode("utf-8", "surrogateescape")))
    if unicodedata.category(shown[0]).startswith("M"):
        return "◌" + shown  # an accent needs a base to stand on
    return shown


def visible(c: str) -> str:
    if c == " ":
        return "␣"
    if "\udc80" <= c <= "\udcff":  # surrogateescape's form of a byte that is not UTF-8
        return f"\\x{ord(c) - 0xdc00:02x}"
    return c if c == "'" else repr(c)[1:-1]  # repr would put a quote in other quotes


def columns(text: str) -> int:
    """How many columns of a terminal the text takes."""
    return sum(0 if unicodedata.category(c) in ("Mn", "Me") else 1 + (unicodedata.east_asian_width(c) in "WF")
               for c in text)


def clip(text: str, room: int) -> str:
    """The text in at most `room` columns; … marks what is cut."""
    if columns(text) <= room:
        return text
    while text and columns(text) >= room:
        text = text[:-1]
    return text + "…" * (room > 0)


def paint(text: str, style: str, colour: bool) -> str:
    return f"\x1b[{style}m{text}\x1b[0m" if colour and style and text else text


def percent(share: float) -> str:
    return f"{share:.0%}" if share >= 0.01 else "<1%"


def bar(share: float, size: int) -> str:
    """A bar of up to `size` columns, in eighths of a column."""
    eighths = round(8 * size * share)
    return "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()


# ----- A tree in a terminal --------------------------------------------------------------------------------------


def nodes_to_show(cycle: dict, room: int) -> set[int]:
    """The accepted path whole, then the most confident of the other nodes (the first ones, if there is no confidence),
    `room` in all. A node is only shown below its parent, which comes before it and is never less confident."""
    tokens, confidence = cycle["tokens"], cycle["confidence"]
    shown = {0, *cycle["path"]}
    for node in sorted(range(len(tokens)), key=lambda i: -confidence[i] if confidence else i):
        if len(shown) < room and tokens[node] >= 0 and cycle["parents"][node] in shown:
            shown.add(node)
    return shown


def count_hidden(cycle: dict, shown: set[int]) -> dict[int, int]:
    """Of each shown node, and of BONUS: how many hidden nodes have it as their nearest shown ancestor."""
    hidden = dict.fromkeys([*shown, BONUS], 0)
    for node, token in enumerate(cycle["tokens"]):
        if token >= 0 and node not in shown:
            while node not in shown:
                node = cycle["parents"][node]
            hidden[node] += 1
    return hidden


def draw_branches(cycle: dict, shown: set[int], step: int, node: int = 0, before: str = "") -> list[tuple[int, str]]:
    """The shown nodes below `node` in the order of their lines, and the branches to draw in front of each, `step`
    columns a level. The accepted child comes last: so the path leads down to the bonus token, from which the next tree
    grows."""
    path = [0, *cycle["path"]]
    if cycle["gained"] > len(cycle["path"]):
        path.append(BONUS)
    accepted = path[path.index(node) + 1:][:1] if node in path else []
    children = [i for i in range(1, len(cycle["tokens"]))
                if i in shown and i not in accepted and cycle["parents"][i] == node] + accepted
    lines = []
    for child in children:
        last = child == children[-1]
        mark = "+" if child == BONUS else "*" if child in path else "─"
        lines.append((child, before + ("└" if last else "├") + "─" * (step - 2) + mark + " "))
        if child != BONUS:
            further = before + ("  " if last else "│ ") + " " * (step - 2)
            lines += draw_branches(cycle, shown, step, child, further)
    return lines


def tree_lines(cycle: dict, texts: dict[int, str], number: int, width: int = 80, colour: bool = False,
               most: int = 16) -> list[str]:
    """A line of figures, then a line for each of up to `most` nodes; an accepted path that is longer is shown whole.

    cycle: what Watch.read returns. texts: of all its tokens. number: 1 for the first cycle. No line is wider than
    `width`, if that is at least 32.
    """
    width = max(width, 32)
    tokens, path, confidence = cycle["tokens"], cycle["path"], cycle["confidence"]
    wide = width >= 60
    bar_size = 10 if confidence and wide else 0
    figure_size = 6 + bar_size if confidence else 0
    room = width - 11 - figure_size  # for branches and token; 11 columns are for the note at the end
    shown = nodes_to_show(cycle, most)
    hidden = count_hidden(cycle, shown)
    rows = []
    for node, branches in [(0, ""), *draw_branches(cycle, shown, 3 if wide else 2)]:
        token = cycle["next"][path[-1] if path else 0] if node == BONUS else tokens[node]
        if len(branches) > room - 4:
            branches = "…" + branches[5 - room:]
        rows.append((node, branches, clip(texts[token], room - len(branches))))
    text_size = max(len(branches) + columns(text) for _, branches, text in rows)
    lines = [title(cycle, number, width, colour)]
    for node, branches, text in rows:
        padding = " " * (text_size - len(branches) - columns(text))
        figure = ""
        if node == 0:
            figure = " " * figure_size
        elif node != BONUS and confidence:
            figure = f" {percent(confidence[node]):>4} {bar(confidence[node], bar_size):{bar_size}}"
        rest = f"{padding}{figure} {note(cycle, node, hidden[node])}".rstrip()
        lines.append(paint(branches[:-2], GREY, colour) + paint(branches[-2:] + text + rest, style(node, path), colour))
    return lines


def title(cycle: dict, number: int, width: int, colour: bool) -> str:
    drafted = sum(token >= 0 for token in cycle["tokens"][1:])
    accepted = len(cycle["path"])
    name = f"cycle {number}"
    figures = f": +{cycle['gained']}, {accepted} of {drafted} drafts accepted"
    if cycle["gained"] == accepted:  # no bonus token: the text ended within the path
        figures += ", the end"
    return paint(name, BOLD, colour) + clip(figures, width - len(name))


def note(cycle: dict, node: int, hidden: int) -> str:
    words = ["bonus"] if node == BONUS else ["~"] if node in cycle["looked_up"] else []
    if hidden:
        words.append(f"+{hidden} more")
    return " ".join(words)


def style(node: int, path: list[int]) -> str:
    if node == BONUS:
        return ORANGE
    if node in path:
        return BLUE
    return GREY if node else BOLD


# ----- The answer in a terminal ----------------------------------------------------------------------------------


def draft_depths(cycles: list[dict]) -> list[int]:
    """The depth at which each token of an answer was drafted; 0 for the target's own: the first and every bonus."""
    depths = [0]
    for cycle in cycles:
        drafted = len(cycle["path"])
        depths += [*range(1, drafted + 1), *[0] * (cycle["gained"] - drafted)]
    return depths


def answer_text(cycles: list[dict], pieces: list[str], colour: bool) -> str:
    """The answer with each token coloured by the depth at which it was drafted, and a legend. Without colour, the
    target's own tokens stand in ⟨⟩."""
    depths = draft_depths(cycles)

    def painted(text: str, depth: int) -> str:
        return paint(text, DEPTHS[min(depth, len(DEPTHS)) - 1] if depth else ORANGE, colour)

    text = ""
    for piece, depth in zip(pieces, depths):
        bracketed = piece and not colour and depth == 0
        text += f"⟨{piece}⟩" if bracketed else painted(piece, depth)
    own = painted(f"{depths.count(0)} of the model's own" + ("" if colour else " ⟨⟩"), 0)
    drafted = [painted(f"{depths.count(depth)} at depth {depth}", depth) for depth in sorted(set(depths) - {0})]
    legend = f"{own}; drafted: {', '.join(drafted)}" if drafted else own
    return f"{text}\n\n{len(depths)} tokens in {len(cycles)} cycles: {legend}"


# ----- On a page -------------------------------------------------------------------------------------------------


def write_page(result: dict, path: Path) -> None:
    """Write a page that steps through the cycles: tree_page.html with the run in it. result: what --json prints."""
    run = {key: result[key] for key in ("method", "trees")}
    # Write "<" as JSON's \u003c, so that no token can end the <script> that holds the data.
    data = json.dumps(run, separators=(",", ":")).replace("<", "\\u003c")
    template = Path(__file__).with_name("tree_page.html").read_text(encoding="utf-8")
    before, after = template.split("RUN_AS_JSON")
    write_text(path, before + data + after)
