"""A conversation with the model, at a terminal or through a pipe: generate.py --interactive.

    python generate.py --checkpoint checkpoints/HuggingFaceTB/SmolLM2-135M-Instruct --eagle2 --interactive
    printf 'Name three rivers.\\nAnd three lakes.\\n' | python generate.py --checkpoint ... --eagle2 --interactive

Each turn processes only the new part of the prompt, since the engine keeps its caches (Engine.generate, reuse). At a
terminal, prompt_toolkit edits the line. Through a pipe, every line of stdin is a turn. Answers and draft trees go to
stdout; notes, errors and speeds go to stderr.
"""
import itertools
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from app.chat_file import Messages, read_messages, write_messages
from app.draw_tree import paint, wants_colour
from app.line_editor import CtrlC, Pipe, Terminal
from app.watch import View, Watch, watch
from engine import Engine
from sampling import Sampling
from tokenizer import Tokenizer

ROOM = 64  # tokens of the context that a turn must leave free for its answer


# ----- What is printed besides the answers -----------------------------------------------------------------------


def note(text: str) -> None:
    """Print a line that is not the model's: on stderr, dim if stderr shows colours."""
    print(paint(text, "2", wants_colour(sys.stderr)), file=sys.stderr, flush=True)


@dataclass
class Answer:
    """The figures of one answer."""
    prompt_tokens: int
    reused: int = 0  # prompt tokens that were in the caches already
    gained: list[int] = field(default_factory=list)  # tokens that each cycle committed, without the first token
    tokens: int = 0  # with the first token, which prefill chose
    first_s: float = 0.0  # seconds until the first token
    decode_s: float = 0.0  # seconds from the first token to the end


def report(answers: list[Answer]) -> str:
    """The speed of one or more answers, tokens per step, and how much of the prompts the caches held already."""
    gained = sum((answer.gained for answer in answers), [])
    seconds = sum(answer.decode_s for answer in answers)
    first_s = sum(answer.first_s for answer in answers) / len(answers)
    reused = sum(answer.reused for answer in answers)
    prompt_tokens = sum(answer.prompt_tokens for answer in answers)
    speed = ""
    if gained:
        speed = f"{sum(gained) / seconds:.1f} tokens/s, {sum(gained) / len(gained):.2f} tokens per step, "
    return f"{speed}first token after {first_s:.2f} s, {reused} of {prompt_tokens} prompt tokens reused"


# ----- The conversation ------------------------------------------------------------------------------------------


