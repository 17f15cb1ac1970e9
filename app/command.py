"""How a command ends: with an exit code. For 2 and 130 there is also one line on stderr that says what was wrong
(argparse puts the options before it). Other errors, such as a RuntimeError that `work` raises, keep their traceback.

    2     what the user gave cannot be used, or a file cannot be read or written: ValueError, OSError
    130   Ctrl-C
    141   nobody reads stdout any more, as behind `| head`

Commands import this file before torch, and nothing here imports torch: Ctrl-C may come in the seconds that this takes.
"""
import gc
import os
import signal
import sys
from collections.abc import Callable

from app.streams import finish_stdout, prepare_streams
from ops.startup import end_of_imports, wake_gpu

# torch reads these variables.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # waiting threads sleep (docs/benchmarking.md)
# No holes in the GPU's memory (docs/quantization.md); not tried under WSL. What the user set is kept, by its older name
# too.
if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ and "microsoft" not in os.uname().release:
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")


def before_imports(gpu: bool = False) -> None:
    """A command calls this before it imports torch. Until `run_command`, Ctrl-C ends the process at once, and garbage
    collection is off, because imports leave no garbage. (A collection at exit would take 0.4 s too: see gc.freeze.)
    gpu: also prepare the GPU in the background (ops/startup.py), unless an argument of the command line is "cpu"."""
    watch_for_ctrl_c()
    gc.disable()
    if gpu and not any(word.rpartition("=")[2] == "cpu" for word in sys.argv):
        wake_gpu()


def watch_for_ctrl_c() -> None:
    """Let Ctrl-C end the process at once, in one line: while torch is imported, where a KeyboardInterrupt may be
    swallowed or become another error, and in downloads, whose threads it would wait for. `raise_on_ctrl_c` ends it."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else ignored, as behind `nohup` and `&`
        signal.signal(signal.SIGINT, end_at_once)


def raise_on_ctrl_c() -> None:
    if signal.getsignal(signal.SIGINT) is end_at_once:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def end_at_once(*_: object) -> None:
    os.write(2, b"interrupted\n")
    os._exit(130)


def run_command(work: Callable[[], int | None]) -> None:
    """Do the work of a command, and end the process unless its exit code is 0: the one that `work` returns (None is
    0), or one of those above."""
    end_of_imports()
    raise_on_ctrl_c()
    if not gc.isenabled():
        gc.enable()
        gc.freeze()  # what was imported is no garbage now or later, and need not be looked at again
    prepare_streams()
    try:
        code = work() or 0
        sys.stdout.flush()
    except BrokenPipeError:
        code = 141
    except (ValueError, OSError) as error:
        code = fail(error)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    finish_stdout()
    if code:
        sys.exit(code)


def fail(error: Exception) -> int:
    """One line on stderr; the exit code for bad input is 2."""
    print(f"error: {' '.join(str(error).split()) or type(error).__name__}", file=sys.stderr)
    return 2
