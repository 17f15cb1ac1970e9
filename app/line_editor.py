"""Where a chat reads its lines from: a terminal or a pipe."""
import os
import signal
import sys
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.enums import DEFAULT_BUFFER
from prompt_toolkit.filters import has_focus
from prompt_toolkit.history import FileHistory, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.shortcuts import confirm


class CtrlC:
    """Ctrl-C stops an answer between two cycles, where nothing is half done: whoever writes it looks at `asked`. Only
    where nothing can be lost but waiting may be long, for a line or for a prompt to be processed, it `raises`."""

    def __init__(self) -> None:
        self.asked = self.raises = False

    def __enter__(self) -> "CtrlC":
        self.before = signal.signal(signal.SIGINT, self.handle)
        return self

    def __exit__(self, *exception: object) -> None:
        signal.signal(signal.SIGINT, self.before)

    def handle(self, *_: object) -> None:
        self.asked = True
        if self.raises:
            self.raises = False
            raise KeyboardInterrupt


# ----- Reading what the user says --------------------------------------------------------------------------------


class Lines:
    """Stdin that is no terminal."""
    terminal = False

    def __init__(self, ctrl_c: CtrlC) -> None:
        self.ctrl_c = ctrl_c

    def read(self, default: str) -> str | None:
        """The next line; None: there is none, or Ctrl-C. `default` was refused, and nobody is there to edit it."""
        try:
            self.ctrl_c.raises = True
            line = sys.stdin.readline()
            self.ctrl_c.raises = False
        except KeyboardInterrupt:
            return None
        except UnicodeDecodeError:
            self.ctrl_c.raises = False
            raise ValueError("stdin is not valid UTF-8: convert it, for example with iconv") from None
        return line.removesuffix("\n") if line else None


class Terminal:
    """A line editor with a history that outlives the program. Enter sends, Alt-Enter and pasted text have new lines."""
    terminal = True

    def __init__(self) -> None:
        self.session = PromptSession([("bold", "> ")], history=open_history(), multiline=True, key_bindings=keys(),
                                     prompt_continuation="  ")

    def read(self, default: str) -> str | None:
        """What is sent, with `default` to begin with; None: Ctrl-D. KeyboardInterrupt: Ctrl-C where nothing is
        written."""
        try:
            print()
            return self.session.prompt(default=default)
        except EOFError:
            return None

    def confirm(self, question: str) -> bool:
        try:
            return confirm(question)
        except (EOFError, KeyboardInterrupt):
            return False


class History(FileHistory):
    def store_string(self, string: str) -> None:
        try:
            super().store_string(string)
        except (OSError, UnicodeError):  # the disk is full, or half a character was typed: the chat goes on
            pass


def open_history() -> FileHistory | InMemoryHistory:
    """The user's, which nobody else may read; where no file can be written, one that ends with the program."""
    folder = Path(os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state"), "eagle2")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        os.close(os.open(folder / "history", os.O_RDWR | os.O_CREAT, 0o600))
    except OSError:
        return InMemoryHistory()
    return History(folder / "history")


def keys() -> KeyBindings:
    bindings, editing = KeyBindings(), has_focus(DEFAULT_BUFFER)  # in a search they are the search's

    @bindings.add("enter", filter=editing)
    def send(event: KeyPressEvent) -> None:
        event.current_buffer.validate_and_handle()

    @bindings.add("escape", "enter", filter=editing)
    def new_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    @bindings.add("c-c", filter=editing)
    @bindings.add("<sigint>")
    def clear_or_leave(event: KeyPressEvent) -> None:
        if not event.current_buffer.text:
            event.app.exit(exception=KeyboardInterrupt, style="class:aborting")
        event.current_buffer.append_to_history()  # arrow-up brings it back
        event.current_buffer.reset()
    return bindings
