// The kernels of decoding on a CPU: a linear layer with int8 or int4 weights, tree attention, and for other weights RoPE
// and the norm. ops/cpu_kernels.py compiles this file and calls it; ops/linear.py, ops/attention.py and ops/embed_rope.py
// hold the same functions in PyTorch, which define them.
//
// One call does what takes PyTorch 20 to 70 small steps, and at batch 1 those steps cost more than the products.
//
// The results of a row do not depend on the other rows, nor on the number of threads, to the bit. Each lane of a vector
// belongs to one output, and adds up its terms in an order that only the row itself decides: columns in `linear`, slots
// in `attention`, where a slot that a row does not see adds exactly nothing. So what a tree's verification computes for
// a node is what plain decoding computes.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "cpu_threads.h"
#include "cpu_vectors.h"

extern "C" void set_threads(int count) { pool.threads = count < pool.started ? pool.started : count; }

// ----- Linear ------------------------------------------------------------------------------------------------------

constexpr int TILE = 16;  // outputs whose weights lie interleaved: [N / 16][columns / 2][16][2], of int4 two in a byte
constexpr int64_t BLOCK = 2048;  // columns whose products 32 bits can add up: 2048 * 8127 * 127 < 2^31
constexpr float LIMIT = 8127;  // 14 bits: the largest integer that a value of x becomes
constexpr float LIMIT_INT4 = 32512;  // 16 bits: 32 bits can add up the products of a group, at most 128

struct Linear {
    int64_t T, K, N;
    const float *x, *norm;
    float eps;
    int rotated;
    const int8_t* packed;
    const void* scale;  // float [N], or of int4 two numbers of 16 bits [columns / group, N, 2]: see ops/quantized.py
    int64_t group, columns;  // of int4: columns of a group, and K rounded up to a multiple of 256; else 0 and K
    int zeros;  // of int4: scales and zeros in fp16, not scales and offsets in bf16
    const float *bias, *residual;
    int gated;
    const float* rope;
    const int64_t* slots;
    float* kv;
    int64_t S, D, kv_heads;
    float* out;
    int16_t* integers;  // [T, K]
    float* steps;  // [T]: what 1 of a row's integers is worth
    int32_t* sums;  // [T, columns / group]: of int4, the integers of each group added up
};

// Each block of 16 columns times the Hadamard matrix: see ops/quantized.py.
inline void rotate(float* x) {
    for (int step = 1; step < 16; step *= 2)
        for (int i = 0; i < 16; i++)
            if (!(i & step)) {
                float a = x[i], b = x[i + step];
                x[i] = a + b;
                x[i + step] = a - b;
            }
    for (int i = 0; i < 16; i++) x[i] *= 0.25f;
}

// Norm row t of x, and make integers of it. The norm's factor is common to the row, so it goes into the step.
void quantize_row(const Linear& a, int64_t t) {
    const float* x = a.x + t * a.K;
    thread_local std::vector<float> copy;
    if (a.norm || a.rotated) {
        copy.resize(a.K);
        Floats squares = {};
        for (int64_t k = 0; k < a.K; k += LANES) {
            Floats value = load(x + k);
            squares += value * value;
            store(&copy[k], a.norm ? value * load(a.norm + k) : value);
        }
        if (a.rotated)
            for (int64_t k = 0; k < a.K; k += 16) rotate(&copy[k]);
        x = copy.data();
        a.steps[t] = a.norm ? 1 / std::sqrt(sum(squares) / a.K + a.eps) : 1;
    } else {
        a.steps[t] = 1;
    }
    Floats tops = {};
    for (int64_t k = 0; k < a.K; k += LANES) tops = larger(tops, larger(load(x + k), -load(x + k)));
    float top = std::max(largest(tops), 1e-30f), limit = a.group ? LIMIT_INT4 : LIMIT;
    int16_t* integers = a.integers + t * a.K;
    for (int64_t k = 0; k < a.K; k += LANES) {
        Floats digits = rounded(load(x + k) * (limit / top));
        *(Halves*)(integers + k) = __builtin_convertvector(__builtin_convertvector(digits, Words), Halves);
    }
    a.steps[t] *= top / limit;
    int32_t* sums = a.sums + (a.group ? t * (a.columns / a.group) : 0);
    for (int64_t first = 0; a.group && first < a.K; first += a.group) {
        int32_t sum = 0;
        for (int64_t k = first; k < std::min(first + a.group, a.K); k++) sum += integers[k];
        sums[first / a.group] = sum;
    }
}

