"""convert_hf_checkpoint.py with hub ids: what is downloaded, and what an error says. A local server is the hub.

    python -m pytest tests/test_hub.py
"""
import hashlib
import http.server
import json
import threading
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from published import head_folder, hf_folder, repack, run
from safetensors.torch import load_file, safe_open, save_file

from convert_hf_checkpoint import convert
from formats import hub as hub_module
from formats.hub import name_of
from model import load_model

torch.set_num_threads(1)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A local server in place of the hub. repos: each repository's folder, or the status and code of the error that the
    server answers with, or the body of every answer. asked: the files that were downloaded. sent: for weights, the
    first byte and the file's size.
    """
    repos: dict[str, Path | tuple[int, str] | bytes] = {}
    asked: list[str] = []
    sent: list[tuple[int, int]] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *args): pass

        def answer(self, status: int, body: bytes = b"", length: int | None = None, **headers: str) -> None:
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(body) if length is None else length))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def do_GET(self):
            path = self.path.split("?")[0]
            name = "/".join(path.removeprefix("/api/models").strip("/").split("/")[:2])
            repo = repos.get(name, (401, "RepoNotFound"))
            if isinstance(repo, tuple):
                return self.answer(repo[0], X_Error_Code=repo[1], X_Error_Message="no")
            if isinstance(repo, bytes):
                return self.answer(200, repo, X_Repo_Commit="0" * 40, ETag='"0"')
            files = sorted(file.name for file in repo.iterdir())
            if "/tree/" in path:
                tree = [{"type": "file", "path": file, "size": (repo / file).stat().st_size,
                         "oid": hashlib.sha1((repo / file).read_bytes()).hexdigest()} for file in files]
                return self.answer(200, json.dumps(tree).encode(), Content_Type="application/json")
            if path.startswith("/api/"):
                info = {"id": name, "modelId": name, "sha": "0" * 40, "siblings": [{"rfilename": f} for f in files],
                        "private": False, "downloads": 0, "likes": 0, "tags": []}
                return self.answer(200, json.dumps(info).encode(), Content_Type="application/json")
            file = repo / path.rsplit("/", 1)[1]
            if not file.is_file():
                return self.answer(404, X_Error_Code="EntryNotFound")
            data = file.read_bytes()
            if self.command == "GET":
                asked.append(file.name)
            half = self.command == "GET" and (repo / "BREAK").exists() and file.suffix == ".safetensors"
            start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0])
            if self.command == "GET" and file.suffix == ".safetensors":
                sent.append((start, len(data)))
            end = len(data) // 2 if half else len(data)
            self.answer(206 if start else 200, data[start:max(start, end)], len(data) - start, X_Repo_Commit="0" * 40,
                        ETag=f'"{hashlib.sha1(data).hexdigest()}"', **(
                            {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"} if start else {}))
            self.close_connection = True

        do_HEAD = do_GET

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    api = huggingface_hub.HfApi(endpoint=f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(hub_module, "snapshot_download",
                        partial(api.snapshot_download, cache_dir=tmp_path / "cache", max_workers=1))
    monkeypatch.setattr(hub_module, "list_repo_files", api.list_repo_files)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.chdir(tmp_path)
    yield SimpleNamespace(repos=repos, asked=asked, sent=sent, server=server)
    server.shutdown()
    server.server_close()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["safetensors", "sharded", "bin", "sharded bin"])
def test_hub_download(kind, hub, tmp_path, monkeypatch):
    """Fails if the weights are downloaded in two formats, or with files of other programs."""
    tensors = hf_folder(tmp_path / "repo")
    convert(tmp_path / "repo", tmp_path / "expected")
    if kind != "safetensors":
        repack(tmp_path / "repo", tensors, kind)
    if "bin" not in kind:
        torch.save({}, tmp_path / "repo/pytorch_model.bin")
    save_file({}, tmp_path / "repo/consolidated.safetensors")
    hub.repos |= {"org/name": tmp_path / "repo", "org/head": head_folder(tmp_path / "head", "bin")}
    assert run(monkeypatch, "org/name", "--eagle", "org/head") == 0
    out = tmp_path / "checkpoints/org/name"
    ours, expected = (load_file(folder / "model.safetensors") for folder in (out, tmp_path / "expected"))
    assert all(torch.equal(ours[name], expected[name]) for name in expected)
    with safe_open(out / "model.safetensors", "pt") as file:
        assert file.metadata()["source"] == "org/name"
    assert (out / "eagle/pytorch_model.bin").read_bytes() == (tmp_path / "head/pytorch_model.bin").read_bytes()
    assert not {"README.md", "consolidated.safetensors"} & set(hub.asked)
    if "bin" not in kind:
        assert hub.asked.count("pytorch_model.bin") == 1  # the head's


def test_hub_model_is_refused_before_its_weights(hub, tmp_path, monkeypatch, capsys):
    """Fails if the weights of a model that the engine cannot run are downloaded."""
    hf_folder(tmp_path / "repo")
    config = json.loads((tmp_path / "repo/config.json").read_text()) | {"model_type": "mixtral"}
    (tmp_path / "repo/config.json").write_text(json.dumps(config))
    hub.repos["org/name"] = tmp_path / "repo"
    assert run(monkeypatch, "org/name") == 2
    assert "mixtral" in capsys.readouterr().err and hub.asked == ["config.json"]


@pytest.mark.slow
@pytest.mark.parametrize("answer, message", [((403, "GatedRepo"), "gated"), ((401, "RepoNotFound"), "neither a path"),
                                             ((500, ""), "failed"), (None, "failed")])
def test_hub_errors_name_the_page(answer, message, hub, monkeypatch, capsys):
    """Fails if the user sees a traceback where a login or another name would help."""
    hub.repos["org/name"] = answer
    if answer is None:  # no server at all
        hub.server.shutdown()
        hub.server.server_close()
    assert run(monkeypatch, "org/name") == 2
    error = capsys.readouterr().err
    assert message in error and "https://huggingface.co/org/name" in error and error.count("\n") == 1
    assert ("hf auth login" in error) == (message != "failed")


@pytest.mark.slow
def test_interrupted_download_is_an_error_and_goes_on(hub, tmp_path, monkeypatch, capsys):
    """Fails if half a download is converted, or if the next run does not go on with it."""
    hf_folder(tmp_path / "repo")
    (tmp_path / "repo/BREAK").touch()
    hub.repos["org/name"] = tmp_path / "repo"
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    assert run(monkeypatch, "org/name") == 2
    assert "error: org/name" in capsys.readouterr().err and not (tmp_path / "checkpoints").exists()
    (tmp_path / "repo/BREAK").unlink()
    assert run(monkeypatch, "org/name") == 0
    load_model(tmp_path / "checkpoints/org/name")
    assert hub.asked.count("config.json") == 1  # complete files are kept


@pytest.mark.slow
def test_cut_connection_is_taken_up_again(hub, tmp_path, monkeypatch):
    """Fails if a connection that breaks within a file makes the next try start at its beginning."""
    hf_folder(tmp_path / "repo")
    (tmp_path / "repo/BREAK").touch()
    hub.repos["org/name"] = tmp_path / "repo"
    monkeypatch.setattr("time.sleep", lambda seconds: (tmp_path / "repo/BREAK").unlink())  # between two tries
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 4096)
    assert run(monkeypatch, "org/name") == 0
    (first, size), (second, _) = hub.sent
    assert first == 0 and size // 2 - 4096 < second <= size // 2
    load_model(tmp_path / "checkpoints/org/name")


# ----- What is not a model, or not the hub -------------------------------------------------------------------------


@pytest.mark.parametrize("files, message", [
    (["a.gguf", "b.Q4_K_M.GGUF"], "GGUF files (a.gguf, b.Q4_K_M.GGUF): convert one of them, after `hf download org/x "),
    (["adapter_config.json", "adapter_model.safetensors"], "an adapter (LoRA), not a model: merge it"),
    (["consolidated.00.pth", "params.json"], "Meta's own format"), (["README.md"], "no config.json"), ([], "nothing")])
def test_repositories_without_a_model(files, message, hub, tmp_path, monkeypatch, capsys):
    """Fails if a repository without a config.json is reported as a failed download, or its files are downloaded."""
    (tmp_path / "repo").mkdir()
    for name in files:
        (tmp_path / "repo" / name).write_text("{}")
    hub.repos["org/x"] = tmp_path / "repo"
    assert run(monkeypatch, "org/x") == 2
    error = capsys.readouterr().err
    assert message in error and error.splitlines()[-1].startswith("error: org/x: ") and not hub.asked


@pytest.mark.parametrize("body", [b"<!DOCTYPE html><html>Log in</html>", b'{"error": "blocked"}', b"[]", b"", b"null"])
def test_captive_portals(body, hub, monkeypatch, capsys):
    """Fails if what a proxy or a login page sends in place of the hub's JSON ends in the words of a JSON parser."""
    hub.repos["org/x"] = body
    assert run(monkeypatch, "org/x") == 2
    error = capsys.readouterr().err
    assert "is not the hub: a proxy" in error and "https://huggingface.co/org/x" in error and error.count("\n") == 1


