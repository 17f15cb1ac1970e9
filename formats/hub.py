"""Hugging Face's hub: downloading a repository, what stands in its way, and names for what lies in its cache."""
import json
import os
import re
from functools import partial
from pathlib import Path

from huggingface_hub import constants, errors, list_repo_files, snapshot_download

from formats import packed
from formats.config import Config
from formats.downloads import not_what_it_is_called
from formats.weights import first_line

# What is copied from a Hugging Face folder besides the weights.
FILES = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json",
         "vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json", "chat_template.jinja",
         "chat_template.json", "tekken.json"}
WEIGHTS = ["model*.safetensors", "model.safetensors.index.json", *packed.FILES]
PICKLES = ["pytorch_model*.bin", "pytorch_model.bin.index.json"]


# ----- Downloading -------------------------------------------------------------------------------------------------


def fetch(source: str, token: str | None, is_target: bool) -> Path:
    """A path that exists, as it is, or else the downloaded snapshot of a hub id. Raises ValueError for a target that is
    not implemented, before its weights are downloaded, and OSError where the download fails."""
    if Path(source).exists():
        return Path(source)
    page = f"{constants.ENDPOINT}/{source}"
    download = partial(snapshot_download, source, token=token)
    try:
        folder = Path(download(allow_patterns=["config.json"]))
        if not (folder / "config.json").is_file():
            raise ValueError(f"{source}: {no_model(list_repo_files(source, token=token), source)}")
        check_files(folder, {"config.json"})
        if is_target:
            Config.load(folder)
        folder = Path(download(allow_patterns=[*FILES, *WEIGHTS]))
        if not any(folder.glob("model*.safetensors")):
            download(allow_patterns=PICKLES)
        return folder
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as err:
        why = "gated" if isinstance(err, errors.GatedRepoError) else "neither a path here nor a public repository"
        raise OSError(f"{source} is {why}: check the name or ask for access at {page}; then `hf auth login`") from err
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as err:  # of what should be the hub's JSON
        raise OSError(f"{source}: what answered at {page} is not the hub: a proxy, or a network that asks for a login; "
                      "open the page in a browser, then run this again") from err
    except ValueError:
        raise
    except Exception as err:  # network errors have other classes in every version of huggingface_hub
        offline = "HF_HUB_OFFLINE is set and it is not in the cache; unset it" if constants.HF_HUB_OFFLINE else (
            f"{type(err).__name__}: {first_line(err)}")
        raise OSError(f"{source}: downloading {page} failed ({offline}); check the page and the network, then run this "
                      "again: complete files are kept") from err


def no_model(files: list[str], where: str) -> str:
    """What a repository or folder holds instead of a model, if it has no config.json, and what to do."""
    ggufs = sorted(file for file in files if file.lower().endswith(".gguf"))
    if ggufs:
        names = ", ".join(ggufs[:3]) + ", ..." * (len(ggufs) > 3)
        return f"no config.json, but GGUF files ({names}): convert one of them, after `hf download {where} {ggufs[0]}`"
    if "adapter_config.json" in files:
        return ("an adapter (LoRA), not a model: merge it into its base model (peft's merge_and_unload), save the "
                "result and convert that")
    if any(file.endswith((".pth", "params.json")) for file in files):
        return "no config.json, but Meta's own format: take the repository whose files are for transformers (often -hf)"
    return f"no config.json, so no model of transformers; it holds {', '.join(sorted(files)[:4]) or 'nothing'}"


def check_files(folder: Path, names: set[str]) -> None:
    """Raise ValueError for the first of these files that is there and is not what its name says."""
    for name in sorted(names):
        wrong = not_what_it_is_called(folder / name) if (folder / name).is_file() else None
        if wrong:
            raise ValueError(wrong)


def check_folder(folder: Path) -> None:
    """Raise ValueError if a folder that is to be converted holds no model, or files that are not what they are called.
    """
    if not folder.is_dir():
        return
    files = sorted(os.listdir(folder))
    weights = any(re.fullmatch(r"(model|pytorch_model).*\.(safetensors|bin)", file) for file in files)
    if "config.json" not in files or ("adapter_config.json" in files and not weights):
        what = no_model([file for file in files if file != "config.json"], "ORG/NAME")
        raise ValueError(f"{folder}: {what.partition(', after')[0]}")
    check_files(folder, {file for file in files if file in FILES or file.endswith(".index.json")})


# ----- Names -------------------------------------------------------------------------------------------------------


def name_of(source: Path) -> str | None:
    """ORG/NAME for a path: its last two parts, without .gguf. In the hub's cache, where paths are
    models--ORG--NAME/snapshots/REVISION/FILE, that of the repository. None where nothing in the path is a name."""
    parts = [part for part in Path(os.path.abspath(source)).parts if part.strip(os.sep)]
    last = re.sub(r"(?i)(-00001-of-\d{5})?\.gguf$", "", parts[-1]) if parts else ""
    cached = next((part.split("--")[1:] for part in parts if part.startswith("models--")), None)
    if cached and last == parts[-1]:
        parts = cached
    elif cached:
        parts = [*cached[:-1], last]
    else:
        parts = [*parts[-2:-1], last]
    if not last or re.fullmatch(r"[0-9a-f]{40,64}|blobs|snapshots|", parts[-1]):
        return None
    return "/".join(parts)