// Sums of ROWS rows of integers and TILES tiles of weights, as fp32, to out [ROWS, stride].
template <int ROWS, int TILES>
void multiply(const int16_t* x, const int8_t* w, int64_t K, float* out, int64_t stride) {
    for (int64_t first = 0; first < K; first += BLOCK) {
        int64_t last = std::min(first + BLOCK, K);
        Sums acc[ROWS][TILES];
        for (int m = 0; m < ROWS; m++)
            for (int t = 0; t < TILES; t++) acc[m][t] = all_of(0);
        for (int64_t k = first; k < last; k += 2) {
            Weights weights[TILES];
            for (int t = 0; t < TILES; t++) weights[t] = widen(w + (t * K + k) * TILE);
            for (int m = 0; m < ROWS; m++) {
                Pair pair = broadcast(x + m * K + k);
                for (int t = 0; t < TILES; t++) add_products(acc[m][t], weights[t], pair);
            }
        }
        for (int m = 0; m < ROWS; m++)
            for (int i = 0; i < TILES * TILE; i += LANES) {
                float* to = out + m * stride + i;
                Floats part = floats_of(acc[m][i / TILE], i % TILE);
                store(to, first ? load(to) + part : part);
            }
    }
}

// The same of int4 weights, scaled: rows m to m + ROWS, outputs n to n + TILES * TILE, to out [ROWS, stride]. q + 8 is
// what is stored, so a group's sum of integers begins at -8 times the sum of x.
template <int ROWS, int TILES> void multiply_int4(const Linear& a, int64_t m, int64_t n, float* out, int64_t stride) {
    const int64_t groups = a.columns / a.group;
    const int16_t* x = a.integers + m * a.K;
    const int32_t* sums = a.sums + m * groups;
    const int8_t* w = a.packed + n * (a.columns / 2);
    for (int64_t first = 0; first < a.K; first += a.group) {
        int64_t last = std::min(first + a.group, a.K), g = first / a.group;
        Sums acc[ROWS][TILES];
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++)
            for (int t = 0; t < TILES; t++) acc[r][t] = all_of(-8 * sums[r * groups + g]);
        for (int64_t k = first; k < last; k += 2) {
            Weights weights[TILES];
            for (int t = 0; t < TILES; t++) weights[t] = widen_nibbles(w + (t * a.columns + k) / 2 * TILE);
            for (int r = 0; r < ROWS; r++) {
                Pair pair = broadcast(x + r * a.K + k);
                for (int t = 0; t < TILES; t++) add_products(acc[r][t], weights[t], pair);
            }
        }
#pragma GCC unroll 8
        for (int i = 0; i < TILES * TILE; i += LANES) {
            Words word = *(const Words*)((const int32_t*)a.scale + g * a.N + n + i);
            Floats scale = a.zeros ? of_halves(word) : as_floats(word << 16) * 16;
            Floats offset = a.zeros ? of_halves(word >> 16) * -scale : as_floats(word & (int32_t)0xffff0000);
#pragma GCC unroll 8
            for (int r = 0; r < ROWS; r++) {
                float* to = out + r * stride + i;
                Floats part = scale * floats_of(acc[r][i / TILE], i % TILE);
                part += offset * (float)sums[r * groups + g];
                store(to, first ? load(to) + part : part);
            }
        }
    }
}

