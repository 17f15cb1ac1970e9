"""Hostile files: pickles and chat templates that try to run code or to fill the memory, and odd tensors in pickles.

    python -m pytest tests/formats/test_fuzz_code.py
"""
import io
import os
import pickle
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from damage import flipped, refusal
from tiny_sources import save_published

from convert_hf_checkpoint import convert
from draft import Eagle2
from drafters.heads import load_head
from drafters.medusa import Medusa, load_medusa
from model import Llama, load_model
from tokenizer import Tokenizer


class Call:
    """Unpickling this calls a function."""

    def __init__(self, function: Callable, *inputs: object) -> None:
        self.call = function, inputs

    def __reduce__(self) -> tuple:
        return self.call


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny.save_everything(tmp_path_factory.mktemp("hostile") / "model")
    save_published(folder / "source", "bin")
    return folder


@pytest.fixture(scope="module")
def target(folder: Path) -> Llama:
    return load_model(folder)


@pytest.fixture
def loaders(folder: Path, target: Llama) -> dict[Path, Callable[[], object]]:
    """Each file that may be a pickle, and what loads it."""
    return {folder / "eagle_pickle/pytorch_model.bin":
            lambda: Eagle2(load_head(folder / "eagle_pickle", target), target, 8, 2, 4),
            folder / "medusa_pickle/medusa_lm_head.pt":
            lambda: Medusa(load_medusa(folder / "medusa_pickle", target), target),
            folder / "source/pytorch_model-00001-of-00002.bin": lambda: convert(folder / "source", folder / "out")}


def saved(value: object, zipped: bool = True) -> bytes:
    file = io.BytesIO()
    torch.save(value, file, _use_new_zipfile_serialization=zipped)
    return file.getvalue()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_pickles_run_nothing(loaders: dict, tmp_path: Path) -> None:
    """Fails if a pickle with a call in it is not refused, or is run: beside the tensors or in place of them, as torch
    saves it, as torch did before 1.6, or bare; whole or with changed bytes."""
    mark = tmp_path / "was_here"
    code = f"__import__('os').mkdir({str(mark)!r})"
    attacks = [Call(os.mkdir, str(mark)), Call(os.system, f"mkdir {mark}"), Call(eval, code), Call(exec, code),
               Call(Path.mkdir, mark), Call(getattr, Path, "mkdir"), Call(torch.load, str(mark)), Call(open, mark, "w")]
    draw = random.Random(0)
    for path, load in loaders.items():
        data = path.read_bytes()
        tensors = torch.load(path, weights_only=True)
        name = min(tensors)
        for attack in attacks:
            for value in (attack, tensors | {name: attack}, tensors | {"more": [attack]}):
                raw = draw.choice([saved(value), saved(value, False), pickle.dumps(value), pickle.dumps(value, 0)])
                path.write_bytes(raw)
                assert refusal(load) != "", (path.name, attack.call)
                path.write_bytes(flipped(raw, draw))
                refusal(load)
                assert not mark.exists(), (path.name, attack.call)
        path.write_bytes(data)
        assert refusal(load) == ""


def odd_tensors(t: torch.Tensor) -> dict[str, object]:
    """What a pickle may hold in place of the tensor t."""
    return {"no data": torch.empty_like(t, device="meta"), "sparse": t.to_sparse(), "a list": t.tolist(), "none": None,
            "one element for all": t.flatten()[:1].view([1] * t.dim()).expand(t.shape),
            "one element for terabytes": t.flatten()[:1].view([1] * t.dim()).expand([2**20] * t.dim()),
            "quantised": torch.quantize_per_tensor(t, 0.1, 0, torch.qint8), "complex": t.to(torch.complex64),
            "float8": t.to(torch.float8_e4m3fn), "integers": t.to(torch.int32), "booleans": t > 0,
            "nested": torch.nested.nested_tensor(list(t)) if t.dim() > 1 else t[:0], "a number": t.flatten()[0].clone(),
            "one row less": t[:-1].clone(), "nothing": t[:0].clone(), "one dimension more": t[None].clone(),
            "conjugated": torch.complex(t, t).conj(), "a class": torch.Tensor, "a size": t.shape}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor", "ignore:The PyTorch API of nested tensors")
def test_odd_pickles(loaders: dict) -> None:
    """Fails if a pickle whose tensors are of another kind than strided numbers is not refused cleanly, or if one that
    repeats an element fills the memory. Those of the right shape may work."""
    for path, load in loaders.items():
        data = path.read_bytes()
        tensors = torch.load(path, weights_only=True)
        for dim in (1, 2):
            name = min(name for name in tensors if tensors[name].dim() == dim)
            for how, odd in odd_tensors(tensors[name]).items():
                path.write_bytes(saved(tensors | {name: odd}))
                assert refusal(load) or how in ("one element for all", "float8", "sparse"), (path.name, name, how)
        for value in ([*tensors.values()], {"model": tensors}, {1: tensors[name]}, None, tensors[name], {}, "",
                      {**tensors, 7: tensors[name]}, {**tensors, ("a", 1): tensors[name]}):
            path.write_bytes(saved(value))
            assert refusal(load) != "", path.name
        path.write_bytes(data)
        assert refusal(load) == ""


ESCAPES = [
    "''.__class__.__mro__[1].__subclasses__()", "cycler.__init__.__globals__.os.mkdir(MARK)", "[].append.__class__",
    "self._TemplateReference__context", "namespace.__init__.__globals__['os'].mkdir(MARK)", "strftime_now.__globals__",
    "lipsum.__globals__.os.mkdir(MARK)", "(''|attr('__class__'))|attr('mro')", "joiner.__init__.__globals__",
    "raise_exception.__globals__['__builtins__']['eval'](\"__import__('os').mkdir(MARK)\")", "''['__class__']",
    "'{0.__class__.__init__.__globals__}'.format(messages)", "messages|map(attribute='__class__')|list", "dict.mro()",
    "messages.append('x')", "messages|tojson(default=lipsum)", "().__doc__.__class__", "(1).__class__.__base__",
    "messages[0].items.__self__.clear()", "messages[0].update(role='x')", "'%s'|format(messages.__class__)",
    "messages.__reduce_ex__(2)", "''.join.__func__", "caller.__code__", "raise_exception.__code__.co_consts",
    "self.__init__.__globals__['__builtins__'].open(MARK, 'w')"]
MEMORY = ["'x' * 10**10", "'%9999999999d' % 1", "'{:>9999999999}'.format(1)", "'x'|center(10**10)", "[0] * 10**10",
          "range(10**12)|list", "'x'|indent(10**10)", "'x'.ljust(10**10)"]


@pytest.mark.slow
def test_templates_run_nothing(tmp_path: Path) -> None:
    """Fails if a chat template reaches Python's objects, changes the conversation, or fills the memory."""
    tiny.save_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    mark = tmp_path / "was_here"
    file = tmp_path / "chat_template.jinja"
    messages = [{"role": "user", "content": "Hi"}]
    texts = []

    def render() -> None:
        texts.append(Tokenizer(tmp_path).render(messages))

    for escape in [*ESCAPES, *MEMORY]:
        for form in ("{{ %s }}", "{%% set x = %s %%}{{ x }}", "{%% for x in %s %%}{{ x }}{%% endfor %%}"):
            file.write_text(form % escape.replace("MARK", repr(str(mark))))
            texts.clear()
            refusal(render)
            assert not mark.exists() and "<class" not in "".join(texts) and "__" not in "".join(texts), escape
            assert messages == [{"role": "user", "content": "Hi"}], escape
