"""The small steps of a cycle as a few Triton kernels: tree.py's functions for a GPU, within a CUDA graph.

Between two forwards a cycle does little work in many steps: some 300 kernels of a few microseconds each as PyTorch
operations. Here the host reads nothing, grids are static, every sum has a fixed order, and state changes in place.

  gumbel_noise          sampling.gumbel_noise
  catch_up              tree.catch_up
  top_children, argmax  tree.best_children without scores, logits.argmax(-1)
  grow                  one level of Eagle2.propose: children, candidates, and which of them are fed next
  rerank                tree.rerank
  accept_commit         tree.accept_commit
  compact               the accepted rows of cache and features, moved to the front

All choices compare int64 keys made of value and index: largest key, best value, at a tie the lower index.
"""
import torch
from torch import Tensor

from ops.device import device_limits, enter, tl, triton
from tree import Candidates, Level, State, Tree


@triton.jit
def sort_key(value, index, real):
    """int64 whose order is that of the values, fp32, and at a tie the lower index first. Where not `real`: last."""
    bits = tl.where(value == 0, 0.0, value).to(tl.int32, bitcast=True)  # -0 ties with 0
    bits ^= (bits >> 31) & 0x7FFFFFFF  # floats are sign and magnitude, integers two's complement
    return tl.where(real, (bits.to(tl.int64) << 32) | (0x7FFFFFFF - index), -(1 << 63))


@triton.jit
def key_value(key):
    bits = (key >> 32).to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def key_index(key):
    return 0x7FFFFFFF - (key & 0x7FFFFFFF)


@triton.jit
def mix32(x):
    """sampling.mix32, in uint32."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def noise_kernel(seed, places, out, V, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """See `gumbel_noise`: one block of one place's tokens."""
    enter(PDL)
    row, token = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    key = tl.load(seed)
    h = mix32(key.to(tl.uint32)) ^ mix32((key >> 32).to(tl.uint32) ^ 0x5BD1E995)
    h = mix32(mix32(h) + tl.load(places + row).to(tl.uint32))
    u = tl.minimum((mix32(mix32(h ^ token.to(tl.uint32))).to(tl.float32) + 0.5) * 0.5**32, 1 - 0.5**24)
    rest = 1 - u  # log1p(-u): the log of what 1 - u is rounded to, times how far the rounding is off
    log1p = tl.where(rest == 1, -u, tl.log(rest) * u / (1 - rest))
    tl.store(out + row.to(tl.int64) * V + token, -tl.log(-log1p), mask=token < V)


@triton.jit
def catch_up_kernel(text, length, committed, where, tokens, places, last, here, N, W, SIZE: tl.constexpr,
                    PDL: tl.constexpr):
    """See `catch_up`. One program."""
    enter(PDL)
    i = tl.arange(0, SIZE)
    end, new = tl.load(length), tl.load(committed)
    place = end - new - 1 + i
    tl.store(tokens + i, tl.load(text + place + 1, mask=i < N), mask=i < N)
    tl.store(places + i, place, mask=i < N)
    tl.store(last, new - 1)
    tl.store(here + i, end + tl.load(where + i, mask=i < W), mask=i < W)


@triton.jit
def partial_kernel(logits, noise, ids, keys, peaks, sums, V, stride, K: tl.constexpr, BLOCK: tl.constexpr,
                   SUM: tl.constexpr, PDL: tl.constexpr):
    """One block of one row's tokens: the K best keys, and the block's share of the row's log-sum-exp."""
    enter(PDL)
    row, block = tl.program_id(0), tl.program_id(1)
    at = row * tl.num_programs(1) + block
    token = block * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(logits + row * stride + token, mask=token < V, other=-float("inf")).to(tl.float32)
    if noise is not None:
        own = token if ids is None else tl.load(ids + token, mask=token < V, other=0)
        x += tl.load(noise + own, mask=token < V, other=0.0)
    if SUM:
        peak = tl.max(x, 0)
        tl.store(peaks + at, peak)
        tl.store(sums + at, tl.sum(tl.exp(x - tl.where(peak == -float("inf"), 0.0, peak)), 0))
    key = sort_key(x, token, token < V)
    for rank in range(K):
        best = tl.max(key, 0)
        tl.store(keys + at * K + rank, best)
        key = tl.where(key == best, -(1 << 63), key)


