"""app/memory.py: the bytes it plans are those of real tensors, and where memory ends one line says what would fit."""
import gc
import json
import weakref
from collections.abc import Callable
from pathlib import Path
from pkgutil import resolve_name
from types import FunctionType, ModuleType

import pytest
import tiny
import torch
from helpers import FLAGS
from torch import Tensor, nn

import generate
from app import memory
from draft import Eagle2, Vanilla
from drafters.heads import Quantize, load_head
from drafters.methods import METHODS, make_drafter
from engine import SPARE, Engine
from formats.config import Config
from model import Llama, load_model
from ops.cpu_integers import PACKED, is_supported
from ops.cpu_kernels import library
from ops.quantized import Quantized
from quant.linear import QuantizedLinear

MODES = [(None, 128), ("int8", 128), ("int8dyn", 128), ("int4", 64), ("int4", 128)]
LLAMA_2_13B = {"model_type": "llama", "vocab_size": 32000, "hidden_size": 5120, "intermediate_size": 13824,
               "num_hidden_layers": 40, "num_attention_heads": 40, "max_position_embeddings": 4096}


def sizes(tensors: list[Tensor]) -> dict[int, int]:
    """Bytes of each storage behind these tensors, by its address."""
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}


def held(*things: object) -> int:
    """Bytes of the distinct storages behind tensors, quantised weights and the weights of modules."""
    tensors = []
    for thing in things:
        if isinstance(thing, nn.Module):
            tensors += [*thing.parameters(), *thing.buffers()]
        elif isinstance(thing, Quantized):
            tensors += [thing.data, thing.scale]
        elif isinstance(thing, Tensor):
            tensors.append(thing)
    return sum(sizes(tensors).values())


def reachable(thing: object) -> dict[int, int]:
    """Bytes of each storage that Python's garbage collector finds behind an object: in containers of any kind and in
    slots too, where memory.py does not look."""
    found, seen, todo = [], set(), [thing]
    while todo:
        thing = todo.pop()
        if id(thing) in seen or isinstance(thing, (type, ModuleType, FunctionType)):
            continue
        seen.add(id(thing))
        if isinstance(thing, Tensor):
            found.append(thing)
        todo += gc.get_referents(thing)  # of a tensor: its attributes
    return sizes(found)


# ----- What is planned is what is taken --------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("mode, group", MODES)
@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}, {"hidden_size": 48, "head_dim": 10}])
def test_weights_and_cache_are_exact(mode: str | None, group: int, changes: dict, tmp_path: Path) -> None:
    """Fails if padding or scales of int4 are not counted, or an lm_head that is int8 in any mode and no longer tied."""
    bias = "head_dim" in changes
    model = Llama(Config.from_dict(tiny.SHAPE | changes), qkv_bias=bias)
    tiny.randomise(model, 0, torch.float32)
    folder = tiny.save_target(model, tmp_path / "x")
    model = load_model(folder, "cpu", torch.bfloat16, mode, group)
    empty = memory.empty_model(model.cfg, torch.bfloat16, mode, group, bias)
    assert held(model) == memory.total_bytes(empty)
    words = () if mode is None else ("--quantize", mode, *(("--group", str(group)) if mode == "int4" else ()))
    args = generate.parse_args(["--checkpoint", str(folder), "--memory", *words])
    assert held(model) == memory.plan(args, torch.bfloat16, 100, mode).weights
    model.allocate_cache(100, SPARE)
    assert held(model.kv, model.rope) == memory.cache_bytes(model.cfg, 100, torch.bfloat16)