// Outputs n to n + TILES * TILE of rows m to m + ROWS, as sums of integers or, of int4, scaled.
template <int ROWS, int TILES> void multiply_any(const Linear& a, int64_t m, int64_t n, float* out, int64_t stride) {
    if (a.group)
        multiply_int4<ROWS, TILES>(a, m, n, out, stride);
    else
        multiply<ROWS, TILES>(a.integers + m * a.K, a.packed + n * a.K, a.K, out, stride);
}

// The same for 1 to MAX_ROWS rows and an even number of tiles. Few rows take more tiles at a time: an addition has to
// wait for the one before it, and others fill the gap.
template <int ROWS>
void multiply_tiles(const Linear& a, int64_t m, int rows, int64_t n, int tiles, float* out, int64_t stride) {
    if (rows < ROWS) {
        if constexpr (ROWS > 1) multiply_tiles<ROWS / 2>(a, m, rows, n, tiles, out, stride);
        return;
    }
    constexpr int WIDE = ROWS <= 2 ? 4 : 2;
    int t = 0;
    for (; t + WIDE <= tiles; t += WIDE) multiply_any<ROWS, WIDE>(a, m, n + t * TILE, out + t * TILE, stride);
    for (; t < tiles; t += 2) multiply_any<ROWS, 2>(a, m, n + t * TILE, out + t * TILE, stride);
    if (rows > ROWS) multiply_tiles<ROWS>(a, m + ROWS, rows - ROWS, n, tiles, out + ROWS * stride, stride);
}

// Outputs n to n + count of rows m to m + rows: y [rows, stride].
void outputs(const Linear& a, int64_t m, int rows, int64_t n, int count, float* y, int64_t stride) {
    multiply_tiles<MAX_ROWS>(a, m, rows, n, count / TILE, y, stride);
    for (int r = 0; r < rows; r++)
        for (int i = 0; i < count; i += LANES) {
            Floats step = Floats{} + a.steps[m + r];
            Floats value = load(y + r * stride + i) * (a.group ? step : step * load((const float*)a.scale + n + i));
            store(y + r * stride + i, a.bias ? value + load(a.bias + n + i) : value);
        }
}

// Rotate the queries and keys of one head, and store them: see rope_store in ops/embed_rope.py.
void store_head(const Linear& a, int64_t m, int rows, int64_t head, const float* y, int64_t stride) {
    int64_t D = a.D, queries = a.N / D - 2 * a.kv_heads;
    for (int r = 0; r < rows; r++, y += stride) {
        int64_t row = m + r;
        float* to = head < queries ? a.out + (row * queries + head) * D
                                   : a.kv + ((head - queries) * a.S + a.slots[row]) * D;
        if (head >= queries + a.kv_heads) {
            memcpy(to, y, D * sizeof(float));
            continue;
        }
        const float *cos = a.rope + row * D, *sin = cos + a.T * D;
        for (int64_t i = 0; i < D / 2; i++) {
            float u = y[i], v = y[i + D / 2];
            to[i] = u * cos[i] - v * sin[i];
            to[i + D / 2] = v * cos[i] + u * sin[i];
        }
    }
}

// See rope_store_torch in ops/embed_rope.py: qkv [T, N] -> out, kv.
extern "C" void rope_store(int64_t T, int64_t N, const float* qkv, const float* rope, const int64_t* slots, float* kv,
                           int64_t S, int64_t D, int64_t kv_heads, float* out) {
    Linear a{};
    a.T = T, a.N = N, a.rope = rope, a.slots = slots, a.kv = kv, a.S = S, a.D = D, a.kv_heads = kv_heads, a.out = out;
    for (int64_t head = 0; head < N / D; head++) store_head(a, 0, (int)T, head, qkv + head * D, N);
}

