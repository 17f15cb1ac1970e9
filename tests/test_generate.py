"""The command line: what it prints, its JSON, and that bad input ends in one line and exit code 2."""
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from conftest import DEMO, ROOT, all_cores
from helpers import KEYS, Payload

import generate
from app import answer, options
from drafters import methods, tree_size
from sampling import Sampling


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint with all that generate.py can load."""
    return tiny.save_everything(tmp_path_factory.mktemp("generate") / "everything")


@pytest.fixture
def copy(everything: Path, tmp_path: Path) -> Path:
    """The tiny checkpoint with links for files, so that a test may break any of them."""
    folder = tmp_path / "copy"
    shutil.copytree(everything, folder, copy_function=lambda a, b: Path(b).symlink_to(Path(a).resolve()))
    return folder


@pytest.mark.slow
def test_compare_json(call, demo: Path) -> None:
    """Fails if a key of the documented JSON is missing, or if streamed text, decoded tokens and counts do not agree."""
    code, out, err = call("--checkpoint", demo, "--eagle2", "--compare", "--json", "--prompt", "Name three colours.",
                          "--max_new_tokens", 24, "--dtype", "float32", "--device", "cpu")
    assert code == 0
    *text, last = out.rstrip("\n").split("\n")
    result = json.loads(last)
    assert result.keys() == KEYS | {"vanilla", "identical", "start_s", "first_token_s"}
    assert result["vanilla"].keys() == KEYS
    assert result["identical"] is True and result["tokens"] == result["vanilla"]["tokens"]
    assert "\n".join(text).rstrip() == result["text"].rstrip()
    assert result["new_tokens"] == len(result["tokens"]) == 1 + sum(result["gained"]) <= 24
    assert result["cycles"] == len(result["gained"]) and set(result["vanilla"]["gained"]) <= {1}
    assert result["mean_gained"] == pytest.approx(sum(result["gained"]) / result["cycles"])
    assert result["method"] == "eagle2" and result["vanilla"]["method"] == "vanilla" and result["dtype"] == "float32"
    assert "identical tokens" in err and "tokens/s" in err


@pytest.mark.slow
def test_imports_and_first_token(everything: Path) -> None:
    """Fails if a run imports what it does not use and what takes long: torch's compiler, which a random number on the
    meta device brings in, Triton without a GPU, or what other commands and a chat need. And if the statistics do not
    say when the first token came."""
    code = ("import sys, generate\n"
            "generate.main()\n"
            "print(*{'torch._dynamo', 'torch._inductor', 'sympy', 'triton', 'transformers', 'gguf', 'huggingface_hub', "
            "'prompt_toolkit', 'matplotlib', 'tiktoken', 'sentencepiece', 'ops.startup'} & {*sys.modules})")
    words = ["--checkpoint", str(everything), "--device", "cpu", "--eagle2", "--prompt", "x", "--max_new_tokens", "2"]
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    start = time.perf_counter()
    run = subprocess.run([sys.executable, "-c", code, *words, "--json"], cwd=ROOT, env=env, capture_output=True,
                         text=True)
    took = time.perf_counter() - start
    *_, result, imported = run.stdout.splitlines()
    assert imported == "ops.startup" or torch.cuda.is_available()
    result = json.loads(result)
    parts = result["start_s"]
    assert [*parts][0] == "imports" and [*parts][-1] == "prompt" and {"model", "tokenizer", "draft head"} < parts.keys()
    assert parts["prompt"] == result["prefill_s"] and 0.5 < parts["imports"] < sum(parts.values()) < took
    assert result["first_token_s"] == sum(parts.values())
    assert f"first token after {result['first_token_s']:.2f} s: imports {parts['imports']:.2f}" in run.stderr


@pytest.mark.slow
def test_readme(call, demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """Fails if README's Python no longer runs, or prints something else than the command line does."""
    snippet = (ROOT / "README.md").read_text(encoding="utf-8").partition("### From Python")[2]
    snippet = snippet.partition("```python\n")[2].partition("```")[0]
    folder = tmp_path / DEMO.relative_to(ROOT)
    folder.parent.mkdir(parents=True)
    folder.symlink_to(demo.resolve())
    monkeypatch.chdir(tmp_path)
    with all_cores():
        exec(snippet, {})
    said = capsys.readouterr().out
    code, out, _ = call("--checkpoint", folder, "--prompt", "Hello!", "--eagle2", "--draft_tokens", 16, "--temperature",
                        0.7, "--top_p", 0.9, "--seed", 1, "--max_new_tokens", 64)
    assert code == 0 and said == out != "\n"


