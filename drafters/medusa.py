"""Medusa (arXiv 2401.10774): heads that read one feature of the target and guess several tokens ahead, all at once.

The feature that the newest token was chosen from, the target's last hidden state after the final norm, goes into every
head. Head k (from 0) is a block or more of x + silu(W x + b) and a projection to the vocabulary, and guesses the token
k + 2 places after the feature's own: the one k + 1 levels under the root. No head sees what another one guessed. So a
tree costs one row of each head, siblings have the same children, and which ranks it combines is fixed beforehand.

  V1   each head has a projection of its own, as large as the lm_head
  V2   all share the target's lm_head: blocks alone, and one product for all heads

    heads = load_medusa("medusa-vicuna-7b-v1.3", target)
    engine = Engine(target, Medusa(heads, target), max_seq_len=2048)
"""
import json
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from draft import Drafter, drafting_rows, tree_ops
from formats.medusa import FILES, PROJECTION, arrange, common_name, read_pickle, shares_lm_head
from formats.weights import fill, read_tensors
from model import Llama
from ops.linear import linear
from tree import MAX_NODES, State, Tree, build_tree, root_token

# The authors' tree `mc_sim_7b_63` (github.com/FasterDecoding/Medusa, medusa/model/medusa_choices.py): how many of the
# next head's best tokens hang under each node, which is the path of ranks that leads to it: (0, 1) is the first head's
# best token and the second head's second-best. 63 drafted nodes; level by level 10, 28, 23 and 2.
CHILDREN = {(): 10, (0,): 10, (1,): 7, (2,): 3, (3,): 2, **{(rank,): 1 for rank in range(4, 10)},
            (0, 0): 10, (0, 1): 3, (0, 2): 2, **{(0, rank): 1 for rank in range(3, 8)}, (1, 0): 2, (2, 0): 1,
            (0, 0, 0): 2}
MEDUSA_TREE = [(*path, rank) for path, count in CHILDREN.items() for rank in range(count)]


class MedusaHeads(nn.Module):
    """The blocks of all heads, and with a `vocab_size` (V1) their projections. New heads of one's own are V2: to begin
    with, each hands the feature on as it is."""

    def __init__(self, hidden_size: int, num_heads: int, num_layers: int = 1, vocab_size: int | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_layers, num_heads, hidden_size, hidden_size))
        self.bias = nn.Parameter(torch.zeros(num_layers, num_heads, hidden_size))
        self.projections = None if vocab_size is None else nn.Parameter(torch.zeros(num_heads, vocab_size, hidden_size))

    def forward(self, features: Tensor, count: int | None = None) -> Tensor:
        """What the lm_head, or each head's own projection, is to read: [heads, ..., C] of features [..., C]; of the
        first `count` heads alone."""
        count = count or self.weight.shape[1]
        x = features.expand(count, *features.shape)
        for layer, (weight, bias) in enumerate(zip(self.weight[:, :count], self.bias[:, :count])):
            if layer == 0:  # all heads read the same rows: side by side they are one matrix
                y = linear(features, weight.flatten(0, 1), bias.flatten()).unflatten(-1, (count, -1)).movedim(-2, 0)
            else:
                rows = x.reshape(count, -1, x.shape[-1])
                y = torch.baddbmm(bias[:, None], rows, weight.mT).view(x.shape)
            x = x + F.silu(y)
        return x


def save_medusa(heads: MedusaHeads, folder: Path | str) -> None:
    """As TGI reads it: medusa_lm_head.safetensors and a config.json that says whether the lm_head is shared (V2)."""
    folder, (layers, count) = Path(folder), heads.weight.shape[:2]
    tensors = {f"{head}.{layer}.linear.{kind}": t[layer, head] for head in range(count) for layer in range(layers)
               for kind, t in (("weight", heads.weight), ("bias", heads.bias))}
    if heads.projections is not None:
        tensors |= {f"{head}.{layers}.weight": t for head, t in enumerate(heads.projections)}
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: t.detach().contiguous() for name, t in tensors.items()}, folder / FILES[0], {"format": "pt"})
    (folder / "config.json").write_text(json.dumps({
        "version": "2" if heads.projections is None else "1", "medusa_num_heads": count, "medusa_num_layers": layers,
        "base_model_name_or_path": ""}, indent=2) + "\n", encoding="utf-8")


