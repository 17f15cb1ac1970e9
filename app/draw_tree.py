"""A cycle's tree as lines for a terminal, and as a page."""
import json
import os
import unicodedata
from pathlib import Path
from typing import TextIO

from tokenizer import Tokenizer

GREY, BLUE, ORANGE = "38;5;245", "1;38;5;32", "1;38;5;172"  # Okabe and Ito's, as plots.py has them, of a terminal's 256
DEPTHS = ("38;5;32", "38;5;36", "38;5;175", "38;5;74", "38;5;142")  # the last one: that deep or deeper
MARKS = "* drafted and accepted   + bonus: the model's own"
SHARES = "% the draft head's probability of the path to a node   ~ looked up in the text"
BONUS = -1  # in an outline: the target's own token after the last accepted node


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