@pytest.mark.slow
def test_sampled_text_does_not_depend_on_the_drafter(call, everything: Path) -> None:
    """Fails if the text of a seed depends on the drafter, or not on the seed."""
    words = ("--checkpoint", everything, "--prompt", "Tell me a joke.", "--max_new_tokens", 30, "--dtype", "float32",
             "--temperature", 1, "--device", "cpu")
    texts = [call(*words, *more)[1] for more in (["--seed", 7], ["--seed", 7, "--eagle"], ["--seed", 7, "--eagle2"],
                                                 ["--seed", 8, "--eagle2"])]
    assert texts[0] == texts[1] == texts[2] != texts[3]


@pytest.mark.slow
def test_stop(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Fails if --stop shows more than the text before it, if another drafter ends at another token, or if the last
    cycle's tokens after it are counted."""
    words = ["--checkpoint", str(tiny.save_everything(tmp_path / "x")), "--device", "cpu", "--dtype", "float32",
             "--max_seq_len", "128", "--prompt", "Count", "--stop", "never", "--stop", "ever"]
    args = generate.parse_args([*words, "--eagle2", "--draft_vocab", "0"])
    assert args.stop == ["never", "ever"]
    fast, plain = options.load_engine(args), options.load_engine(generate.parse_args(words))
    tokenizer = fast.tokenizer
    ids = generate.read_prompt(args, tokenizer)

    def write(engine, *stops: str) -> dict:
        result = answer.generate(engine, ids, 60, Sampling(), tokenizer, "any", True, stops)
        assert capsys.readouterr().out == result["text"] + "\n"
        assert result["new_tokens"] == len(result["tokens"]) == 1 + sum(result["gained"])
        assert all(0 < gained <= 4 for gained in result["gained"])
        return result

    text = write(plain)["text"]
    assert max(write(fast)["gained"]) > 1
    assert write(fast, *args.stop)["text"] == text and not any(stop in text for stop in args.stop)
    for middle in range(0, 24, 3):  # within a cycle or at its end
        stop = text[middle:middle + 3]  # of a token a byte
        result = write(fast, "never", stop)
        assert result["stop"] == "string" and result["text"] == text.partition(stop)[0]
        assert result["tokens"] == write(plain, "never", stop)["tokens"] and result["new_tokens"] < 60


@pytest.mark.slow
def test_nobody_reads_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """Fails if there is a traceback behind `| head`, or on Ctrl-C."""
    folder, pipe = tiny.save_everything(tmp_path / "x"), subprocess.PIPE
    words = ["generate.py", "--checkpoint", str(folder), "--device", "cpu", "--prompt", "x"]
    run = subprocess.Popen([sys.executable, *words, "--json"], cwd=ROOT, stdout=pipe, stderr=pipe)
    run.stdout.close()
    assert "Traceback" not in run.stderr.read().decode() and run.wait() == 141

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt
    monkeypatch.setattr(answer, "run", interrupt)
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit, match="130"):
        generate.main()
    assert capsys.readouterr().err.endswith("interrupted\n")


@pytest.mark.slow
def test_context_is_filled_and_named(call, demo: Path) -> None:
    """Fails if a full context is an error, is left partly unused, or is not named as what ended the text, or if one
    that is longer than the model's goes unnoticed."""
    code, out, err = call("--checkpoint", demo, "--raw", "--prompt", "One two three four", "--max_seq_len", 12,
                        "--eagle2", "--json", "--device", "cpu")
    result = json.loads(out.splitlines()[-1])
    assert code == 0 and result["stop"] == "context"
    assert result["prompt_tokens"] + result["new_tokens"] == 12
    assert err.count("the context of 12 tokens (--max_seq_len) ended the answer") == 1 and "nonsense" not in err
    code, out, err = call("--checkpoint", demo, "--prompt", "Hi", "--max_seq_len", 8193, "--max_new_tokens", 2,
                          "--device", "cpu")
    assert code == 0 and "--max_seq_len 8193: the model was made for 8192 tokens" in err and "ended the" not in err


