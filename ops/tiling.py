"""How ops/linear.py's kernel cuts a linear layer into blocks, measured on an H100 (BENCHMARKS.md) and an H200. For
another card, `python -m benchmarks.tilings` searches.

The aim: enough programs at once, and enough of their weights in flight, that memory never idles. Cards with 99 KB of
shared memory (sm_86, sm_89) get smaller blocks; there two programs share a multiprocessor.
"""
import math
from typing import NamedTuple


class Tiling(NamedTuple):
    BM: int  # rows of x, padded, at most 128; 1: multiply and add instead of using tensor cores
    BN: int  # rows of the weights that a program owns
    BK: int  # columns in one block (of int4: bytes)
    SK: int  # programs that share the columns of a tile, at most 64
    warps: int
    stages: int  # blocks in flight, through shared memory
    ahead: int = 4  # blocks that are prefetched into L2 while the previous kernel still runs (Hopper)
    unroll: int = 1  # of one row: blocks that are in flight through registers


def linear_config(M: int, N: int, K: int, sms: int, capability: tuple[int, int]) -> Tiling:
    """The Tiling for weights [N, K] in bf16 or fp16 and M rows of x, on a card with `sms` multiprocessors."""
    if M == 1:
        return one_row(N, K)
    if M > 64:
        return many_rows(N, K, 2, 2, 0, sms, capability)
    hopper = capability >= (9, 0)
    BM = 16 if M <= 16 else 32 if M <= 32 else 64
    if K < 1024:  # over before memory is busy: all of a tile's K in flight, and nothing shared
        stages = 4 if not hopper else 9 if BM == 16 else 6
        return Tiling(BM, 64, 64 if K % 64 == 0 else 32, 1, 4, stages)
    BN, warps, stages = 64, 4, 4
    BK = 128 if BM < 64 else 64
    SK, shortest = 1, 4  # blocks of a split; a shorter one would never reach full speed
    tiles = -(-N // 64)
    if tiles < sms:  # two programs a multiprocessor share the work; on Hopper one, with twice as much in flight
        SK = (1 if hopper else 2) * sms // tiles
        if hopper:
            BK, stages, shortest = (256, 5, 3) if BM == 16 else (128, 6, 4)
            if BM == 16 and tiles * K <= sms * BK:
                shortest = 1  # every block has a program of its own
    elif hopper and K < 4096:  # short tiles: all of them at once, three programs a multiprocessor, or many small ones
        if BM < 64 and tiles <= 3 * sms:
            BK, stages = 64, 6
    elif BM == 16 and hopper:
        BK, stages = 256, 3
    elif BM == 64:  # every tile reads all of x again, from L2: large tiles, if they make up nearly whole waves
        waves = tiles / 2 / sms
        if not hopper:
            BN, BK = 128, 32
        elif math.ceil(waves) / waves < 1.4:
            BN, BK, warps, stages = 128, 128, 8, 3
    while K % BK and BK > 32:
        BK //= 2  # K = 576: no masks with blocks of 64
    SK = max(1, min(SK, K // BK // shortest, 64))
    blocks = -(-K // BK // SK)  # of a split; more stages would be empty. As many as blocks slowed 32 rows by 15 %
    return Tiling(BM, BN, BK, SK, warps, min(stages, max(3, blocks + (BM == 32))))


def one_row(N: int, K: int) -> Tiling:
    """The Tiling for one row of x: threads lie side by side along K, so that the loop needs no barrier."""
    if K >= 8192:
        return Tiling(1, 4, 2048, 1, 4, 1, ahead=1)
    if K >= 2048:
        return Tiling(1, 8, 1024, 1, 4, 3 if N < 2048 else 4, ahead=2)
    if K >= 1024 and N <= 65536:
        return Tiling(1, 4, 512, 1, 2, 1, ahead=2, unroll=3) if N <= 16384 else Tiling(1, 4, 256, 1, 1, 1, 1, unroll=6)
    if K >= 1024:
        return Tiling(1, 16, 256, 1, 4, 4, ahead=1)
    if N <= 16384:
        return Tiling(1, 4, 1024, 1, 4, 1, ahead=1)
    return Tiling(1, 4, 256, 1, 1, 1, ahead=1)


def takes_integer_row(N: int, columns: int, group: int) -> bool:
    """Whether one row of x is best multiplied by integer weights without tensor cores, by multiply_row in
    ops/integer_product.py. Tensor cores win where a weight is so large that not all of its tiles fit on the GPU at
    once. An lm_head has so many tiles that this does not matter. Measured on an H200 (docs/experiments.md)."""
    weights = N * columns * (2 if group else 1)
    return N >= 2**15 or weights <= (2**25 if columns >= 8192 else 2**26)


def one_integer_row(N: int, columns: int) -> Tiling:
    """The Tiling for multiply_row (see `takes_integer_row`). A warp reads 512 bytes of a row at once, so that its
    threads lie side by side. If there are few rows, several warps share a row."""
    BN, warps = (8, 1) if N >= 8192 or columns <= 512 else (4, 2 if columns < 4096 else 4)
    return Tiling(1, BN, 512 * warps, 1, warps, 1, ahead=1, unroll=min(2, -(-columns // (512 * warps))))


def many_rows(N: int, columns: int, w_bytes: int, x_bytes: int, group: int, sms: int, capability: tuple[int, int]
              ) -> Tiling:
    """The Tiling for 65 to 128 rows of x, of x_bytes an element (two planes: 2), and weights of N rows of `columns`
    elements of w_bytes each (int4: `columns` bytes, group > 0). Measured at the 7B's shape on an H200, bf16 and int8.

    Every tile reads all of x again from L2: one to four times as many bytes as of weights. So tiles are large. But
    every split stores a sum of up to 64 KB (128 x 128 fp32), which costs more: there are only as many splits as fill
    the waves of programs nearly whole, and half as large tiles where that saves splits.
    """
    hopper = capability >= (9, 0)
    BN, tiles = 128, -(-N // 128)
    two = hopper and x_bytes == w_bytes and tiles > sms  # programs a multiprocessor, half the memory each
    half = -(-N // 64)
    if hopper and not group and not two and (tiles > sms or half <= sms and sms // half * half >= sms // tiles * tiles):
        BN, tiles = 64, half  # as many programs with half of the splits
    if group:
        BK, stages = 64, 4 if hopper else 3
    elif hopper:
        BK = 128 // w_bytes
        stages = (96 if two else 192) * 1024 // (BK * (BN * w_bytes + 128 * x_bytes))  # of a program's shared memory
    else:
        BK, stages = 64 // w_bytes, 4
    SK = max(1, sms // tiles)
    while not two and math.ceil(tiles * SK / sms) > 1.4 * tiles * SK / sms:
        SK += 1
    while columns % BK and BK > 64 // w_bytes:
        BK //= 2
    SK = max(1, min(SK, columns // BK // 4, 64))
    return Tiling(128, BN, BK, SK, 8, stages, ahead=4 if w_bytes == 2 else max(1, 256 // BK))


def integer_config(M: int, N: int, columns: int, planes: int, group: int, sms: int, capability: tuple[int, int]
                   ) -> Tiling:
    """The Tiling for integer weights of N rows of `columns` bytes and M rows of x in `planes` planes; group: see
    ops.quantized.Quantized. Hopper's tensor cores want at least 16 rows, all planes together."""
    if M > 64:
        return many_rows(N, columns, 1, planes, group, sms, capability)
    if M == 1 and planes == 2 and takes_integer_row(N, columns, group):
        return one_integer_row(N, columns)
    hopper = capability >= (9, 0)
    if M <= 8:
        BM = 8 if planes == 2 else 16
    else:
        BM = 16 if M <= 16 else 32 if M <= 32 else 64
    rows = planes * BM  # what tensor cores multiply
    tiles = -(-N // 64)
    if group == 32 and BM <= 32:
        return many_groups(BM, rows, tiles, columns, sms, hopper)
    crowded = rows == 128 and group and not hopper  # four warps would not have enough registers
    BN = 128 if crowded else 64
    warps = 8 if crowded else 4
    if columns < 1024 and not crowded:  # all of a tile's weights in flight
        stages = (6 if rows <= 16 else 4 if rows <= 32 else 3) if group else 9 if rows < 64 else 6 if rows < 128 else 4
        return Tiling(BM, BN, max(64, group), 1, warps, stages if hopper else min(stages, 3 if group else 4), ahead=0)
    if hopper:
        BK, SK, stages = hopper_int4(rows, tiles, sms) if group else hopper_int8(rows, tiles, columns, sms)
    else:  # 99 KB of shared memory: 48 of them for each program, where they suffice
        BK = max(64, group) if crowded else 128
        SK = -(-2 * sms // tiles) if tiles < sms else 1
        stages = 4 if rows < 64 else 3
    if group == 32:  # a loop of eight groups takes the compiler minutes
        BK = min(BK, 128)
    while columns % BK and BK > max(64, group):
        BK //= 2
    SK = max(1, min(SK, columns // BK // 4, 64))
    return Tiling(BM, BN, BK, SK, warps, stages, ahead=max(1, (256 if group or rows <= 16 else 1024) // BK))


def many_groups(BM: int, rows: int, tiles: int, columns: int, sms: int, hopper: bool) -> Tiling:
    """The Tiling for int4 in groups of 32 and up to 32 rows of x. The loop waits for the tensor cores after every
    group, so several programs have to share a multiprocessor. `rows`: what tensor cores multiply; tiles: of 64 rows of
    the weights.

    Splits are chosen by a count of the blocks that a multiprocessor gets through one after the other, where starting
    and ending a program is worth two of them.
    """
    BK = 128 if rows <= 32 else 64
    blocks = columns // BK
    resident = sms * (2 if not hopper else 4 if rows <= 16 else 3)

    def length(SK: int) -> int:
        return -(-tiles * SK // resident) * (-(-blocks // SK) + 2)
    SK = min(range(1, min(16 if rows <= 32 else 6, blocks) + 1), key=length)  # a sum of many rows is long
    stages = 3 if rows == 32 and not hopper else 4
    return Tiling(BM, 64, BK, SK, 4, min(stages, -(-blocks // SK) + 1), ahead=256 // BK)


def hopper_int4(rows: int, tiles: int, sms: int) -> tuple[int, int, int]:
    """BK, SK and stages for int4 on Hopper."""
    if tiles < sms and rows == 128:
        return (128, 4, 3) if 4 * tiles > sms else (128, sms // tiles, 4)
    if tiles < sms and 2 * tiles > sms:  # two splits would make a wave and a half
        return 128, 4, 6 if rows <= 16 else 4
    if tiles < sms:
        return 256, sms // tiles, 3 if rows == 64 else 6
    if tiles > 3 * sms and rows <= 32:
        return 256, 1, 3
    if tiles > 3 * sms and rows == 64:
        return 128, 1, 4
    SK = 2 if tiles < 2 * sms or rows <= 16 else 1
    return 128, SK, 4 if rows < 64 else 3


def hopper_int8(rows: int, tiles: int, columns: int, sms: int) -> tuple[int, int, int]:
    """BK, SK and stages for int8 on Hopper."""
    if tiles < sms:
        BK, stages = (128, 8) if rows == 128 else (256, 6)
        return BK, sms // tiles, stages
    if columns < 4096 and tiles <= 3 * sms and rows != 64:  # all tiles at once, three programs a multiprocessor
        return 128, 1, 6 if rows < 64 else 3
    if rows <= 16 and tiles <= 3 * sms:  # of more columns too, all tiles at once
        return (128, 1, 5) if tiles <= 2 * sms else (256, 1, 3)
    if rows < 64:
        return 256, 1, 6 if rows <= 16 else 4
    return 128, 1, 4
