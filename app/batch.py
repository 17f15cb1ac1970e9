"""Answer many prompts from one file and write the answers to another, which no crash can spoil.

    python generate.py --checkpoint checkpoints/HuggingFaceTB/SmolLM2-135M-Instruct --eagle2 \\
        --prompt_file questions.jsonl --output answers.jsonl
    jq -r '.text // .error // .turns[].text' answers.jsonl

A line of --prompt_file is a JSON object with one of

    prompt      a text
    messages    a conversation up to the place where the answer starts
    turns       what the user says in one conversation, turn by turn (Spec-Bench, MT-bench)

and perhaps an `id` or a `question_id`. Without one, the line's number is its id.

A line of --output has the id, what --json prints (for `turns`, a list of these) and how the answer was made. For a
prompt that cannot be answered it has `error` instead, and the run goes on. Each line is on the disk before the next
prompt is started. So whatever ends a run, the same command continues it.
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
from typing import Any, NamedTuple

from tqdm import tqdm

from app.answer import generate
from app.options import Engine, explain_template, load_engine
from drafters.methods import METHODS, OPTIONS, RULE, WINDOW
from formats.questions import are_turns, read_lines
from sampling import Sampling
from tokenizer import Tokenizer

KINDS = ("prompt", "messages", "turns")
# generate.py's arguments that do not change an answer: file names, and the flags whose meaning `method` holds
METHOD_FLAGS = {part for name in METHODS for part in name.split("+")} - OPTIONS.keys()
NO_SETTINGS = {"checkpoint", "prompt_file", "output", "tree_table"} | METHOD_FLAGS
DEFAULTS = {"lookup_rule": RULE, "window": WINDOW}  # every answer so far records these two, even if not given


# ----- The prompts -----------------------------------------------------------------------------------------------


class Task(NamedTuple):
    """A line of --prompt_file."""
    line: int
    id: int | str
    content: dict  # those of KINDS that the line has
    digest: str  # of the content


def digest(*parts: bytes) -> str:
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def read_tasks(path: Path) -> list[Task]:
    """The lines of --prompt_file. ValueError for a line that is not an object or whose id is bad or taken: the file is
    not what the user meant. Whether a prompt can be answered, `respond` finds out."""
    tasks = []
    line_of: dict[int | str, int] = {}
    for number, raw in read_lines(path):
        if raw is None:
            raise ValueError(f'{path}: line {number} is not a JSON object, such as {{"prompt": "Hello"}}')
        name = raw.get("id", raw.get("question_id", number))
        if isinstance(name, bool) or not isinstance(name, (int, str)):
            raise ValueError(f"{path}: the id in line {number} is neither a number nor a text")
        if name in line_of:
            raise ValueError(f"{path}: lines {line_of[name]} and {number} have the same id, {json.dumps(name)}")
        content = {kind: raw[kind] for kind in KINDS if kind in raw}
        tasks.append(Task(number, name, content, digest(json.dumps(content).encode())))
        line_of[name] = number
    if not tasks:
        raise ValueError(f"{path}: no prompts in it")
    return tasks


def respond(content: dict, raw: bool, tokenizer: Tokenizer, ask: Callable[[list[int]], dict]) -> dict:
    """The answer to one line of --prompt_file. `ask` answers one prompt, given as ids. ValueError for a line that
    cannot be answered."""
    if len(content) != 1:
        raise ValueError(f"a prompt has one of {', '.join(KINDS)}; this one has {' and '.join(content) or 'none'}")
    (kind, value), = content.items()
    if kind == "messages":
        if not are_messages(value):
            raise ValueError("messages should be a list of objects with role and content, both texts")
        if raw:
            raise ValueError("messages need the chat template: leave out --raw")
        return ask(tokenizer.chat(value))
    turns = [value] if kind == "prompt" else value
    if not (are_turns(turns) and all(turn.strip() for turn in turns)):
        raise ValueError(f"{kind} should be {'a text' if kind == 'prompt' else 'a list of texts'}, and not empty")
    texts = []  # questions and answers in turn
    answers = []
    for turn in turns:
        texts.append(turn)
        answer = ask(tokenizer.encode("\n\n".join(texts)) if raw else tokenizer.dialogue(texts))
        texts.append(answer["text"])
        answers.append(answer)
    return answers[0] if kind == "prompt" else {"turns": answers}


def are_messages(value: object) -> bool:
    return bool(value) and isinstance(value, list) and all(
        isinstance(message, dict) and isinstance(message.get("role"), str) and isinstance(message.get("content"), str)
        for message in value)


# ----- What was asked for ----------------------------------------------------------------------------------------


def settings(args: argparse.Namespace) -> dict:
    """What the answers depend on, as JSON gives it back: the options that are set, and the target's weights. A run is
    resumed only where these are the same, so the same options must give the same settings in every version."""
    path = args.checkpoint if args.checkpoint.is_file() else args.checkpoint / "model.safetensors"
    options = {name: value for name, value in vars(args).items()
               if name not in NO_SETTINGS and value is not None and value is not False}
    if args.chat_template:
        options["chat_template"] = digest(args.chat_template.read_bytes())
    made = {"model": path.name, "weights": fingerprint(path), **DEFAULTS, **options}
    return json.loads(json.dumps(made, default=str))


def fingerprint(path: Path, sample: int = 2**20) -> str:
    """A digest of a file's size, beginning and end. "" for a missing file: loading the model reports that."""
    if not path.is_file():
        return ""
    size = path.stat().st_size
    with path.open("rb") as file:
        first = file.read(sample)
        file.seek(max(0, size - sample))
        return digest(str(size).encode(), first, file.read())


