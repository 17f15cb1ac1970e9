"""Speculative sampling with a draft model: a smaller language model writes a chain, the target verifies it at once.

    python generate.py --checkpoint checkpoints/ORG/LARGE --speculate checkpoints/ORG/SMALL --prompt "Hello!"

From Leviathan et al., arXiv 2211.17192, and Chen et al., arXiv 2302.01318. When sampling there are two lossless rules:

    keyed      The draft model and the target choose with the same noise, keyed by the position in the text. A drafted
               token is accepted if both chose it. The text is that of plain decoding with the same seed.
    rejection  The papers' rule. Token x is accepted with probability p(x) / q(x), where p is the target's distribution
               and q the draft model's. After a rejection the next token is sampled from max(p - q, 0), normalised.
               This accepts more. The text is a different one of the same distribution.

Staged drafting (arXiv 2308.04623) speeds up the draft model in the same way: with `retrieval`, each of its forwards
also verifies a chain found in the text (drafters/lookup.py), so fewer forwards write the same chain.
"""
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from draft import Drafter, tree_ops
from drafters.lookup import Retrieval
from engine import SPARE
from formats.config import Config
from formats.foreign import head_for_model
from formats.weights import fill, read_tensors
from model import Llama, load_model
from ops.attention import TreeMask, causal_mask
from ops.linear import linear
from ops.quantized import Quantized, dequantize
from sampling import gumbel_noise, perturb, process
from tree import State, Tree, chain_tree, root_token

DRAFTING = 0x5EED0D7A  # seed ^ this: the seed of the noise that the draft model samples with, under the rejection rule
ACCEPTING = 0x5EED0ACC  # seed ^ this: the seed of the noise that decides what is accepted


# ----- The draft model ---------------------------------------------------------------------------------------------


def load_draft_model(path: Path | str, target: Llama) -> Llama:
    """Load a draft model for `target`, in its dtype: a converted checkpoint with the target's tokens, or what `python
    -m training.peers` writes. The latter is layers and a norm only, perhaps in int8, which are dequantised here; its
    embedding and lm_head are the target's.

    Raises FileNotFoundError, or ValueError if the files are damaged or made for another target.
    """
    path = Path(path)
    like = target.embed.weight
    if not path.exists():
        raise FileNotFoundError(f"{path}: no draft model there; convert one with convert_hf_checkpoint.py, or train "
                                "one with `python -m training.peers`")
    file = path / "model.safetensors" if path.is_dir() else path
    cfg = Config.load(file.parent)
    tensors, metadata = read_tensors(file)
    if "format" not in metadata and (kind := head_for_model(map(str, tensors), {})):
        raise ValueError(f"{file}: holds {kind}, not a model")
    if cfg.vocab_size != target.cfg.vocab_size:
        raise ValueError(f"{file}: a model of {cfg.vocab_size} tokens cannot draft for one of {target.cfg.vocab_size}: "
                         "they need the same tokenizer")
    if metadata.get("embedding") != "target":
        return load_model(path, like.device, like.dtype)
    if cfg.hidden_size != target.cfg.hidden_size:
        raise ValueError(f"{file}: made for a target of hidden size {cfg.hidden_size}, not {target.cfg.hidden_size}")
    if metadata.get("mode") == "int8":
        for name in [name.removesuffix(".data") for name in tensors if name.endswith(".data")]:
            data, scale = tensors.pop(f"{name}.data"), tensors.pop(f"{name}.scale", None)
            if (scale is None or scale.dtype != torch.float32 or data.dtype != torch.int8 or data.dim() != 2
                    or scale.shape != data.shape[:1]):
                raise ValueError(f"{file}: {name} should be int8 with a scale for each row; train it again")
            tensors[f"{name}.weight"] = dequantize(Quantized(data, scale, 0, 2), like.dtype)
    with torch.device("meta"):
        draft = Llama(cfg, qkv_bias="layers.0.wqkv.bias" in tensors)
    # `fill` wants the file to hold every weight of the model. So the target's modules are attached only after it.
    draft.embed = None
    draft.lm_head = None
    fill(draft, tensors, file, like.device, like.dtype)
    draft.embed = target.embed
    draft.lm_head = target.lm_head
    return draft


# ----- Drafting with it --------------------------------------------------------------------------------------------