def test_errors_without_a_text_and_offline(monkeypatch, capsys):
    """Fails if an exception without a text, or HF_HUB_OFFLINE, is reported without a word of what is wrong."""
    def nothing(*args, **options):
        raise ConnectionError

    monkeypatch.setattr(hub_module, "snapshot_download", nothing)
    assert run(monkeypatch, "org/x") == 2
    assert "failed (ConnectionError: ConnectionError); check" in capsys.readouterr().err
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert run(monkeypatch, "org/x") == 2
    assert "HF_HUB_OFFLINE is set" in capsys.readouterr().err


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1\nsize 9\n"


@pytest.mark.parametrize("file, change, message", [
    ("model.safetensors", lambda data: POINTER, "Git-LFS pointer"), ("tokenizer.json", lambda data: POINTER, "git lfs"),
    ("config.json", lambda data: POINTER, "git lfs pull"), ("tokenizer.json", lambda data: b"", "empty"),
    ("model.safetensors", lambda data: data[:-1], "cut off after "),
    ("model.safetensors", lambda data: data[:100], "cut off in its header after 100 bytes"),
    ("model.safetensors", lambda data: b"<html>Log in</html>", "web page"),
    ("config.json", lambda data: b"\n<!doctype HTML>", "web page"),
    ("model.safetensors", lambda data: b'{"error": "Repository not found"}', "answer (Repository not found)"),
    ("config.json", lambda data: b'{"message": "Not allowed"}', "answer (Not allowed)"),
    ("model.safetensors", lambda data: b"garbage!" * 40, "or not a safetensors file")])
