"""The target and dialogues that the tests of both trainers learn from."""
from types import SimpleNamespace

import pytest
import tiny
import torch
from helpers import read
from torch import Tensor

from model import Llama
from training import steps
from training.dialogues import Script, write_dialogues


@pytest.fixture(scope="session")
def learnable(tmp_path_factory: pytest.TempPathFactory) -> tuple[Llama, Tensor]:
    """A target in bfloat16, as train.py loads it, and 256 dialogues of 32 tokens."""
    model, path = tiny.pair(3, 0.1, torch.bfloat16, num_hidden_layers=4)[0], tmp_path_factory.mktemp("dialogues") / "d"
    plain = SimpleNamespace(has_chat_template=False, stop_ids=frozenset([4]), bos_id=1)
    write_dialogues(model, Script(plain, torch.device("cpu")), path, 256, 32, 256)
    return model, read(path, 32)


@pytest.fixture(autouse=True)
def several_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let training take the few places of a test in several parts, as it takes thousands with a large vocabulary."""
    monkeypatch.setattr(steps, "LOGITS", 1000)
