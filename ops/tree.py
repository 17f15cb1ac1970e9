"""The small steps of a cycle in a few Triton kernels: tree.py's functions for a GPU, inside a CUDA graph.

Between two forwards, a cycle does little work in many steps: as PyTorch operations, some 300 kernels of a few
microseconds each. Here the host reads nothing, grids are static, every sum has a fixed order, and state changes in
place. The functions have the names and results of their twins, which are the documentation:

    catch_up, best_tokens, argmax, grow, grid, rerank, accept_commit, compact     tree.py
    gumbel_noise                                                                  sampling.py

Choices compare the keys of ops/topk.py. A tile has 16 lanes for the k <= 10 nodes of a level, and 64 or 128 for the
nodes of a tree: as many as the words of its ancestors have bits.

Letters: T nodes of a tree, N drafted candidates, D depths, V tokens of the vocabulary.
"""
import torch
from torch import Tensor

from ops.device import pdl_options, tl, triton, wait_for_previous
from ops.topk import argmax, best_tokens, key_index, key_value, sort_key, top_children  # noqa: F401  (tree.py's names)
from tree import Candidates, Level, State, Tree


@triton.jit
def mix32(x):
    """sampling.mix32, in uint32."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def noise_kernel(seed, positions, out, V, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """See `gumbel_noise`. Grid (positions, blocks of V): a program writes BLOCK tokens of one position.

    Pointers: seed int64, positions [any] int64, out [any, V] fp32.
    """
    wait_for_previous(PDL)
    row, token = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    key = tl.load(seed)
    h = mix32(key.to(tl.uint32)) ^ mix32((key >> 32).to(tl.uint32) ^ 0x5BD1E995)
    h = mix32(mix32(h) + tl.load(positions + row).to(tl.uint32))
    u = tl.minimum((mix32(mix32(h ^ token.to(tl.uint32))).to(tl.float32) + 0.5) * 0.5**32, 1 - 0.5**24)
    rest = 1 - u  # log1p(-u) is the log of the rounded 1 - u, corrected for the rounding
    log1p = tl.where(rest == 1, -u, tl.log(rest) * u / (1 - rest))
    tl.store(out + row.to(tl.int64) * V + token, -tl.log(-log1p), mask=token < V)


@triton.jit
def catch_up_kernel(text, length, committed, scratch, tokens, positions, last_row, absolute, N, W, SIZE: tl.constexpr,
                    PDL: tl.constexpr):
    """See `catch_up`. One program.

    Pointers, all int64: text [any], length and committed 0-d, scratch [W], tokens and positions [N], last_row [1],
    absolute [W]. SIZE is the larger of N and W, rounded up to a power of two.
    """
    wait_for_previous(PDL)
    i = tl.arange(0, SIZE)
    end, new = tl.load(length), tl.load(committed)
    position = end - new - 1 + i
    tl.store(tokens + i, tl.load(text + position + 1, mask=i < N), mask=i < N)
    tl.store(positions + i, position, mask=i < N)
    tl.store(last_row, new - 1)
    tl.store(absolute + i, end + tl.load(scratch + i, mask=i < W), mask=i < W)


@triton.jit(do_not_specialize=["N", "depth"])
def grow_kernel(children, logs, level_scores, level_index, level_visible,  # of the nodes that were fed
                tokens, scores, parents,  # the candidates
                next_tokens, next_scores, next_index, next_parent_rows, next_visible,  # the level to be fed next
                N, depth, K: tl.constexpr, PDL: tl.constexpr):
    """See `grow`. One program; tiles are [16, 16]: nodes that were fed, and the ranks of their children.

    Pointers: children [N, K] int64 and logs [N, K] fp32, the K best tokens below each node and their log-probabilities;
    all others as in tree.Level and tree.Candidates, visible as [k, 2].
    """
    wait_for_previous(PDL)
    lane, rank = tl.arange(0, 16), tl.arange(0, 16)[None, :]
    fed = lane < N
    child, real = lane[:, None] * K + rank, fed[:, None] & (rank < K)
    token = tl.load(children + child, mask=real, other=0)
    score = tl.load(level_scores + lane, mask=fed, other=0.0)[:, None] + tl.load(logs + child, mask=real, other=0.0)
    first = tl.where(depth == 0, 0, K + (depth - 1) * K * K)  # candidates of the levels above
    tl.store(tokens + first + child, token, mask=real)
    tl.store(scores + first + child, score, mask=real)
    tl.store(parents + first + child, tl.load(level_index + lane, mask=fed, other=0)[:, None], mask=real)

    top = tl.topk(tl.reshape(sort_key(score, child, real), [256]), 16)
    chosen, child = lane < K, key_index(top).to(tl.int32)
    row = tl.where(chosen, child // K, 0)
    in_tile = row * 16 + tl.where(chosen, child % K, 0)
    tl.store(next_tokens + lane, tl.gather(tl.reshape(token, [256]), in_tile, 0), mask=chosen)
    tl.store(next_scores + lane, key_value(top), mask=chosen)
    tl.store(next_index + lane, first + child, mask=chosen)
    tl.store(next_parent_rows + lane, row, mask=chosen)
    slot = (depth * K + lane).to(tl.int64)
    for word in tl.static_range(2):
        own = tl.where(slot // 64 == word, tl.full([16], 1, tl.int64) << (slot % 64), 0)
        inherited = tl.load(level_visible + row * 2 + word, mask=chosen, other=0)
        tl.store(next_visible + lane * 2 + word, inherited | own, mask=chosen)


@triton.jit(do_not_specialize=["D", "n"])
def grid_kernel(children, logs, tokens, scores, parents, D, n, K: tl.constexpr, BEAM: tl.constexpr,
                PAIRS: tl.constexpr, PDL: tl.constexpr):
    """See `grid`. One program does one depth after the other. A lane of PAIRS is a pair: a parent and a child's rank.

    Pointers: children [D, K] int64 and logs [D, K] fp32, the K best tokens of each depth and their log-probabilities;
    tokens, scores, parents [D * n or more] as in tree.Candidates. BEAM and PAIRS are n and the number of pairs, rounded
    up to a power of two, at least 16.
    """
    wait_for_previous(PDL)
    node, lane = tl.arange(0, BEAM), tl.arange(0, PAIRS)
    parent, rank, pairs = lane, lane * 0, n
    for r in tl.static_range(1, K):  # n // (r + 1) parents have a child of rank r that can be kept
        parent = tl.where(lane < pairs, parent, lane - pairs)
        rank = tl.where(lane < pairs, rank, r)
        pairs += n // (r + 1)
    real = lane < pairs
    parent = tl.where(real, parent, 0)
    pair = parent * 16 + rank  # the order at a tie; and lanes may have any order, because keys carry the pair
    score = tl.where(node == 0, 0.0, -float("inf"))  # the root alone
    for depth in range(D):
        log_p = tl.load(logs + depth * K + rank, mask=real, other=0.0)
        best = tl.topk(sort_key(tl.gather(score, parent, 0) + log_p, pair, real), BEAM)
        score, winner = key_value(best), key_index(best)
        at, kept = depth * n + node, node < n
        tl.store(tokens + at, tl.load(children + depth * K + winner % 16, mask=kept), mask=kept)
        tl.store(scores + at, score, mask=kept)
        tl.store(parents + at, tl.where(depth == 0, -1, (depth - 1) * n + winner // 16), mask=kept)


@triton.jit
def bit(node, word, WORDS: tl.constexpr):
    """One word of tree.bit: the bit of each node, 0 where it is in the other one of two words."""
    one = tl.full(node.shape, 1, tl.int64)
    if WORDS == 1:
        return one << node
    else:
        return tl.where(node // 64 == word, one << (node % 64), 0)


@triton.jit
def rerank_kernel(tokens, scores, parents, text, length, tree_tokens, tree_parents, tree_depth, tree_ancestors,
                  N, n, MAX_DEPTH: tl.constexpr, SIZE: tl.constexpr, WORDS: tl.constexpr, PDL: tl.constexpr):
    """See `rerank`. One program. The root takes part as candidate -1, which is the parent that its children name.

    Pointers: tokens, scores, parents [N] as in tree.Candidates, text [any] int64, length 0-d int64; tree_* [n + 1] and
    tree_ancestors [n + 1, WORDS] int64 as in tree.Tree. SIZE is N rounded up to a power of two, at least 64 * WORDS.
    """
    wait_for_previous(PDL)
    LANES: tl.constexpr = 64 * WORDS
    index, node = tl.arange(0, SIZE), tl.arange(0, LANES).to(tl.int64)
    score = tl.load(scores + index, mask=index < N, other=0.0)
    best = key_index(tl.topk(sort_key(score, index, index < N), LANES))
    kept = tl.sort(tl.where(node < n, best, tl.where(node == LANES - 1, -1, SIZE)))  # the root, the n best, and padding
    drafted = (node > 0) & (node <= n)
    above = tl.load(parents + kept, mask=drafted, other=-1)
    parent = tl.sum(tl.where(kept[None, :] == above[:, None], node[None, :], 0), 1)
    token = tl.load(tokens + kept, mask=drafted, other=tl.load(text + tl.load(length) - 1))

    low, high, depth, at = bit(node, 0, WORDS), bit(node, 1, WORDS), (node > 0).to(tl.int64), parent
    for _ in range(MAX_DEPTH):  # as tree.build_tree does
        low |= bit(at, 0, WORDS)
        high |= bit(at, 1, WORDS)
        depth += at > 0
        at = tl.gather(parent, at, 0)
    tl.store(tree_tokens + node, token, mask=node <= n)
    tl.store(tree_parents + node, parent, mask=node <= n)
    tl.store(tree_depth + node, depth, mask=node <= n)
    tl.store(tree_ancestors + node * WORDS, low, mask=node <= n)
    if WORDS == 2:
        tl.store(tree_ancestors + node * WORDS + 1, high, mask=node <= n)


@triton.jit
def accept_commit_kernel(tokens, parents, depths, ancestors, next_tokens, text, length, committed, done, stop_ids,
                         limit, path, report, T, STOPS, STEPS, PATH: tl.constexpr, STOP_TILE: tl.constexpr,
                         WORDS: tl.constexpr, PDL: tl.constexpr):
    """See `accept_commit`. One program.

    Pointers: tokens, parents, depths, next_tokens [T], ancestors [T, WORDS] int64; text [any], length, committed int64
    and done bool, which change in place; stop_ids [STOPS], limit, path [STEPS], report [STEPS + 2] int64;
    STEPS = max_depth + 1. PATH and STOP_TILE are STEPS and STOPS rounded up to a power of two.
    """
    wait_for_previous(PDL)
    node, step = tl.arange(0, 64 * WORDS).to(tl.int64), tl.arange(0, PATH)
    real, taken = node < T, step < STEPS
    parent = tl.load(parents + node, mask=real, other=0)
    wrong = tl.load(tokens + node, mask=real, other=0) != tl.load(next_tokens + parent, mask=real, other=0)
    word = 0 if WORDS == 1 else node // 64
    shift = node if WORDS == 1 else node % 64
    wrong_bits = (wrong & (node > 0)).to(tl.int64) << shift
    low_wrong = tl.sum(wrong_bits if WORDS == 1 else tl.where(word == 0, wrong_bits, 0), 0)  # bits are distinct
    wrong_above = tl.load(ancestors + node * WORDS, mask=real, other=0) & low_wrong
    if WORDS == 2:
        high_wrong = tl.sum(tl.where(word == 1, wrong_bits, 0), 0)
        wrong_above |= tl.load(ancestors + node * 2 + 1, mask=real, other=0) & high_wrong
    depth = tl.load(depths + node, mask=real, other=-1)
    reached = tl.where(wrong_above == 0, depth, -1)
    last, accepted = tl.argmax(reached, 0), tl.max(reached, 0)
    on_path = (tl.load(ancestors + last * WORDS + word) >> shift) & 1 == 1
    here = tl.where(on_path[None, :] & (depth[None, :] == step[:, None]), node[None, :], -1)  # at most one node a row
    walk = tl.where(tl.max(here, 1) < 0, last, tl.max(here, 1))
    out = tl.load(next_tokens + walk)
    tl.store(path + step, walk, mask=taken)

    stop = tl.arange(0, STOP_TILE)[None, :]
    stops = (out[:, None] == tl.load(stop_ids + stop, mask=stop < STOPS, other=0)) & (stop < STOPS)
    first_stop = tl.min(tl.where(stops, step[:, None], STEPS))
    before, most, over, old = tl.load(length), tl.load(limit), tl.load(done), tl.load(committed)
    count = tl.where(over, 0, tl.minimum(tl.minimum(accepted, first_stop) + 1, most - before))
    over_now = over | (first_stop < count) | (before + count >= most)
    tl.debug_barrier()  # every thread has read the state
    tl.store(text + before + step, out, mask=taken & (over == 0))
    tl.store(length, before + count)
    tl.store(committed, tl.where(over, old, count))
    tl.store(done, over_now)
    tl.store(report, count)
    tl.store(report + 1, over_now)
    tl.store(report + 2 + step, out, mask=taken)


@triton.jit
def compact_kernel(kv, base, path, hidden, kept, CELLS, S, D, C, STEPS, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
                   PDL: tl.constexpr):
    """See `compact`. Grid (CELLS, then blocks of C): each of the first CELLS programs moves the rows of one head's keys
    or values in one layer, each of the others COLUMNS columns of the hidden states. All rows are loaded before any is
    stored, because source and destination overlap.

    Pointers: kv [CELLS, S, D], base 0-d int64, path [STEPS] int64, hidden [T, C], kept [STEPS, C]. ROWS and COLUMNS
    are STEPS and D rounded up to a power of two.
    """
    wait_for_previous(PDL)
    cell, step, column = tl.program_id(0), tl.arange(0, ROWS), tl.arange(0, COLUMNS)[None, :]
    source = tl.load(path + step, mask=step < STEPS, other=0)[:, None]
    step = step[:, None].to(tl.int64)
    if cell < CELLS:
        rows = kv + (cell.to(tl.int64) * S + tl.load(base)) * D + column
        origin, goal = rows + source * D, rows + step * D
        moves = (step < STEPS) & (source != step) & (column < D)
    else:
        column += (cell - CELLS) * COLUMNS
        origin, goal = hidden + source * C + column, kept + step * C + column
        moves = (step < STEPS) & (column < C)
    x = tl.load(origin, mask=moves)
    tl.debug_barrier()
    tl.store(goal, x, mask=moves)


def gumbel_noise(seed: Tensor, positions: Tensor, vocab_size: int) -> Tensor:
    """sampling.gumbel_noise, equal up to the last digits of an fp32 logarithm."""
    out = torch.empty(len(positions), vocab_size, device=positions.device)
    block = 1024
    noise_kernel[len(positions), triton.cdiv(vocab_size, block)](seed, positions, out, vocab_size, block,
                                                                 **pdl_options(positions.device))
    return out


def catch_up(state: State, n: int, scratch: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """tree.catch_up."""
    tokens, positions = scratch.new_empty(2, n)
    last_row = scratch.new_empty(1)
    absolute = torch.empty_like(scratch)
    size = triton.next_power_of_2(max(n, scratch.numel()))
    catch_up_kernel[1,](state.tokens, state.length, state.committed, scratch, tokens, positions, last_row, absolute, n,
                        scratch.numel(), size, num_warps=1, **pdl_options(scratch.device))
    return tokens, positions, last_row, absolute


def grow(logits: Tensor, level: Level, candidates: Candidates, depth: int, k: int, ids: Tensor | None = None,
         noise: Tensor | None = None) -> Level:
    """tree.grow."""
    return next_level(*top_children(logits, k, ids, noise), level, candidates, depth)


def next_level(children: Tensor, logs: Tensor, level: Level, candidates: Candidates, depth: int) -> Level:
    """tree.grow, from the best tokens below each node of `level` and their log-probabilities, both [nodes, k]."""
    nodes, k = children.shape
    new = children.new_empty
    following = Level(tokens=new(k), scores=logs.new_empty(k), index=new(k), parent_rows=new(k), visible=new(k, 2))
    grow_kernel[1,](children, logs, level.scores, level.index, level.visible, *candidates[:3], *following, nodes, depth,
                    k, **pdl_options(logs.device))
    return following


def grid(logits: Tensor, candidates: Candidates, n: int, k: int, ids: Tensor | None = None,
         noise: Tensor | None = None) -> None:
    """tree.grid, for n <= 127 and k <= 10; at a tie of a row's tokens the lower id."""
    children, logs = top_children(logits, k, ids, noise)
    beam = max(16, triton.next_power_of_2(n))
    pairs = max(16, triton.next_power_of_2(sum(n // rank for rank in range(1, k + 1))))
    grid_kernel[1,](children, logs, *candidates[:3], len(logits), n, k, beam, pairs, num_warps=max(1, pairs // 64),
                    **pdl_options(logits.device))


def rerank(state: State, candidates: Candidates, n: int, max_depth: int) -> Tree:
    """tree.rerank, for n <= 127."""
    new, words = candidates.tokens.new_empty, 1 if n < 64 else 2
    tree = Tree(*new(3, n + 1), new(n + 1, words))
    size = len(candidates.tokens)
    rerank_kernel[1,](*candidates[:3], state.tokens, state.length, *tree, size, n, max_depth,
                      max(64 * words, triton.next_power_of_2(size)), words, num_warps=8,
                      **pdl_options(tree.tokens.device))
    return tree


def accept_commit(tree: Tree, next_tokens: Tensor, state: State, stop_ids: Tensor, limit: Tensor, max_depth: int,
                  report: Tensor) -> Tensor:
    """tree.accept_commit; once `done` is set, it changes nothing in the state."""
    path = torch.empty_like(report[2:])
    stops, words = len(stop_ids), tree.ancestors.shape[1]
    accept_commit_kernel[1,](*tree, next_tokens, state.tokens, state.length, state.committed, state.done, stop_ids,
                             limit, path, report, len(next_tokens), stops, max_depth + 1,
                             triton.next_power_of_2(max_depth + 1), triton.next_power_of_2(max(stops, 1)), words,
                             num_warps=1 if words == 1 else 4, **pdl_options(path.device))
    return path


def compact(kv: Tensor, base: Tensor, path: Tensor, hidden: Tensor, kept: Tensor) -> None:
    """tree.compact. hidden and kept have kv's dtype and must not overlap."""
    slots, size = kv.shape[-2:]
    steps, width = len(path), hidden.shape[1]
    cells = kv.numel() // (slots * size)
    columns = triton.next_power_of_2(size)
    compact_kernel[cells + triton.cdiv(width, columns),](
        kv, base, path, hidden, kept, cells, slots, size, width, steps, triton.next_power_of_2(steps), columns,
        num_warps=1, **pdl_options(kv.device))
