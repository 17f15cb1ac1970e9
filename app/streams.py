"""Make stdin, stdout and stderr safe to use, whatever the locale, and where one of them is closed.

A text may hold characters that the terminal's encoding lacks, a pipe's reader may leave, and behind `>&-` there is no
stream at all: Python's sys.stdout is None then, and print(file=None) would write statistics to stdout.
"""
import codecs
import io
import os
import sys

# What we draw, in ASCII. All other characters that an encoding lacks become Python's escapes.
DRAWN = str.maketrans("├└│─␣…⟨⟩◌█▉▊▋▌▍▎▏", "|`|-_.<>o########")


def escape(error: UnicodeEncodeError) -> tuple[str, int]:
    """For codecs: what is printed for characters that the stream's encoding lacks."""
    text = error.object[error.start:error.end].translate(DRAWN)
    return text.encode("ascii", "backslashreplace").decode("ascii"), error.end


class Unheard(io.FileIO):
    """A file that swallows what it cannot write: statistics that nobody reads must not end an answer."""

    def write(self, data: bytes) -> int:
        try:
            return super().write(data)
        except OSError:
            return len(data)


def prepare_streams() -> None:
    """Call it once, before a command does anything else."""
    codecs.register_error("escape", escape)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):  # in order: open() takes the lowest number
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))
    if sys.stderr is sys.__stderr__:
        unheard = io.BufferedWriter(Unheard(sys.stderr.fileno(), "w", closefd=False))
        sys.stderr = io.TextIOWrapper(unheard, sys.stderr.encoding, "escape", line_buffering=True)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="escape")
    if isinstance(sys.stdin, io.TextIOWrapper) and not sys.stdin.isatty():
        if codecs.lookup(sys.stdin.encoding).name in ("ascii", "utf-8"):  # ASCII is what a missing locale stands for
            sys.stdin.reconfigure(encoding="utf-8-sig", errors="strict")


def finish_stdout() -> None:
    """Flush stdout for the last time. Where that fails, let the rest go nowhere: Python would try again at exit and say
    so."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def as_utf8(text: str) -> str:
    """A text from the command line, decoded as UTF-8. Without a locale, Python decodes arguments as ASCII and keeps all
    other bytes as surrogates (surrogateescape). A byte that is not UTF-8 stays a surrogate."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "surrogateescape")