@triton.jit
def merge_kernel(keys, peaks, sums, ids, tokens, logs, BLOCKS, K: tl.constexpr, SIZE: tl.constexpr, B: tl.constexpr,
                 SUM: tl.constexpr, PDL: tl.constexpr):
    """One row's K best tokens, best first, and with SUM their log-probabilities: at most 0, so that no child outscores
    its parent. All are loaded at once, and all read from `ids`: loads that wait for one another cost more than the
    comparisons."""
    enter(PDL)
    row, i, block = tl.program_id(0), tl.arange(0, SIZE), tl.arange(0, B)
    key = tl.load(keys + row * BLOCKS * K + i, mask=i < BLOCKS * K, other=-(1 << 63))
    if SUM:
        peak = tl.load(peaks + row * BLOCKS + block, mask=block < BLOCKS, other=-float("inf"))
        top = tl.max(peak, 0)
        total = tl.sum(tl.load(sums + row * BLOCKS + block, mask=block < BLOCKS, other=0.0) * tl.exp(peak - top), 0)
    lane = tl.arange(0, 16)
    kept = tl.full([16], -(1 << 63), tl.int64)
    for rank in range(K):
        best = tl.max(key, 0)
        kept = tl.where(lane == rank, best, kept)
        key = tl.where(key == best, -(1 << 63), key)
    token, real = key_index(kept), lane < K
    if ids is not None:
        token = tl.load(ids + token, mask=real, other=0)
    tl.store(tokens + row * K + lane, token, mask=real)
    if SUM:  # a GPU's log of just above 1 may be negative
        tl.store(logs + row * K + lane, tl.minimum(key_value(kept) - top - tl.log(total), 0.0), mask=real)


