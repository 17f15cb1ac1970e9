"""ops/startup.py: which part of a start a second belongs to.

    python -m pytest tests/ops/test_startup.py
"""
from types import SimpleNamespace

import pytest

from ops import startup
from ops.startup import Startup, end_of_imports, part, parts_so_far


@pytest.fixture
def tick(monkeypatch: pytest.MonkeyPatch):
    """Lets seconds pass on the clock of a process that has just begun."""
    now = [100.0]
    monkeypatch.setattr(startup, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(startup, "STARTUP", Startup())

    def tick(seconds: float) -> None:
        now[0] += seconds
    return tick


def test_parts(tick) -> None:
    """Fails if a second is counted twice or not at all, if a part within another one is taken out of it, or if time
    after an error still belongs to the part that failed."""
    captured = part("CUDA graphs")(tick)
    tick(3)
    end_of_imports()
    tick(0.5)
    with part("model"):
        tick(1)
    captured(0.25)
    with part("tree size"):
        tick(2)
        captured(4)
    with pytest.raises(ValueError), part("tokenizer"):
        tick(0.125)
        raise ValueError
    captured(0.25)
    tick(1)
    expected = {"imports": 3, "rest": 1.5, "model": 1, "CUDA graphs": 0.5, "tree size": 6, "tokenizer": 0.125}
    assert parts_so_far() == parts_so_far() == expected
    with part("model"):
        tick(1)
        assert parts_so_far() == expected | {"model": 2}
        tick(1)
    assert parts_so_far() == expected | {"model": 3}
