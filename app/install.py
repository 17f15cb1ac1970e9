"""Put converted or downloaded files into their folder: all of them or none. A draft head is tried out before that, if
the target has a tokenizer and fits into memory.

A head that does not fit its target is silent: the text is right, and few drafts are accepted. So the target writes a
few answers, and the head guesses them (drafters/head_check.py). What the files of an EAGLE-3 or block head leave open
is chosen so, and written beside it into measured.json. A head that guesses badly is installed with a warning.
"""
import argparse
import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from app.memory import free_bytes, stored_model, total_bytes
from app.options import is_quantized_file, placement
from draft import EagleHead
from drafters.block import BlockHead
from drafters.eagle3 import Eagle3Head
from drafters.head_check import EXPECTED, compare, is_clear, right_guesses, table, write_answers
from drafters.heads import Head, load_head, type_of_head
from formats.block import open_block
from formats.config import Config
from formats.eagle import CURVE, VOCAB
from formats.eagle3 import open_eagle3
from formats.eagle3_config import MEASURED
from formats.hub import FILES
from formats.tokenizer_files import TOKENIZERS
from formats.writing import QUANTIZED, replace_files
from model import Llama, load_model
from ops.device import gpu_problem
from tokenizer import Tokenizer

HEAD_FILES = {"config.json", "model.safetensors", "pytorch_model.bin", VOCAB, CURVE, MEASURED}
FEW = (3, 32)  # questions, and tokens of each answer, that show whether a head guesses at all
MANY = (3, 192)  # the same to tell variants of a head apart: a wrong RoPE base shows in longer texts
CAUSES = {EagleHead: "another model's, or one of another chat template",
          Eagle3Head: "another model's, one of another chat template, or read from the wrong layers (taps in "
          "measured.json)",
          BlockHead: "another model's, one of another chat template, or read in the wrong way (taps, anchor_first and "
          "causal in measured.json)"}


@contextmanager
def staged(out: Path, source: Path) -> Iterator[Path]:
    """Yield a scratch folder. When the block ends, its files replace those that an earlier run wrote into `out`, and
    what quantize.py made of them. After an error `out` is as it was, and the error is a ValueError that names both
    folders."""
    part = source
    try:
        stale = (*FILES, VOCAB, CURVE, MEASURED, "model.safetensors", "pytorch_model.bin", QUANTIZED)
        with replace_files(out, stale) as part:
            yield part
    except Exception as err:
        # Deliberately every Exception. The source is a download, and what a damaged one raises cannot be listed: gguf
        # raises IndexError and UnicodeDecodeError, a missing entry KeyError, `tokenizers` a bare Exception, the disk
        # OSError. So a bug in this file looks like bad input too; the cause keeps its traceback.
        reason = f"{err} is missing" if isinstance(err, KeyError) else str(err) or type(err).__name__
        if not source.is_dir():
            reason = reason.replace(f"{part}/", f"{source}: ")
        reason = reason.replace(str(part), str(source))  # the scratch folder is gone
        raise ValueError(f"{source} -> {out} failed: {reason}") from err


def add_head(head: Path, out: Path) -> None:
    """Copy a published head, unchanged, to the folder eagle/, eagle3/ or block/ of the checkpoint `out`, and write what
    was measured of it beside it. Raises ValueError if it does not load as a head of the model in `out`, or if nothing
    tells what its files leave open."""
    with torch.device("meta"):
        target = Llama(Config.load(out))
    load_head(head, target)
    kind = type_of_head(head)
    read = {Eagle3Head: open_eagle3, BlockHead: open_block}.get(kind)
    measured = measure(head, out, read(head, target.cfg).doubts if read else {})
    with staged(out / kind.folder, head) as part:
        for file in HEAD_FILES & set(os.listdir(head)):
            shutil.copyfile(head / file, part / file)
        if measured:  # besides what is known already
            known = json.loads((part / MEASURED).read_text(encoding="utf-8")) if (part / MEASURED).exists() else {}
            (part / MEASURED).write_text(json.dumps(known | measured) + "\n", encoding="utf-8")


def measure(head: Path, checkpoint: Path, doubts: dict[str, tuple]) -> dict:
    """Let the head guess what the target writes, on a GPU if there is one. On a CPU the target has quantised weights,
    its own or int8, and computes in fp32, for which there are kernels. Returns the best values of the fields in
    `doubts`. ValueError if there are doubts, and they cannot be measured or two variants guess about equally well."""
    device, dtype = placement(argparse.Namespace(
        device="cpu" if gpu_problem(None) else None, dtype=None, quantize=None, checkpoint=Path()))
    mode = None
    if device == "cpu":
        mode, dtype = None if is_quantized_file(checkpoint) else "int8", torch.float32
    obstacle = why_not_measured(checkpoint, device, dtype, mode)
    if obstacle:
        if doubts:
            fields = ", ".join(f'"{name}": one of {[*map(json.dumps, values)]}' for name, values in doubts.items())
            raise ValueError(f"{head}: its files leave open what {', '.join(doubts)} is, and it cannot be measured "
                             f"({obstacle}): write {MEASURED} beside them, with {fields}")
        print(f"{head}: not tried out ({obstacle})", file=sys.stderr)
        return {}
    model = load_model(checkpoint, device, dtype, mode)
    loaded = load_head(head, model)
    answers = write_answers(model, Tokenizer(checkpoint), *(MANY if doubts else FEW))
    if not doubts:
        warn(head, loaded, [float(right.float().mean()) for right in right_guesses(loaded, model, answers)])
        return {}
    variants = compare(loaded, doubts, model, answers)
    best, *others = variants
    print(f"{head}: its files leave open what {', '.join(doubts)} is. How many of the first, second and third guesses "
          f"are right:\n{table(variants)}", file=sys.stderr)
    close = [variant for variant in others if not is_clear(best, variant)]
    if close:
        raise ValueError(f"{head}: the guesses do not tell these apart: choose one of the first {1 + len(close)} "
                         f"lines, and write it beside the head into {MEASURED}, for example {json.dumps(best.fields)}")
    warn(head, loaded, best.shares)
    return best.fields


def why_not_measured(checkpoint: Path, device: str, dtype: torch.dtype, mode: str | None) -> str | None:
    """What stands in the way of running the target there, if anything."""
    if not any((checkpoint / name).is_file() for name in TOKENIZERS):
        return f"{checkpoint} has no tokenizer"
    target = stored_model(checkpoint / "model.safetensors", dtype, mode)
    needed = 1.3 * total_bytes(target)  # and activations, the head, a small cache
    free = free_bytes(device)
    if needed > free:
        return f"the target needs {needed / 1e9:.1f} GB to run, and {free / 1e9:.1f} GB are free"
    return None


def warn(head: Path, loaded: Head, shares: list[float]) -> None:
    """Say on stderr how often the head's guesses were right and, where that is far too seldom, the likely cause."""
    guessed = ", ".join(f"{share:.0%}" for share in shares)
    line = f"{head}: of its first, second and third guesses {guessed} are right"
    if shares[0] < EXPECTED / 3:
        line += (f"; a head that fits has about {EXPECTED:.0%}. Drafts will seldom be accepted: it is probably "
                 f"{CAUSES[type(loaded)]}")
    print(line, file=sys.stderr)
