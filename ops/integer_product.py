"""The loops of ops/linear.py's kernel for integer weights: tensor cores multiply integers, and each group of columns of
int4 is scaled by itself. One row of x becomes integers within its loop. ops/quantized.py says what the integers mean.

Letters as in ops/linear.py; BM rows of x, of BN rows of the weights, in blocks of BK columns (of int4: bytes).
"""
from ops.device import tl, triton
from ops.quantized import offset_of, scale_of, zero_of


@triton.jit
def unpack_int4(packed, INTERPRET: tl.constexpr):
    """int8 -> 16 times the low four bits and 16 times the high four bits, as signed numbers, int8 each: masking out the
    other half of a byte leaves just that. Three instructions do it for four bytes."""
    if INTERPRET:
        return packed << 4, packed & -16
    else:
        return tl.inline_asm_elementwise(
            "{ .reg .b32 a; shl.b32 a, $2, 4; and.b32 $0, a, 0xF0F0F0F0; and.b32 $1, $2, 0xF0F0F0F0; }",
            "=r,=r,r", [packed], dtype=(tl.int8, tl.int8), is_pure=True, pack=4)


@triton.jit
def multiply_integers(x_ptr, sums_ptr, w_rows, row, scale_ptr, norm_ptr, M, N, K, columns, first, last,
                      EVEN_K: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr, ZEROS: tl.constexpr,
                      PLANES: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
                      UNROLL: tl.constexpr, INTERPRET: tl.constexpr):
    """The loop for these weights and rows: the sums fp32 [BN, BM], and the sums of squares of x [BM], which are 0 where
    x comes as integers (Triton 3.6 cannot return None here). The parameters are those of the functions below."""
    squares = tl.zeros((BM,), dtype=tl.float32)
    if BM == 1:
        acc, squares = multiply_row(x_ptr, w_rows, row, scale_ptr, norm_ptr, N, K, columns, first, last, EVEN_K, GROUP,
                                    ZEROS, BN, BK, STAGES, UNROLL, INTERPRET)
    elif GROUP:
        acc = multiply_int4(x_ptr, sums_ptr, w_rows, row, scale_ptr, M, N, K, columns, first, last, EVEN_K, GROUP,
                            GROUPS, ZEROS, PLANES, BM, BN, BK, STAGES, INTERPRET)
    else:
        acc = multiply_int8(x_ptr, w_rows, scale_ptr + row, M, K, first, last, EVEN_K, PLANES, BM, BN, BK, STAGES)
    return acc, squares


