"""app/streams.py and app/command.py in processes of their own: streams that are not UTF-8, closed, full or unread.

    python -m pytest tests/app/test_streams.py
"""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from conftest import ROOT

# What a command does with its streams; without torch, so that it starts quickly.
SCRIPT = """
import json, sys
from app.command import run_command
def work():
    text = sys.stdin.read()
    print("figures", file=sys.stderr)
    print("├─ é 你" + text, flush=True)
    print("more figures", file=sys.stderr)
    print(json.dumps({"text": "é" + text}))
run_command(work)
"""
C_LOCALE = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
UTF8 = {"PYTHONUTF8": "1"}
UTF8_LINES = "├─ é 你ü\n".encode() + b'{"text": "\\u00e9\\u00fc"}\n'
EMPTY = "├─ é 你\n".encode() + b'{"text": "\\u00e9"}\n'
FIGURES = b"figures\nmore figures\n"


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "script.py"
    path.write_text(SCRIPT, encoding="utf-8")
    return path


def environment(**changes: str) -> dict[str, str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("LC_", "LANG", "PYTHON"))}
    return clean | {"PYTHONPATH": str(ROOT)} | changes


@pytest.mark.parametrize("env, streams, code, out, err", [
    (UTF8, "", 0, UTF8_LINES, FIGURES),
    ({"PYTHONIOENCODING": "ascii"}, "", 0, b'|- \\xe9 \\u4f60\\xfc\n{"text": "\\u00e9\\u00fc"}\n', FIGURES),
    (C_LOCALE, "", 0, b'|- \\xe9 \\u4f60\\xfc\n{"text": "\\u00e9\\u00fc"}\n', FIGURES),
    ({"PYTHONIOENCODING": "latin-1"}, "</dev/null", 0, b'|- \xe9 \\u4f60\n{"text": "\\u00e9"}\n', FIGURES),
    (UTF8, "<&-", 0, EMPTY, FIGURES),
    (UTF8, ">&-", 0, b"", FIGURES),
    (UTF8, "2>&-", 0, UTF8_LINES, b""),
    (UTF8, "<&- >&- 2>&-", 0, b"", b""),
    (UTF8, "2>/dev/full", 0, UTF8_LINES, b""),
    (UTF8, ">/dev/full", 2, b"", b"figures\nerror: [Errno 28] No space left on device\n"),
], ids=str)
def test_streams(env: dict, streams: str, code: int, out: bytes, err: bytes, script: Path) -> None:
    """Fails if there is a traceback, if a line of the answer is missing or cut, or if figures get into stdout: where a
    stream is closed, full or in another encoding, and where UTF-8 with a byte-order mark meets an ASCII stdin."""
    done = subprocess.run(["bash", "-c", f'exec "$0" "$1" {streams}', sys.executable, script], env=environment(**env),
                          input=b"\xef\xbb\xbf\xc3\xbc", capture_output=True, timeout=60)  # ü after a mark
    assert (done.returncode, done.stdout, done.stderr) == (code, out, err)
    json.loads(out.splitlines()[-1] if out else b"{}")


def test_nobody_reads(script: Path) -> None:
    """Fails if a reader of stdout or stderr that leaves causes a traceback, or if without a reader of stderr an answer
    is cut short."""
    for gone, code in (("stdout", 141), ("stderr", 0)):
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.PIPE}
        process = subprocess.Popen([sys.executable, script], env=environment(**UTF8), **pipes)
        getattr(process, gone).close()
        process.stdin.close()
        kept = process.stderr if gone == "stdout" else process.stdout
        assert kept.read() == (b"figures\n" if gone == "stdout" else EMPTY) and process.wait() == code


@pytest.mark.slow
def test_trees_in_ascii(tmp_path: Path) -> None:
    """Fails if a real run in an ASCII terminal ends early: with trees, a page, JSON and a prompt that is not ASCII."""
    folder = tiny.save_everything(tmp_path / "x")
    words = ["generate.py", "--checkpoint", folder, "--device", "cpu", "--eagle2", "--prompt", "Où ?", "--show_tree",
             "--tree_html", tmp_path / "page.html", "--json", "--max_new_tokens", "8", "--raw"]
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, env=environment(**C_LOCALE))
    assert done.returncode == 0 and done.stderr.count(b"\n") == 2 and b"tokens/s" in done.stderr
    lines = done.stdout.decode("ascii").splitlines()
    assert len(json.loads(lines[-1])["tokens"]) == 8 and json.loads(lines[-1])["prompt_tokens"] == 5
    assert any(line.startswith("`-") for line in lines) and (tmp_path / "page.html").is_file()
