"""A conversation with the model, at a terminal or through a pipe: generate.py --interactive.

    python generate.py --checkpoint checkpoints/HuggingFaceTB/SmolLM2-135M-Instruct --eagle2 --interactive
    printf 'Name three rivers.\\nAnd three lakes.\\n' | python generate.py --checkpoint ... --eagle2 --interactive

Of each turn only what is new is processed: the engine keeps its caches (Engine.generate, reuse). At a terminal
prompt_toolkit edits the line; without one every line of stdin is a turn. Answers go to stdout, all else to stderr.
"""
import itertools
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from app.draw_tree import paint, wants_colour
from app.line_editor import CtrlC, Lines, Terminal
from app.watch import View, Watch, watch
from engine import Engine
from sampling import Sampling
from tokenizer import Tokenizer

ROOM = 64  # tokens of the context that a turn must leave for its answer
Messages = list[dict[str, str]]


# ----- Files -----------------------------------------------------------------------------------------------------


def read_messages(path: Path) -> Messages:
    """A conversation that `write_messages` wrote; ValueError or OSError says what is wrong."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{path}: not a JSON file ({e})") from None
    messages = raw.get("messages") if isinstance(raw, dict) else None
    if not isinstance(messages, list):
        raise ValueError(f'{path}: not a conversation, which is {{"messages": [{{"role": ..., "content": ...}}, ...]}}')
    first = bool(messages) and isinstance(messages[0], dict) and messages[0].get("role") == "system"
    for number, message in enumerate(messages):
        role = "system" if first and number == 0 else ("user", "assistant")[(number - first) % 2]
        if not isinstance(message, dict) or message.get("role") != role or not isinstance(message.get("content"), str):
            raise ValueError(f'{path}: message {number + 1} should be {{"role": "{role}", "content": "a text"}}')
        try:
            message["content"].encode()
        except UnicodeEncodeError:
            raise ValueError(f"{path}: message {number + 1} holds half a character, a lone surrogate") from None
    if (len(messages) - first) % 2:
        raise ValueError(f"{path}: the last message has no answer; leave it out and ask it again")
    return [{"role": message["role"], "content": message["content"]} for message in messages]


def write_messages(path: Path, messages: Messages) -> None:
    """Whole or not at all, and never over a file that is something else."""
    path = path.resolve()  # a link stays one
    if path.exists():
        try:
            read_messages(path)
        except ValueError:
            raise ValueError(f"{path}: is there already, and is no conversation; choose another name") from None
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        part.write_text(json.dumps({"messages": messages}, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


# ----- The conversation ------------------------------------------------------------------------------------------


def note(text: str) -> None:
    """A line that is not the model's: on stderr, dim where there is colour."""
    print(paint(text, "2", wants_colour(sys.stderr)), file=sys.stderr, flush=True)


@dataclass
class Answer:
    prompt_tokens: int
    reused: int = 0  # of the prompt's, because they were in the caches
    gained: list[int] = field(default_factory=list)  # by each cycle; the first token, prefill's, is in `tokens` alone
    tokens: int = 0
    first_s: float = 0.0  # until the first token was there
    decode_s: float = 0.0  # from then on


def report(answers: list[Answer]) -> str:
    """Of one or more answers: speed, what a cycle gained, and what of the prompts was in the caches already."""
    gained, seconds = sum((a.gained for a in answers), []), sum(a.decode_s for a in answers)
    speed = f"{sum(gained) / seconds:.1f} tokens/s, {sum(gained) / len(gained):.2f} a cycle, " if gained else ""
    return (f"{speed}first token after {sum(a.first_s for a in answers) / len(answers):.2f} s, "
            f"{sum(a.reused for a in answers)} of {sum(a.prompt_tokens for a in answers)} prompt tokens reused")