@triton.jit
def multiply_int8(x_ptr, w_rows, scales, M, K, first, last, EVEN_K: tl.constexpr, PLANES: tl.constexpr,
                  BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr):
    """w @ x.T over columns first to last, times the scales of w: fp32 [BN, BM]. One product takes all planes of x, BM
    rows of each.

    Pointers: x int8 [PLANES, M, K]; w_rows [BN, 1] to the first column of each row, int8; scales [BN], fp32.
    """
    r = tl.arange(0, PLANES * BM)[:, None]
    live, x_rows = r % BM < M, x_ptr + (r // BM * M + r % BM).to(tl.int64) * K
    acc = tl.zeros((BN, PLANES * BM), dtype=tl.int32)
    for start in tl.range(first, last, BK, num_stages=STAGES):
        k = (start + tl.arange(0, BK))[None, :]
        inside = (k < K) | EVEN_K  # folds to no mask at all
        w = tl.load(w_rows + k, mask=inside, other=0, eviction_policy="evict_first")
        x = tl.load(x_rows + k, mask=inside & live, other=0)
        acc = tl.dot(w, x.trans(), acc, out_dtype=tl.int32)
    return combine_planes(acc, 256.0, PLANES, BM, BN) * tl.load(scales)[:, None]


@triton.jit
def multiply_int4(x_ptr, sums_ptr, w_rows, row, scale_ptr, M, N, K, half, first, last, EVEN_K: tl.constexpr,
                  GROUP: tl.constexpr, GROUPS: tl.constexpr, ZEROS: tl.constexpr, PLANES: tl.constexpr,
                  BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
                  INTERPRET: tl.constexpr):
    """w @ x.T over bytes first to last of each row, two columns a byte, with scales and offsets: fp32 [BN, BM].

    The program that starts at byte 0 adds the offsets of all columns before its loop, on the tensor cores. Groups of 32
    are so many that the others would wait for it: there each program adds those of its columns, INSIDE the loop, unless
    x has so many rows that this takes longer.

    Pointers: x int8 [PLANES, M, K], sums fp32 [groups, M], w_rows [BN, 1] to the first byte of each row, int8; scale
    int32 [groups, N], see `scale_of`. row [BN]: the rows' numbers. half: bytes of a row. GROUPS: `groups` rounded up to
    a power of two.
    """
    APART: tl.constexpr = PLANES * BM > 128  # one plane after the other: registers do not hold a product of 256 rows
    STEP: tl.constexpr = min(BK, GROUP)
    r, b = tl.arange(0, BM if APART else PLANES * BM)[:, None], tl.arange(0, STEP)[None, :]
    live, x_rows = r % BM < M, x_ptr + (r // BM * M + r % BM).to(tl.int64) * K
    groups, acc = half * 2 // GROUP, tl.zeros((BN, BM), dtype=tl.float32)
    INSIDE: tl.constexpr = GROUP == 32 and BM <= 32
    if not INSIDE and (APART or ZEROS or GROUP == 32) and GROUPS > 32:
        # A few groups at a time, and no address kept over the loop below: registers again
        FEW: tl.constexpr = 16 if GROUP == 64 and BM <= 16 else 32
        for top in tl.range(0, groups, FEW, num_stages=1, disable_licm=True):
            acc = multiply_offsets(sums_ptr, scale_ptr, row, M, N, top, groups, first == 0, acc, FEW, ZEROS, BM,
                                   INTERPRET)
    elif not INSIDE:
        acc = multiply_offsets(sums_ptr, scale_ptr, row, M, N, 0, groups, first == 0, acc, GROUPS, ZEROS, BM, INTERPRET)
    for start in tl.range(first, last, BK, num_stages=STAGES):
        for part in tl.static_range(0, BK, STEP):
            at = start + part
            k, g, h = at + b, at // GROUP, (at + half) // GROUP
            inside = (at < half) | EVEN_K
            w = tl.load(w_rows + k, mask=inside, other=0, eviction_policy="evict_first")
            x = tl.load(x_rows + k, mask=live & ((k < K) & inside | EVEN_K), other=0)
            y = tl.load(x_rows + half + k, mask=live & ((half + k < K) | EVEN_K), other=0)
            x_low, y_low = None, None
            if APART:  # x and y are the high planes
                x_low = tl.load(x_rows + M * K + k, mask=live & ((k < K) & inside | EVEN_K), other=0)
                y_low = tl.load(x_rows + M * K + half + k, mask=live & ((half + k < K) | EVEN_K), other=0)
            low, high = unpack_int4(w, INTERPRET)
            there = inside & (tl.arange(0, BM) < M)
            word = tl.load(scale_ptr + g * N + row, mask=inside, other=0)
            dot = multiply_group(low, x, x_low, PLANES, BM, BN)
            acc = add_group(acc, dot, word, sums_ptr + g * M, there, INSIDE, ZEROS, BM)
            word = tl.load(scale_ptr + h * N + row, mask=inside, other=0)
            dot = multiply_group(high, y, y_low, PLANES, BM, BN)
            acc = add_group(acc, dot, word, sums_ptr + h * M, there, INSIDE, ZEROS, BM)
    return acc


@triton.jit
def add_group(acc, dot, word, sums_ptr, there, OFFSETS: tl.constexpr, ZEROS: tl.constexpr, BM: tl.constexpr):
    """acc fp32 [BN, BM] plus one group's product `dot`, scaled, and with OFFSETS its offset times its sums of x. word
    int32 [BN], see `scale_of`; sums fp32 [M]; there [BM]: which of them there are, none past the last group."""
    if OFFSETS:
        sums = tl.load(sums_ptr + tl.arange(0, BM), mask=there, other=0.0)[None, :]
        return acc + scaled(dot, word[:, None], sums, ZEROS)
    else:
        return acc + dot * scale_of(word, ZEROS)[:, None]


@triton.jit
def scaled(dot, word, sums, ZEROS: tl.constexpr):
    """Products of 16 q and x, scaled, with the offsets times the sums of x. word int32, see `scale_of`."""
    if ZEROS:
        return (dot + zero_of(word) * sums) * scale_of(word, ZEROS)
    else:
        return dot * scale_of(word, ZEROS) + offset_of(word, ZEROS) * sums


@triton.jit
def multiply_group(w, x, x_low, PLANES: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """w [BN, columns] times x, columns of one group: fp32 [BN, BM]. x holds all planes, or with x_low the high one."""
    dot = tl.dot(w, x.trans(), out_dtype=tl.int32)
    if x_low is None:
        return combine_planes(dot, 256, PLANES, BM, BN)
    else:
        return tl.dot(w, x_low.trans(), dot * 256, out_dtype=tl.int32).to(tl.float32)


@triton.jit
def multiply_offsets(sums_ptr, scale_ptr, row, M, N, top, groups, wanted, acc, GROUPS: tl.constexpr,
                     ZEROS: tl.constexpr, BM: tl.constexpr, INTERPRET: tl.constexpr):
    """acc fp32 [BN, BM] and, if `wanted`, the offset of each group times the group's sum of x, over GROUPS groups from
    `top` on; there are `groups` of them in all.

    Tensor cores multiply bf16, so a sum goes in as two bf16 numbers, which hold 16 of its 22 bits. So does an offset
    with ZEROS: the product of an fp16 scale and a whole zero has 15. Pointers: see `multiply_int4`.
    """
    g, m = top + tl.arange(0, GROUPS), tl.arange(0, BM)
    word = tl.load(scale_ptr + g[None, :] * N + row[:, None], mask=(g < groups)[None, :] & wanted, other=0)
    offset = offset_of(word, ZEROS)
    sums = tl.load(sums_ptr + g[:, None] * M + m[None, :], mask=(g < groups)[:, None] & (m < M)[None, :] & wanted,
                   other=0.0)
    if INTERPRET:
        return tl.dot(offset, sums, acc, input_precision="ieee")
    else:
        high, large = sums.to(tl.bfloat16), offset.to(tl.bfloat16)
        low = (sums - high.to(tl.float32)).to(tl.bfloat16)
        acc = tl.dot(large, low, tl.dot(large, high, acc))
        if ZEROS:
            small = (offset - large.to(tl.float32)).to(tl.bfloat16)
            acc = tl.dot(small, high, acc)
        return acc


@triton.jit
def combine_planes(dot, HIGH: tl.constexpr, PLANES: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """The products of all planes, int32 [BN, PLANES * BM], as those of x: HIGH * high + low, fp32 [BN, BM]. The type of
    HIGH is the type of that sum: the integer 256 where it fits (one group), else 256.0."""
    if PLANES == 2:
        high, low = tl.split(dot.reshape(BN, 2, BM).permute(0, 2, 1))
        dot = high * HIGH + low
    return dot.to(tl.float32)


# ----- One row -------------------------------------------------------------------------------------------------------


@triton.jit
def multiply_row(x_ptr, w_rows, row, scale_ptr, norm_ptr, N, K, columns, first, last, EVEN_K: tl.constexpr,
                 GROUP: tl.constexpr, ZEROS: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
                 UNROLL: tl.constexpr, INTERPRET: tl.constexpr):
    """w @ (norm * x) of one row x [K] over columns (of int4: bytes) first to last: fp32 [BN, 1], and the sum of squares
    of x [1]. Pointers: as in `multiply_int8` and `multiply_int4`, but x and norm [K] are not integers.

    A thread takes 16 columns side by side and makes integers of their x in registers, for all of its rows of w. So no
    kernel has to do that before, and only 16 columns share a scale: they lose less than a whole row would. One row
    needs no tensor cores: an instruction multiplies and adds four pairs of bytes (dp4a, sm_61 and later).

    Two tensors [.., BK / 2] hold the first 8 of each 16 columns, and the other 8: a thread loads 16 bytes at once, 8
    columns of x. If it took 16 bytes of w at once, Triton would move x between threads.
    """
    acc = tl.zeros((BN, BK // 16), dtype=tl.float32)
    squares = tl.zeros((1, BK // 2), dtype=tl.float32)
    i = tl.arange(0, BK // 2)[None, :]
    for start in tl.range(first, last, BK, num_stages=STAGES, loop_unroll_factor=UNROLL):
        k = tl.max_contiguous(tl.multiple_of(start + i // 8 * 16 + i % 8, [1, 8]), [1, 8])
        inside = (k < columns) | EVEN_K
        w1 = tl.load(w_rows + k, mask=inside, other=0, eviction_policy="evict_first")
        w2 = tl.load(w_rows + k + 8, mask=inside, other=0, eviction_policy="evict_first")
        x, x_scale, square = load_integers(x_ptr, norm_ptr, k, inside & (k < K) | EVEN_K, INTERPRET)
        squares += square
        if GROUP:
            low1, high1 = unpack_int4(w1, INTERPRET)
            low2, high2 = unpack_int4(w2, INTERPRET)
            byte = tl.minimum(start + 16 * tl.arange(0, BK // 16)[None, :], columns - 1)
            words = scale_ptr + row[:, None] + byte // GROUP * N
            acc += sums_of_group(low1, low2, x, words, ZEROS, INTERPRET) * x_scale
            inside = inside & (columns + k < K) | EVEN_K
            x, x_scale, square = load_integers(x_ptr, norm_ptr, columns + k, inside, INTERPRET)
            squares += square
            words = scale_ptr + row[:, None] + (columns + byte) // GROUP * N
            acc += sums_of_group(high1, high2, x, words, ZEROS, INTERPRET) * x_scale
        else:
            acc += sums_of_products(w1, w2, x, INTERPRET).to(tl.float32) * x_scale
    total = tl.sum(acc, 1)
    if not GROUP:
        total *= tl.load(scale_ptr + row)
    return total[:, None], tl.sum(squares, 1)


@triton.jit
def load_integers(x_ptr, norm_ptr, k, inside, INTERPRET: tl.constexpr):
    """norm * x at 16 columns from each k [1, BK / 2] on, as x_scale * (256 * high + low): the bytes int8 [1, BK / 2],
    (high, low) of the first 8 columns and (high, low) of the others, low ones without a sign; x_scale fp32 [1, BK /
    16], the power of two with which the integers are at most 2^14. And the squares of x [1, BK / 2], added in pairs."""
    x1, x2 = load_pair(x_ptr, k, inside)
    squares = x1 * x1 + x2 * x2
    if norm_ptr is not None:
        norm1, norm2 = load_pair(norm_ptr, k, inside)
        x1, x2 = x1 * norm1, x2 * norm2
    top = tl.maximum(tl.max(in_eights(tl.abs(x1)), 2), tl.max(in_eights(tl.abs(x2)), 2))
    exponent = (tl.maximum(top, 1e-30).to(tl.int32, bitcast=True) & 0x7F800000) - (127 << 23)
    x_scale = (exponent + (127 - 13 << 23)).to(tl.float32, bitcast=True)
    x_scale = tl.where(top < float("inf"), x_scale, float("nan"))  # the integers of an infinite x would be 0
    inverse = ((127 + 13 << 23) - exponent).to(tl.float32, bitcast=True)[:, :, None]
    high1, low1 = bytes_of((in_eights(x1) * inverse).reshape(x1.shape), INTERPRET)
    high2, low2 = bytes_of((in_eights(x2) * inverse).reshape(x1.shape), INTERPRET)
    return (high1, low1, high2, low2), x_scale, squares


@triton.jit
def load_pair(ptr, k, inside):
    """8 columns from each k [1, BK / 2] on, and the 8 after them: fp32."""
    one = tl.load(ptr + k, mask=inside, other=0.0).to(tl.float32)
    return one, tl.load(ptr + k + 8, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def in_eights(x):
    """[any, columns] as [any, columns / 8, 8]."""
    return x.reshape(x.shape[0], x.shape[1] // 8, 8)


@triton.jit
def bytes_of(q, INTERPRET: tl.constexpr):
    """The high and the low byte of each number of q fp32, rounded to 16 bits."""
    if INTERPRET:
        q = tl.floor(q + 0.5).to(tl.int32)
        return (q >> 8).to(tl.int8), q.to(tl.int8)
    else:  # the low 16 bits of q + 1.5 * 2^23 are the integer; those of four numbers are sorted into two words
        return tl.inline_asm_elementwise(
            "{ .reg .b32 a, b, c, d; add.f32 a, $2, 0f4B400000; add.f32 b, $3, 0f4B400000;"
            " add.f32 c, $4, 0f4B400000; add.f32 d, $5, 0f4B400000;"
            " prmt.b32 a, a, b, 0x5140; prmt.b32 c, c, d, 0x5140;"
            " prmt.b32 $0, a, c, 0x7632; prmt.b32 $1, a, c, 0x5410; }",
            "=r,=r,f,f,f,f", [q], dtype=(tl.int8, tl.int8), is_pure=True, pack=4)


@triton.jit
def sums_of_group(q1, q2, x, words, ZEROS: tl.constexpr, INTERPRET: tl.constexpr):
    """16 q, int8 [BN, BK / 2] both, times x of `load_integers`, added up over 16 columns each, scaled, with the offset:
    fp32 [BN, BK / 16]. words: pointers to scales and offsets, see `scale_of`."""
    dot = sums_of_products(q1, q2, x, INTERPRET).to(tl.float32)
    ones = tl.full(x[0].shape, 1, tl.int8)
    sums = sums_of_products(ones, ones, x, INTERPRET).to(tl.float32)
    if INTERPRET:
        word = tl.load(words)
    else:  # Triton 3.6 would load them by other threads than those that need them
        word = tl.inline_asm_elementwise("ld.global.nc.b32 $0, [$1];", "=r,l", [words], dtype=tl.int32, is_pure=True,
                                         pack=1)
    return scaled(dot, word, sums, ZEROS)


@triton.jit
def sums_of_products(w1, w2, x, INTERPRET: tl.constexpr):
    """w, int8 [any, BK / 2] both, times x of `load_integers`, added up over 16 columns each: int32 [any, BK / 16]."""
    high1, low1, high2, low2 = x
    if INTERPRET:
        products = w1.to(tl.int32) * (high1.to(tl.int32) * 256 + (low1.to(tl.int32) & 255))
        products += w2.to(tl.int32) * (high2.to(tl.int32) * 256 + (low2.to(tl.int32) & 255))
    else:  # the sum of a thread's 16 columns in the place of the first, then seven zeros
        products = tl.inline_asm_elementwise(
            "{ .reg .b32 a; dp4a.s32.s32 a, $8, $12, 0; dp4a.s32.s32 a, $9, $13, a;"
            " dp4a.s32.s32 a, $10, $16, a; dp4a.s32.s32 a, $11, $17, a; shl.b32 a, a, 8;"
            " dp4a.s32.u32 a, $8, $14, a; dp4a.s32.u32 a, $9, $15, a;"
            " dp4a.s32.u32 a, $10, $18, a; dp4a.s32.u32 $0, $11, $19, a; mov.b32 $1, 0; mov.b32 $2, 0;"
            " mov.b32 $3, 0; mov.b32 $4, 0; mov.b32 $5, 0; mov.b32 $6, 0; mov.b32 $7, 0; }",
            "=r,=r,=r,=r,=r,=r,=r,=r,r,r,r,r,r,r,r,r,r,r,r,r", [w1, w2, high1, low1, high2, low2], dtype=tl.int32,
            is_pure=True, pack=8)
    return tl.sum(in_eights(products), 2)