// norm * x / sqrt(mean(x^2) + eps) of each row. K is a multiple of 16.
extern "C" void rms_norm(int64_t T, int64_t K, const float* x, const float* norm, float eps, float* out) {
    for (int64_t t = 0; t < T; t++, x += K, out += K) {
        Floats squares = {};
        for (int64_t k = 0; k < K; k += LANES) squares += load(x + k) * load(x + k);
        float factor = 1 / std::sqrt(sum(squares) / K + eps);
        for (int64_t k = 0; k < K; k += LANES) store(out + k, load(x + k) * factor * load(norm + k));
    }
}

// See `linear` in ops/linear.py. N is a multiple of 64, K of 16, D of 32 and at most 256.
extern "C" void linear(int64_t T, int64_t K, int64_t N, const float* x, const float* norm, float eps, int rotated,
                       const int8_t* packed, const void* scale, int64_t group, int64_t columns, int zeros,
                       const float* bias, const float* residual, int gated, const float* rope, const int64_t* slots,
                       float* kv, int64_t S, int64_t D, int64_t kv_heads, float* out) {
    thread_local std::vector<int16_t> integers;
    thread_local std::vector<float> steps;
    thread_local std::vector<int32_t> sums;
    integers.resize(T * K);
    steps.resize(T);
    sums.resize(group ? T * (columns / group) : 0);
    Linear a{T, K, N, x, norm, eps, rotated, packed, scale, group, columns, zeros, bias, residual, gated, rope, slots,
             kv, S, D, kv_heads, out, integers.data(), steps.data(), sums.data()};
    if (T * K < 16384)
        for (int64_t t = 0; t < T; t++) quantize_row(a, t);
    else
        parallel(T, [&](int64_t t) { quantize_row(a, t); });
    int64_t width = gated ? N / 2 : N;
    int64_t unit = kv ? D : width >= 1024 && !gated && width % 64 == 0 ? 64 : 32;  // outputs
    parallel(width / unit, [&](int64_t number) {
        constexpr int64_t MOST = 256;
        float y[MAX_ROWS * MOST], up[MAX_ROWS * 32];
        int64_t n = number * unit;
        for (int64_t m = 0; m < T; m += MAX_ROWS) {
            int rows = (int)std::min<int64_t>(MAX_ROWS, T - m);
            outputs(a, m, rows, n, (int)unit, y, MOST);
            if (gated) outputs(a, m, rows, width + n, (int)unit, up, 32);
            if (kv) {
                store_head(a, m, rows, number, y, MOST);
                continue;
            }
            for (int r = 0; r < rows; r++)
                for (int64_t i = 0; i < unit; i += LANES) {
                    int64_t at = (m + r) * width + n + i;
                    Floats value = load(y + r * MOST + i);
                    if (gated) value = value / (1 + exponential(-value)) * load(up + r * 32 + i);
                    store(out + at, residual ? load(residual + at) + value : value);
                }
        }
    });
}

// ----- Attention -----------------------------------------------------------------------------------------------------

struct Attention {
    int64_t T, H, K, S, D;
    const float* q;
    const void* kv;
    bool is_bf16;
    int64_t base;
    const int64_t* bits;
    int64_t words, window, reach;  // reach: from slot base + reach on, no bit is set
    float* out;
};

