"""Where a chat reads its lines from, a terminal or a pipe, and what Ctrl-C does meanwhile."""
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
    """Within `with`, Ctrl-C sets `pressed`. The loop that writes an answer checks it between two cycles, where nothing
    is half done, and stops.

    While Pipe.read waits for a line, or the engine processes a prompt, no loop checks `pressed`. The code there sets
    `raises`: then the next Ctrl-C raises KeyboardInterrupt and resets `raises`.
    """

    def __init__(self) -> None:
        self.pressed = False
        self.raises = False

    def __enter__(self) -> "CtrlC":
        self.previous_handler = signal.signal(signal.SIGINT, self.handle)
        return self

    def __exit__(self, *exception: object) -> None:
        signal.signal(signal.SIGINT, self.previous_handler)

    def handle(self, *_: object) -> None:
        self.pressed = True
        if self.raises:
            self.raises = False
            raise KeyboardInterrupt


# ----- Reading what the user says --------------------------------------------------------------------------------


class Pipe:
    """Stdin that is not a terminal: every line is a turn."""
    is_terminal = False

    def __init__(self, ctrl_c: CtrlC) -> None:
        self.ctrl_c = ctrl_c

    def read(self, default: str) -> str | None:
        """The next line, without its newline. None at the end of stdin and after Ctrl-C. ValueError if stdin is not
        UTF-8. `default` (the text to edit at a terminal) is ignored."""
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
    """A line editor whose history outlives the program. Enter sends; Alt-Enter and pasted text make new lines."""
    is_terminal = True

    def __init__(self) -> None:
        self.session = PromptSession([("bold", "> ")], history=open_history(), multiline=True, key_bindings=keys(),
                                     prompt_continuation="  ")

    def read(self, default: str) -> str | None:
        """What the user sends; the line starts as `default`. None after Ctrl-D. KeyboardInterrupt after Ctrl-C on an
        empty line."""
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
    """A history file whose errors do not end the chat: the disk is full, or half a character was typed."""

    def store_string(self, string: str) -> None:
        try:
            super().store_string(string)
        except (OSError, UnicodeError):
            pass


def open_history() -> FileHistory | InMemoryHistory:
    """The user's history file, which nobody else may read (mode 600). If it cannot be written, a history that ends with
    the program."""
    folder = Path(os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state"), "eagle2")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        os.close(os.open(folder / "history", os.O_RDWR | os.O_CREAT, 0o600))
    except OSError:
        return InMemoryHistory()
    return History(folder / "history")


def keys() -> KeyBindings:
    """What Enter, Alt-Enter and Ctrl-C do in the line. In a history search (Ctrl-R) they keep their usual meaning."""
    bindings = KeyBindings()
    editing = has_focus(DEFAULT_BUFFER)

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
        event.current_buffer.append_to_history()  # arrow-up brings the line back
        event.current_buffer.reset()
    return bindings