def test_prompt_from_file_and_stdin(call, everything: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if another text reaches the model by @FILE or - than by --prompt."""
    (tmp_path / "p.txt").write_text("Hello there", encoding="utf-8")
    words = ("--checkpoint", everything, "--max_new_tokens", 20, "--device", "cpu", "--prompt")
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello there"))
    outs = {call(*words, source)[1] for source in ("Hello there", f"@{tmp_path}/p.txt", "-")}
    assert len(outs) == 1 and outs != {""}
    assert call(*words, "Hello where")[1] not in outs


def test_byte_order_marks(call, everything: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if the mark that some editors put before a text becomes part of a prompt, or if a file in another encoding
    is not named."""
    words = ("--checkpoint", everything, "--raw", "--json", "--max_new_tokens", 1, "--device", "cpu", "--prompt")
    (tmp_path / "p.txt").write_bytes(b"\xef\xbb\xbfhi")
    (tmp_path / "utf16.txt").write_text("hi", encoding="utf-16")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xef\xbb\xbfhi"), "utf-8"))
    for source in (f"@{tmp_path}/p.txt", "-", "hi"):
        assert json.loads(call(*words, source)[1].splitlines()[-1])["prompt_tokens"] == 2
    code, _, err = call(*words, f"@{tmp_path}/utf16.txt")
    assert code == 2 and "utf16.txt: not UTF-8" in err and err.count("\n") == 1
    (tmp_path / "q.jsonl").write_bytes(b'\xef\xbb\xbf{"prompt": "hi"}\n')
    assert call(*words[:3], "--device", "cpu", "--prompt_file", tmp_path / "q.jsonl", "--output", tmp_path / "a.jsonl",
                "--max_new_tokens", 1)[0] == 0
    assert json.loads((tmp_path / "a.jsonl").read_text())["prompt_tokens"] == 2


def test_what_is_said_about_templates(call, copy: Path, tmp_path: Path) -> None:
    """Fails if nobody says that a model has no chat template, that an answer has no end, or that a template is broken;
    if one of these is said where it does not matter; or if --chat_template does not give one."""
    config = json.loads((copy / "tokenizer_config.json").read_text())
    (copy / "tokenizer_config.json").unlink()

    def ask(template: str | None, *words: object) -> tuple[int, list[str]]:
        (copy / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": template}))
        code, _, err = call("--checkpoint", copy, "--device", "cpu", "--max_new_tokens", 2, *words)
        statistics = 0 if code else 2 if "--prompt" in words else 1
        return code, err.splitlines()[:len(err.splitlines()) - statistics]

    (tmp_path / "good.jinja").write_text("{{ messages[0].content }}|")
    (tmp_path / "q.jsonl").write_text('{"prompt": "x"}\n')
    prompt, raw = ("--prompt", "x"), ("--prompt", "x", "--raw")
    batch = ("--prompt_file", tmp_path / "q.jsonl", "--output", tmp_path / "a.jsonl")
    given = ("--prompt", "x", "--chat_template", tmp_path / "good.jinja")
    good, broken = config["chat_template"], "{% do x %}"
    endless = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    for template, words, code, said in (
            (good, prompt, 0, None), (None, prompt, 0, "no chat template"), (None, batch, 0, "no chat template"),
            (None, raw, 0, None), (None, ("--interactive",), 2, "--chat_template FILE"), (None, given, 0, "no special"),
            (endless, prompt, 0, "--stop user: ends it"), (endless, (*prompt, "--stop", "user:"), 0, None),
            (endless, raw, 0, None), (broken, prompt, 2, "tag 'do'"), (broken, raw, 0, None),
            (broken, given, 0, "no special"), (broken, ("--interactive",), 2, "tag 'do'")):
        found = ask(template, *words)
        assert found[0] == code and len(found[1]) == bool(said) and (said or "") in "".join(found[1]), (template, words)
    engine = options.Engine.load(copy, device="cpu", chat_template=str(tmp_path / "good.jinja"))
    assert engine.tokenizer.chat([{"role": "user", "content": "x"}]) == [*b"x|"]


def test_ids_beyond_the_model(call, copy: Path) -> None:
    """Fails if a tokenizer with a token that the model lacks is refused, if a prompt with that token is not, or if it
    may end a text, where no tensor has a place for it."""
    config = json.loads((copy / "tokenizer_config.json").read_text())
    for name in ("tokenizer_config.json", "generation_config.json"):
        (copy / name).unlink()
    more = {"pad_token": "<pad>", "sep_token": "<a>", "cls_token": "<b>", "mask_token": "<c>"}  # 260 comes fourth
    (copy / "tokenizer_config.json").write_text(json.dumps(config | more))
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": [257, 260, 261, 32000]}))
    words = ("--checkpoint", copy, "--device", "cpu", "--max_new_tokens", 2, "--eagle2")
    assert call(*words, "--prompt", "x")[0] == 0
    tokenizer = options.load_engine(generate.parse_args([*map(str, words), "--prompt", "x"])).tokenizer
    names = [tokenizer.bpe.id_to_token(i) for i in range(258, tokenizer.vocab_size)]
    assert tokenizer.vocab_size == 262 and tokenizer.stop_ids == {257}
    for raw in ((), ("--raw",)):
        assert call(*words, "--prompt", f"x{names[1]}", *raw)[0] == 0
        code, out, err = call(*words, "--prompt", f"x{names[2]}", *raw)
        assert code == 2 and out == "" and err.count("\n") == 1 and names[2] in err and "260" in err


@pytest.mark.slow
@pytest.mark.parametrize("slots", [2, 3])
@pytest.mark.parametrize("method", ["vanilla", "lookup", "lookahead", "medusa", "speculate", "eagle", "eagle2",
                                    "eagle2+lookup"])
def test_the_smallest_context(method: str, slots: int, call, everything: Path) -> None:
    """Fails if a context of 2 or 3 tokens, or an answer of one token, ends in anything but the tokens that fit, with
    any method, or has no line of figures."""
    weights = {"medusa": ("--medusa", everything / "medusa"), "speculate": ("--speculate", everything / "draft")}
    words = ("--checkpoint", everything, "--device", "cpu", "--dtype", "float32", "--raw", "--max_seq_len", slots)
    compare = () if method == "vanilla" else ("--compare", "--show_tree")
    for prompt in ("x", "xy")[:slots - 1]:
        for limit in (1, 9):
            code, out, err = call(*words, "--prompt", prompt, "--method", method, *weights.get(method, ()), "--json",
                                  "--max_new_tokens", limit, *compare)
            result = json.loads(out.splitlines()[-1])
            assert code == 0 and result["new_tokens"] == min(limit, slots - len(prompt)) and "nan" not in err
            assert result.get("identical", True) and "tokens/s" in err
    code, _, err = call(*words, "--prompt", "x" * slots)
    assert code == 2 and f"--max_seq_len {slots}" in err


@pytest.mark.parametrize("words, message", [
    (["--prompt", "x", "--draft_tokens", "8"], "is for the methods eagle2, eagle2+lookup"),
    (["--prompt", "x", "--draft_tokens", "auto"], "is for the methods eagle2, eagle2+lookup"),
    (["--prompt", "x", "--eagle", "--tree_table"], "is for the methods eagle2, eagle2+lookup"),
    (["--prompt", "x", "--eagle2", "--draft_tokens", "many"], "--draft_tokens: 'many' is neither a number"),
    (["--prompt", "x", "--eagle2", "--draft_tokens", "8", "--tree_table"], "--tree_table"),
    (["--prompt", "x", "--eagle2", "--draft_tokens", "auto", "--draft_depth", "2"], "choose depth"),
    (["--prompt", "x", "--eagle2", "--tree_table", "--draft_topk", "2"], "choose depth"),
    (["--prompt", "x", "--eagle2", "--tree_table", "--draft_depth", "0"], "choose depth"),
    (["--prompt", "x", "--eagle2", "--rejection"], "no method: rejection goes with speculate"),
    (["--prompt", "x", "--medusa", "a", "--lookup"], "no method: lookup goes with speculate, eagle2, eagle3, block"),
    (["--prompt", "x", "--lookup", "--draft_tokens", "9"], "--draft_tokens"),
    (["--prompt", "x", "--eagle2", "--chain", "9"], "--chain"),
    (["--prompt", "x", "--lookup", "--chain", "0"], "1 to 16"),
    (["--prompt", "x", "--eagle2", "--lookup", "--chain", "0"], "1 to 16"),
    (["--prompt", "x", "--speculate", "DRAFT", "--chain", "0"], "1 to 16"),
    (["--prompt", "x", "--speculate", "DRAFT", "--lookup", "--chain", "0"], "1 to 16"),
    (["--prompt", "x", "--lookahead", "--window", "0", "0", "0"], "at least 1"),
    (["--prompt", "x", "--max_seq_len", "0"], "--max_seq_len must be 2 to"),
    (["--prompt", "x", "--max_seq_len", "1"], "--max_seq_len must be 2 to"),
    (["--prompt", "x", "--draft_vocab", "0"], "--draft_vocab is for the methods eagle, eagle2"),
    (["--prompt", "x", "--chain", "9"], "--chain is for the methods lookup, speculate"),
    (["--prompt", "x", "--window", "7", "5", "7"], "--window is for the method lookahead"),
    (["--prompt", "x", "--method", "eagle4"], "invalid choice: 'eagle4'"),
    (["--prompt", "x", "--method", "eagle2", "--lookup"], "name two methods"),
    (["--prompt", "x", "--method", "vanilla", "--eagle"], "name two methods"),
    (["--prompt", "x", "--method", "lookup", "--medusa", "x"], "name two methods"),
    (["--prompt", "x", "--method", "medusa"], "--medusa DIR is missing"),
    (["--prompt", "x", "--method", "speculate+lookup"], "--speculate DIR is missing"),
    (["--memory", "--prompt", "x"], "not allowed with"),
    (["--memory", "--eagle2", "--draft_tokens", "0"], "--draft_tokens"),
    (["--prompt", "x", "--lookup", "--draft_depth", "2"], "is for the methods eagle2, eagle2+lookup"),
    (["--prompt", "x", "--draft_vocab", "12"], "--draft_vocab"),
    (["--prompt", "x", "--eagle2", "--draft_vocab", "-1"], "--draft_vocab"),
    (["--prompt", "x", "--eagle", "--draft_depth", "2"], "is for the methods eagle2, eagle2+lookup"),
    (["--prompt", "x", "--quantize", "int8", "--group", "64"], "--group"),
    (["--prompt", "x", "--group", "64"], "--quantize int4"),
    (["--prompt", "x", "--quantize", "int5"], "int8dyn"),
    (["--prompt", "x", "--eagle", "--eagle2"], "not allowed with"),
    (["--prompt", "x", "--compare"], "--compare need"),
    (["--prompt", "x", "--top_p", "0.5"], "--temperature above 0"),
    (["--prompt", "x", "--temperature", "-1"], "--temperature"),
    (["--prompt", "x", "--temperature", "nan"], "--temperature"),
    (["--prompt", "x", "--temperature", "inf"], "--temperature"),
    (["--prompt", "x", "--temperature", "1e-7"], "--temperature"),
    (["--prompt", "x", "--temperature", "1e38", "--top_p", "0.5"], "--temperature"),
    (["--prompt", "x", "--temperature", "1", "--top_p", "0"], "--top_p"),
    (["--prompt", "x", "--temperature", "1", "--top_p", "nan"], "--top_p"),
    (["--prompt", "x", "--temperature", "1", "--min_p", "1.01"], "--min_p"),
    (["--prompt", "x", "--temperature", "1", "--top_k", "-1"], "--top_k"),
    (["--prompt", "x", "--raw", "--chat_template", "x"], "--chat_template is without --raw"),
    (["--prompt", "x", "--chat_template", "/no/such/template"], "/no/such/template"),
    (["--prompt", "x", "--max_new_tokens", "0"], "--max_new_tokens"),
    (["--prompt", "x", "--seed", str(2**64)], "--seed"),
    (["--prompt", "x", "--stop", ""], "--stop"),
    (["--prompt", ""], "empty"),
    (["--prompt", " \n"], "empty"),
    (["--prompt", "@/no/such/file"], "/no/such/file"),
    (["--prompt", "word " * 300, "--max_seq_len", "256"], "--max_seq_len 256"),
    (["--prompt", "x", "--eagle2", "--draft_tokens", "129"], "--draft_tokens"),
    (["--prompt", "x", "--eagle2", "--draft_tokens", "0"], "2-128 --draft_tokens"),
    (["--prompt", "x", "--eagle2", "--draft_depth", "0"], "1-10 --draft_depth"),
    (["--prompt", "x", "--eagle2", "--draft_topk", "0"], "1-10 --draft_topk"),
    (["--prompt", "x", "--eagle2", "--draft_vocab", "99999999"], "draft_vocab.json"),
    (["--prompt", "x", "--eagle2", "--draft", "/no/such/head"], "/no/such/head"),
])
def test_bad_flags(words: list[str], message: str, call, everything: Path) -> None:
    """Fails if a command line that makes no sense ends in a traceback, in more than one line of error, or in a guess:
    0, say, taken for an option that was not given."""
    words = [everything / "draft" if word == "DRAFT" else word for word in words]
    code, out, err = call("--checkpoint", everything, "--device", "cpu", *words)
    *usage, error = err.splitlines()
    assert code == 2 and message in error and "error: " in error and out == ""
    assert all(line.startswith(("usage: ", " ")) for line in usage)


def test_a_file_that_is_no_model(call, everything: Path, tmp_path: Path) -> None:
    """Fails if a file that has to be converted, or a sound config.json, is called damaged."""
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    for file in (tmp_path / "model.gguf", everything / "config.json"):
        code, _, err = call("--checkpoint", file, "--device", "cpu", "--prompt", "x")
        assert code == 2 and "should be a folder that convert_hf_checkpoint.py wrote" in err and "damaged" not in err


def test_tree_that_fits(call, copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if --draft_tokens auto does not refuse a head without a curve in one line, shows its table unasked, is
    measured again in the next run, or drafts another tree than the chosen one."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    words = ("--checkpoint", copy, "--device", "cpu", "--prompt", "x", "--eagle2", "--max_new_tokens", 4, "--json")
    curve = copy / "eagle/acceptance.json"
    curve.unlink(missing_ok=True)
    for more in (["--draft_tokens", "auto"], ["--tree_table"]):
        code, out, err = call(*words, *more)
        assert code == 2 and err.count("\n") == 1 and "acceptance.json" in err and "train.py" in err and out == ""
    curve.write_text(json.dumps({"nodes": tree_size.NODES, "topk": 10, "gained": [[1, 2, 3] + [3] * 5] * 8}))
    measured, profile = [], [1.0] * (3 + len(tree_size.NODES))
    monkeypatch.setattr(tree_size, "measure", lambda *inputs: measured.append(inputs) or profile)
    _, out, err = call(*words, "--tree_table")
    assert "*600.0" in err and len(json.loads(out.splitlines()[-1])["accept_by_depth"]) == 3
    _, out, err = call(*words, "--draft_tokens", "auto")
    assert "verify, ms" not in err and len(json.loads(out.splitlines()[-1])["accept_by_depth"]) == 3
    assert len(measured) == 1 and (tmp_path / "cache/eagle2/trees.json").is_file()
    call(*words)
    assert len(measured) == 1
    curve.write_text("{}")
    code, _, err = call(*words, "--draft_tokens", "auto")
    assert code == 2 and "damaged" in err and err.count("\n") == 1


@pytest.mark.parametrize("words, cuda, tree", [
    ((), True, "fit"), ((), False, methods.CPU_TREE), (("--draft_tokens", "auto"), False, "fit"),
    (("--draft_tokens", "9"), True, (9, 6, 10)), (("--draft_depth", "2"), True, (60, 2, 10)),
    (("--draft_topk", "4"), False, (8, 4, 4)), (("--draft_depth", "0"), False, (8, 0, 3)),
    (("--draft_tokens", "0"), True, (0, 6, 10)), (("--no_compile",), True, methods.GPU_TREE)])
def test_which_tree(words: tuple, cuda: bool, tree: tuple | str, tmp_path: Path, monkeypatch) -> None:
    """Fails if the best size replaces one that was asked for, 0 included, or if defaults are wrong where there is no
    curve or no time to measure."""
    model = SimpleNamespace(embed=SimpleNamespace(weight=SimpleNamespace(is_cuda=cuda)))
    head = tmp_path / "eagle"
    head.mkdir()
    args = generate.parse_args(["--checkpoint", str(tmp_path), "--prompt", "x", "--eagle2", *words])
    setup = methods.Setup(model, args, SimpleNamespace(folder="eagle"), 64)
    found = {"fit": (16, 4, 10)}
    monkeypatch.setattr(methods, "profile_key", lambda *inputs: "")
    monkeypatch.setattr(methods, "fastest_tree", lambda *inputs: found["fit"])
    if "auto" not in words:
        without = methods.tree_shape(setup)
        assert without == tree or (without, tree) == (methods.GPU_TREE, "fit")
    curve = {"nodes": tree_size.NODES, "topk": 10, "gained": [[2] * 8] * 8}
    tree_size.curve_path(head).write_text(json.dumps(curve))
    assert methods.tree_shape(setup) == (found["fit"] if tree == "fit" else tree)
    found["fit"] = None
    default = methods.GPU_TREE if cuda else methods.CPU_TREE
    assert methods.tree_shape(setup) == (default if tree == "fit" else tree)


def test_no_cuda(call, everything: Path) -> None:
    """Fails if --device cuda ends in a traceback on a machine without CUDA."""
    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    code, _, err = call("--checkpoint", everything, "--device", "cuda", "--prompt", "x")
    assert code == 2 and "--device cuda" in err


@pytest.mark.parametrize("how", ["missing", "half converted", "not converted", "truncated", "garbage", "no tokenizer",
                                 "other head", "evil head", "truncated head", "no head"])
def test_bad_checkpoints(how: str, call, copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a bad checkpoint or head is not refused in one line that names the file, or if a pickle is executed: the
    first thing that goes wrong for a user."""
    monkeypatch.chdir(tmp_path)
    weights, head = copy / "model.safetensors", copy / "eagle"
    data = weights.read_bytes() if how in ("truncated", "not converted") else b""
    named = {"missing": "nowhere", "half converted": "config.json", "no tokenizer": "tokenizer",
             "no head": "eagle"}.get(how, "eagle" if "head" in how else "model.safetensors")
    if how == "half converted":
        (copy / "config.json").unlink()
    elif how == "no tokenizer":
        (copy / "tokenizer.json").unlink()
    elif how in ("truncated", "garbage", "not converted"):
        weights.unlink()
        weights.write_bytes({"truncated": data[:len(data) // 2], "garbage": bytes(range(256)) * 40,
                             "not converted": data.replace(b"eagle2-native-1", b"something-else1", 1)}[how])
    elif how != "missing":
        shutil.rmtree(head)
        if how == "other head":
            tiny.save_head(tiny.head(tiny.target()), head)
        elif how != "no head":
            head.mkdir()
            shutil.copy(copy.parent / "copy" / "config.json", head / "config.json")
            evil = pickle.dumps({"fc.weight": Payload(Path("pickle-was-executed"))})
            blob = evil if how == "evil head" else b"PK\x03\x04 cut"
            (head / "pytorch_model.bin").write_bytes(blob)
    code, out, err = call("--checkpoint", copy.parent / "nowhere" if how == "missing" else copy, "--eagle2",
                          "--prompt", "x", "--device", "cpu")
    assert code == 2 and err.startswith("error: ") and named in err and err.count("\n") == 1 and out == ""
    assert not Path("pickle-was-executed").exists()