# ----- The answers -----------------------------------------------------------------------------------------------

LINE_START = b'{"id": '  # every line of --output begins so
# What read_answer raises for other lines.
NOT_OURS = (ValueError, RecursionError, KeyError, TypeError, AttributeError, OverflowError)


class Written(NamedTuple):
    """A line of --output, as far as resuming needs it."""
    id: int | str
    digest: str  # Task.digest
    settings: dict[str, Any]
    figures: Counter


def read_answer(line: bytes) -> Written:
    """Raises one of NOT_OURS for a line that `write` did not write as a whole."""
    answer = json.loads(line)
    written = Written(answer["id"], answer["asked"], dict(answer["settings"]), figures(answer))
    hash(written.id)  # TypeError for a list
    if not all(0 <= number < 2**53 for number in written.figures.values()):
        raise ValueError("no run counts so far")
    return written


def is_torn(line: bytes) -> bool:
    """True for a last line that a crash cut off. Zero bytes may end it: a file can grow before its data is written."""
    start = line.rstrip(b"\0")
    return not line.endswith(b"\n") and (start.startswith(LINE_START) or LINE_START.startswith(start))


def resume(file: FileIO, path: Path, tasks: list[Task], wanted: dict) -> tuple[set[int | str], Counter]:
    """The ids that --output has, and their figures added up. Cuts off a last line that a crash left unfinished.
    `wanted`: this command's `settings`. ValueError where a line is not what this command would have written."""
    digests = {task.id: task.digest for task in tasks}
    done: set[int | str] = set()
    total = Counter()
    size = 0  # of the whole lines
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                answer = read_answer(line)
            except NOT_OURS as error:
                if isinstance(error, ValueError) and is_torn(line):
                    break
                raise ValueError(f"{path}: line {number} was not written by --output: name another file") from None
            if not line.endswith(b"\n"):
                break
            found = answer.settings
            other = [f"{key} {found.get(key)!r} there, {wanted.get(key)!r} here" for key in {**wanted, **found}
                     if found.get(key) != wanted.get(key)]
            if other:
                raise ValueError(f"{path}: made with other settings ({'; '.join(other)}): name another file")
            if answer.id in done or digests.get(answer.id, answer.digest) != answer.digest:
                raise ValueError(f"{path}: line {number} answers another prompt with the id {json.dumps(answer.id)}: "
                                 "name another file, or give each prompt an id of its own")
            done.add(answer.id)
            total += answer.figures
            size += len(line)
    file.truncate(size)
    return done, total


def write(file: FileIO, answer: dict) -> None:
    """Append a whole line; when this returns it is on the disk."""
    line = memoryview(json.dumps(answer).encode() + b"\n")
    while line:
        line = line[file.write(line):]
    os.fsync(file.fileno())


def figures(answer: dict) -> Counter:
    """The numbers of one line of --output that `summary` adds up."""
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
            f"{total['gained'] / max(total['cycles'], 1):.2f} tokens per step")


# ----- The run ---------------------------------------------------------------------------------------------------


def answer_task(task: Task, args: argparse.Namespace, engine: Engine, sampling: Sampling) -> dict:
    """The answer, or {"error": one line} for a prompt that cannot be answered."""
    def ask(ids: list[int]) -> dict:
        return generate(engine, ids, args.max_new_tokens, sampling, engine.tokenizer, args.method, stops=args.stop)

    try:
        return respond(task.content, args.raw, engine.tokenizer, ask)
    except ValueError as error:
        return {"error": " ".join(str(error).split())}


def batch(args: argparse.Namespace, sampling: Sampling) -> int:
    """Answer all of --prompt_file that --output does not have yet. Returns the exit code: 1 if a prompt failed, 130
    after Ctrl-C. Raises ValueError or OSError with one line to show."""
    tasks = read_tasks(args.prompt_file)
    wanted = settings(args)
    done: set[int | str] = set()
    if args.output.exists() and args.output.samefile(args.prompt_file):
        raise ValueError(f"--prompt_file and --output are the same file, {args.output}")
    if args.output.exists() and not args.output.is_file():
        raise ValueError(f"--output {args.output}: not a file that a run could go on with, such as a pipe or a device")
    with args.output.open("ab+", buffering=0) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            done, total = resume(file, args.output, tasks, wanted)
            rest = [task for task in tasks if task.id not in done]
            if rest:
                engine = load_engine(args)
                explain_template(engine.tokenizer, args)
                engine.warm_up(sampling)
            with tqdm(total=len(tasks), initial=len(tasks) - len(rest), desc="prompts", disable=None) as bar:
                for task in rest:
                    answer = answer_task(task, args, engine, sampling)
                    if "error" in answer:
                        bar.write(f"{args.prompt_file}, line {task.line}: {answer['error']}", file=sys.stderr)
                    write(file, {"id": task.id, **answer, "asked": task.digest, "settings": wanted})
                    done.add(task.id)
                    total += figures(answer)
                    bar.set_postfix_str(summary(total).partition(", ")[2])
                    bar.update()
        except BlockingIOError:
            raise ValueError(f"{args.output}: another run is writing to it") from None
        except KeyboardInterrupt:
            print(f"\ninterrupted: {sum(task.id in done for task in tasks)} of {len(tasks)} prompts are done; the same "
                  "command continues with the others", file=sys.stderr)
            return 130
    print(summary(total), file=sys.stderr)
    return 1 if total["failed"] else 0