@triton.jit(do_not_specialize=["N", "depth"])
def grow_kernel(children, logs, fed_scores, fed_index, fed_bits, tokens, scores, parents, next_tokens, next_scores,
                next_index, next_rows, next_bits, N, depth, K: tl.constexpr, PDL: tl.constexpr):
    """See `grow`. One program; tiles are [16, 16]: fed rows, and their children by rank."""
    enter(PDL)
    lane, rank = tl.arange(0, 16), tl.arange(0, 16)[None, :]
    fed = lane < N
    child, real = lane[:, None] * K + rank, fed[:, None] & (rank < K)
    token = tl.load(children + child, mask=real, other=0)
    score = tl.load(fed_scores + lane, mask=fed, other=0.0)[:, None] + tl.load(logs + child, mask=real, other=0.0)
    first = tl.where(depth == 0, 0, K + (depth - 1) * K * K)  # candidates of the levels before
    tl.store(tokens + first + child, token, mask=real)
    tl.store(scores + first + child, score, mask=real)
    tl.store(parents + first + child, tl.load(fed_index + lane, mask=fed, other=0)[:, None], mask=real)

    top = tl.topk(tl.reshape(sort_key(score, child, real), [256]), 16)
    chosen, child = lane < K, key_index(top).to(tl.int32)
    row = tl.where(chosen, child // K, 0)
    place = row * 16 + tl.where(chosen, child % K, 0)  # in the tile
    tl.store(next_tokens + lane, tl.gather(tl.reshape(token, [256]), place, 0), mask=chosen)
    tl.store(next_scores + lane, key_value(top), mask=chosen)
    tl.store(next_index + lane, first + child, mask=chosen)
    tl.store(next_rows + lane, row, mask=chosen)
    slot = (depth * K + lane).to(tl.int64)
    for word in tl.static_range(2):
        own = tl.where(slot // 64 == word, tl.full([16], 1, tl.int64) << (slot % 64), 0)
        inherited = tl.load(fed_bits + row * 2 + word, mask=chosen, other=0)
        tl.store(next_bits + lane * 2 + word, inherited | own, mask=chosen)


@triton.jit
def rerank_kernel(tokens, scores, parents, text, length, tree_tokens, tree_parents, tree_depth, tree_ancestors,
                  N, n, MAX_DEPTH: tl.constexpr, SIZE: tl.constexpr, PDL: tl.constexpr):
    """See `rerank`. One program. The root takes part as candidate -1, the parent that its children name."""
    enter(PDL)
    index, node = tl.arange(0, SIZE), tl.arange(0, 64).to(tl.int64)
    score = tl.load(scores + index, mask=index < N, other=0.0)
    best = key_index(tl.topk(sort_key(score, index, index < N), 64))
    kept = tl.sort(tl.where(node < n, best, tl.where(node == 63, -1, SIZE)))  # the root, the n best, and padding
    drafted = (node > 0) & (node <= n)
    above = tl.load(parents + kept, mask=drafted, other=-1)
    parent = tl.sum(tl.where(kept[None, :] == above[:, None], node[None, :], 0), 1)
    token = tl.load(tokens + kept, mask=drafted, other=tl.load(text + tl.load(length) - 1))

    one = tl.full([64], 1, tl.int64)
    ancestors, depth, at = one << node, (node > 0).to(tl.int64), parent
    for _ in range(MAX_DEPTH):  # as tree.build does
        ancestors |= one << at
        depth += at > 0
        at = tl.gather(parent, at, 0)
    tl.store(tree_tokens + node, token, mask=node <= n)
    tl.store(tree_parents + node, parent, mask=node <= n)
    tl.store(tree_depth + node, depth, mask=node <= n)
    tl.store(tree_ancestors + node, ancestors, mask=node <= n)


@triton.jit
def accept_commit_kernel(tokens, parents, depths, ancestors, next_tokens, text, length, committed, done, stop_ids,
                         limit, path, report, T, STOPS, STEPS, PATH: tl.constexpr, STOP_TILE: tl.constexpr,
                         PDL: tl.constexpr):
    """See `accept_commit`. One program of one warp; PATH and STOP_TILE are STEPS and STOPS rounded up."""
    enter(PDL)
    node, step = tl.arange(0, 64).to(tl.int64), tl.arange(0, PATH)
    real, taken = node < T, step < STEPS
    parent = tl.load(parents + node, mask=real, other=0)
    wrong = tl.load(tokens + node, mask=real, other=0) != tl.load(next_tokens + parent, mask=real, other=0)
    wrong_bits = tl.sum((wrong & (node > 0)).to(tl.int64) << node, 0)  # bits are distinct
    above, depth = tl.load(ancestors + node, mask=real, other=0), tl.load(depths + node, mask=real, other=-1)
    reached = tl.where((above & wrong_bits) == 0, depth, -1)
    last, accepted = tl.argmax(reached, 0), tl.max(reached, 0)
    on_path = (tl.load(ancestors + last) >> node) & 1 == 1
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
def compact_kernel(kv, base, path, features, kept, CELLS, S, D, C, STEPS, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
                   PDL: tl.constexpr):
    """See `compact`. A program moves the rows of one layer's keys or values of one head, or, the last programs,
    COLUMNS columns of the features. All rows are loaded before any is stored: slots overlap."""
    enter(PDL)
    cell, step, column = tl.program_id(0), tl.arange(0, ROWS), tl.arange(0, COLUMNS)[None, :]
    source = tl.load(path + step, mask=step < STEPS, other=0)[:, None]
    step = step[:, None].to(tl.int64)
    if cell < CELLS:
        rows = kv + (cell.to(tl.int64) * S + tl.load(base)) * D + column
        origin, goal = rows + source * D, rows + step * D
        moves = (step < STEPS) & (source != step) & (column < D)
    else:
        column += (cell - CELLS) * COLUMNS
        origin, goal = features + source * C + column, kept + step * C + column
        moves = (step < STEPS) & (column < C)
    x = tl.load(origin, mask=moves)
    tl.debug_barrier()
    tl.store(goal, x, mask=moves)


def overlap(device: torch.device) -> dict[str, bool]:
    """How to launch a kernel while the one before it still runs, where a GPU can (Hopper); see kernels.enter."""
    return dict.fromkeys(("PDL", "launch_pdl"), device_limits(device)[1] >= (9, 0))


def gumbel_noise(seed: Tensor, places: Tensor, vocab_size: int) -> Tensor:
    """sampling.gumbel_noise, to the last digits of a float's logarithm."""
    out, block = torch.empty(len(places), vocab_size, device=places.device), 1024
    noise_kernel[len(places), triton.cdiv(vocab_size, block)](seed, places, out, vocab_size, block,
                                                              **overlap(places.device))
    return out


def catch_up(state: State, n: int, where: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """tree.catch_up."""
    tokens, places = where.new_empty(2, n)
    last, here = where.new_empty(1), torch.empty_like(where)
    catch_up_kernel[1,](state.tokens, state.length, state.committed, where, tokens, places, last, here, n,
                        where.numel(), triton.next_power_of_2(max(n, where.numel())), num_warps=1,
                        **overlap(where.device))
    return tokens, places, last, here


def top_children(logits: Tensor, k: int, ids: Tensor | None = None, noise: Tensor | None = None, log_p: bool = True
                 ) -> tuple[Tensor, Tensor]:
    """The k <= 10 most probable tokens of logits [N, V], best first, the first at a tie: tokens [N, k] int64, read from
    `ids` [V] if given, and log-probabilities [N, k] fp32, at most 0 (without `log_p` not computed). noise [all tokens]
    fp32 is added first. In blocks of a row, at most 64: enough programs for a large GPU even if N is 1."""
    (rows, vocab), device = logits.shape, logits.device
    block = max(1024, triton.next_power_of_2(triton.cdiv(vocab, 64)))  # 2048 for Llama-3
    blocks = triton.cdiv(vocab, block)
    keys = torch.empty(rows, blocks, k, dtype=torch.int64, device=device)
    peaks, sums = torch.empty(2, rows if log_p else 0, blocks, device=device)
    tokens, logs = keys.new_empty(rows, k), peaks.new_empty(rows, k)
    partial_kernel[rows, blocks](logits, noise, None if noise is None else ids, keys, peaks, sums, vocab,
                                 logits.stride(0), k, block, log_p, num_warps=4 if block == 1024 else 2,
                                 **overlap(device))
    size = triton.next_power_of_2(blocks * k)
    merge_kernel[rows,](keys, peaks, sums, ids, tokens, logs, blocks, k, size, triton.next_power_of_2(blocks), log_p,
                        num_warps=max(1, size // 256), **overlap(device))
    return tokens, logs


def best_tokens(logits: Tensor, k: int, ids: Tensor | None = None, noise: Tensor | None = None) -> Tensor:
    """tree.best_tokens; the first at a tie."""
    return top_children(logits, k, ids, noise, log_p=False)[0]


def argmax(logits: Tensor) -> Tensor:
    """The most probable token of each of logits [T, V], [T] int64; the lower id at a tie."""
    return best_tokens(logits, 1).flatten()


def grow(logits: Tensor, level: Level, candidates: Candidates, depth: int, k: int, ids: Tensor | None = None,
         noise: Tensor | None = None) -> Level:
    """tree.grow."""
    children, logs = top_children(logits, k, ids, noise)
    new = children.new_empty
    following = Level(new(k), logs.new_empty(k), new(k), new(k), new(k, 2))
    grow_kernel[1,](children, logs, level.scores, level.index, level.visible, *candidates[:3], *following,
                    len(logits), depth, k, **overlap(logits.device))
    return following


def rerank(state: State, candidates: Candidates, n: int, max_depth: int) -> Tree:
    """The n <= 63 best candidates as one tree under the newest committed token; see tree.rerank."""
    tree, size = Tree(*candidates.tokens.new_empty(4, n + 1)), len(candidates.tokens)
    rerank_kernel[1,](*candidates[:3], state.tokens, state.length, *tree, size, n, max_depth,
                      max(64, triton.next_power_of_2(size)), num_warps=8, **overlap(tree.tokens.device))
    return tree


def accept_commit(tree: Tree, next_tokens: Tensor, state: State, stop_ids: Tensor, limit: Tensor, max_depth: int,
                  report: Tensor) -> Tensor:
    """tree.accept_commit. next_tokens [T]: the target's choice after each node; stop_ids [any] int64;
    limit 0-d int64. Changes state.tokens, length, committed (0-d int64) and done (0-d bool) in place; once done is
    set, none of them. Returns path [max_depth + 1] int64 and fills report [max_depth + 3] int64 for the host: how many
    tokens were committed, whether the text has ended, and the tokens (entries beyond that number do not count)."""
    path, stops = torch.empty_like(report[2:]), len(stop_ids)
    accept_commit_kernel[1,](*tree, next_tokens, state.tokens, state.length, state.committed, state.done, stop_ids,
                             limit, path, report, len(next_tokens), stops, max_depth + 1,
                             triton.next_power_of_2(max_depth + 1), triton.next_power_of_2(max(stops, 1)), num_warps=1,
                             **overlap(path.device))
    return path


def compact(kv: Tensor, base: Tensor, path: Tensor, features: Tensor, kept: Tensor) -> None:
    """tree.compact. features and kept in kv's dtype; they must not overlap."""
    (slots, size), steps, width = kv.shape[-2:], len(path), features.shape[1]
    cells, columns = kv.numel() // (slots * size), triton.next_power_of_2(size)
    compact_kernel[cells + triton.cdiv(width, columns),](
        kv, base, path, features, kept, cells, slots, size, width, steps, triton.next_power_of_2(steps), columns,
        num_warps=1, **overlap(kv.device))