class Chat:
    """A conversation and the engine that answers it."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, sampling: Sampling, max_new_tokens: int,
                 system: str | None = None, stops: Sequence[str] = ()) -> None:
        if not tokenizer.has_chat_template:
            raise ValueError("this model has no chat template, which --interactive needs: give one by --chat_template "
                             "FILE (docs/usage.md), or use --prompt TEXT --raw")
        self.engine = engine
        self.tokenizer = tokenizer
        self.sampling = sampling
        self.max_new_tokens = max_new_tokens
        self.stops = stops
        self.messages: Messages = []  # a system message, if there is one, then questions and answers in turn
        self.answers: list[Answer] = []
        self.leaving = False
        self.ctrl_c = CtrlC()
        if system:
            self.set_system(system)

    def run(self, reader: Pipe | Terminal) -> None:
        """Talk until the user leaves. Through a pipe, a question that cannot be answered raises ValueError."""
        draft = ""  # what the line editor starts with
        while not self.leaving:
            try:
                text = reader.read(draft)
            except KeyboardInterrupt:  # the first one may have been meant for an answer that has just ended
                if self.ctrl_c.pressed:
                    return
                self.ctrl_c.pressed = True
                note("[Ctrl-C again leaves]")
                continue
            draft = ""
            self.ctrl_c.pressed = False
            if text is None:
                return
            try:
                if text.startswith("/"):
                    self.command(text)
                elif text.strip():
                    draft = self.turn(text, reader)
            except (ValueError, OSError) as e:
                if not reader.is_terminal and not text.startswith("/"):
                    raise
                note(f"error: {' '.join(str(e).split())}")

    def turn(self, text: str, reader: Pipe | Terminal) -> str:
        """One question and its answer. Returns what the user edits next: the question, if it got no answer."""
        question = {"role": "user", "content": text}
        ids = self.make_room(question, reader)
        if ids is None:
            return text
        answer = self.write_answer(ids)
        if answer is None:
            note("[stopped before the first word: the question is not kept; Ctrl-C again leaves]")
            return text
        self.messages += [question, {"role": "assistant", "content": answer}]
        return ""

    def make_room(self, question: dict[str, str], reader: Pipe | Terminal) -> list[int] | None:
        """The ids of the conversation with this question. Where they leave no room for an answer, the user may drop the
        oldest turns. None: the user refused. ValueError: it does not fit."""
        context = self.engine.max_seq_len
        room = min(ROOM, self.max_new_tokens)
        first = self.turns_start()
        dropped = 0  # turns
        ids = self.tokenizer.chat([*self.messages, question])
        whole_length = len(ids)
        while len(ids) + room > context and first + 2 * dropped < len(self.messages):
            dropped += 1
            ids = self.tokenizer.chat([*self.messages[:first], *self.messages[first + 2 * dropped:], question])
        fits = len(ids) + room <= context
        if fits and not dropped:
            return ids
        full = (f"with this message the conversation has {whole_length} tokens and an answer needs {room} more; the "
                f"context holds {context} (--max_seq_len)")
        if not fits:
            raise ValueError(f"{full}. The message is too long even without the earlier turns: shorten it")
        if not reader.is_terminal:
            raise ValueError(f"{full}. Use /reset or /undo, or start with a larger --max_seq_len")
        if not reader.confirm(f"{full}. Drop the oldest {'turn' if dropped == 1 else f'{dropped} turns'}?"):
            return None
        del self.messages[first:first + 2 * dropped]
        return ids

    def write_answer(self, ids: list[int]) -> str | None:
        """Stream the answer. Returns its text, up to where it was stopped. None: stopped before the first token."""
        start = time.perf_counter()
        answer = Answer(len(ids))
        cycles = self.engine.generate(ids, self.max_new_tokens, self.sampling, reuse=True)
        try:
            self.ctrl_c.pressed = False
            self.ctrl_c.raises = True
            first = next(cycles)  # prefill, which may take long
            self.ctrl_c.raises = False
        except KeyboardInterrupt:
            return None
        answer.first_s = time.perf_counter() - start
        answer.reused = self.engine.reused
        text, ended = self.stream_answer(itertools.chain([first], cycles), answer, start)
        self.answers.append(answer)
        print(flush=True)
        if not ended:
            note(self.why_cut(answer))
        note(report([answer]))
        return text

    def stream_answer(self, cycles: Iterator[list[int]], answer: Answer, start: float) -> tuple[str, bool]:
        """Print the text as `cycles` yields it, or trees if they are watched. Returns the text, and whether the model
        ended it (a stop id or a stop text). Completes `answer`, which began at `start`."""
        view = View(self.engine.drafter, self.tokenizer) if isinstance(self.engine.drafter, Watch) else None
        stream = self.tokenizer.stream(self.stops)
        text = ""
        for new in cycles:
            piece = stream.push(new)
            if view:
                view.push(new)
            else:
                print(piece, end="", flush=True)
            text += piece
            if answer.tokens:
                answer.gained.append(len(new))
            answer.tokens += len(new)
            if self.ctrl_c.pressed or stream.stopped:
                break
        answer.decode_s = time.perf_counter() - start - answer.first_s
        ended = stream.stopped or new[-1] in self.tokenizer.stop_ids
        if ended:
            rest = stream.flush()
        else:  # keep what might have become a stop text, but leave out half a character
            rest = stream.held if self.stops else ""
        if view:
            view.finish()
        else:
            print(rest, end="")
        return text + rest, ended

    def why_cut(self, answer: Answer) -> str:
        """Why an answer ended before the model ended it."""
        if self.ctrl_c.pressed:
            return "[stopped; Ctrl-C again leaves]"
        if answer.tokens >= self.max_new_tokens:
            return f"[--max_new_tokens {self.max_new_tokens} ended the answer]"
        return (f"[the context of {self.engine.max_seq_len} tokens is full: /undo, /reset, or drop the oldest turns "
                "when asked]")

    def turns_start(self) -> int:
        """The index of the first question: 1 after a system message, else 0."""
        return int(bool(self.messages) and self.messages[0]["role"] == "system")

    def set_system(self, text: str) -> None:
        messages = [{"role": "system", "content": text}, *self.messages[self.turns_start():]]
        self.check_template(messages)
        self.messages = messages

    def check_template(self, messages: Messages) -> None:
        """ValueError where the model's template cannot render these messages: some have no system role."""
        self.tokenizer.chat([*messages, {"role": "user", "content": "Hi"}])

    # ----- Commands --------------------------------------------------------------------------------------------------

    def command(self, text: str) -> None:
        words = text[1:].split(maxsplit=1)
        name = words[0] if words else ""
        argument = words[1].strip() if len(words) > 1 else ""
        if name in COMMANDS:
            COMMANDS[name].run(self, argument)
        else:
            note(f"/{name} is not a command and was not sent: /help lists them; to send it, put a space before it")

    def help(self, _: str) -> None:
        lines = [f"{f'/{name} {command.argument}':15}{command.help}" for name, command in COMMANDS.items()]
        lines.append("Enter sends, Alt-Enter starts a new line. Ctrl-C stops an answer; Ctrl-C twice or Ctrl-D leaves.")
        note("\n".join(lines))

    def reset(self, _: str) -> None:
        del self.messages[self.turns_start():]
        note("[a new conversation]")

    def undo(self, _: str) -> None:
        if len(self.messages) == self.turns_start():
            return note("[there is nothing to take back]")
        question = " ".join(self.messages[-2]["content"].split())
        del self.messages[-2:]
        note(f"[taken back: {question[:60]}{'...' if len(question) > 60 else ''}]")

    def system(self, text: str) -> None:
        if text:
            self.set_system(text)
        if self.turns_start():
            note(f"[system message: {self.messages[0]['content']}]")
        else:
            note("[there is no system message]")

    def save(self, name: str) -> None:
        path = path_given(name, "/save")
        write_messages(path, self.messages)
        note(f"[{path}: {len(self.messages)} messages]")

    def load(self, name: str) -> None:
        path = path_given(name, "/load")
        messages = read_messages(path)
        self.check_template(messages)
        self.messages = messages
        note(f"[{path}: {len(messages)} messages]")

    def stats(self, _: str) -> None:
        tokens = len(self.tokenizer.chat(self.messages)) if self.messages else 0
        answers = f"{len(self.answers)}, {report(self.answers)}" if self.answers else "none"
        note(f"{len(self.messages)} messages, {tokens} of {self.engine.max_seq_len} tokens of the context; "
             f"answers: {answers}")

    def tree(self, _: str) -> None:
        if not self.engine.drafter.max_depth:
            return note("[plain decoding drafts no trees: start with --eagle2]")
        on = not isinstance(self.engine.drafter, Watch)
        watch(self.engine, on)
        note("[trees are drawn]" if on else "[trees are not drawn]")

    def exit(self, _: str) -> None:
        self.leaving = True


