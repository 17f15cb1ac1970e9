"""bench.py --llamacpp: what llama.cpp is asked for, what becomes of its answer, and what is refused."""
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

import bench
from benchmarks.engines import llamacpp_decoder


@pytest.fixture
def llamacpp(monkeypatch: pytest.MonkeyPatch) -> dict:
    """A stand-in for the package xllamacpp. Returns what it was given, and what it will answer."""
    seen = {"answer": {"timings": {"prompt_n": 3, "prompt_ms": 250.0, "predicted_ms": 400.0, "predicted_n": 4},
                       "__verbose": {"tokens": [5, 6, 7, 2]}}}

    def params() -> SimpleNamespace:
        parts = {name: SimpleNamespace() for name in ("model", "cpuparams", "cpuparams_batch")}
        seen["params"] = SimpleNamespace(**parts)
        return seen["params"]

    class Server:
        def __init__(self, given: object) -> None:
            assert given is seen["params"]

        def handle_completions(self, request: dict) -> dict:
            seen["request"] = request
            return seen["answer"]

    package = ModuleType("xllamacpp")
    package.CommonParams, package.Server = params, Server
    monkeypatch.setitem(sys.modules, "xllamacpp", package)
    return seen


def test_decoder(llamacpp: dict) -> None:
    """Fails if llama.cpp gets other ids, threads or a longer text than we, samples, keeps the last prompt's cache, or
    if its tokens and seconds are counted otherwise than ours: those of prefill apart, and its token too."""
    found = llamacpp_decoder(Path("x.gguf"), 99)([1, 2, 3], 8)
    assert (found.tokens, found.gained, found.prefill_s, found.decode_s) == ([5, 6, 7, 2], [1, 1, 1], 0.25, 0.4)
    params, request = llamacpp["params"], llamacpp["request"]
    assert params.model.path == "x.gguf" and params.n_ctx == 99
    assert params.cpuparams.n_threads == params.cpuparams_batch.n_threads == torch.get_num_threads()
    assert (request["prompt"], request["n_predict"], request["temperature"]) == ([1, 2, 3], 8, 0)
    assert request["top_k"] == 1 and request["cache_prompt"] is False


def test_errors(llamacpp: dict) -> None:
    """Fails if an error of llama.cpp, or a prompt that it reads otherwise, is counted as an answer."""
    decode = llamacpp_decoder(Path("x.gguf"), 99)
    with pytest.raises(ValueError, match="2"):
        decode([1, 2], 8)
    llamacpp["answer"] = {"error": "no room"}
    with pytest.raises(ValueError, match="no room"):
        decode([1, 2, 3], 8)


@pytest.mark.parametrize("words, message", [
    (("--llamacpp", "no/such.gguf"), "no such file"), (("--shape", "llama-2-7b"), "without --shape"),
    (("--device", "cuda"), "for --device cpu"),
    (("--temperature", "1"), "add --temperature 0"), ((), "xllamacpp is not installed; pip install xllamacpp")])
def test_refused(words: tuple, message: str, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if bad input, or a missing package, is found only after the model is loaded."""
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: None)
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    with pytest.raises(SystemExit) as end:
        bench.parse_args(["--checkpoint", "x", "--device", "cpu", "--llamacpp", str(tmp_path / "x.gguf"), *words])
    assert end.value.code == 2 and message in capsys.readouterr().err
