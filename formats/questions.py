"""Files of questions or prompts: JSON lines, as Spec-Bench, MT-bench and SPEED-Bench have them."""
import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

UNFILLED = "FULL BENCHMARK DATA SHOULD BE FETCHED"  # how SPEED-Bench's placeholders begin


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


def turns_of(raw: dict) -> object:
    """What the user says: `turns` or, as NVIDIA's prepare.py writes SPEED-Bench, `messages` of the user alone."""
    messages = raw.get("messages")
    if "turns" in raw or not isinstance(messages, list):
        return raw.get("turns")
    return [m.get("content") if isinstance(m, dict) and m.get("role") == "user" else None for m in messages]


def read_rows(path: Path) -> Iterator[tuple[int, dict | None]]:
    """The number and the object of each line, or of each row of a Parquet file."""
    if path.suffix != ".parquet":
        yield from read_lines(path)
        return
    try:
        import pyarrow.parquet
    except ModuleNotFoundError:
        raise ValueError(f"{path}: reading Parquet needs pyarrow: pip install pyarrow") from None
    yield from enumerate(pyarrow.parquet.read_table(path).to_pylist(), 1)


def read_questions(path: Path) -> list[Question]:
    """The questions of a file: JSON lines as Spec-Bench and MT-bench have them, or SPEED-Bench's files (nvidia's data
    set on the hub), JSON lines or Parquet. A question has `turns` and perhaps `question_id` and `category`.

    Raises ValueError naming the first line that is not one, or if there is no question.
    """
    questions = []
    for number, raw in read_rows(path):
        turns = raw and turns_of(raw)
        if not are_turns(turns):
            raise ValueError(f'{path}: each line should be a JSON object with "turns", a list of texts; '
                             f"line {number} is not")
        if any(turn.startswith(UNFILLED) for turn in turns):
            raise ValueError(f"{path}: line {number} holds a placeholder instead of its text. SPEED-Bench's own "
                             "prepare.py fetches the texts that its license leaves out; give the file that it writes")
        name = str(raw.get("question_id", number))
        category = str(raw.get("category", "all"))
        questions.append(Question(name, category, turns))
    if not questions:
        raise ValueError(f"{path}: no questions in it")
    return questions
