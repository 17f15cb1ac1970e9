"""app/options.py: what is asked for on the command line or from Python reaches the engine, and when it is warmed up."""
import json
import sys
from pathlib import Path

import pytest
import tiny

import generate
from app.options import Engine, load_engine
from sampling import Sampling


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_everything(tmp_path_factory.mktemp("options") / "x")


def test_compiled(folder: Path) -> None:
    """Fails if --no_compile or compiled=False launches graphs all the same, or if kernels are launched one by one
    although nobody asked for that."""
    seen = []

    class Recorded(Engine):
        def __init__(self, *how: object) -> None:
            seen.append(how[4])
            super().__init__(*how)

    words = ["--checkpoint", str(folder), "--device", "cpu", "--prompt", "x"]
    for more in ((), ("--no_compile",)):
        load_engine(generate.parse_args([*words, *more]), Recorded)
    for options in ({}, {"compiled": False}):
        Recorded.load(folder, device="cpu", **options)
    assert seen == [True, False, True, False]


def test_group(folder: Path) -> None:
    """Fails if int4 has other groups than those that are asked for."""
    for options, group in (({}, 128), ({"group": 64}, 64)):
        engine = Engine.load(folder, device="cpu", quantize="int4", **options)
        assert engine.model.layers[0].wqkv.weight.group == group


def test_zero_is_no_default(folder: Path) -> None:
    """Fails if a 0 from Python is taken for an option that was not given."""
    with pytest.raises(ValueError, match="2-128 --draft_tokens"):
        Engine.load(folder, "eagle2", device="cpu", draft_tokens=0)


def test_broken_template(folder: Path, tmp_path: Path) -> None:
    """Fails if a broken template that a program gives is found only at the first chat."""
    (tmp_path / "x.jinja").write_text("{% do x %}")
    with pytest.raises(ValueError, match="tag 'do'"):
        Engine.load(folder, device="cpu", chat_template=tmp_path / "x.jinja")


def test_the_whole_context_is_no_nonsense(folder: Path, capsys: pytest.CaptureFixture) -> None:
    """Fails if somebody who asks for all tokens that the model was made for is warned."""
    most = json.loads((folder / "config.json").read_text())["max_position_embeddings"]
    for slots, warned in ((most, False), (most + 1, True)):
        Engine.load(folder, device="cpu", max_seq_len=slots)
        assert ("writes nonsense" in capsys.readouterr().err) == warned


@pytest.mark.parametrize("how", ["--prompt", "--prompt_file", "--interactive"])
def test_warm_before_the_first_text(how: str, folder: Path, tmp_path: Path, call, monkeypatch: pytest.MonkeyPatch
                                    ) -> None:
    """Fails if compiling and capturing, which takes seconds on a GPU, counts as the time of the first answer; or if a
    prompt that is too long is refused only after it."""
    events = []
    write = Engine.generate
    monkeypatch.setattr(Engine, "warm_up", lambda self, sampling: events.append(sampling))
    monkeypatch.setattr(Engine, "generate", lambda *how, **more: events.append("text") or write(*how, **more))
    (tmp_path / "q.jsonl").write_text('{"prompt": "x"}\n')
    monkeypatch.setattr(sys, "stdin", (tmp_path / "q.jsonl").open())
    what = {"--prompt": ["x"], "--prompt_file": [tmp_path / "q.jsonl", "--output", tmp_path / "a.jsonl"]}
    words = ("--checkpoint", folder, "--device", "cpu", "--temperature", 0.5, "--max_new_tokens", 2, how)
    assert call(*words, *what.get(how, []))[0] == 0 and events == [Sampling(0.5), "text"]
    if how == "--prompt":
        events.clear()
        assert call(*words, "word " * 600)[0] == 2 and events == []
