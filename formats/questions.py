"""Files of questions or prompts as JSON lines, as Spec-Bench and MT-bench have them."""
import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple


class Question(NamedTuple):
    name: str  # its question_id, or its line number where there is none
    category: str  # "all" where there is none
    turns: list[str]  # what the user says, turn by turn


def read_lines(path: Path) -> Iterator[tuple[int, dict | None]]:
    """The line number and the object of each line of a JSON-lines file; None for a line that is no JSON object. Empty
    lines are skipped. Line numbers start at 1."""
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):  # str.splitlines would cut at U+2028 in a text
        if line.strip():
            try:
                raw = json.loads(line)
            except (ValueError, RecursionError):
                raw = None
            yield number, raw if isinstance(raw, dict) else None


def are_turns(turns: object) -> bool:
    """Whether this is a list of one or more texts."""
    return bool(turns) and isinstance(turns, list) and all(isinstance(turn, str) for turn in turns)


def read_questions(path: Path) -> list[Question]:
    """The questions of a file. Each line is an object with `turns`, and perhaps `question_id` and `category`.

    Raises ValueError naming the first line that is not, or if there is no question.
    """
    questions = []
    for number, raw in read_lines(path):
        if raw is None or not are_turns(raw.get("turns")):
            raise ValueError(f'{path}: each line should be a JSON object with "turns", a list of texts; '
                             f"line {number} is not")
        name = str(raw.get("question_id", number))
        category = str(raw.get("category", "all"))
        questions.append(Question(name, category, raw["turns"]))
    if not questions:
        raise ValueError(f"{path}: no questions in it")
    return questions
