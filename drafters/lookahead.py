"""Lookahead decoding (Fu et al., arXiv 2402.02057): the target drafts for itself, without a second model.

Beside the root the forward verifies, it computes two branches of rows:

  the lookahead branch guesses W places at once as Jacobi iteration does. Its window holds the guesses of the last N - 1
  steps, level 0 the oldest. Down each column they make an N-gram, whose last token the target chooses in this forward.
  the verification branch tries the N-grams seen before that begin with the root: G chains of N - 1 tokens, from a pool.

Window for W = 4, N = 4, by place after the root. A row sees level 0 up to its own column, then its column above it:

    level 0    0 1 2 3       place 0 is the root
    level 1      1 2 3 4
    level 2        2 3 4 5
    chosen           3 4 5 6 enters as the new level 2, level 0 leaves, and level 1 is aligned with the next root

The text may advance by more than one place a step, the window advances by one: its guesses then lag behind.
Lookahead rows must never be accepted, so tokens t of theirs are drafted as ~t (drafter.py).

Where this differs from the authors' program (github.com/hao-ai-lab/LookaheadDecoding):
  - After a chain that is right to its end the target's next token counts too. Theirs drops it when sampling (and when
    greedy did so in earlier versions).
  - The window is full from the start, of tokens of the prompt chosen by a hash. Theirs chooses level 0 at random, and
    fills the other levels in its first N - 2 steps, in which it verifies nothing.
  - When sampling, the guesses are sampled as well, with the noise of their place. Theirs are greedy, and those that are
    the stop id are replaced.
  - G chains are verified whether or not the pool has so many: one shape for every step.
As theirs does by default, the pool starts empty, keeps the last G different N-grams of each first token, and takes
none from the prompt.

    engine = Engine(model, Lookahead(model), max_seq_len=2048)
    for tokens in engine.generate([1, 2, 3], max_new_tokens=100): ...
"""
import torch
from torch import Tensor

from draft import Drafter
from model import Llama
from sampling import mix32
from tree import MAX_NODES, State, Tree, build_tree, root_token


def shape(window: int, ngram: int, guesses: int, device: torch.device) -> Tree:
    """The rows without their tokens: the window level by level, the root its first, then chain after chain."""
    levels = ngram - 1
    row = torch.arange(levels * (window + guesses), device=device)
    ahead, place = row[:levels * window], row - levels * window  # the latter: in the chains
    parents = torch.where((place < 0) | (place % levels == 0), 0, row - 1)
    tree = build_tree(torch.zeros_like(row), parents, levels)
    level, column = ahead // window, ahead % window
    sees = torch.where(level == 0, column <= column[:, None],
                       (column == column[:, None]) & (level <= level[:, None]))  # [rows, rows seen]
    tree.ancestors[:len(ahead)] = (sees.long() << ahead).sum(1)
    tree.depth[:len(ahead)] = level + column
    return tree


class Lookahead(Drafter):
    """W = window, N = ngram, G = guesses. State, changed in place and cleared for each prompt:
      window [N - 1, W] int64, whose first token is the root, put there by `propose`
      pool [V, G, N - 1] int32, what followed each token, oldest first; where there is less, rows of -1 before
    """
    has_blocked_nodes = True

    def __init__(self, model: Llama, window: int = 7, ngram: int = 5, guesses: int = 7) -> None:
        if min(window, ngram - 1, guesses) < 1:
            raise ValueError(f"Lookahead: window {window} and guesses {guesses} must be at least 1, ngram {ngram} 2")
        levels, self.num_nodes = ngram - 1, (ngram - 1) * (window + guesses)
        if self.num_nodes > MAX_NODES:
            raise ValueError(f"Lookahead: (ngram - 1) * (window + guesses) = {levels} * ({window} + {guesses}) = "
                             f"{self.num_nodes} rows, {MAX_NODES} is the most")
        self.max_depth, self.noise_depth = levels, max(levels, levels + window - 2)
        device = model.embed.weight.device
        self.shape = shape(window, ngram, guesses, device)
        self.window = torch.zeros(levels, window, dtype=torch.int64, device=device)
        self.pool = torch.full((model.cfg.vocab_size, guesses, levels), -1, dtype=torch.int32, device=device)
        rows = torch.arange(levels * window, device=device)
        self.hide = -(rows > 0).long()  # t ^ -1 is ~t; the root stays
        self.random = mix32(rows)
        self.blank = self.pool.new_full((window, 1, levels), -1)
        self.entries = torch.arange(1 + guesses + window, device=device)  # of one token's pool while it is updated
        # Which entries replace an equal one: those after it, and the blank one, the first
        self.replaces = (self.entries > self.entries[:, None]) | (self.entries == 0)

    def reset(self, state: State) -> None:
        self.window.copy_(state.tokens[self.random % state.length].view_as(self.window))
        self.pool.fill_(-1)

    def propose(self, state: State) -> Tree:
        self.window[0, :1] = root_token(state)  # `learn` cannot know it: it runs before the commit
        guesses = self.pool.index_select(0, self.window[0, :1])
        return self.shape._replace(tokens=torch.cat((self.window.flatten() ^ self.hide, guesses.flatten())))

    def learn(self, state: State, tree: Tree, next_tokens: Tensor) -> None:
        levels, window = self.window.shape
        chosen = next_tokens[(levels - 1) * window:levels * window]
        columns = torch.cat((self.window[1:], chosen[None]))  # [N - 1, W], what follows each token of level 0
        self.remember(self.window[0], columns.T)
        self.window.copy_(columns)

    def remember(self, first: Tensor, rest: Tensor) -> None:
        """Add N-grams to the pool one after the other: first [W], rest [W, N - 1]. Who is there already becomes the
        newest, who is not takes the place of the oldest. What remains of all that one token had before, and of all that
        it gets, are the last G different ones. So each column works out its token's whole pool; columns of the same
        token write the same, and it does not matter which is last."""
        same = (first == first[:, None])[..., None]
        entries = torch.cat((self.blank, self.pool.index_select(0, first), torch.where(same, rest, self.blank)), 1)
        equal = (entries[:, :, None] == entries[:, None]).all(-1)  # [W, 1 + G + W, 1 + G + W]
        gone = (equal & self.replaces).any(-1)
        places = torch.where(gone, self.entries[:1], self.entries)  # instead of those gone the blank one, entry 0
        last = places.sort().values[:, -self.pool.shape[1]:]  # [W, G]
        kept = entries.gather(1, last[..., None].expand(-1, -1, entries.shape[2]))
        self.pool.index_copy_(0, first, kept.int())
