"""Many prompts from a file, one after the other, and their answers into another that no crash can spoil.

    python generate.py --checkpoint checkpoints/HuggingFaceTB/SmolLM2-135M-Instruct --eagle2 \\
        --prompt_file questions.jsonl --output answers.jsonl

A line of --prompt_file is a JSON object with `prompt`, a text, or `messages`, a conversation up to where the answer
starts, or `turns`, what the user says in one conversation, turn by turn (Spec-Bench, MT-bench). Its `id` may be given,
or `question_id`; else it is the line's number.

A line of --output has the id, what --json prints, and how it was made; with `turns` a list of what --json prints. Or
the id and `error`, of a prompt that cannot be answered: the others are. A line is on the disk before the next prompt is
begun, so whatever ended a run, the same command goes on after it.

    jq -r '.text // .error // .turns[].text' answers.jsonl
"""
import argparse
import fcntl
import hashlib
import json
import os
import sys
from collections import Counter
from collections.abc import Callable
from io import FileIO
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from app.answer import generate
from app.options import load_engine
from formats.questions import are_turns, read_lines
from sampling import Sampling
from tokenizer import Tokenizer

KINDS = ("prompt", "messages", "turns")
FIRST = b'{"id": '  # how a line of --output begins
NO_SETTINGS = ("checkpoint", "prompt_file", "output", "tree_table",  # what does not change a line
               "eagle", "eagle2", "lookahead", "lookup", "rejection")  # what `method` says


class Task(NamedTuple):
    line: int
    id: int | str
    content: dict
    asked: str  # a digest of the content


def digest(*parts: bytes) -> str:
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def read_tasks(path: Path) -> list[Task]:
    """ValueError names the line that cannot be told from the others, or is no object: the file is not what was meant.
    What is wrong with a prompt itself shows when it is its turn."""
    tasks, lines = [], {}
    for number, raw in read_lines(path):
        if raw is None:
            raise ValueError(f'{path}: line {number} is not a JSON object, such as {{"prompt": "Hello"}}')
        name = raw.get("id", raw.get("question_id", number))
        if isinstance(name, bool) or not isinstance(name, (int, str)):
            raise ValueError(f"{path}: the id in line {number} is neither a number nor a text")
        if name in lines:
            raise ValueError(f"{path}: lines {lines[name]} and {number} have the same id, {json.dumps(name)}")
        content = {kind: raw[kind] for kind in KINDS if kind in raw}
        tasks.append(Task(number, name, content, digest(json.dumps(content).encode())))
        lines[name] = number
    if not tasks:
        raise ValueError(f"{path}: no prompts in it")
    return tasks


def settings(args: argparse.Namespace) -> dict:
    """What decides the answers, as JSON gives it back: the options, and which weights."""
    path = args.checkpoint if args.checkpoint.is_file() else args.checkpoint / "model.safetensors"
    given = {name: value for name, value in vars(args).items()
             if name not in NO_SETTINGS and value is not None and value is not False}
    return json.loads(json.dumps({"model": path.name, "weights": fingerprint(path), **given}, default=str))


def fingerprint(path: Path, sample: int = 2**20) -> str:
    """A digest of a file's size, beginning and end; of none if it is not there, as loading it will say."""
    if not path.is_file():
        return ""
    size = path.stat().st_size
    with path.open("rb") as file:
        first = file.read(sample)
        file.seek(max(0, size - sample))
        return digest(str(size).encode(), first, file.read())


def count(answer: dict) -> Counter:
    """What the last line on stderr is made of."""
    parts = [] if "error" in answer else answer.get("turns", [answer])
    return Counter({"prompts": 1, "failed": int("error" in answer),
                    "tokens": sum(part["new_tokens"] for part in parts),
                    "gained": sum(sum(part["gained"]) for part in parts),
                    "cycles": sum(len(part["gained"]) for part in parts),
                    "seconds": sum(part["decode_s"] for part in parts)})


def summary(total: Counter) -> str:
    failed = f" ({total['failed']} failed)" if total["failed"] else ""
    return (f"{total['prompts']} prompts{failed}, {total['tokens']} tokens, "
            f"{total['gained'] / max(total['seconds'], 1e-9):.1f} tokens/s, "
            f"{total['gained'] / max(total['cycles'], 1):.2f} tokens a cycle")