@pytest.mark.slow
@pytest.mark.parametrize("mode, group", MODES)
@pytest.mark.parametrize("ids", [None, 12])
def test_eagle_is_exact(mode: str | None, group: int, ids: int | None, tmp_path: Path) -> None:
    """Fails if something that a drafter makes of its head is not counted: the table of fc's outputs for all tokens,
    half of fc again, a copy of rows of the lm_head, with room for a prompt's."""
    model, head = tiny.pair(0, dtype=torch.float32, vocab_size=100)
    folder = tiny.save_target(model, tmp_path / "x")
    tiny.save_head(head, folder / "eagle")
    (folder / "eagle/draft_vocab.json").write_text(json.dumps(list(range(12))))
    model = load_model(folder, "cpu", torch.bfloat16, mode, group)
    head = load_head(folder / "eagle", model, ids or 0, Quantize(mode and "int8"))
    drafter = Eagle2(head, model, 8, 3, 3)
    drafter.allocate(100 + SPARE)
    own = () if ids is None else (drafter.bound.lm_head, head.vocab, drafter.bound.ids, drafter.bound.draft_rows.rank)
    small = (drafter.scratch, *drafter.root_level, *drafter.candidates)
    words = () if mode is None else ("--quantize", mode, *(("--group", str(group)) if mode == "int4" else ()))
    args = generate.parse_args(["--checkpoint", str(folder), "--memory", "--eagle2", "--draft_tokens", "8",
                                "--draft_depth", "3", "--draft_topk", "3", "--draft_vocab", str(ids or 0), *words])
    empty = memory.empty_model(model.cfg, torch.bfloat16, mode, group)
    own += (drafter.bound.fc, drafter.bound.fc_of_token)
    assert held(head, head.kv, head.rope, *small, *own) == memory.total_bytes(
        memory.empty_drafter(args, empty, 100, mode), besides=empty)


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_everything(tmp_path_factory.mktemp("memory") / "x")


@pytest.fixture(scope="module", params=MODES, ids=str)
def loaded(request: pytest.FixtureRequest, everything: Path) -> tuple[Llama, list[str], str | None]:
    """The target in each mode, the words that ask for it, and the mode."""
    mode, group = request.param
    words = [] if mode is None else ["--quantize", mode, *(["--group", str(group)] if mode == "int4" else [])]
    return load_model(everything, "cpu", torch.bfloat16, mode, group), words, mode


@pytest.mark.slow
@pytest.mark.parametrize("method, more", [*((method, ()) for method in METHODS), ("eagle2", ("--draft_vocab", "0")),
                                          ("eagle2", ("--draft_tokens", "33", "--draft_depth", "5")),
                                          ("lookahead", ("--window", "4", "3", "9")), ("lookup", ("--chain", "3"))])
def test_every_method_is_exact(method: str, more: tuple[str, ...], loaded, everything: Path) -> None:
    """Fails if the plan for a method, in any mode, is not to the byte what its loaded drafter holds after some cycles:
    weights, caches, tables, pools and what it keeps from one cycle to the next."""
    model, mode_words, mode = loaded
    words = {".": everything / "draft", "medusa": everything / "medusa"}
    flags = [str(words.get(word, word)) for word in FLAGS[method]]
    args = generate.parse_args(["--checkpoint", str(everything), "--memory", *flags, *more, *mode_words])
    need = memory.plan(args, torch.bfloat16, 100, mode)
    model.free_cache()
    drafter = make_drafter(method, args, model, 100)
    engine = Engine(model, drafter, 100)
    list(engine.generate(tiny.prompt(0, 9), 12))
    target = reachable(model)
    assert need.weights == held(model)
    assert need.cache == held(model.kv, model.rope) == sum(target.values()) - held(model)
    assert need.drafter == sum(size for address, size in reachable(drafter).items() if address not in target)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", ["vanilla", "eagle2", "eagle3", "block", "medusa"])
