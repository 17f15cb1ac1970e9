"""formats/questions.py on the files of Spec-Bench and SPEED-Bench as they are published or prepared.

    python -m pytest tests/formats/test_questions.py
"""
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from formats.questions import read_questions

# A row as the data set nvidia/SPEED-Bench has it on the hub.
SPEED_BENCH = {"question_id": "0a" * 16, "category": "rag", "sub_category": "x", "turns": ["Why?", "And then?"],
               "source": "a/b", "src_id": "7", "difficulty": "easy", "multiturn": True}


def asked(turns: list[str]) -> list[dict]:
    return [{"role": "user", "content": turn} for turn in turns]


def save(path: Path, *rows: dict) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_spec_bench(tmp_path: Path) -> None:
    """Fails if a field that Spec-Bench has besides the turns matters."""
    path = save(tmp_path / "question.jsonl",
                {"question_id": 81, "category": "writing", "turns": ["Compose.", "Rewrite."]},
                {"question_id": 121, "category": "math_reasoning", "turns": ["2+2?"], "reference": ["4"]})
    assert read_questions(path) == [("81", "writing", ["Compose.", "Rewrite."]), ("121", "math_reasoning", ["2+2?"])]


def test_speed_bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if one of the three forms of SPEED-Bench is not read: turns as on the hub, messages as NVIDIA's prepare.py
    writes them, or Parquet; or if a missing package gives a traceback."""
    expected = [("0a" * 16, "rag", ["Why?", "And then?"])]
    assert read_questions(save(tmp_path / "a.jsonl", SPEED_BENCH)) == expected
    prepared = {key: value for key, value in SPEED_BENCH.items() if key != "turns"}
    prepared["messages"] = asked(SPEED_BENCH["turns"])
    assert read_questions(save(tmp_path / "qualitative.jsonl", prepared)) == expected
    table = SimpleNamespace(to_pylist=lambda: [SPEED_BENCH])
    pyarrow, parquet = ModuleType("pyarrow"), ModuleType("pyarrow.parquet")
    pyarrow.parquet, parquet.read_table = parquet, lambda path: table
    monkeypatch.setitem(sys.modules, "pyarrow", pyarrow)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", parquet)
    assert read_questions(tmp_path / "test.parquet") == expected
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.delitem(sys.modules, "pyarrow.parquet")
    with pytest.raises(ValueError, match="test.parquet: reading Parquet needs pyarrow: pip install pyarrow"):
        read_questions(tmp_path / "test.parquet")


@pytest.mark.parametrize("row, message", [
    ({"turns": ["FULL BENCHMARK DATA SHOULD BE FETCHED FROM THE SOURCE USING SPECDEC_BENCH\n\n{article}"]},
     "line 2 holds a placeholder"),
    ({"messages": asked(["a", "FULL BENCHMARK DATA SHOULD BE FETCHED FROM THE SOURCE USING SPECDEC_BENCH"])},
     "line 2 holds a placeholder"),
    ({"messages": [{"role": "system", "content": "x"}]}, "line 2 is not"), ({"messages": []}, "line 2 is not"),
    ({"messages": ["x"]}, "line 2 is not"), ({"messages": "x"}, "line 2 is not"),
    ({"messages": [{"role": "user", "content": [1]}]}, "line 2 is not")])
def test_refused(row: dict, message: str, tmp_path: Path) -> None:
    """Fails if speed is measured on a placeholder, or if a role or a part of a message is dropped."""
    path = save(tmp_path / "a.jsonl", SPEED_BENCH, row)
    with pytest.raises(ValueError, match=message) as error:
        read_questions(path)
    assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)