def resume(file: FileIO, path: Path, tasks: list[Task], how: dict) -> tuple[set[int | str], Counter]:
    """The ids that --output has, and their numbers; a last line that a crash left unfinished is cut off. ValueError
    for what this command would not have written."""
    asked, done, total, whole = {task.id: task for task in tasks}, set(), Counter(), 0
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                answer = json.loads(line)
                name, of, made, numbers = answer["id"], answer["asked"], dict(answer["settings"]), count(answer)
                again = name in done
            except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
                torn = line.rstrip(b"\0")  # a file may grow before what is to be in it is there
                if not line.endswith(b"\n") and isinstance(error, ValueError) and (
                        torn.startswith(FIRST) or FIRST.startswith(torn)):
                    break
                raise ValueError(f"{path}: line {number} is nothing that --output writes: name another file") from None
            if not line.endswith(b"\n"):
                break
            other = [f"{key} {made.get(key)!r} there, {how.get(key)!r} here" for key in {**how, **made}
                     if made.get(key) != how.get(key)]
            if other:
                raise ValueError(f"{path}: made with other settings ({'; '.join(other)}): name another file")
            if again or name in asked and asked[name].asked != of:
                raise ValueError(f"{path}: line {number} answers another prompt with the id {json.dumps(name)}: name "
                                 "another file, or give prompts an id of their own")
            done.add(name)
            total += numbers
            whole += len(line)
    file.truncate(whole)
    return done, total


def respond(content: dict, raw: bool, tokenizer: Tokenizer, ask: Callable[[list[int]], dict]) -> dict:
    """The answer to one line. ValueError where there can be none."""
    if len(content) != 1:
        raise ValueError(f"a prompt has one of {', '.join(KINDS)}; this one has {' and '.join(content) or 'none'}")
    (kind, value), = content.items()
    if kind == "messages":
        if not (value and isinstance(value, list) and all(
                isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
                for m in value)):
            raise ValueError("messages should be a list of objects with role and content, both texts")
        if raw:
            raise ValueError("messages need the chat template: leave out --raw")
        return ask(tokenizer.chat(value))
    turns = [value] if kind == "prompt" else value
    if not (are_turns(turns) and all(turn.strip() for turn in turns)):
        raise ValueError(f"{kind} should be {'a text' if kind == 'prompt' else 'a list of texts'}, and not empty")
    texts, answers = [], []
    for turn in turns:
        texts.append(turn)
        answers.append(ask(tokenizer.encode("\n\n".join(texts)) if raw else tokenizer.dialogue(texts)))
        texts.append(answers[-1]["text"])
    return answers[0] if kind == "prompt" else {"turns": answers}


def write(file: FileIO, answer: dict) -> None:
    """A whole line; when this returns it is on the disk."""
    line = memoryview(json.dumps(answer).encode() + b"\n")
    while line:
        line = line[file.write(line):]
    os.fsync(file.fileno())


def batch(args: argparse.Namespace, sampling: Sampling) -> int:
    """All of --prompt_file; the exit code. Raises ValueError or OSError with one line to
    show."""
    tasks, how, done = read_tasks(args.prompt_file), settings(args), set()
    if args.output.exists() and args.output.samefile(args.prompt_file):
        raise ValueError(f"--prompt_file and --output are the same file, {args.output}")
    with args.output.open("ab+", buffering=0) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            done, total = resume(file, args.output, tasks, how)
            rest = [task for task in tasks if task.id not in done]
            if rest:
                engine = load_engine(args)
                tokenizer = engine.tokenizer
                engine.warm_up(sampling)
            with tqdm(total=len(tasks), initial=len(tasks) - len(rest), desc="prompts", disable=None) as bar:
                for task in rest:
                    try:
                        answer = respond(task.content, args.raw, tokenizer, lambda ids: generate(
                            engine, ids, args.max_new_tokens, sampling, tokenizer, args.method, stops=args.stop))
                    except ValueError as error:
                        answer = {"error": " ".join(str(error).split())}
                        bar.write(f"{args.prompt_file}, line {task.line}: {answer['error']}", file=sys.stderr)
                    write(file, {"id": task.id, **answer, "asked": task.asked, "settings": how})
                    done.add(task.id)
                    total += count(answer)
                    bar.set_postfix_str(summary(total).partition(", ")[2])
                    bar.update()
        except BlockingIOError:
            raise ValueError(f"{args.output}: another run is writing to it") from None
        except KeyboardInterrupt:
            print(f"\ninterrupted: {sum(task.id in done for task in tasks)} of {len(tasks)} prompts are done, and the "
                  "same command does the rest", file=sys.stderr)
            return 130
    print(summary(total), file=sys.stderr)
    return 1 if total["failed"] else 0
