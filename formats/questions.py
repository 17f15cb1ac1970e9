"""Files of prompts: JSON lines."""
import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple


class Question(NamedTuple):
    name: str  # its question_id, or the number of its line
    category: str
    turns: list[str]


def read_lines(path: Path) -> Iterator[tuple[int, dict | None]]:
    """The objects of a file of JSON lines, with their line numbers; None for what is none. Empty lines are left out."""
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):  # str.splitlines cuts at U+2028, in a text too
        if line.strip():
            try:
                raw = json.loads(line)
            except (ValueError, RecursionError):
                raw = None
            yield number, raw if isinstance(raw, dict) else None


def are_turns(turns: object) -> bool:
    return bool(turns) and isinstance(turns, list) and all(isinstance(turn, str) for turn in turns)


def read_questions(path: Path) -> list[Question]:
    """JSON lines as Spec-Bench and MT-bench have them: `turns`, and perhaps `question_id` and `category`."""
    questions = []
    for number, raw in read_lines(path):
        if raw is None or not are_turns(raw.get("turns")):
            raise ValueError(f'{path}: each line should be a JSON object with "turns", a list of texts; '
                             f"line {number} is not")
        name, category = (str(raw.get(key, other)) for key, other in (("question_id", number), ("category", "all")))
        questions.append(Question(name, category, raw["turns"]))
    if not questions:
        raise ValueError(f"{path}: no questions in it")
    return questions
