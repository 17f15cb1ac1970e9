"""Speculative sampling with a smaller language model: it writes a chain, the target verifies it in one forward.

    python generate.py --checkpoint checkpoints/org/large --speculate checkpoints/org/small --prompt "..."

Leviathan et al., arXiv 2211.17192; Chen et al., arXiv 2302.01318. When sampling there are two lossless rules:

    keyed      draft and target choose with the same noise, which belongs to the place in the text; a token is accepted
               where both choose it, and the text is that of plain decoding with the same seed, token for token
    rejection  the papers': token x is accepted with probability p(x) / q(x), else the next one is sampled from what p
               exceeds q by. More is accepted, and the text is another one of the same distribution

Staged (arXiv 2308.04623): with `retrieval` the small model is sped up in the same way. Each of its forwards verifies a
chain that the text itself suggests (lookup.py), so that fewer forwards write the same chain.
"""
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from draft import Drafter, tree_ops
from drafters.lookup import Retrieval
from formats.config import Config
from formats.weights import fill, read_tensors
from model import Llama, load_model
from ops.attention import TreeMask, causal_mask
from ops.linear import linear
from ops.quantized import Quantized, dequantize
from sampling import gumbel_noise, perturb, process
from tree import State, Tree, build_tree, root_token

DRAFTING, ACCEPTING = 0x5EED0D7A, 0x5EED0ACC  # make of the seed those of two more streams of noise


def load_draft_model(path: Path | str, target: Llama) -> Llama:
    """A converted checkpoint with the target's tokens, or what train_peers.py writes: layers and norm, whose 8 bits
    become the target's dtype; embedding and lm_head are the target's own. Errors as in load_model."""
    path, like = Path(path), target.embed.weight
    if not path.exists():
        raise FileNotFoundError(f"{path}: no draft model there; convert one with convert_hf_checkpoint.py, or train "
                                "one with train_peers.py")
    file = path / "model.safetensors" if path.is_dir() else path
    cfg, (tensors, metadata) = Config.load(file.parent), read_tensors(file)
    if cfg.vocab_size != target.cfg.vocab_size:
        raise ValueError(f"{file}: a model of {cfg.vocab_size} tokens cannot draft for one of {target.cfg.vocab_size}: "
                         "they need the same tokenizer")
    if metadata.get("embedding") != "target":
        return load_model(path, like.device, like.dtype)
    if cfg.hidden_size != target.cfg.hidden_size:
        raise ValueError(f"{file}: made for a target of hidden size {cfg.hidden_size}, not {target.cfg.hidden_size}")
    if metadata.get("mode") == "int8":
        for name in [name.removesuffix(".data") for name in tensors if name.endswith(".data")]:
            weight = Quantized(tensors.pop(f"{name}.data"), tensors.pop(f"{name}.scale"), 0, 2)
            tensors[f"{name}.weight"] = dequantize(weight, like.dtype)
    with torch.device("meta"):
        draft = Llama(cfg, qkv_bias="layers.0.wqkv.bias" in tensors)
    draft.embed = draft.lm_head = None  # not in the file
    fill(draft, tensors, file, like.device, like.dtype)
    draft.embed, draft.lm_head = target.embed, target.lm_head
    return draft