class Command(NamedTuple):
    run: Callable[[Chat, str], None]  # takes what follows the command's name
    argument: str
    help: str


COMMANDS = {
    "help": Command(Chat.help, "", "print this list"),
    "reset": Command(Chat.reset, "", "start a new conversation; the system message stays"),
    "undo": Command(Chat.undo, "", "take back the last question and its answer"),
    "system": Command(Chat.system, "TEXT", "set the system message; without TEXT, show it"),
    "save": Command(Chat.save, "FILE", "write the conversation to FILE as JSON"),
    "load": Command(Chat.load, "FILE", "replace the conversation by one that /save wrote"),
    "stats": Command(Chat.stats, "", "print how fast the answers so far were"),
    "tree": Command(Chat.tree, "", "draw the draft trees, or stop drawing them"),
    "exit": Command(Chat.exit, "", "leave")}


def path_given(name: str, command: str) -> Path:
    if not name:
        raise ValueError(f"{command} FILE: the name of the file is missing")
    try:
        return Path(name).expanduser()
    except RuntimeError as error:  # ~NAME of a user who does not exist
        raise ValueError(f"{command} {name}: {error}") from None


def chat(engine: Engine, tokenizer: Tokenizer, sampling: Sampling, max_new_tokens: int, system: str | None = None,
         stops: Sequence[str] = ()) -> None:
    """Talk until the user leaves. Raises ValueError or OSError with one line to show."""
    conversation = Chat(engine, tokenizer, sampling, max_new_tokens, system, stops)
    engine.warm_up(sampling)
    with conversation.ctrl_c as ctrl_c:
        if sys.stdin.isatty() and sys.stdout.isatty():
            note("/help lists the commands. Enter sends, Alt-Enter starts a new line, Ctrl-C stops an answer.")
            conversation.run(Terminal())
        else:
            conversation.run(Pipe(ctrl_c))
