"""app/chat.py and app/line_editor.py: conversations at a scripted terminal and through a pipe, files, and Ctrl-C."""
import io
import json
import os
import random
import re
import signal
import stat
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from prompt_toolkit.application import create_app_session
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

import generate
from app import chat, line_editor
from app.chat import Answer, Chat, report
from app.chat_file import Messages, read_messages, write_messages
from app.line_editor import Pipe, Terminal
from draft import Eagle2, Vanilla
from engine import Engine
from formats.tokenizer_files import CHAR_OF
from sampling import Sampling
from tokenizer import Tokenizer

TEMPLATE = ("{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
            "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
SLOTS, LIMIT = 512, 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint with an EAGLE head, a chat template and a token for every byte."""
    model, head = tiny.pair(3, 0.1, torch.float32, vocab_size=258)
    folder = tiny.save_target(model, tmp_path_factory.mktemp("chat"))
    tiny.save_head(head, folder / "eagle")
    marks = [{"id": 256 + i, "content": f"<|im_{name}|>", "single_word": False, "lstrip": False, "rstrip": False,
              "normalized": False, "special": True} for i, name in enumerate(("start", "end"))]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    bpe = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
           "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "merges": [],
           "vocab": {char: byte for byte, char in CHAR_OF.items()}}
    (folder / "tokenizer.json").write_text(json.dumps({
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": marks, "normalizer": None,
        "pre_tokenizer": level, "post_processor": None, "decoder": level, "model": bpe}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE, "eos_token": "<|im_end|>"}))
    return folder


@pytest.fixture
def make(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[..., Chat]]:
    """Makes chats that handle Ctrl-C and have a history file of their own."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    model, head = tiny.pair(3, 0.1, torch.float32, vocab_size=258)
    tokenizer = Tokenizer(folder)
    before = signal.getsignal(signal.SIGINT)

    def make(slots: int = SLOTS, limit: int = LIMIT, stop: frozenset[int] = frozenset([257]), **more: object) -> Chat:
        tokenizer.stop_ids = stop
        engine = Engine(model, Eagle2(head, model, 12, 3, 3), slots, stop)
        made = Chat(engine, tokenizer, more.pop("sampling", Sampling()), limit, **more)
        made.ctrl_c.__enter__()
        return made
    yield make
    signal.signal(signal.SIGINT, before)


class Script(Pipe):
    """Says these lines, as if at a terminal, and answers every question with `yes`."""

    def __init__(self, *lines: str, terminal: bool = True, yes: bool = True) -> None:
        self.lines = list(lines)
        self.is_terminal = terminal
        self.yes = yes
        self.asked: list[str] = []  # the questions
        self.drafts: list[str] = []  # what each line started with

    def read(self, default: str) -> str | None:
        self.drafts.append(default)
        return self.lines.pop(0) if self.lines else None

    def confirm(self, question: str) -> bool:
        self.asked.append(question)
        return self.yes


def at_terminal(talk: Chat, *lines: str) -> None:
    """Run the chat while these keys are typed, one string whenever a line is awaited; "|" is a pause. The last string
    must leave the chat, or reading would wait for ever."""
    with create_pipe_input() as keyboard, create_app_session(input=keyboard, output=DummyOutput()):
        class Typist(Terminal):
            def read(self, default: str) -> str | None:
                for number, keys in enumerate(waiting.pop(0).split("|")):
                    threading.Timer(0.15 + 0.15 * number, keyboard.send_text, [keys]).start()
                return super().read(default)
        waiting = list(lines)
        talk.run(Typist())
    assert not waiting


def spy(talk: Chat, seen: Callable[[list[int]], object]) -> None:
    """Call `seen` with the tokens of each cycle before the chat gets them."""
    generate = talk.engine.generate

    def spied(*inputs: object, **options: object) -> Iterator[list[int]]:
        for new in generate(*inputs, **options):
            seen(new)
            yield new
    talk.engine.generate = spied


def said(talk: Chat) -> list[str]:
    return [message["content"] for message in talk.messages[talk.turns_start()::2]]


# ----- Conversations ---------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("how", [Sampling(), Sampling(temperature=1.0, seed=7)])
def test_turns(how: Sampling, make, capsys: pytest.CaptureFixture) -> None:
    """Fails if an answer depends on reused caches or misses the earlier turns, if a text is not on stdout or figures
    are, or if nothing of the prompt is reused."""
    talk = make(sampling=how)
    talk.run(Script("Hello", "And you?", "  \n", "Why?"))
    out, err = capsys.readouterr()
    expected = []
    for question in ("Hello", "And you?", "Why?"):
        expected.append({"role": "user", "content": question})
        fresh = Engine(talk.engine.model, talk.engine.drafter, SLOTS, frozenset([257]))
        tokens = sum(fresh.generate(talk.tokenizer.chat(expected), LIMIT, how), [])
        expected.append({"role": "assistant", "content": talk.tokenizer.stream().push(tokens)})
    assert talk.messages == expected
    assert out == "".join(message["content"] + "\n" for message in expected[1::2])
    assert err.count("tokens/s") == 3 and err.count("--max_new_tokens 12 ended") == 3 and "\033" not in err
    assert talk.answers[0].reused == 0
    for before, after in zip(talk.answers, talk.answers[1:]):
        assert before.prompt_tokens <= after.reused + 12 and after.reused < after.prompt_tokens
        assert f"{after.reused} of {after.prompt_tokens} prompt tokens reused" in err
        assert 1 + sum(after.gained) == after.tokens == LIMIT


def test_commands(make, capsys: pytest.CaptureFixture) -> None:
    """Fails if a command is sent to the model, or takes back, clears or shows too much or too little."""
    talk = make(system="Be brief.")
    talk.run(Script("a", "b", "/undo", "/nonsense", "/usr/bin is what?", "/", "/help", " /c", "/stats", "/tree"))
    err = capsys.readouterr().err
    assert said(talk) == ["a", " /c"] and talk.messages[0] == {"role": "system", "content": "Be brief."}
    assert err.count("is not a command and was not sent") == 3 and "[taken back: b]" in err and "are drawn" in err
    assert all(f"/{name}" in err for name in chat.COMMANDS) and "4 messages" not in err and "5 messages" in err
    talk.run(Script("/undo", "/undo", "/undo", "/system", "/system Be long.", "/exit", "not sent"))
    err = capsys.readouterr().err
    assert talk.messages == [{"role": "system", "content": "Be long."}]
    assert err.count("[taken back") == 2 and "nothing to take back" in err and "message: Be brief." in err
    talk.leaving = False
    talk.run(Script("x", "/reset", "/system"))
    assert talk.messages == [{"role": "system", "content": "Be long."}]


def test_watch(make, capsys: pytest.CaptureFixture) -> None:
    """Fails if trees are drawn unasked or for another answer, if they change the answer or what is reused, or if plain
    decoding is watched."""
    plain, talk = make(), make()
    plain.run(Script("a", "b", "c"))
    capsys.readouterr()
    talk.run(Script("a", "/tree", "b", "/tree", "c"))
    out, err = capsys.readouterr()
    assert "trees are drawn" in err and "trees are not drawn" in err
    cycles = [int(number) for number in re.findall(r"^cycle (\d+):", out, re.M)]
    assert cycles == [*range(1, len(talk.answers[1].gained) + 1)]
    assert talk.messages == plain.messages
    assert [answer.reused for answer in talk.answers] == [answer.reused for answer in plain.answers]
    talk.engine.drafter = Vanilla()
    talk.run(Script("/tree"))
    assert "drafts no trees" in capsys.readouterr().err and isinstance(talk.engine.drafter, Vanilla)


@pytest.mark.slow
def test_end_of_answer(make, capsys: pytest.CaptureFixture) -> None:
    """Fails if a stop token counts as the limit, if half a character is printed where an answer is cut within one, or
    left out where the model itself ended so."""
    tokens = []
    talk = make(limit=40)
    spy(talk, tokens.extend)
    talk.run(Script("Hello"))
    talk.tokenizer.stop_ids = frozenset()
    for count in range(1, 30):
        whole = talk.tokenizer.stream().push(tokens[:count])
        cut = make(limit=count, stop=frozenset())
        cut.run(Script("Hello"))
        assert cut.messages[1]["content"] == whole and f"--max_new_tokens {count} ended" in capsys.readouterr().err
    stop = next(token for token in tokens[5:] if token not in tokens[:5])
    ended = make(limit=40, stop=frozenset([stop]))
    ended.run(Script("Hello"))
    out, err = capsys.readouterr()
    assert ended.messages[1]["content"] == ended.tokenizer.decode(tokens[:tokens.index(stop) + 1]) == out[:-1]
    assert "ended the answer" not in err and "full" not in err


@pytest.mark.slow
def test_stop(make, capsys: pytest.CaptureFixture) -> None:
    """Fails if a stop text is printed, kept, or counts as the limit, or if the beginning of one that never comes is
    lost."""
    plain = make(limit=40)
    plain.run(Script("Hello"))
    text = plain.messages[1]["content"]
    for stop, kept in ((text[9:12], text[:text.index(text[9:12])]), (text[-2:] + "never", text)):
        capsys.readouterr()
        talk = make(limit=40, stops=(stop,))
        talk.run(Script("Hello"))
        out, err = capsys.readouterr()
        assert talk.messages[1]["content"] == kept and out == kept + "\n"
        assert ("ended the answer" in err) == (kept is text)


@pytest.mark.slow
def test_context(make, capsys: pytest.CaptureFixture) -> None:
    """Fails if a turn is cut or refused silently, if turns are dropped without a yes, too few or too many of them or
    the system message with them, or if a refused question is lost."""
    talk = make(slots=200, limit=30, system="Be brief.")
    script = Script("one", "two", "three", "four")
    talk.run(script)
    assert len(script.asked) == 2
    assert re.search(r"has \d+ tokens and an answer needs 30 more; the context holds 200 .*Drop the oldest turn\?",
                     script.asked[0])
    assert said(talk) == ["three", "four"] and talk.messages[0]["content"] == "Be brief."
    no = Script("five", yes=False)
    talk.run(no)
    assert said(talk) == ["three", "four"] and no.drafts == ["", "five"]
    capsys.readouterr()
    long = Script("x" * 150, terminal=True)
    talk.run(long)
    assert "too long even without" in capsys.readouterr().err and long.asked == [] and long.drafts == ["", ""]
    with pytest.raises(ValueError, match="the context holds 200"):
        talk.run(Script("six", terminal=False))
    assert said(talk) == ["three", "four"]
    talk.max_new_tokens = 1000
    talk.messages = []
    talk.run(Script("y" * 60))
    assert "the context of 200 tokens is full" in capsys.readouterr().err
    assert talk.answers[-1].prompt_tokens + talk.answers[-1].tokens == 200


# ----- Files -----------------------------------------------------------------------------------------------------


def test_save_and_load(make, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Fails if a conversation comes back changed, if a file is half written or overwrites something else, or if loading
    a broken file loses the present conversation."""
    talk = make(system="Sé breve 🍳")
    file = tmp_path / "talk 1.json"
    talk.run(Script("Hello \u2028 é", f"/save {file}", "more", f"/save {file}", "/reset", f"/load {file}", "/undo"))
    kept = json.loads(file.read_text(encoding="utf-8"))["messages"]
    assert talk.messages == kept[:3] and said(talk) == ["Hello \u2028 é"] and len(kept) == 5
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == [file.name]
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())  # as some editors save it
    talk.run(Script(f"/load {file}", "/undo"))
    assert talk.messages == kept[:3]
    capsys.readouterr()
    talk.run(Script("/save", "/load", f"/load {tmp_path}/none", f"/save {tmp_path}/no/such", f"/load {tmp_path}"))
    err = capsys.readouterr().err
    assert err.count("error: ") == 5 and err.count("name of the file is missing") == 2 and "Traceback" not in err
    other = tmp_path / "notes.json"
    other.write_text('{"mine": 1}')
    link = tmp_path / "link.json"
    link.symlink_to(file)
    talk.run(Script(f"/save {other}", f"/save {link}"))
    assert other.read_text() == '{"mine": 1}' and "choose another name" in capsys.readouterr().err
    talk.run(Script("/save ~no-such-user/x.json", f"/save {link}"))
    assert "/save ~no-such-user/x.json: " in capsys.readouterr().err
    assert link.is_symlink() and len(read_messages(file)) == 3


@pytest.mark.parametrize("text, message", [
    ("", "not a JSON file"), ("[" * 100000, "not a JSON file"), ('[{"role": "user"}]', "not a conversation"),
    ('{"messages": 1}', "not a conversation"), ('{"messages": [1]}', "message 1 should be"),
    ('{"messages": [{"role": "assistant", "content": "x"}]}', 'message 1 should be .*"user"'),
    ('{"messages": [{"role": "system", "content": "x"}, {"role": "user", "content": 3}]}', "message 2 should be"),
    ('{"messages": [{"role": "user", "content": "x"}]}', "no answer"),
    ('{"messages": [{"role": "system", "content": "x"}, {"role": "system", "content": "x"}]}', "message 2"),
    ('{"messages": [{"role": "user", "content": "\\ud800"}, {"role": "assistant", "content": ""}]}', "lone surrogate"),
])
def test_load_says_what_is_wrong(text: str, message: str, tmp_path: Path, make, capsys: pytest.CaptureFixture) -> None:
    """Fails if a malformed file is loaded, or if the message does not say what is wrong with it."""
    (tmp_path / "talk.json").write_text(text)
    talk = make()
    talk.messages = before = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    talk.run(Script(f"/load {tmp_path}/talk.json"))
    err = capsys.readouterr().err
    assert re.search(f"error: .*talk.json: .*{message}", err) and err.count("\n") == 1 and talk.messages is before


def test_write_is_atomic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a full disk destroys what was saved before."""
    file = tmp_path / "a.json"
    messages = [{"role": "system", "content": "x"}]
    write_messages(file, messages)
    before = file.stat().st_ino
    write_messages(file, messages)
    assert file.stat().st_ino != before  # a new file took its place

    def full(self: Path, text: str, **how: object) -> None:
        with self.open("w") as f:
            f.write(text[:5])
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space"):
        write_messages(file, [])
    assert read_messages(file) == messages and list(tmp_path.iterdir()) == [file]


# ----- Terminals and pipes ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_terminal(make, tmp_path: Path) -> None:
    """Fails if a new line sends or is lost, if the history does not come back, if Ctrl-C on a line leaves or loses the
    line, if the first Ctrl-C on an empty line leaves (it may have been meant for the answer before), or if the second
    does not."""
    talk = make()
    at_terminal(talk, "Hi 🍳 é\r", "two\x1b\rlines\r", "\x1b[200~pasted\nlines\x1b[201~!\r", "gone\x03|\x1b[A?\r",
                "\x03", "still here\r", "\x03", "\x03")
    assert said(talk) == ["Hi 🍳 é", "two\nlines", "pasted\nlines!", "gone?", "still here"]
    again = make()
    at_terminal(again, "\x1b[A\x1b[A\x1b[A\x1b[A\r", "/exit\r")
    assert said(again) == ["pasted\nlines!"]
    assert stat.S_IMODE((tmp_path / "state/eagle2/history").stat().st_mode) == 0o600
    again.leaving = False
    at_terminal(again, "/x\r", "\x12pasted|\r|\r", "\x04")  # Ctrl-R: Enter ends the search, then sends; Ctrl-D
    assert said(again) == ["pasted\nlines!"] * 2


@pytest.mark.slow
def test_terminal_asks(make) -> None:
    """Fails if turns are dropped without a yes, or if the user cannot edit a question that was refused."""
    talk = make(slots=200, limit=30)
    at_terminal(talk, "one\r", "two\r", "three\r|n", "\x7f\x7f\r|y", "/exit\r")
    assert said(talk) == ["two", "thr"]


@pytest.mark.parametrize("how", [KeyboardInterrupt, EOFError])
def test_ctrl_c_is_no_yes(how: type[BaseException], monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if Ctrl-C or Ctrl-D at the question whether turns may be dropped drops them."""
    def ended(question: str) -> bool:
        raise how
    monkeypatch.setattr(line_editor, "confirm", ended)
    assert Terminal.confirm(None, "Drop the oldest turn?") is False


@pytest.mark.slow
def test_history_that_cannot_be_written(make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if the chat ends because a file is in the folder's place, the disk is full or half a character is typed."""
    (tmp_path / "state").write_text("")
    at_terminal(make(), "one\r", "/exit\r")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "other"))
    history = line_editor.open_history()
    history.store_string("\udc80")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(line_editor.FileHistory, "store_string", full)
    talk = make()
    at_terminal(talk, "one\r", "\x1b[A\r", "/exit\r")
    assert said(talk) == ["one", "one"]


@pytest.fixture
def call(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    """The command line with a text piped into it: (exit code, stdout, stderr)."""
    def call(text: str, *words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["generate.py", "--checkpoint", str(folder), "--device", "cpu",
                                          *map(str, words)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(os.fsencode(text)), "utf-8"))
        code = 0
        before = signal.getsignal(signal.SIGINT)
        try:
            generate.main()
        except SystemExit as e:
            code = e.code
        assert signal.getsignal(signal.SIGINT) is before  # Ctrl-C means what it did
        return code, *capsys.readouterr()
    return call


def test_pipe(call, tmp_path: Path) -> None:
    """Fails if a pipe gives another conversation than a terminal, or if a last line without a newline is lost."""
    words = ("--interactive", "--eagle2", "--max_new_tokens", 9, "--system", "Hm.")
    code, out, err = call(f"one\n\n/save {tmp_path}/a\ntwo\n/what\nthree\n/save {tmp_path}/b", *words)
    messages = read_messages(tmp_path / "b")
    assert code == 0 and [m["content"] for m in messages[::2]][1:] == [m["content"] for m in messages[2::2]]
    assert out == "".join(m["content"] + "\n" for m in messages[2::2]) and err.count("tokens/s") == 3
    assert [m["content"] for m in messages[:6:2]] == ["Hm.", messages[2]["content"], messages[4]["content"]]
    assert [m["content"] for m in messages[1::2]] == ["one", "two", "three"] and len(read_messages(tmp_path / "a")) == 3


def test_stop_through_a_pipe(call) -> None:
    """Fails if --stop of the command line does not end the answers of a chat."""
    words = ("--interactive", "--max_new_tokens", 30)
    whole = call("one\n", *words)[1][:-1]
    assert call("one\n", *words, "--stop", whole[5:7])[1] == whole.partition(whole[5:7])[0] + "\n"


@pytest.mark.parametrize("stdin, stdout, reader", [
    (True, True, "Terminal"), (True, False, "Pipe"), (False, True, "Pipe")])
def test_who_reads(stdin: bool, stdout: bool, reader: str, make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if the line editor draws where there is no terminal, such as into the file that answers go to."""
    talk, readers = make(), []
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: stdin))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: stdout)
    monkeypatch.setattr(chat, "Terminal", type("Terminal", (), {}))
    monkeypatch.setattr(Chat, "run", lambda self, reader: readers.append(type(reader).__name__))
    chat.chat(talk.engine, talk.tokenizer, Sampling(), 9)
    assert readers == [reader]


@pytest.mark.parametrize("text, words, message", [
    ("x", (), "--prompt --interactive"), ("x", ("--interactive", "--prompt", "x"), "not allowed with"),
    ("x", ("--interactive", "--raw"), "without --raw"), ("x", ("--interactive", "--json"), "--json"),
    ("x", ("--prompt", "x", "--system", "y"), "--system is for"),
    ("x" * 300, ("--interactive", "--max_seq_len", "200"), "has 3.. tokens .*the context holds 200"),
    ("\udcff\n", ("--interactive",), "not valid UTF-8"),
])
def test_refused(text: str, words: tuple, message: str, call) -> None:
    """Fails if bad input ends in a traceback, or in exit code 0, which a script would take for success."""
    code, out, err = call(text, *words)
    assert code == 2 and re.search(message, err) and "Traceback" not in err and out == ""


def test_no_chat_template(call, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a model without a template gets one or a traceback, or if a system message is kept that the template
    refuses."""
    real = Tokenizer.render
    monkeypatch.setattr(Tokenizer, "has_chat_template", property(lambda self: False, lambda *_: None), raising=False)
    code, out, err = call("x\n", "--interactive")
    assert code == 2 and out == ""
    assert err == ("error: this model has no chat template, which --interactive needs: give one by "
                   "--chat_template FILE (docs/usage.md), or use --prompt TEXT --raw\n")
    monkeypatch.undo()

    def refuse(self: Tokenizer, messages: Messages, *rest: bool) -> str:
        if messages[0]["role"] == "system":
            raise ValueError("the chat template failed: no system role")
        return real(self, messages, *rest)
    monkeypatch.setattr(Tokenizer, "render", refuse)
    talk = Chat(type("E", (), {"max_seq_len": 9}), Tokenizer(folder), Sampling(), 5)
    with pytest.raises(ValueError, match="no system role"):
        talk.set_system("x")
    assert talk.messages == []


def test_colour(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """Fails if escape codes go into a file, or to users who asked for none."""
    for tty, variables, dim in ((True, {}, True), (True, {"NO_COLOR": "1"}, False), (True, {"TERM": "dumb"}, False),
                                (False, {}, False)):
        with monkeypatch.context() as patch:
            patch.setattr(sys.stderr, "isatty", lambda tty=tty: tty)
            patch.setenv("TERM", "xterm")
            patch.delenv("NO_COLOR", raising=False)
            for name, value in variables.items():
                patch.setenv(name, value)
            chat.note("x")
        assert capsys.readouterr().err == ("\033[2mx\033[0m\n" if dim else "x\n")


# ----- Ctrl-C ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_ctrl_c_at_random(make, capsys: pytest.CaptureFixture) -> None:
    """50 interrupted answers. Fails at a traceback, if text was shown but not kept or the reverse, at half a character,
    or if what the caches hold spoils the next answer."""
    dice = random.Random(0)
    turns = 50
    timers = []
    kept: list[dict[str, str]] = []  # the messages of the conversations that were ended to make room
    talk = make(slots=1500, limit=60)

    class Interrupting(Script):
        def read(self, default: str) -> str | None:
            for timer in timers:
                timer.join()
            if len(talk.messages) >= 10 or len(timers) == turns:  # before the context is full
                kept.extend(talk.messages)
                talk.messages = []
            if len(timers) == turns:
                return None
            timers.append(threading.Timer(dice.random() ** 2 * 0.15, os.kill, (os.getpid(), signal.SIGINT)))
            timers[-1].start()
            return default or f"question {len(timers)}"
    talk.run(Interrupting())
    out, err = capsys.readouterr()
    assert len(timers) == turns and "error" not in err
    questions = [m["content"] for m in kept[::2]]
    assert [m["role"] for m in kept] == ["user", "assistant"] * len(questions)
    assert out == "".join(m["content"] + "\n" for m in kept[1::2])
    assert len(questions) == len(set(questions)) == len(talk.answers) == turns - err.count("before the first word")
    assert err.count("[stopped; ") > 5
    talk.messages = kept[-4:]
    fresh = Engine(talk.engine.model, talk.engine.drafter, 1500, frozenset([257]))
    ids = talk.tokenizer.chat([*talk.messages, {"role": "user", "content": "And now?"}])
    talk.max_new_tokens = 20
    talk.run(Script("And now?"))
    tokens = sum(fresh.generate(ids, 20), [])
    assert talk.messages[-1]["content"] == talk.tokenizer.stream().push(tokens, tokens[-1] == 257)
    assert talk.answers[-1].reused > 0


@pytest.mark.slow
def test_ctrl_c_in_prefill(make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """Fails if a long prompt cannot be stopped, if its question is lost, or if a second Ctrl-C ends the chat."""
    def kill(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    talk = make()
    script = Script("a", "b", "c")
    with monkeypatch.context() as patch:
        patch.setattr(talk.engine.drafter, "reset", kill)  # called before the prompt is processed
        talk.run(script)
        kill()
    out, err = capsys.readouterr()
    assert talk.messages == [] and out == "" and err.count("before the first word") == 3
    assert script.drafts == ["", "a", "b", "c"]
    talk.run(Script("a"))
    assert len(talk.messages) == 2


@pytest.mark.slow
def test_ctrl_c_between(make) -> None:
    """Fails if Ctrl-C leaves when an answer has just ended, if during an answer it stops more than that one, or if it
    does not leave while a line from a pipe is awaited."""
    talk = make()
    talk.ctrl_c.handle()
    talk.run(Script("a"))
    assert len(talk.answers) == 1 and talk.answers[0].tokens == LIMIT

    second, third = 2, 4  # how many messages there are while these answers are written
    spy(talk, lambda new: len(talk.messages) in (second, third) and not talk.ctrl_c.raises and os.kill(
        os.getpid(), signal.SIGINT))
    talk.run(Script("b"))
    assert len(talk.answers[1].gained) == 1 and len(talk.messages) == 4
    at_terminal(talk, "c\r", "d\r", "/exit\r")  # the line editor has a Ctrl-C of its own
    assert len(talk.answers) == 4 and len(talk.answers[2].gained) == 1 and talk.answers[3].tokens == LIMIT
    lines = Pipe(talk.ctrl_c)
    threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
    reading, writing = os.pipe()
    with os.fdopen(reading) as talk_in, os.fdopen(writing, "w"):
        before, sys.stdin = sys.stdin, talk_in
        try:
            assert lines.read("") is None
        finally:
            sys.stdin = before


@pytest.mark.slow
@pytest.mark.xdist_group("demo")
def test_demo_reuses_nearly_all(demo: Path, demo_model, demo_head, capsys: pytest.CaptureFixture) -> None:
    """Fails if template or tokenizer give an answer other ids than the model wrote: correct, but nothing is reused."""
    tokenizer = Tokenizer(demo)
    engine = Engine(demo_model, Eagle2(demo_head, demo_model, 8, 3, 3), 512, tokenizer.stop_ids)
    talk = Chat(engine, tokenizer, Sampling(), 16)
    talk.run(Script("Name two animals that live in the sea.", "Write a line of Python that prints 'é'."))
    first, second = talk.answers
    assert second.reused >= first.prompt_tokens + first.tokens - 3 - 2 - 1


# ----- Without a model ---------------------------------------------------------------------------------------------


def bare_chat(slots: int, length: int) -> Chat:
    """A chat of two messages, each of `length` tokens, before an engine of so many slots."""
    made = Chat.__new__(Chat)
    made.engine = SimpleNamespace(max_seq_len=slots, drafter=None)
    made.tokenizer = SimpleNamespace(chat=lambda messages: [0] * length * len(messages))
    made.messages, made.max_new_tokens = [{"role": "user"}, {"role": "assistant"}], 10
    return made


def test_a_conversation_that_just_fits() -> None:
    """Fails if it is cut."""
    assert len(bare_chat(40, 10).make_room({}, SimpleNamespace(is_terminal=False))) == 30


def test_report() -> None:
    """Fails if the time to the first token of several answers is a sum."""
    answers = [Answer(9, gained=[4], first_s=1.0, decode_s=2.0), Answer(9, gained=[2], first_s=3.0, decode_s=2.0)]
    assert report(answers).startswith("1.5 tokens/s, 3.00 tokens per step, first token after 2.00 s")


def test_seconds_of_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if the time until the first token counts as decoding."""
    monkeypatch.setattr(chat, "time", SimpleNamespace(perf_counter=lambda: 10.0))
    made = bare_chat(40, 10)
    made.ctrl_c, made.stops = SimpleNamespace(pressed=False), ()
    made.tokenizer.stop_ids = {7}
    made.tokenizer.stream = lambda stops: SimpleNamespace(push=lambda new: "", flush=lambda: "", stopped=False, held="")
    answer = Answer(9, first_s=6.0)
    made.stream_answer(iter([[1], [2, 7]]), answer, 1.0)
    assert answer.decode_s == 3.0 and answer.gained == [2]


def test_ctrl_c_twice_but_not_at_once() -> None:
    """Fails if Ctrl-C at a line, long after one at an earlier line, leaves."""
    made = bare_chat(40, 10)
    made.ctrl_c, made.leaving, asked = SimpleNamespace(pressed=False), False, []

    def read(draft: str) -> str | None:
        asked.append(draft)
        if len(asked) in (1, 3):
            raise KeyboardInterrupt
        return " " if len(asked) < 5 else None
    made.run(SimpleNamespace(read=read, is_terminal=True))
    assert len(asked) == 5
