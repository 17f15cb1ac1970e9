"""app/command.py: how commands end.

    python -m pytest tests/app/test_command.py
"""
import gc
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from app.command import before_imports, end_at_once, raise_on_ctrl_c, run_command, watch_for_ctrl_c

COMMANDS = ["generate.py", "convert_hf_checkpoint.py", "quantize.py", "train.py", "bench.py", "training/peers.py",
            "benchmarks/cycle.py", "benchmarks/quality.py"]


def raising(error: BaseException | int | None) -> int | None:
    if isinstance(error, BaseException):
        raise error
    return error


@pytest.mark.parametrize("end, code, said", [
    (None, 0, ""), (0, 0, ""), (1, 1, ""), (ValueError("two\nlines"), 2, "error: two lines\n"),
    (FileNotFoundError(2, "No such file or directory", "x"), 2, "error: [Errno 2] No such file or directory: 'x'\n"),
    (PermissionError(), 2, "error: PermissionError\n"), (KeyboardInterrupt(), 130, "interrupted\n"),
    (BrokenPipeError(), 141, "")])
def test_exit_codes(end, code: int, said: str, capsys: pytest.CaptureFixture) -> None:
    """Fails if a command ends in a traceback, in more than one line, or with another exit code."""
    found = 0
    try:
        run_command(lambda: raising(end))
    except SystemExit as ended:
        found = ended.code
    assert found == code and capsys.readouterr().err == said


def test_faults_of_ours_keep_their_traceback() -> None:
    """Fails if a mistake in the code is shown as bad input."""
    with pytest.raises(TypeError):
        run_command(lambda: raising(TypeError("a bug")))


def test_ctrl_c_while_nothing_can_be_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if Ctrl-C is caught where it was ignored, as behind `nohup`, or if the work of a command cannot clean up.
    """
    before = signal.getsignal(signal.SIGINT)
    try:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        watch_for_ctrl_c()
        raise_on_ctrl_c()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        signal.signal(signal.SIGINT, signal.default_int_handler)
        watch_for_ctrl_c()
        assert signal.getsignal(signal.SIGINT) is end_at_once
        run_command(lambda: None)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("given, release, allocator", [
    ({}, "6.1", "expandable_segments:True"), ({"PYTORCH_ALLOC_CONF": "mine"}, "6.1", "mine"),
    ({"PYTORCH_CUDA_ALLOC_CONF": "mine"}, "6.1", "None"), ({}, "5.15-microsoft-standard-WSL2", "None")])
def test_variables_of_torch(given: dict, release: str, allocator: str) -> None:
    """Fails if what the user set for torch is overruled, by its older name too; if threads that wait take a core's
    time; or if the allocator gets under WSL what was not tried there."""
    code = ("import os, types\n"
            f"os.uname = lambda: types.SimpleNamespace(release={release!r})\n"
            "import app.command\n"
            "print(os.environ.get('PYTORCH_ALLOC_CONF'), os.environ['OMP_WAIT_POLICY'])")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PYTORCH_", "OMP_"))}
    said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=clean | given)
    assert said.stdout.split() == [allocator, "PASSIVE"]


def test_garbage_is_collected_again() -> None:
    """Fails if garbage is looked for while a command imports torch, among what it imported, or no more during its work;
    or if a command that is called from Python, as here in other tests, touches any of it."""
    handler, frozen = signal.getsignal(signal.SIGINT), gc.get_freeze_count()
    try:
        run_command(lambda: None)
        assert gc.isenabled() and gc.get_freeze_count() == frozen
        before_imports()
        imported = [[] for _ in range(2000)]
        assert not gc.isenabled()
        run_command(lambda: None)
        assert gc.isenabled() and gc.get_freeze_count() > frozen + len(imported) // 2
    finally:
        gc.enable()
        gc.unfreeze()
        signal.signal(signal.SIGINT, handler)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_watches_before_torch(command: str) -> None:
    """Fails if Ctrl-C in the seconds in which torch is imported ends in a traceback. The child gets it at the first
    import of torch or numpy."""
    module = command.removesuffix(".py").replace("/", ".")
    code = ("import runpy, sys, os, signal\n"
            "signal.signal(signal.SIGINT, signal.default_int_handler)  # it is ignored in a shell's background jobs\n"
            "class Finder:\n"
            "    def find_spec(self, name, path=None, target=None):\n"
            "        if name in ('torch', 'numpy'):\n"
            "            os.kill(os.getpid(), signal.SIGINT)\n"
            "sys.meta_path.insert(0, Finder())\n"
            f"runpy.run_module({module!r}, run_name='__main__')\n")
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60,
                           env={**os.environ, "PYTHONPATH": str(Path(ROOT))})
    assert (ended.returncode, ended.stderr) == (130, "interrupted\n")
