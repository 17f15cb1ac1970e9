"""Lookahead decoding (Fu et al., arXiv 2402.02057): the target drafts for itself, without a second model.

    python generate.py --checkpoint checkpoints/HuggingFaceTB/SmolLM2-135M-Instruct --lookahead --prompt "Hello!"

Each step's verification forward computes the root and the rows of two branches:

  lookahead     guesses W positions in parallel, as Jacobi iteration does. The window holds the guesses of the last
                N - 1 steps, level 0 the oldest. Each column of it is the start of an n-gram of N tokens. The target
                chooses the last of them in this forward.
  verification  verifies the n-grams seen before that begin with the root: G chains of N - 1 tokens, from a pool.

The window for W = 4 and N = 4. The numbers are positions after the root. A row sees level 0 up to its own column, and
of the higher levels its own column, up to itself:

    level 0    0 1 2 3       position 0 is the root
    level 1      1 2 3 4
    level 2        2 3 4 5
    chosen           3 4 5 6 becomes the new level 2. Level 0 is dropped. Level 1 becomes level 0, under the next root.

The window advances by one position a step. The text may advance by more: then the guesses in the window lag behind.
Rows of the lookahead branch must never be accepted, so a token t of theirs is stored as ~t (Drafter.has_blocked_nodes).

Differences from the authors' program (github.com/hao-ai-lab/LookaheadDecoding):
  - After a chain that is accepted to its end, the target's next token is committed too. Theirs drops this token when
    sampling (in earlier versions when greedy too).
  - The window is full from the start, with tokens of the prompt chosen by a hash. Theirs chooses level 0 at random and
    fills the other levels in its first N - 2 steps, which verify nothing.
  - When sampling, the guesses are sampled too, with the noise of their position. Theirs are greedy, and a guess that
    is the stop id is replaced.
  - G chains are verified even if the pool has fewer: every step has the same shape.
As in theirs by default, the pool starts empty, keeps the last G different n-grams of each first token, and takes no
n-grams from the prompt.
"""
import torch
from torch import Tensor

from draft import Drafter
from model import Llama
from sampling import mix32
from tree import MAX_NODES, State, Tree, bit, build_tree, root_token


def lookahead_tree(window: int, ngram: int, guesses: int, device: torch.device) -> Tree:
    """The rows of a step, without their tokens: the window level by level (row 0 is the root), then chain after
    chain."""
    levels = ngram - 1
    row = torch.arange(levels * (window + guesses), device=device)
    chain_row = row - levels * window  # negative in the window
    under_root = (chain_row < 0) | (chain_row % levels == 0)
    parents = torch.where(under_root, 0, row - 1)
    tree = build_tree(torch.zeros_like(row), parents, levels)
    # What a row of the window sees is no path of a tree, so its ancestors and depth are written here.
    window_row = row[:levels * window]
    level = window_row // window
    column = window_row % window
    sees = torch.where(level == 0, column <= column[:, None],
                       (column == column[:, None]) & (level <= level[:, None]))  # [rows, rows seen]
    words = tree.ancestors.shape[1]
    tree.ancestors[:len(window_row)] = (sees[..., None] * bit(window_row, words)).sum(1)
    tree.depth[:len(window_row)] = level + column
    return tree


class Lookahead(Drafter):
    """W = window, N = ngram, G = guesses. State of the current text, changed in place and cleared for each prompt:
      window [N - 1, W] int64; `propose` writes the root into its first entry
      pool [V, G, N - 1] int32, the tokens that followed each first token: the newest n-gram last, unused entries first
        and filled with -1
    """
    has_blocked_nodes = True

    def __init__(self, model: Llama, window: int = 7, ngram: int = 5, guesses: int = 7) -> None:
        levels = ngram - 1
        if min(window, levels, guesses) < 1:
            raise ValueError(f"Lookahead: window {window} and guesses {guesses} must be at least 1, and ngram {ngram} "
                             "at least 2")
        self.num_nodes = levels * (window + guesses)
        if self.num_nodes > MAX_NODES:
            raise ValueError(f"Lookahead: (ngram - 1) * (window + guesses) = {levels} * ({window} + {guesses}) = "
                             f"{self.num_nodes} rows, but at most {MAX_NODES} can be verified")
        self.max_depth = levels
        self.noise_depth = max(levels, levels + window - 2)  # the window's last row: level N - 2, column W - 1
        device = model.embed.weight.device
        self.tree = lookahead_tree(window, ngram, guesses, device)
        self.window = torch.zeros(levels, window, dtype=torch.int64, device=device)
        self.pool = torch.full((model.cfg.vocab_size, guesses, levels), -1, dtype=torch.int32, device=device)
        rows = torch.arange(levels * window, device=device)
        self.block = -(rows > 0).long()  # t ^ -1 is ~t: blocks the rows of the window; t ^ 0 is t: not the root
        self.hashes = mix32(rows)
        # For `remember`, which looks at 1 + G + W entries of a token: an unused one, its pool, and one of each column
        self.unused = self.pool.new_full((window, 1, levels), -1)
        self.entries = torch.arange(1 + guesses + window, device=device)
        # replaces[i, j]: entry j replaces an equal entry i. A later entry does, and the first, unused one does
        self.replaces = (self.entries > self.entries[:, None]) | (self.entries == 0)

    def reset(self, state: State) -> None:
        self.window.copy_(state.tokens[self.hashes % state.length].view_as(self.window))
        self.pool.fill_(-1)

    def propose(self, state: State) -> Tree:
        self.window[0, :1] = root_token(state)  # `learn` cannot write it: it runs before the commit
        chains = self.pool.index_select(0, self.window[0, :1])
        return self.tree._replace(tokens=torch.cat((self.window.flatten() ^ self.block, chains.flatten())))

    def learn(self, state: State, tree: Tree, next_tokens: Tensor) -> None:
        levels, window = self.window.shape
        chosen = next_tokens[(levels - 1) * window:levels * window]  # after the window's last level
        following = torch.cat((self.window[1:], chosen[None]))  # [N - 1, W], the tokens after each token of level 0
        self.remember(self.window[0], following.T)
        self.window.copy_(following)

    def remember(self, first: Tensor, rest: Tensor) -> None:
        """Append each n-gram to its first token's pool: an existing one moves to the end, a new one evicts the oldest.
        first [W], rest [W, N - 1].

        A token's new pool is the last G different n-grams of these: its old pool, then all that the columns add to it.
        Every column computes the whole new pool of its first token. Columns with equal first tokens compute the same
        pool, so write order does not matter.
        """
        same_first = (first == first[:, None])[..., None]
        added = torch.where(same_first, rest, self.unused)  # [W, W, N - 1]
        entries = torch.cat((self.unused, self.pool.index_select(0, first), added), 1)
        equal = (entries[:, :, None] == entries[:, None]).all(-1)  # [W, 1 + G + W, 1 + G + W]
        replaced = (equal & self.replaces).any(-1)
        kept = torch.where(replaced, self.entries[:1], self.entries)  # entry 0, the unused one, for each replaced entry
        kept = kept.sort().values[:, -self.pool.shape[1]:]  # [W, G]
        pools = entries.gather(1, kept[..., None].expand(-1, -1, entries.shape[2]))
        self.pool.index_copy_(0, first, pools.int())