// LANES of the rows that share key/value head `head`, from row `first` on: a row is a token and one of its query heads.
void attend(const Attention& a, int64_t head, int64_t first) {
    int64_t D = a.D, G = a.H / a.K, rows = std::min<int64_t>(LANES, a.T * G - first);
    int64_t end = std::min(a.S, a.base + (a.bits ? a.reach : (first + rows - 1) / G + 1));  // nobody sees this slot
    thread_local std::vector<float> q, p, wide;
    const float* cache[2];  // keys and values of this head
    wide.resize(a.is_bf16 ? 2 * end * D : 0);
    for (int i = 0; i < 2; i++) {
        int64_t at = (i * a.K + head) * a.S * D;
        cache[i] = a.is_bf16 ? &wide[i * end * D] : (const float*)a.kv + at;
        if (a.is_bf16) {
            const uint16_t* from = (const uint16_t*)a.kv + at;
            uint32_t* to = (uint32_t*)&wide[i * end * D];
            for (int64_t j = 0; j < end * D; j++) to[j] = (uint32_t)from[j] << 16;
        }
    }
    const float *keys = cache[0], *values = cache[1];
    q.assign(D * LANES, 0);
    p.resize(end * LANES);
    int64_t token[LANES];
    for (int64_t r = 0; r < LANES; r++) {
        token[r] = (first + std::min(r, rows - 1)) / G;
        const float* from = a.q + (token[r] * a.H + head * G + (first + r) % G) * D;
        if (r < rows)
            for (int64_t d = 0; d < D; d++) q[d * LANES + r] = from[d] / std::sqrt((float)D);
    }
    auto seen = [&](int64_t slot) {  // all bits set where a lane sees the slot
        Words mask;
        for (int64_t r = 0; r < LANES; r++) {
            int64_t node = slot - a.base;
            bool sees = !a.window || node > token[r] - a.window;  // of the text before the tree
            if (node >= 0)
                sees = a.bits ? a.bits[token[r] * a.words + node / 64] >> (node % 64) & 1 : node <= token[r];
            mask[r] = sees ? -1 : 0;
        }
        return mask;
    };
    Floats lowest = Floats{} - 1e30f, top = lowest, total = {};
    constexpr int AT_ONCE = 8;
    for (int64_t slot = 0; slot < end; slot += AT_ONCE) {
        int64_t count = std::min<int64_t>(AT_ONCE, end - slot);
        Floats score[AT_ONCE] = {};
        const float* from[AT_ONCE];
        for (int j = 0; j < AT_ONCE; j++) from[j] = keys + (slot + std::min<int64_t>(j, count - 1)) * D;
        for (int64_t d = 0; d < D; d++) {
            Floats lanes = load(&q[d * LANES]);
            for (int j = 0; j < AT_ONCE; j++) score[j] += lanes * from[j][d];
        }
        for (int64_t j = 0; j < count; j++) {
            if (slot + j >= a.base || a.window) score[j] = seen(slot + j) ? score[j] : lowest;
            top = larger(top, score[j]);
            store(&p[(slot + j) * LANES], score[j]);
        }
    }
    for (int64_t slot = 0; slot < end; slot++) {
        Floats score = load(&p[slot * LANES]);
        Floats weight = exponential(score - top);  // exactly 0 where the slot is not seen
        total += weight;
        store(&p[slot * LANES], weight);
    }
    for (int64_t d = 0; d < D; d += 16) {
        Floats acc[16] = {};
        for (int64_t slot = 0; slot < end; slot++) {
            Floats weight = load(&p[slot * LANES]);
            const float* value = values + slot * D + d;
            for (int i = 0; i < 16; i++) acc[i] += weight * value[i];
        }
        for (int i = 0; i < 16; i++) {
            Floats y = acc[i] / total;
            for (int64_t r = 0; r < rows; r++) a.out[(token[r] * a.H + head * G + (first + r) % G) * D + d + i] = y[r];
        }
    }
}

// See tree_attention_torch in ops/attention.py. window 0: none. D is a multiple of 16.
extern "C" void attention(int64_t T, int64_t H, int64_t K, int64_t S, int64_t D, const float* q, const void* kv,
                          int is_bf16, const int64_t* base, const int64_t* bits, int64_t words, int64_t window,
                          float* out) {
    int64_t reach = 64 * words;
    auto is_set = [&](int64_t node) {
        for (int64_t t = 0; t < T; t++)
            if (bits[t * words + node / 64] >> (node % 64) & 1) return true;
        return false;
    };
    while (reach && !is_set(reach - 1)) reach--;
    Attention a{T, H, K, S, D, q, kv, (bool)is_bf16, *base, bits, words, window, reach, out};
    int64_t blocks = (T * (H / K) + LANES - 1) / LANES;
    parallel(K * blocks, [&](int64_t unit) { attend(a, unit % K, unit / K * LANES); });
}