def load_medusa(path: Path | str, target: Llama) -> MedusaHeads:
    """Published heads: a folder with a file of one of three layouts, or that file. How many heads and blocks there are
    is what the file says (the authors' configs have it wrong); config.json, if there is one, only that heads share
    the lm_head though they bring projections. One block that all layers of a head share is loaded as several.

    Raises FileNotFoundError, or ValueError where the file is damaged, of another kind, or for another model.
    """
    path, weight = Path(path), target.embed.weight
    file = path if path.is_file() else next((path / name for name in FILES if (path / name).is_file()), None)
    if file is None:
        raise FileNotFoundError(f"{path}: no Medusa heads there: neither {', '.join(FILES[:-1])} nor {FILES[-1]}")
    published = read_pickle(file) if file.suffix == ".pt" else read_tensors(file)[0]
    if shares_lm_head(file.parent / "config.json"):
        published = {name: tensor for name, tensor in published.items() if not PROJECTION.fullmatch(common_name(name))}
    tensors = arrange(file, published, target.cfg.hidden_size, target.cfg.vocab_size)
    layers, count, size, _ = tensors["weight"].shape
    with torch.device("meta"):
        heads = MedusaHeads(size, count, layers, target.cfg.vocab_size if "projections" in tensors else None)
    fill(heads, tensors, file, weight.device, weight.dtype)
    return heads


class Medusa(Drafter):
    """A fixed tree, `choices`: the paths of ranks that lead to its nodes. Levels that there is no head for are left
    out, and heads that there is no level for are not run."""

    def __init__(self, heads: MedusaHeads, target: Llama, choices: list[tuple[int, ...]] = MEDUSA_TREE) -> None:
        nodes = sorted({(), *(path for path in choices if len(path) <= heads.weight.shape[1])},
                       key=lambda path: (len(path), path))  # level order, the root first
        self.num_nodes, self.max_depth = len(nodes), len(nodes[-1])
        self.ranks = 1 + max(path[-1] for path in nodes[1:])
        if self.num_nodes > MAX_NODES or self.ranks > min(10, target.cfg.vocab_size):
            raise ValueError(f"a tree of {self.num_nodes} nodes and the best {self.ranks} tokens: at most {MAX_NODES} "
                             f"and {min(10, target.cfg.vocab_size)} are possible")
        self.heads, self.lm_head = heads, drafting_rows(target.lm_head.weight, None, False)
        device = target.embed.weight.device
        self.tree_ops = tree_ops(device)
        parents = torch.tensor([0] + [nodes.index(path[:-1]) for path in nodes[1:]], device=device)
        self.shape = build_tree(torch.zeros_like(parents), parents, self.max_depth)
        self.places = torch.tensor([(len(path) - 1) * self.ranks + path[-1] for path in nodes[1:]], device=device)

    def propose(self, state: State) -> Tree:
        feature = state.features.index_select(0, (state.committed - 1)[None])  # the root was chosen from it
        best = self.tree_ops.best_tokens(self.logits(feature, state), self.ranks)
        return self.shape._replace(tokens=torch.cat((root_token(state), best.flatten()[self.places])))

    def logits(self, feature: Tensor, state: State) -> Tensor:
        """What each head says of its own level, [heads, V] fp32, given the target's feature [1, C]. Sampling adds noise
        that belongs to the place in the text: with it heads guess what will be sampled, not what may be."""
        hidden, own = self.heads(feature, self.max_depth)[:, 0], self.heads.projections
        if own is None:
            logits = linear(hidden, self.lm_head, dtype=torch.float32)
        else:
            logits = torch.cat([linear(row, weight, dtype=torch.float32) for row, weight in zip(hidden.split(1), own)])
        return logits if state.noise is None else logits + state.noise[:self.max_depth]
