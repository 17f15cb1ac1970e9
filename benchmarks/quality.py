"""What quantising costs in quality: perplexity on a text, and how many of bfloat16's greedy tokens are kept.

    python -m benchmarks.quality --checkpoint checkpoints/HuggingFaceTB/SmolLM2-135M-Instruct TEXT_FILE

Prints a Markdown table with a row for the unquantised model, for each mode of quantising on load, and for each
quantised file in the checkpoint's folder.
"""
from app.command import before_imports, run_command

if __name__ == "__main__":
    before_imports()

import argparse
import math
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from app.options import is_quantized_file
from benchmarks.workload import gigabytes
from draft import Vanilla
from engine import SPARE, Engine
from formats.questions import read_questions
from model import Llama, load_model
from ops.linear import MAX_ROWS, linear
from quant.linear import GROUPS, quantize_linears
from tokenizer import Tokenizer

LENGTH = 512  # tokens of a chunk: perplexity is measured chunk by chunk
QUESTIONS = Path(__file__).parent / "cycle_questions.jsonl"


@torch.inference_mode()
def perplexity(model: Llama, ids: Tensor) -> float:
    """exp of the mean loss over ids [chunks, T]. Each chunk starts anew, and its first token is not predicted."""
    loss = 0.0
    for chunk in ids:
        hidden = model(chunk[None], torch.arange(len(chunk), device=ids.device))[0, :-1]
        logits = read_logits(model, hidden)
        loss += F.cross_entropy(logits, chunk[1:], reduction="sum").item()
    return math.exp(loss / (ids.numel() - len(ids)))


def read_logits(model: Llama, hidden: Tensor) -> Tensor:
    """fp32 logits [T, V] of hidden [T, C], as decoding has them. On a GPU those of more rows at a time would be rounded
    to bf16."""
    return torch.cat([linear(x, model.lm_head.weight, dtype=torch.float32) for x in hidden.split(MAX_ROWS)])


@torch.inference_mode()
def kept(model: Llama, prompts: list[list[int]], texts: list[list[int]]) -> float:
    """The share of the tokens of `texts` that the model would choose too, each after its prompt and the tokens of the
    text before it. So a different choice does not change what comes after it."""
    same = 0
    for prompt, text in zip(prompts, texts):
        ids = torch.tensor(prompt + text, device=model.embed.weight.device)
        hidden = model(ids[None, :-1], torch.arange(len(ids) - 1, device=ids.device))[0, len(prompt) - 1:]
        same += int((read_logits(model, hidden).argmax(-1) == ids[len(prompt):]).sum())
    return same / sum(map(len, texts))


def variants(folder: Path, group: int, device: str) -> Iterator[tuple[str, Llama]]:
    """(name, model) of the unquantised model, of each mode (int4 also without scale search), of each quantised file."""
    yield "bf16", load_model(folder)
    for name, mode, options in (("int8", "int8", {}), ("int8dyn", "int8dyn", {}),
                                (f"int4 of {group}, nearest", "int4", {"shrink": (1,)}),  # without the search
                                (f"int4 of {group}", "int4", {})):
        model = load_model(folder)
        quantize_linears(model, mode, group, device, **options)
        yield name, model
    for file in sorted(folder.glob("model-int*.safetensors")):
        yield file.name, load_model(file)


def quality(folder: Path, files: list[Path], questions: Path, tokens: int, new_tokens: int, group: int, device: str
            ) -> None:
    """Print the table: perplexity, how far it is above bf16's, the share of bf16's greedy tokens that are kept, and the
    GB of weights that a step reads."""
    if is_quantized_file(folder):
        raise ValueError(f"{folder}: holds weights that others have quantised, so there is no bf16 to compare with; "
                         "give the folder of the unquantised model")
    tokenizer = Tokenizer(folder)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    ids = [i for file in files for i in tokenizer.encode(file.read_text(encoding="utf-8"))][:tokens]
    if len(ids) < LENGTH:
        raise ValueError(f"the texts should have {LENGTH} tokens or more, not {len(ids)}")
    chunks = torch.tensor(ids[:len(ids) // LENGTH * LENGTH], device=device).view(-1, LENGTH)
    prompts = [tokenizer.dialogue(question.turns[:1]) for question in read_questions(questions)]
    print(f"| {chunks.numel()} tokens of text | perplexity | over bf16 | greedy tokens kept | GB per step |")
    print("|---|---|---|---|---|")
    texts = []  # answers of the first model, bf16
    base = 0.0  # its perplexity
    for name, model in variants(folder, group, device):
        size = gigabytes(model.layers, model.lm_head)  # as stored: on a CPU, `to` makes bf16 float32
        model.to(device, dtype)
        model.allocate_cache(max(LENGTH, max(map(len, prompts)) + new_tokens), SPARE)
        if not texts:
            engine = Engine(model, Vanilla(device), model.kv.shape[4] - SPARE, tokenizer.stop_ids)
            texts = [[i for new in engine.generate(prompt, new_tokens) for i in new] for prompt in prompts]
        score = perplexity(model, chunks)
        base = base or score
        print(f"| {name} | {score:.3f} | {score / base - 1:+.2%} | {kept(model, prompts, texts):.1%} | "
              f"{size:.3f} |", flush=True)


def work() -> None:
    p = argparse.ArgumentParser("python -m benchmarks.quality",
                                description="Measure what each quantisation mode costs in quality.")
    p.add_argument("--checkpoint", type=Path, required=True, help="converted folder")
    p.add_argument("texts", type=Path, nargs="+", metavar="TEXT_FILE", help="texts to measure perplexity on")
    p.add_argument("--group", type=int, choices=GROUPS, default=128,
                   help="columns that share an int4 scale (default: 128)")
    p.add_argument("--tokens", type=int, default=4096, help="how many tokens of the texts to use")
    p.add_argument("--questions", type=Path, default=QUESTIONS,
                   help='JSON lines with "turns"; only the first turn is asked')
    p.add_argument("--new_tokens", type=int, default=64, help="length of the answer to each question")
    p.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    args = p.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        p.error("--device cuda, but torch finds no CUDA device")
    if args.new_tokens < 1:
        p.error("--new_tokens must be at least 1")
    quality(args.checkpoint, args.texts, args.questions, args.tokens, args.new_tokens, args.group, args.device)


if __name__ == "__main__":
    run_command(work)