def test_int8_on_a_cpu_is_exact(method: str, dtype: torch.dtype, everything: Path) -> None:
    """Fails if int8 weights that our kernels read stay in memory a second time, in the model or in a drafter; or if the
    plan counts another copy than FBGEMM makes of those that it reads."""
    words = {".": everything / "draft", "medusa": everything / "medusa"}
    flags = [str(words.get(word, word)) for word in FLAGS[method]]
    args = generate.parse_args(["--checkpoint", str(everything), "--memory", "--quantize", "int8", *flags])
    need, without = (memory.plan(args, dtype, 100, "int8", device) for device in ("cpu", "cuda"))
    before = [id(data) for data in PACKED]
    model = load_model(everything, "cpu", dtype, "int8")
    drafter = make_drafter(method, args, model, 100)
    list(Engine(model, drafter, 100).generate(tiny.prompt(0, 9), 12))
    assert dtype == torch.bfloat16 or library() is None or any(part.data.dim() == 4 for part in model.modules()
                                                               if isinstance(part, QuantizedLinear))
    target = reachable(model)
    assert sum(target.values()) == need.weights + need.cache
    assert need.drafter == sum(size for address, size in reachable(drafter).items() if address not in target)
    copied = sum(data.nbytes for data in PACKED if id(data) not in before) if is_supported() else 0
    unread = drafter.head.fc.weight.data.nbytes if method == "eagle2" else 0  # a part of another weight is read instead
    assert need.passing - without.passing - copied == (unread if copied else 0)


def test_stored_mode(everything: Path) -> None:
    """Fails if a file that quantize.py wrote is planned as if it were to be quantised while loading, or unquantised."""
    for checkpoint in (everything / "int8", everything / "int8/model.safetensors"):
        args = generate.parse_args(["--checkpoint", str(checkpoint), "--memory"])
        need = memory.plan(args, torch.bfloat16, 100, None)
        assert need.weights == held(load_model(checkpoint, "cpu", torch.bfloat16)) and need.loading == 0


def test_known_sizes() -> None:
    """Llama-2-13B has 13,015,864,320 weights; of its cache a slot takes 0.82 MB, as of any of its shape. A prefill with
    its integers needs 67 MB beside OVERHEAD, one with a small model's no more than the largest matrix."""
    cfg = Config.from_dict(LLAMA_2_13B)

    def weight_bytes(mode: str | None) -> int:
        return memory.total_bytes(memory.empty_model(cfg, torch.bfloat16, mode))

    assert weight_bytes(None) == 2 * 13_015_864_320
    assert 0.819e6 < memory.cache_bytes(cfg, 4096, torch.bfloat16) / (4096 + SPARE) < 0.82e6
    assert 13.1e9 < weight_bytes("int8") < 13.3e9
    assert 7.1e9 < weight_bytes("int4") < 7.3e9
    extra = [memory.passing(c, torch.bfloat16, "int4") - memory.passing(c, torch.bfloat16, None)
             for c in (cfg, Config.from_dict(tiny.SHAPE))]
    assert extra == [2 * 2**25, 2 * 96 * 32]


def test_memory_on_the_command_line(everything: Path, monkeypatch: pytest.MonkeyPatch,
                                    capsys: pytest.CaptureFixture) -> None:
    """Fails if --memory loads a model, prints other numbers than the plan's, or asks for a prompt."""
    monkeypatch.setattr("app.options.load_model", out_of_memory)
    words = ["--checkpoint", str(everything), "--memory", "--eagle2", "--device", "cpu", "--dtype", "float16",
             "--max_seq_len", "77"]
    monkeypatch.setattr("sys.argv", ["generate.py", *words])
    generate.main()
    out, err = capsys.readouterr()
    need = memory.plan(generate.parse_args(words), torch.float16, 77, None)
    assert out.count("\n") == 1 and err == ""
    assert out.startswith(f"weights {need.weights / 1e9:.2f} GB, cache {need.cache / 1e9:.2f} GB, drafter ")
    assert f": at most {need.total / 1e9:.2f} GB of " in out and "quantised" not in out
    monkeypatch.setattr("sys.argv", ["generate.py", "--checkpoint", str(everything), "--memory", "--prompt", "x"])
    with pytest.raises(SystemExit, match="2"):
        generate.main()
    assert "not allowed with" in capsys.readouterr().err


def test_free_on_a_cpu() -> None:
    """Fails if the page cache counts as taken: after a download it holds nearly all memory, and the kernel gives it
    up."""
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    available = 1024 * int(fields["MemAvailable"].split()[0])
    assert abs(memory.free_bytes("cpu") - available) < 0.2 * available


