"""What a chat keeps when something is refused: /load and /system replace nothing before the template has taken it."""
from pathlib import Path
from types import SimpleNamespace

import pytest

from app.chat import Answer, Chat, report
from app.chat_file import Messages, write_messages
from sampling import Sampling

TALK: Messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
OTHER: Messages = [{"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}] * 2
SYSTEM = {"role": "system", "content": "Be brief."}


class NoSystem:
    """A tokenizer whose template has no place for a system message."""
    has_chat_template = True

    def chat(self, messages: Messages) -> list[int]:
        if any(message["role"] == "system" for message in messages):
            raise ValueError("System role not supported")
        return [1] * len(messages)


@pytest.fixture
def talk() -> Chat:
    made = Chat(SimpleNamespace(max_seq_len=99), NoSystem(), Sampling(), 9)
    made.messages = list(TALK)
    return made


def test_load(talk: Chat, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Fails if a conversation is lost to a file that the template refuses or that is not there, or if a good file adds
    to it instead of replacing it."""
    write_messages(tmp_path / "system.json", [SYSTEM, *OTHER])
    write_messages(tmp_path / "good.json", OTHER)
    (tmp_path / "bad.json").write_text("{}")
    for name, error in (("system.json", "System role"), ("gone.json", "gone.json"), ("bad.json", "not a conversation"),
                        ("", "name of the file")):
        with pytest.raises((ValueError, OSError), match=error):
            talk.command(f"/load {tmp_path / name if name else ''}")
        assert talk.messages == TALK and capsys.readouterr().err == ""
    talk.command(f"/load {tmp_path / 'good.json'}")
    assert talk.messages == OTHER and "good.json: 4 messages" in capsys.readouterr().err


def test_system(talk: Chat, capsys: pytest.CaptureFixture) -> None:
    """Fails if a system message that the template refuses stays, so that every later turn is an error."""
    with pytest.raises(ValueError, match="System role"):
        talk.command("/system Be brief.")
    assert talk.messages == TALK
    with pytest.raises(ValueError, match="System role"):
        Chat(talk.engine, talk.tokenizer, Sampling(), 9, system="Be brief.")
    talk.tokenizer.chat = lambda messages: [1] * len(messages)
    for text in ("Be brief.", "Be kind."):
        talk.command(f"/system {text}")
        assert talk.messages == [{"role": "system", "content": text}, *TALK]


def test_stats(talk: Chat, capsys: pytest.CaptureFixture) -> None:
    """Fails if /stats, /undo or /reset count or take back something else than what was said."""
    talk.command("/stats")
    assert "2 messages, 2 of 99 tokens of the context; answers: none" in capsys.readouterr().err
    talk.tokenizer.chat = lambda messages: [1] * 7 * len(messages)
    talk.answers = [Answer(9, 3, [4], 5, 1.0, 2.0), Answer(8, 2, [2], 3, 3.0, 1.0)]
    talk.command("/stats")
    assert f"14 of 99 tokens of the context; answers: 2, {report(talk.answers)}\n" in capsys.readouterr().err
    talk.messages = [SYSTEM, *TALK, *OTHER]
    talk.command("/undo")
    assert talk.messages == [SYSTEM, *TALK, *OTHER[:2]] and "[taken back: c]" in capsys.readouterr().err
    talk.command("/reset")
    assert talk.messages == [SYSTEM]
    talk.command("/undo")
    assert talk.messages == [SYSTEM] and "nothing to take back" in capsys.readouterr().err