class Speculate(Drafter):
    """Drafts a chain of `length` tokens in `length` forwards of `draft`, or with `retrieval` up to `length` tokens in
    `forwards` forwards.

    `rejection`: the rejection rule when sampling. Drafting, accepting and resampling use independent noise at each
    position, so discarded draws do not bias the committed text.
    """

    def __init__(self, draft: Llama, target: Llama, length: int = 5, rejection: bool = False,
                 retrieval: Retrieval | None = None, forwards: int = 4) -> None:
        if retrieval is None:
            forwards = length
        rows = 1 + (retrieval.length if retrieval else 0)  # of a forward: the newest token and the retrieved chain
        reach = forwards * rows  # the most tokens that these forwards can draft
        if not (1 <= length <= 16 and 1 <= forwards and length <= reach <= 100):
            raise ValueError(f"a draft model drafts 1 to 16 tokens, and its forwards must reach as many, but at "
                             f"most 100: {length} tokens do not fit {forwards} forwards of {rows} rows")
        self.draft = draft
        self.rejection_sampling = rejection
        self.retrieval = retrieval
        self.forwards = forwards
        self.num_nodes = length + 1
        self.max_depth = length
        self.noise_depth = reach
        self.has_blocked_nodes = retrieval is not None  # nodes that the forwards of a cycle did not get to
        device = target.embed.weight.device
        self.tree_ops = tree_ops(device)
        self.tree = chain_tree(length, device)
        self.offsets = torch.arange(reach + 2, device=device)
        self.newest_and_chain = self.offsets.new_zeros(rows)  # the newest token and the chain retrieved after it
        self.q = torch.zeros(reach, target.cfg.vocab_size if rejection else 0, device=device)  # [reach, V] fp32
        self.text = self.offsets.new_zeros(0)  # [S + 1]: the committed text, and behind it what the draft model wrote

    def allocate(self, slots: int) -> None:
        if self.draft.kv is None or self.draft.kv.shape[4] < slots:
            self.draft.allocate_cache(slots - SPARE, SPARE)  # what the model allows depends on the longest text
        if len(self.text) < slots + 1:
            self.text = self.text.new_zeros(slots + 1)

    def caches(self) -> tuple[Tensor, ...]:
        return self.draft.kv, self.text

    def prefill(self, state: State, hidden: Tensor, slots: Tensor, mask: Tensor | TreeMask) -> None:
        self.draft(state.tokens[slots][None], slots, slots, mask)

    def propose(self, state: State) -> Tree:
        self.text[:len(state.tokens)].copy_(state.tokens)
        root = state.length - 1
        count = 0  # tokens drafted so far: an int, or with retrieval a 0-d tensor
        for turn in range(self.forwards):
            count = self.draft_more(state, root, count, turn == 0)
        drafted = self.text[root + 1 + self.offsets[:self.max_depth]]
        if self.retrieval:
            drafted = torch.where(self.offsets[:self.max_depth] < count, drafted, ~drafted)  # block what is not drafted
        return self.tree._replace(tokens=torch.cat((root_token(state), drafted)))

    def draft_more(self, state: State, root: Tensor, count: int | Tensor, first: bool) -> int | Tensor:
        """Run the draft model once, after the `count` tokens drafted so far, and write what it chose behind them.
        Returns the new count: one more without `retrieval`, else one more and as many retrieved tokens as it chose too.

        The `first` forward also feeds the token before the root. That may be the last token of a chain that was
        accepted as a whole, and such a token was drafted but never fed.
        """
        newest = root + count  # slot of the newest drafted token
        extra = int(first)
        rows = len(self.newest_and_chain)
        slots = newest - extra + self.offsets[:extra + rows]
        tokens = self.text[slots]
        if self.retrieval:
            tokens = torch.cat((tokens[:extra], self.retrieve(state, newest)))
        mask = causal_mask(newest - extra, extra + rows, state.width)
        hidden = self.draft(tokens[None], slots, slots, mask)[0][extra:]
        chosen = self.choose_drafts(state, linear(hidden, self.draft.lm_head.weight, dtype=torch.float32), count)
        self.text.index_copy_(0, newest + 1 + self.offsets[:rows], chosen)
        count = count + 1
        if self.retrieval:
            # Retrieved token i is confirmed if it and all before it are the draft model's own choices.
            confirmed = self.newest_and_chain[1:] == chosen[:-1]
            count = count + confirmed.cumprod(0).sum()
        return count

    def retrieve(self, state: State, newest: Tensor) -> Tensor:
        """The token in slot `newest` of the draft model's text and the chain found after it: [rows] int64. Where no
        token was found, newest_and_chain holds ~0, and the model is fed token 0."""
        self.retrieval.write(replace(state, tokens=self.text, length=newest + 1), self.newest_and_chain)
        return self.newest_and_chain ^ (self.newest_and_chain >> 63)  # ~0 to 0, other tokens unchanged

    def choose_drafts(self, state: State, logits: Tensor, count: int | Tensor) -> Tensor:
        """The draft model's choices, [T] int64, for the positions after `count` drafted tokens. logits [T, V]. Under
        the rejection rule it keeps the distributions that they were sampled from in `q`."""
        s = state.sampling
        depth = count + self.offsets[:len(logits)]
        if not s.temperature:
            return self.tree_ops.argmax(logits)
        if not self.rejection_sampling:
            return self.tree_ops.argmax(perturb(logits, state.noise[depth], s.temperature, s.top_k, s.top_p, s.min_p))
        logits = process(logits, s.temperature, s.top_k, s.top_p, s.min_p)
        self.q.index_copy_(0, depth, logits.softmax(-1))
        # `process` has divided the logits by the temperature, so this noise is not multiplied by it.
        return self.tree_ops.argmax(logits + gumbel_noise(state.seed ^ DRAFTING, state.length + depth, logits.shape[1]))

    def choose(self, state: State, tree: Tree, logits: Tensor) -> Tensor:
        """The rejection rule. Every node is judged as if all before it had been accepted: the result [T] int64 repeats
        a drafted token where it is accepted, and is a resampled token where it is not."""
        p = logits.softmax(-1)
        n = len(logits) - 1  # drafted tokens
        q = self.q[:n]
        drafted = tree.tokens[1:, None]
        is_drafted = drafted >= 0  # False for blocked nodes
        token = drafted.clamp(min=0)
        gumbel = gumbel_noise(state.seed ^ ACCEPTING, state.length + self.offsets[:n], 1)
        uniform = (-(-gumbel).exp()).exp()  # the distribution function of Gumbel noise makes it uniform
        accepted = (is_drafted & (uniform * q.gather(1, token) < p[:n].gather(1, token)))[:, 0]
        rest = (p[:n] - q).clamp(min=0)
        rest = torch.where(is_drafted & (rest.sum(1, keepdim=True) > 0), rest, p[:n])  # blocked: nothing was rejected
        log_rest = torch.cat((rest, p[n:])).log()
        # state.noise is Gumbel noise times the temperature, so the logarithms are multiplied by it too
        resampled = self.tree_ops.argmax(state.sampling.temperature * log_rest + state.noise[tree.depth])
        return torch.cat((torch.where(accepted, tree.tokens[1:], resampled[:-1]), resampled[-1:]))