def test_every_number_of_the_line(everything: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a number stands at another place, or in another unit."""
    args = generate.parse_args(["--checkpoint", str(everything), "--memory"])
    monkeypatch.setattr(memory, "free_bytes", lambda device: 8 * 10**9)
    shares = "weights 1.50 GB, cache 0.25 GB, drafter 0.75 GB, activations 0.50 GB"
    for loading, said in ((0, f"{shares}: at most 3.00 GB of 8.00 GB free"),
                          (3 * 10**9, f"{shares}; before that, while it is quantised, 3.00 GB beside the weights: at "
                           "most 4.50 GB of 8.00 GB free")):
        need = memory.Need(*(int(1e9 * size) for size in (1.5, 0.25, 0.75, 0.5)), loading)
        monkeypatch.setattr(memory, "plan", lambda *how, need=need: need)
        assert memory.summary(args, "cpu", torch.float32, 100) == said


def test_free_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if what PyTorch's allocator holds counts as taken, or its limit for this process is passed over."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (20, 100))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 30)
    for share, free in ((1.0, 50), (0.25, 25)):
        monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda share=share: share)
        assert memory.free_bytes("cuda") == free


# ----- Where memory ends -----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("free, words, fits", [
    (23.6e9, (), ["free: --quantize int8 (17.2 GB) fits"]), (4e9, (), ["a smaller model"]),
    (15e9, (), ["free: --quantize int4 (11.3 GB) fits"]), (10e9, (), ["free: --quantize int4 --max_seq_len 2048 ("]),
    (29e9, (), ["--quantize int8 (", " GB) fits, as does --max_seq_len 2048 ("]),
    (15e9, ("--quantize", "int8"), ["--quantize int4 (", "--max_seq_len 1024 ("]),
    (9e9, ("--quantize", "int4"), ["free: --max_seq_len 1024 ("]), (99e9, (), ["--quantize int8 ("])])
def test_advice(free: float, words: tuple, fits: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if the advice does not fit either, or is the second-best where the best is possible."""
    folder = tmp_path / "Llama-2-13B"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA_2_13B))
    monkeypatch.setattr(memory, "read_tensors", lambda path: ({}, {}))
    args = generate.parse_args(["--checkpoint", str(folder), "--prompt", "x", *words])
    said = memory.advice(args, "cuda", torch.bfloat16, 4096, int(free))
    assert "\n" not in said and said.startswith("out of GPU memory: Llama-2-13B in ") and all(w in said for w in fits)
    assert "3.5 GB of cache for 4096 slots" in said and f"{free / 1e9:.1f} GB free" in said
    assert words or "26.0 GB of weights" in said


