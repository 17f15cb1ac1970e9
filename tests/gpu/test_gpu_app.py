"""app/ on a GPU: traces, memory that ends, and planned bytes against those of the device.

    python -m pytest tests/gpu/test_gpu_app.py -q
"""
import gc
import json
from statistics import fmean

import pytest
import torch

import generate
from app import memory, trace
from app.options import Engine, load_engine
from benchmarks import tilings
from draft import Vanilla
from drafters.methods import METHODS
from model import load_model
from quant.linear import MODES
from sampling import Sampling

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


@pytest.mark.parametrize("quantize, rows", [(None, 1), ("int8", 16), ("int4", 1)])
def test_tilings(demo, quantize: str | None, rows: int, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """Fails if a product of the model is not searched, if no tiling but today's can be timed, or if one that cannot run
    ends the search."""
    monkeypatch.setattr(tilings, "neighbours", lambda t: [t._replace(stages=t.stages + 1), t._replace(BN=2**14)])
    monkeypatch.setattr(tilings, "LEAST", 1.0)
    engine = Engine(load_model(demo, "cuda", torch.bfloat16, quantize), Vanilla("cuda"), 700, frozenset())
    tilings.search_all(engine, rows, 500)
    shown = capsys.readouterr().out
    assert [f" {name}, 2 tilings" in shown for name in ("wqkv", "wo", "w13", "w2", "lm_head")] == [True] * 5, shown


@pytest.mark.parametrize("which", [0, 2, 6])
def test_profile(engines: list[Engine], demo_prompts: list[list[int]], which: int, tmp_path) -> None:
    """Fails if kernels belong to no phase (Triton launches them in another way than PyTorch does), or if graphs do not
    survive the profiler."""
    engine, ids = engines[which], demo_prompts[0]
    text = list(engine.generate(ids, 30))
    for _ in range(2):
        shown = trace.write_trace(engine, ids, Sampling(), tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    found = trace.means(events)
    assert found.keys() == {*trace.PHASES, trace.LAUNCHED, trace.REPLAYED} and "GPU busy" in shown
    assert found[trace.LAUNCHED][0] >= trace.CYCLES <= found[trace.REPLAYED][0]
    parts = sum(found[name][2] for name in trace.PHASES[1:])
    assert all(gpu > 0 for name, (_, _, gpu) in found.items() if name != "draft" or which)
    assert 0.7 * parts < found[trace.LAUNCHED][2] < 1.3 * parts
    kernels_of = {name: fmean(len(own) for _, own in each) for name, each in trace.named_ranges(events).items()}
    # Not their times, which depend on who else is on the GPU
    assert 0.9 < kernels_of[trace.REPLAYED] / kernels_of[trace.LAUNCHED] < 1.1
    assert list(engine.generate(ids, 30)) == text


def test_out_of_memory(demo, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """Fails if too little memory, for the weights, the cache or a capture, is not told in one line, if a run that fits
    does not work afterwards, or if something stays in memory. How much is enough differs from GPU to GPU, so the test
    gives more and more until it is."""
    monkeypatch.setattr("sys.argv", ["generate.py", "--checkpoint", str(demo), "--eagle2", "--prompt", "Hi",
                                     "--max_new_tokens", "8", "--max_seq_len", "8192", "--dtype", "bfloat16"])
    total = torch.cuda.mem_get_info()[1]
    before = torch.cuda.memory_allocated()
    codes = []
    try:
        for gb in (0.1, 0.2, 0.3, 0.4, 0.5, 0.55, 0.6, 0.65, 0.7, 0.8, 0.9, 1.0, 1.5, 2.0, 4.0):
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.set_per_process_memory_fraction(min(1.0, (torch.cuda.memory_reserved() + gb * 1e9) / total))
            try:
                generate.main()
                codes.append(0)
            except SystemExit as ended:
                codes.append(ended.code)
            out, err = capsys.readouterr()
            if codes[-1]:
                assert codes[-1] == 2 and err.splitlines()[-1].startswith("error: out of GPU memory: "), err
                assert "Traceback" not in err
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert codes[0] == 2 and codes[-1] == 0 and codes == sorted(codes, reverse=True)
    gc.collect()
    assert torch.cuda.memory_allocated() - before < 100e6


def allocated() -> int:
    """Bytes of the tensors that live on the GPU, without cuBLAS's workspaces, which stay once they are there."""
    gc.collect()
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated()


def words(demo, mode: str | None, *more: str) -> list[str]:
    return ["--checkpoint", str(demo), "--memory", "--dtype", "bfloat16", "--max_seq_len", "4096", *more,
            *(("--quantize", mode) if mode else ())]


@pytest.mark.parametrize("mode", [None, *MODES])
def test_planned_weights(demo, mode: str | None) -> None:
    """Fails if loading takes other bytes than planned, in the end or at its peak."""
    before = allocated()
    torch.cuda.reset_peak_memory_stats()
    need = memory.plan(generate.parse_args(words(demo, mode)), torch.bfloat16, 4096, mode)
    model = load_model(demo, "cuda", torch.bfloat16, mode)
    peak = torch.cuda.max_memory_allocated() - before
    assert peak < need.weights + max(need.loading, 0.02 * need.weights)
    assert abs(allocated() - before - need.weights) < 0.02 * need.weights
    del model


@pytest.mark.parametrize("mode", [None, *MODES])
def test_planned_engine(demo, mode: str | None) -> None:
    """Fails if an engine with EAGLE-2, its graphs and a long prompt take more than planned."""
    before = allocated()
    args = generate.parse_args(words(demo, mode, "--eagle2", "--draft_tokens", "60", "--draft_vocab", "0"))
    engine = load_engine(args)
    list(engine.generate([5] * 700, 20))
    need = memory.plan(args, torch.bfloat16, 4096, mode)
    assert torch.cuda.memory_allocated() - before < need.weights + need.cache + need.drafter + need.passing


@pytest.mark.parametrize("method", METHODS)
def test_planned_drafter(demo, weights_of: dict, method: str) -> None:
    """Fails if a method's engine takes more than planned, or if the plan is off by more than 2 % and 4 MB."""
    more = ["--method", method]
    for option, folder in weights_of[method].items():
        more += [f"--{option}", str(folder)]
    if "draft_tokens" in METHODS[method].options:
        more += ["--draft_tokens", "60"]
    before = allocated()
    args = generate.parse_args(words(demo, None, *more))
    engine = load_engine(args)
    need = memory.plan(args, torch.bfloat16, 4096, None)
    planned = need.weights + need.cache + need.drafter
    assert abs(allocated() - before - planned) < 0.02 * planned + 4e6
    list(engine.generate([5] * 700, 20))
    assert torch.cuda.memory_allocated() - before < planned + need.passing