class Speculate(Drafter):
    """Drafts `length` tokens in as many forwards of `draft`; with `retrieval`, up to `length` in `rounds` forwards."""

    def __init__(self, draft: Llama, target: Llama, length: int = 5, rejection: bool = False,
                 retrieval: Retrieval | None = None, rounds: int = 4) -> None:
        chain, rounds = (retrieval.length, rounds) if retrieval else (0, length)
        reach = rounds * (chain + 1)  # as many tokens as it may get to
        if not (1 <= length <= 16 and 1 <= rounds and length <= reach <= 100):
            raise ValueError(f"a draft model writes 1 to 16 tokens a cycle; {length} do not fit {rounds} rounds")
        self.draft, self.rejection_sampling, self.retrieval, self.rounds = draft, rejection, retrieval, rounds
        self.num_nodes, self.max_depth, self.noise_depth = length + 1, length, reach
        self.has_blocked_nodes = bool(retrieval)
        device = target.embed.weight.device
        self.tree_ops, self.places = tree_ops(device), torch.arange(reach + 2, device=device)
        parents = (self.places[:length + 1] - 1).clamp(min=0)
        self.shape = build_tree(torch.zeros_like(parents), parents, length)
        self.guess = parents.new_zeros(chain + 1)  # the newest token, and what retrieval would write after it
        self.q = torch.zeros(reach, target.cfg.vocab_size if rejection else 0, device=device)
        self.text = parents.new_zeros(0)  # the target's text with the draft model's behind it

    def allocate(self, slots: int) -> None:
        if self.draft.kv is None or self.draft.kv.shape[4] < slots:
            self.draft.allocate_cache(slots)
        if len(self.text) < slots + 1:
            self.text = self.text.new_zeros(slots + 1)

    def caches(self) -> tuple[Tensor, ...]:
        return self.draft.kv, self.text

    def prefill(self, state: State, features: Tensor, slots: Tensor, mask: Tensor | TreeMask) -> None:
        self.draft(state.tokens[slots][None], slots, slots, mask)

    def propose(self, state: State) -> Tree:
        """Feeds the newest two tokens first: the older one may be the last of a chain that was accepted as a whole, and
        such a token has not been fed."""
        self.text[:len(state.tokens)].copy_(state.tokens)
        base, count, rows = state.length - 1, 0, len(self.guess)
        for turn in range(self.rounds):
            place, again = base + count, int(turn == 0)
            slots = place - again + self.places[:rows + again]
            tokens = self.text[slots]
            if self.retrieval:
                self.retrieval.write(replace(state, tokens=self.text, length=place + 1), self.guess)
                tokens = torch.cat((tokens[:again], self.guess ^ (self.guess >> 63)))  # ~0 to 0
            mask = causal_mask(place - again, rows + again, state.width)
            hidden = self.draft(tokens[None], slots, slots, mask)[0][again:]
            chosen = self.pick(state, linear(hidden, self.draft.lm_head.weight, dtype=torch.float32), count)
            self.text.index_copy_(0, place + 1 + self.places[:rows], chosen)
            count = count + 1
            if self.retrieval:
                count = count + (self.guess[1:] == chosen[:-1]).cumprod(0).sum()
        drafted = self.text[base + 1 + self.places[:self.max_depth]]
        if self.retrieval:
            drafted = torch.where(self.places[:self.max_depth] < count, drafted, ~drafted)
        return self.shape._replace(tokens=torch.cat((root_token(state), drafted)))

    def pick(self, state: State, logits: Tensor, count: int | Tensor) -> Tensor:
        """The draft model's choice after its `count`-th token and those that follow, [T] int64, of logits [T, V]."""
        s, depth = state.sampling, count + self.places[:len(logits)]
        if not s.temperature:
            return self.tree_ops.argmax(logits)
        if not self.rejection_sampling:
            return self.tree_ops.argmax(perturb(logits, state.noise[depth], s.temperature, s.top_k, s.top_p, s.min_p))
        logits = process(logits, s.temperature, s.top_k, s.top_p, s.min_p)
        self.q.index_copy_(0, depth, logits.softmax(-1))
        return self.tree_ops.argmax(logits + gumbel_noise(state.seed ^ DRAFTING, state.length + depth, logits.shape[1]))

    def choose(self, state: State, tree: Tree, logits: Tensor) -> Tensor:
        """The rejection rule, after every node as if all before it had been accepted. A place has noise of its own for
        drafting, accepting and choosing; of what was drawn there in vain, nothing that is committed depends on."""
        p, n, heat = logits.softmax(-1), len(logits) - 1, state.sampling.temperature
        drafted, q = tree.tokens[1:, None], self.q[:n]
        real = drafted >= 0
        x = drafted.clamp(min=0)
        uniform = (-(-gumbel_noise(state.seed ^ ACCEPTING, state.length + self.places[:n], 1)).exp()).exp()
        accepted = (real & (uniform * q.gather(1, x) < p[:n].gather(1, x)))[:, 0]
        rest = (p[:n] - q).clamp(min=0)
        rest = torch.where(real & (rest.sum(1, keepdim=True) > 0), rest, p[:n])  # not drafted: nothing to subtract
        other = self.tree_ops.argmax(heat * torch.cat((rest, p[n:])).log() + state.noise[tree.depth])
        return torch.cat((torch.where(accepted, tree.tokens[1:], other[:-1]), other[-1:]))
