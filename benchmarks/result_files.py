"""The files in benchmarks/results/: what BENCHMARKS.md needs of what bench.py and benchmarks/cycle.py wrote.

Token ids and lists with an entry per prompt or per run are large, and are left out. To add a file and to print the
tables: benchmarks/summary.py.
"""
import json
import re
import shlex
from pathlib import Path

from formats.writing import write_text

RESULTS = Path(__file__).parent / "results"
SHAPES = tuple(f"cycle-llama-{name}" for name in (
    "2-7b-bf16", "2-7b-int8", "2-7b-int8dyn", "2-7b-int4", "3-8b-bf16", "2-13b-bf16", "2-13b-int8", "2-13b-int4"))
CODER = ("methods-coder-bf16", "methods-coder-int8", "methods-coder-gguf")
BLOCK_HEADS = ("methods-demo-block", "methods-coder-block")
NAMES = (*SHAPES, "cycle-demo-mt-bench", "methods-llama-2-7b", "methods-demo", *CODER, *BLOCK_HEADS)
LARGE = {"texts", "gained", "said", "runs", "gaps", "prompts", "unfinished", "histogram", "with_prefill", "settings",
         "arguments", "before", "after", "device"}
# How result["device"] of benchmarks/cycle.py begins. Only a GPU has a power limit and clocks.
ENVIRONMENT = re.compile(r"(?P<device>.+?)(?: \(power limit (?P<power>[^,]+),.+?\))?, torch (?P<torch>.+?), "
                         r"triton (?P<triton>.+?), commit (?P<commit>.+?), (?P<date>\d{4}-\d\d-\d\d), ")
Results = dict[str, dict]  # by name, only those that exist
# What reading an entry raises where it is missing or of another kind, or where numbers are far too large.
DAMAGED = (LookupError, TypeError, AttributeError, ArithmeticError, RecursionError)


def strip(raw: dict) -> dict:
    """What the tables need of what benchmarks/cycle.py or bench.py wrote. ValueError if it is neither."""
    if raw.get("contexts"):
        arguments = raw["arguments"]
        shape, mode, dtype = (arguments[name] for name in ("shape", "quantize", "dtype"))
        kept = {"environment": ENVIRONMENT.match(raw["device"]).groupdict(), "command": cycle_command(arguments),
                "model": Path(arguments["checkpoint"]).name if shape == "None" else shape.title(),
                "precision": dtype if mode == "None" else mode}
    elif raw.get("measured"):
        entries = raw["measured"]
        gaps = [max((at["gap"] for at in entry["gaps"]), default=None) for entry in entries]
        kept = {"environment": raw["before"] | {"power": raw["before"].get("power.limit")},
                "command": clean_command(shlex.split(raw["command"])), "num_prompts": len(raw["prompts"]),
                "measured": [shorten(entry) | {"largest_gap": gap} for entry, gap in zip(entries, gaps)]}
    else:
        raise ValueError("neither benchmarks.cycle nor bench.py wrote this, or nothing was measured")
    return shorten(raw) | kept


def shorten(value: object) -> object:
    """Without the LARGE entries, and floats with 6 significant digits."""
    if isinstance(value, dict):
        return {key: shorten(part) for key, part in value.items() if key not in LARGE}
    if isinstance(value, list):
        return [shorten(part) for part in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def cycle_command(arguments: dict[str, str]) -> str:
    """The command line that gives these arguments of benchmarks/cycle.py, all of them as text."""
    words = ["python", "-m", "benchmarks.cycle"]
    for name, value in arguments.items():
        if value not in ("None", "False") and not value.endswith("/cycle_questions.jsonl"):  # the default questions
            words += [f"--{name}", *([] if value == "True" else re.sub(r"[\[\],']", " ", value).split())]
    return clean_command(words)


def clean_command(words: list[str]) -> str:
    """Without the names of written files, and without the folders of one machine."""
    words = [part for word in words for part in (word.split("=", 1) if word.startswith("--") else [word])]
    written = {"--json", "--plots", "--against"}
    kept = [word for before, word in zip(["", *words], words) if before not in written and word not in written]
    kept = [re.sub(r"(?<=key=@)/.*/", "", word) for word in kept]  # of an endpoint
    return shlex.join(Path(word).name if word.startswith("/") else word for word in kept)


def add(file: Path, name: str, commit: str | None = None, folder: Path = RESULTS) -> Path:
    """Store a result under one of NAMES. `commit` replaces the one that the file states."""
    if name not in NAMES:
        raise ValueError(f"no table shows {name!r}; the names are {', '.join(NAMES)}")
    try:
        result = strip(read_object(file))
        result["environment"]["commit"] = commit or result["environment"]["commit"]
    except DAMAGED:
        raise ValueError(f"{file}: not what benchmarks.cycle or bench.py --json writes") from None
    path = folder / f"{name}.json"
    write_text(path, json.dumps(result) + "\n")
    return path


def read_object(path: Path) -> dict:
    """The object in a JSON file; ValueError if it is anything else."""
    try:
        return {**json.loads(path.read_text(encoding="utf-8"))}
    except (ValueError, TypeError, RecursionError):
        raise ValueError(f"{path}: not a JSON object") from None


def read_results(folder: Path = RESULTS) -> Results:
    paths = {name: folder / f"{name}.json" for name in NAMES}
    return {name: read_object(path) for name, path in paths.items() if path.is_file()}


def problems(results: Results) -> list[str]:
    """Why these results must not stand on one page: a line for each reason."""
    found = []
    for key in ("device", "torch", "triton", "commit"):
        values: dict[str, list[str]] = {}
        for name, result in results.items():
            values.setdefault(result["environment"][key], []).append(name)
        if len(values) > 1 or "unknown" in values:
            found.append(f"{key}: " + "; ".join(f"{value} in {', '.join(names)}" for value, names in values.items()))
    return found
