"""The loops of ops/linear.py's kernel for one row of x: multiply and add, without tensor cores.

Integers become fp32 here, and x stays what it is: with one row the conversion costs less than a kernel that would make
integers of x. So these are the products of the exact integers with the exact x.

A block has 8 columns a thread: tiles are [rows, threads, 8]. So every thread multiplies what it has loaded itself, it
has one sum a row, and with groups it needs one scale a row, because its columns lie within one group.
"""
from ops.device import tl, triton
from ops.quantized import unpack_int4


@triton.jit
def load_block(w_rows, row, scale_ptr, N, columns, start, EVEN_K: tl.constexpr, GROUP: tl.constexpr, BK: tl.constexpr):
    """The weights of one block [BN, BK / 8, 8] and, with groups, the scale and offset of each thread's low and high
    columns, int32 [BN, BK / 8]."""
    eight = start + tl.arange(0, BK // 8) * 8
    k = eight[None, :, None] + tl.arange(0, 8)[None, None, :]
    w = tl.load(w_rows[:, :, None] + k, mask=(k < columns) | EVEN_K, other=0, eviction_policy="evict_first")
    if GROUP:
        words, inside = scale_ptr + (eight // GROUP)[None, :] * N + row[:, None], (eight < columns)[None, :] | EVEN_K
        low = tl.load(words, mask=inside, other=0, eviction_policy="evict_first")
        words += columns // GROUP * N
        return w, low, tl.load(words, mask=inside, other=0, eviction_policy="evict_first")
    else:
        return w


@triton.jit
def load_x(x_ptr, norm_ptr, first, k, end, squares, EVEN_K: tl.constexpr, ROUND: tl.constexpr):
    """norm * x of columns first + k, fp32 (ROUND: rounded to x's dtype), and `squares` with those of x added. Columns
    from `end` on are 0."""
    inside = (k < end) | EVEN_K
    x = tl.load(x_ptr + first + k, mask=inside, other=0.0)
    if norm_ptr is not None:
        g = tl.load(norm_ptr + first + k, mask=inside, other=0.0)
        squares += tl.sum(x.to(tl.float32) * x.to(tl.float32), 2)
        x = x * g if ROUND else x.to(tl.float32) * g.to(tl.float32)
    return x.to(tl.float32), squares


@triton.jit
def add_block(block, acc, squares, x_ptr, norm_ptr, K, columns, start, EVEN_K: tl.constexpr, GROUP: tl.constexpr,
              BK: tl.constexpr, INTERPRET: tl.constexpr):
    """acc [BN, BK / 8] and squares [1, BK / 8] with one block of the product added, which `load_block` loaded."""
    k = (start + tl.arange(0, BK // 8) * 8)[None, :, None] + tl.arange(0, 8)[None, None, :]
    if GROUP:
        w, low_word, high_word = block
        low, high = unpack_int4(w, INTERPRET)
        x, squares = load_x(x_ptr, norm_ptr, 0, k, tl.minimum(K, columns), squares, EVEN_K, False)
        acc = add_group(low, low_word, x, acc)
        x, squares = load_x(x_ptr, norm_ptr, columns, k, K - columns, squares, EVEN_K, False)
        acc = add_group(high, high_word, x, acc)
    else:
        x, squares = load_x(x_ptr, norm_ptr, 0, k, K, squares, EVEN_K, not block.dtype.is_int())
        acc += tl.sum(block.to(tl.float32) * x, 2)
    return acc, squares


@triton.jit
def add_group(q, word, x, acc):
    """acc + scale * (q @ x) + offset * sum(x), of the 8 columns of each thread; word holds scale and offset."""
    scale, offset = (word << 16).to(tl.float32, bitcast=True), (word & -65536).to(tl.float32, bitcast=True)
    return acc + scale * tl.sum(q.to(tl.float32) * x, 2) + offset * tl.sum(x, 2)


@triton.jit
def multiply_row(early, x_ptr, w_rows, row, scale_ptr, norm_ptr, N, K, columns, first, last, EVEN_K: tl.constexpr,
                 GROUP: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BLOCKS: tl.constexpr, EARLY: tl.constexpr,
                 STAGES: tl.constexpr, INTERPRET: tl.constexpr):
    """w @ (norm * x) over columns first to last, with the scales of w, fp32 [BN, 1], and the sum of squares of x [1].

    early: the EARLY first blocks of w (`load_block`). The loads of BLOCKS blocks in all are in flight at once, in
    registers; what is left follows in a loop, through shared memory.
    """
    acc = tl.zeros((BN, BK // 8), dtype=tl.float32)
    squares = tl.zeros((1, BK // 8), dtype=tl.float32)
    blocks = early
    for i in tl.static_range(EARLY, BLOCKS):
        blocks += (load_block(w_rows, row, scale_ptr, N, columns, first + i * BK, EVEN_K, GROUP, BK),)
    for i in tl.static_range(BLOCKS):
        acc, squares = add_block(blocks[i], acc, squares, x_ptr, norm_ptr, K, columns, first + i * BK, EVEN_K, GROUP, BK,
                                 INTERPRET)
    for start in tl.range(first + BLOCKS * BK, last, BK, num_stages=STAGES):
        block = load_block(w_rows, row, scale_ptr, N, columns, start, EVEN_K, GROUP, BK)
        acc, squares = add_block(block, acc, squares, x_ptr, norm_ptr, K, columns, start, EVEN_K, GROUP, BK, INTERPRET)
    total = tl.sum(acc, 1)
    if scale_ptr is not None and not GROUP:
        total *= tl.load(scale_ptr + row)
    return total[:, None], tl.sum(squares, 1)