class Chat:
    def __init__(self, engine: Engine, tokenizer: Tokenizer, sampling: Sampling, max_new_tokens: int,
                 system: str | None = None, stops: Sequence[str] = ()) -> None:
        if not tokenizer.has_chat_template:
            raise ValueError("this model has no chat template, so it cannot --interactive: use --prompt TEXT --raw")
        self.engine, self.tokenizer, self.sampling, self.limit = engine, tokenizer, sampling, max_new_tokens
        self.messages: Messages = []  # perhaps a system message, then questions and answers in turn
        self.answers: list[Answer] = []
        self.stops, self.leaving = stops, False
        self.ctrl_c = CtrlC()
        if system:
            self.set_system(system)

    def run(self, reader: Lines | Terminal) -> None:
        draft = ""
        while not self.leaving:
            try:
                text = reader.read(draft)
            except KeyboardInterrupt:  # perhaps meant for an answer that has just ended
                if self.ctrl_c.asked:
                    return
                self.ctrl_c.asked = True
                note("[Ctrl-C again leaves]")
                continue
            draft, self.ctrl_c.asked = "", False
            if text is None:
                return
            try:
                if text.startswith("/"):
                    self.command(text)
                elif text.strip():
                    draft = self.turn(text, reader)
            except (ValueError, OSError) as e:
                if not reader.terminal and not text.startswith("/"):
                    raise
                note(f"error: {' '.join(str(e).split())}")

    def turn(self, text: str, reader: Lines | Terminal) -> str:
        """One question and its answer. Returns what is to be edited next: the question, if it has no answer."""
        question = {"role": "user", "content": text}
        ids = self.make_room(question, reader)
        if ids is None:
            return text
        answer = self.write(ids)
        if answer is None:
            note("[stopped before the first word: the question is not kept; Ctrl-C again leaves]")
            return text
        self.messages += [question, {"role": "assistant", "content": answer}]
        return ""

    def make_room(self, question: dict[str, str], reader: Lines | Terminal) -> list[int] | None:
        """The prompt. If it does not fit into the context, the oldest turns are dropped; None: the user says no."""
        slots, room, first = self.engine.max_seq_len, min(ROOM, self.limit), self.head()
        whole = ids = self.tokenizer.chat([*self.messages, question])
        cut = first
        while len(ids) + room > slots and cut < len(self.messages):
            cut += 2
            ids = self.tokenizer.chat([*self.messages[:first], *self.messages[cut:], question])
        if ids is whole and len(ids) + room <= slots:
            return ids
        full = (f"with this message the conversation has {len(whole)} tokens, the context {slots} (--max_seq_len), and "
                f"an answer wants {room}")
        if len(ids) + room > slots:
            raise ValueError(f"{full}: too long even without the turns before, so shorten it")
        if not reader.terminal:
            raise ValueError(f"{full}: /reset, /undo, or take a larger --max_seq_len")
        turns = (cut - first) // 2
        if not reader.confirm(f"{full}. Drop the oldest {'turn' if turns == 1 else f'{turns} turns'}?"):
            return None
        del self.messages[first:cut]
        return ids

    def write(self, ids: list[int]) -> str | None:
        """Stream the answer. Returns its text, perhaps not all of it; None: stopped before there was any."""
        answer, start, text, stream = Answer(len(ids)), time.perf_counter(), "", self.tokenizer.stream(self.stops)
        cycles = self.engine.generate(ids, self.limit, self.sampling, reuse=True)
        try:
            self.ctrl_c.asked, self.ctrl_c.raises = False, True
            first = next(cycles)
            self.ctrl_c.raises = False
        except KeyboardInterrupt:
            return None
        answer.first_s, answer.reused = time.perf_counter() - start, self.engine.reused
        view = View(self.engine.drafter, self.tokenizer) if isinstance(self.engine.drafter, Watch) else None
        for new in itertools.chain([first], cycles):
            piece = stream.push(new)
            if view:
                view.push(new)
            else:
                print(piece, end="", flush=True)
            text += piece
            if answer.tokens:
                answer.gained.append(len(new))
            answer.tokens += len(new)
            if self.ctrl_c.asked or stream.stopped:
                break
        answer.decode_s = time.perf_counter() - start - answer.first_s
        self.answers.append(answer)
        ended = stream.stopped or new[-1] in self.tokenizer.stop_ids
        rest = stream.flush() if ended else stream.held  # a character that is half written is left out
        print(rest * (view is None), end="")
        text += rest
        if view:
            view.finish()
        self.end(answer, ended)
        return text

    def end(self, answer: Answer, ended: bool) -> None:
        """What is to be said after an answer."""
        print(flush=True)
        if not ended:
            slots = self.engine.max_seq_len
            note("[stopped; Ctrl-C again leaves]" if self.ctrl_c.asked else
                 f"[--max_new_tokens {self.limit} ended the answer]" if answer.tokens >= self.limit else
                 f"[the context of {slots} tokens is full: /undo, /reset, or drop the oldest turns when asked]")
        note(report([answer]))

    def head(self) -> int:
        """Where the turns begin: after the system message, if there is one."""
        return int(self.messages[:1] != [] and self.messages[0]["role"] == "system")

    def set_system(self, text: str) -> None:
        messages = [{"role": "system", "content": text}, *self.messages[self.head():]]
        self.tokenizer.chat([*messages, {"role": "user", "content": "Hi"}])  # a template may have no place for it
        self.messages = messages

    def command(self, text: str) -> None:
        name, rest = (*text[1:].split(maxsplit=1), "", "")[:2]
        if name not in COMMANDS:
            return note(f"/{name} is no command and was not sent: /help lists them, a space before it sends it")
        COMMANDS[name](self, rest.strip())

    def reset(self, _: str) -> None:
        """/reset         begin again; the system message stays"""
        del self.messages[self.head():]
        note("[a new conversation]")

    def undo(self, _: str) -> None:
        """/undo          take back the last question and its answer"""
        if len(self.messages) == self.head():
            return note("[there is nothing to take back]")
        question = " ".join(self.messages[-2]["content"].split())
        del self.messages[-2:]
        note(f"[taken back: {question[:60]}{'...' * (len(question) > 60)}]")

    def system(self, text: str) -> None:
        """/system TEXT   set the system message; without TEXT, show it"""
        if text:
            self.set_system(text)
        note(f"[system message: {self.messages[0]['content']}]" if self.head() else "[there is no system message]")

    def save(self, name: str) -> None:
        """/save FILE     write the conversation as JSON"""
        path = Path(needed(name, "/save")).expanduser()
        write_messages(path, self.messages)
        note(f"[{path}: {len(self.messages)} messages]")

    def load(self, name: str) -> None:
        """/load FILE     go on with a saved conversation instead of this one"""
        path = Path(needed(name, "/load")).expanduser()
        messages = read_messages(path)
        self.tokenizer.chat([*messages, {"role": "user", "content": "Hi"}])
        self.messages = messages
        note(f"[{path}: {len(messages)} messages]")

    def stats(self, _: str) -> None:
        """/stats         how fast the answers so far were"""
        tokens = len(self.tokenizer.chat(self.messages)) if self.messages else 0
        note(f"{len(self.messages)} messages, {tokens} of {self.engine.max_seq_len} tokens of the context; answers: "
             + (f"{len(self.answers)}, {report(self.answers)}" if self.answers else "none"))

    def tree(self, _: str) -> None:
        """/tree          draw what is drafted, or no longer"""
        if not self.engine.drafter.max_depth:
            return note("[plain decoding drafts no trees: start with --eagle2]")
        watch(self.engine, not isinstance(self.engine.drafter, Watch))
        note(f"[trees are {'' if isinstance(self.engine.drafter, Watch) else 'not '}drawn]")

    def help(self, _: str) -> None:
        """/help          this list"""
        note("\n".join(command.__doc__ for command in COMMANDS.values()) + "\n"
             "Enter sends, Alt-Enter begins a new line; Ctrl-C stops an answer, twice it leaves, as does Ctrl-D")

    def exit(self, _: str) -> None:
        """/exit          leave"""
        self.leaving = True


COMMANDS = {command.__name__: command for command in (
    Chat.help, Chat.reset, Chat.undo, Chat.system, Chat.save, Chat.load, Chat.stats, Chat.tree, Chat.exit)}


def needed(name: str, command: str) -> str:
    if not name:
        raise ValueError(f"{command} FILE: the name of the file is missing")
    return name


def chat(engine: Engine, tokenizer: Tokenizer, sampling: Sampling, max_new_tokens: int, system: str | None = None,
         stops: Sequence[str] = ()) -> None:
    """Talk until the user leaves. Raises ValueError or OSError with one line to show."""
    conversation = Chat(engine, tokenizer, sampling, max_new_tokens, system, stops)
    engine.warm_up(sampling)
    with conversation.ctrl_c as ctrl_c:
        terminal = sys.stdin.isatty() and sys.stdout.isatty()
        if terminal:
            note("/help lists the commands. Enter sends, Alt-Enter begins a new line, Ctrl-C stops an answer.")
        conversation.run(Terminal() if terminal else Lines(ctrl_c))