def test_files_that_are_not_what_they_are_called(file, change, message, tmp_path, monkeypatch, capsys):
    """Fails if a file that was never downloaded whole is reported in the words of a library, or without its name."""
    hf_folder(tmp_path / "hf")
    path = tmp_path / "hf" / file
    path.write_bytes(change(path.read_bytes()))
    assert run(monkeypatch, tmp_path / "hf", "--out", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert message in error and str(path) in error and error.count("\n") == 1 and ".part" not in error
    assert not (tmp_path / "out").exists()


def test_cut_pickles_and_folders_of_others(tmp_path, monkeypatch, capsys):
    """Fails if half a pickle, or a folder that holds no model, is not called so."""
    tensors = hf_folder(tmp_path / "hf")
    repack(tmp_path / "hf", tensors, "bin")
    path = tmp_path / "hf/pytorch_model.bin"
    path.write_bytes(path.read_bytes()[:-300])
    assert run(monkeypatch, tmp_path / "hf", "--out", tmp_path / "out") == 2
    assert f"{path}: damaged, cut off" in capsys.readouterr().err
    path.unlink()
    (tmp_path / "hf/adapter_config.json").write_text("{}")
    assert run(monkeypatch, tmp_path / "hf", "--out", tmp_path / "out") == 2
    assert "an adapter (LoRA)" in capsys.readouterr().err
    (tmp_path / "hf/adapter_config.json").unlink()
    (tmp_path / "hf/config.json").unlink()
    (tmp_path / "hf/x.gguf").touch()
    assert run(monkeypatch, tmp_path / "hf", "--out", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert "GGUF files (x.gguf): convert one of them" in error and error.count("\n") == 1


@pytest.mark.parametrize("path, name", [
    ("a/org/name", "org/name"), ("org/x.Q4.gguf", "org/x.Q4"), ("org/X.GGUF", "org/X"), ("/model", "model"),
    ("/hub/models--org--name/snapshots/" + "0" * 40, "org/name"), ("/hub/models--gpt2/snapshots/" + "0" * 40, "gpt2"),
    ("/hub/models--org--repo-GGUF/snapshots/" + "a" * 40 + "/m.Q8_0.gguf", "org/m.Q8_0"),
    ("/hub/models--org--name/blobs/" + "b" * 64, "org/name"), ("/x/snapshots/" + "0" * 40, None), ("/", None),
    ("/x/blobs/" + "f" * 64, None)])
def test_names_of_paths(path, name):
    """Fails if a default --out is a hash of the hub's cache, or lies outside checkpoints/."""
    assert name_of(Path(path)) == name


def test_a_path_without_a_name_needs_out(tmp_path, monkeypatch, capsys):
    """Fails if a checkpoint is written to a folder that is called by a revision."""
    source = tmp_path / "snapshots" / ("0" * 40)
    hf_folder(source)
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, source) == 2
    assert "--out" in capsys.readouterr().err and not (tmp_path / "checkpoints").exists()
    assert run(monkeypatch, source, "--out", tmp_path / "out") == 0