def test_advice_for_quantised_weights(everything: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a file that is quantised already is to be quantised; or if a model that would fit is called too large
    where something else took the memory."""
    monkeypatch.setattr(memory, "plan", lambda args, dtype, slots, mode, device: memory.Need(
        10**9 // (2 if mode else 1), slots * 10**6, 0, 0, 0))
    words = ["--checkpoint", str(everything / "int8/model.safetensors"), "--prompt", "x"]
    for free, said in ((1.28e9, "free: --max_seq_len 256 ("), (9e8, "a smaller model would fit")):
        text = memory.advice(generate.parse_args(words), "cuda", torch.bfloat16, 300, int(free))
        assert "--quantize" not in text and (said in text)
    text = memory.advice(generate.parse_args(words), "cuda", torch.bfloat16, 200, 2 * 10**9)
    assert text.endswith("free: something else took it meanwhile")


@pytest.mark.parametrize("error, is_memory", [
    (torch.OutOfMemoryError("CUDA out of memory."), True), (RuntimeError("Triton Error [CUDA]: out of memory"), True),
    (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to"), True), (RuntimeError("shapes"), False)])
def test_exhausted(error: RuntimeError, is_memory: bool) -> None:
    """Fails if one of the ways to say it is missed, also behind an error that a capture's end raised, or if some other
    error is taken for it."""
    assert memory.exhausted(error) == is_memory
    try:
        try:
            raise error
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")
    except RuntimeError as e:
        assert memory.exhausted(e) == is_memory


def out_of_memory(*inputs: object, **options: object) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nMore lines.")


def ending_memory(original: Callable) -> Callable:
    """`original` where it works on the meta device, as planning does; elsewhere memory is at its end."""
    def function(*inputs: object, **options: object) -> object:
        if any(isinstance(x, nn.Module) and next(x.parameters()).is_meta for x in inputs) or (
                torch.device("meta") in inputs):
            return original(*inputs, **options)
        return out_of_memory()
    return function


@pytest.mark.slow
@pytest.mark.parametrize("where", ["load_model", "Llama.allocate_cache", "EagleHead.allocate_cache", "rope_table",
                                   "Engine.verify", "Engine.prefill_chunk"])
def test_on_the_command_line(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                             capsys: pytest.CaptureFixture) -> None:
    """Fails if memory that ends at any of these places is told by more than one line, or with another exit code than 2,
    or if in a session that goes on the next run does not work."""
    folder = tiny.save_everything(tmp_path / "x")
    owner = {"load_model": "app.options", "Llama": "model.Llama", "EagleHead": "draft.EagleHead", "rope_table": "model",
             "Engine": "engine.Engine"}[where.partition(".")[0]]
    words = ["generate.py", "--checkpoint", str(folder), "--eagle2", "--device", "cpu", "--prompt", "x",
             "--max_new_tokens", "8", "--max_seq_len", "64"]
    monkeypatch.setattr("sys.argv", words)
    path = f"{owner}.{where.rpartition('.')[2]}"
    with monkeypatch.context() as broken:
        broken.setattr(path, ending_memory(resolve_name(path)))
        with pytest.raises(SystemExit) as ended:
            generate.main()
    out, err = capsys.readouterr()
    assert ended.value.code == 2 and err.startswith("error: out of memory: x in ") and err.count("\n") == 1
    assert "GB of cache for 64 slots" in err and "for drafting" in err
    assert out == "" or where == "Engine.verify", "a CPU does not warm up, so the first token is written before it"
    generate.main()


@pytest.mark.slow
def test_session_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a model whose cache could not grow no longer serves the engine that it has, or a smaller new one, or if
    something of the failed engine stays in memory. A cache without its RoPE table would be taken for whole, and read
    beyond its end."""
    model = tiny.target(0, torch.float32)
    engine, ids = Engine(model, Vanilla(), 64), tiny.prompt(0, 9)
    text, made = sum(engine.generate(ids, 20), []), []
    for broken in ("model.rope_table", "torch.Tensor.new_zeros"):
        with monkeypatch.context() as patch:
            patch.setattr(broken, out_of_memory)
            drafter = Vanilla()
            made.append(weakref.ref(drafter))
            with pytest.raises(torch.OutOfMemoryError):
                Engine(model, drafter, 256)
            del drafter
        gc.collect()
        assert made.pop()() is None
        assert sum(engine.generate(ids, 20), []) == text
        assert sum(Engine(model, Vanilla(), 48).generate(ids, 20), []) == text
    longer = Engine(model, Vanilla(), 256)
    assert model.kv.shape[4] == model.rope.shape[1] == 256 + SPARE
    assert sum(longer.generate(ids, 20), []) == text


@pytest.mark.slow
def test_more_slots_than_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """Fails if real memory that ends, on a CPU, is not told in one line: 2**24 slots take 4 TB of cache here."""
    raw = tiny.SHAPE | {"vocab_size": 300, "num_hidden_layers": 2, "num_attention_heads": 64, "num_key_value_heads": 64,
                        "head_dim": 1024, "hidden_size": 16}
    folder = tiny.save_everything(tmp_path / "x")
    model = tiny.target(0, torch.float32, **raw)
    tiny.save_target(model, folder)
    args = ["generate.py", "--checkpoint", str(folder), "--device", "cpu", "--prompt", "x", "--max_seq_len", str(2**24)]
    monkeypatch.setattr("sys.argv", args)
    with pytest.raises(SystemExit) as ended:
        generate.main()
    err = capsys.readouterr().err
    assert ended.value.code == 2 and err.startswith("error: out of memory") and "--max_seq_len" in err
