"""A conversation as a JSON file: {"messages": [{"role": "user", "content": "Hello"}, ...]}.

A system message may come first; then questions (user) and answers (assistant) alternate, and the last is an answer.
"""
import json
from pathlib import Path

from formats.writing import replace_when_whole

Messages = list[dict[str, str]]


def read_messages(path: Path) -> Messages:
    """A conversation that `write_messages` wrote. Raises OSError, or ValueError with what is wrong with the file."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{path}: not a JSON file ({e})") from None
    messages = raw.get("messages") if isinstance(raw, dict) else None
    if not isinstance(messages, list):
        raise ValueError(f'{path}: not a conversation, which is {{"messages": [{{"role": ..., "content": ...}}, ...]}}')
    has_system = bool(messages) and isinstance(messages[0], dict) and messages[0].get("role") == "system"
    roles = ["system"] * has_system + ["user", "assistant"] * len(messages)  # more than enough: zip ends with messages
    for number, (message, role) in enumerate(zip(messages, roles), 1):
        if not isinstance(message, dict) or message.get("role") != role or not isinstance(message.get("content"), str):
            raise ValueError(f'{path}: message {number} should be {{"role": "{role}", "content": "a text"}}')
        try:
            message["content"].encode()
        except UnicodeEncodeError:
            raise ValueError(f"{path}: message {number} holds half a character, a lone surrogate") from None
    if (len(messages) - has_system) % 2:
        raise ValueError(f"{path}: the last message has no answer; leave it out and ask it again")
    return [{"role": message["role"], "content": message["content"]} for message in messages]


def write_messages(path: Path, messages: Messages) -> None:
    """Write the whole conversation or nothing, and never over a file that is not a conversation (ValueError)."""
    path = path.resolve()  # so that a link stays a link
    if path.exists():
        try:
            read_messages(path)
        except ValueError:
            raise ValueError(f"{path}: this file exists and is not a conversation; choose another name") from None
    with replace_when_whole(path) as part:
        part.write_text(json.dumps({"messages": messages}, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
