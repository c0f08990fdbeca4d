/* One decoding step of the whole model on a CPU: R sequences, one new token each, weights in bfloat16 or float32.
 *
 * Decoding reads every weight once for a handful of multiplications, so its floor is the time to read them from memory.
 * Operator by operator, torch pays a call and a barrier for each of a dozen small products per layer, its bfloat16
 * matrix-vector product does not reach the memory's speed on small matrices, and its products of 2 to 8 rows are slower
 * still. Here one parallel region runs through all layers. Activations stay float32; keys and values have the type of
 * the weights, as the cache holds them.
 *
 * Every sum is taken in the same order whatever R is and whichever row it belongs to, so a sequence's logits do not
 * depend, not in a bit, on what else is in the batch.
 *
 * The file includes itself once for each type of weight (W).
 *
 * Shapes: L layers, R rows, D hidden, H query heads, K key/value heads, d head width, F feed-forward, V vocabulary,
 * N rows of the cache, C its capacity.
 */
#ifndef W
#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

#define MOST_ROWS 16

#ifdef _OPENMP
#include <omp.h>
#else
static int omp_get_thread_num(void) { return 0; }
#endif

typedef uint16_t bf16;

static inline float wide_bf16(bf16 h) {
    uint32_t u = (uint32_t)h << 16;
    float f;
    memcpy(&f, &u, 4);
    return f;
}

static inline bf16 narrow_bf16(float f) {
    uint32_t u;
    memcpy(&u, &f, 4);
    return (bf16)((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}

static inline float wide_f32(float f) { return f; }
static inline float narrow_f32(float f) { return f; }

/* Sums are taken in lanes and by fused steps, written out: a compiler may order a sum differently in one place than in
 * another, and gcc tuned for Zen fuses a multiplication and an addition in loops with many sums but not with one. */
#ifdef __AVX512F__
#define LANES 16
#else
#define LANES 8
#endif
typedef float vec __attribute__((vector_size(4 * LANES)));
typedef uint32_t bits __attribute__((vector_size(4 * LANES)));
typedef bf16 halves __attribute__((vector_size(2 * LANES)));

static inline vec load_f32(const float *x) {
    vec v;
    memcpy(&v, x, sizeof v);
    return v;
}

static inline vec load_bf16(const bf16 *w) {
    halves h;
    memcpy(&h, w, sizeof h);
    return (vec)(__builtin_convertvector(h, bits) << 16);
}

static inline vec fused(vec a, vec b, vec sum) {
#if defined(__AVX512F__)
    return (vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)sum);
#elif defined(__AVX2__) && defined(__FMA__)
    return (vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)sum);
#else
    return a * b + sum;
#endif
}

static inline float total(vec v) {
    float lanes[LANES];
    memcpy(lanes, &v, sizeof v);
    for (int width = LANES / 2; width > 0; width /= 2)
        for (int k = 0; k < width; k++) lanes[k] += lanes[k + width];
    return lanes[0];
}

/* Rotate the halves of one head by its token's angles. */
static void rotate(float *x, const float *cos, const float *sin, int64_t half) {
    for (int64_t j = 0; j < half; j++) {
        float a = x[j], b = x[half + j];
        x[j] = a * cos[j] - b * sin[j];
        x[half + j] = b * cos[j] + a * sin[j];
    }
}

#define W float
#define NAMED(name) name##_f32
#include "decode_kernels.c"
#undef W
#undef NAMED
#define W bf16
#define NAMED(name) name##_bf16
#include "decode_kernels.c"

/* The output matrix in 8 bits: w[i] ~ scale[i] * q[i], with error[i] >= |(x . w[i]) - scale[i] * (x . q[i])| / |x| for
 * any x (Cauchy-Schwarz), the rounding of float32 sums included. */
void lumina_quantise(const bf16 *w, int8_t *q, float *scale, float *error, int64_t V, int64_t D, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < V; i++) {
        const bf16 *row = w + i * D;
        float peak = 0.0f, square = 0.0f, lost = 0.0f;
#pragma omp simd reduction(max : peak)
        for (int64_t j = 0; j < D; j++) {
            float a = fabsf(wide_bf16(row[j]));
            peak = a > peak ? a : peak;
        }
        float unit = peak > 0.0f ? peak / 127.0f : 1.0f, inverse = 1.0f / unit;
#pragma omp simd reduction(+ : square, lost)
        for (int64_t j = 0; j < D; j++) {
            float v = wide_bf16(row[j]), n = rintf(v * inverse), off = v - n * unit;
            q[i * D + j] = (int8_t)n;
            square += v * v;
            lost += off * off;
        }
        scale[i] = unit;
        error[i] = 1.0001f * sqrtf(lost) + 1e-5f * sqrtf(square);
    }
}

/* x . q over n. gcc 12 turns the plain loop over bytes into a third of the memory's speed, hence the intrinsics. */
static inline float dot_bytes(const float *x, const int8_t *q, int64_t n) {
    float sum = 0.0f;
    int64_t j = 0;
#ifdef __AVX512F__
    __m512 first = _mm512_setzero_ps(), second = _mm512_setzero_ps();
    for (; j + 32 <= n; j += 32) {
        __m512i q0 = _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(q + j)));
        __m512i q1 = _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(q + j + 16)));
        first = _mm512_fmadd_ps(_mm512_loadu_ps(x + j), _mm512_cvtepi32_ps(q0), first);
        second = _mm512_fmadd_ps(_mm512_loadu_ps(x + j + 16), _mm512_cvtepi32_ps(q1), second);
    }
    sum = _mm512_reduce_add_ps(_mm512_add_ps(first, second));
#elif defined(__AVX2__) && defined(__FMA__)
    __m256 sums[4] = {_mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps()};
    for (; j + 32 <= n; j += 32) {
        for (int k = 0; k < 4; k++) {
            __m256i bytes = _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(q + j + 8 * k)));
            sums[k] = _mm256_fmadd_ps(_mm256_loadu_ps(x + j + 8 * k), _mm256_cvtepi32_ps(bytes), sums[k]);
        }
    }
    __m256 four = _mm256_add_ps(_mm256_add_ps(sums[0], sums[1]), _mm256_add_ps(sums[2], sums[3]));
    float parts[8];
    _mm256_storeu_ps(parts, four);
    for (int k = 0; k < 8; k++) sum += parts[k];
#endif
    for (; j < n; j++) sum += x[j] * (float)q[j];
    return sum;
}

/* For each row of x and of w, bounds between which x . w[i] lies: (R, V) each. norms: |x| for each row of x. */
void lumina_bounds(const float *x, const float *norms, const int8_t *q, const float *scale, const float *error,
                   float *low, float *high, int64_t R, int64_t V, int64_t D, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < V; i++) {
        for (int64_t r = 0; r < R; r++) {
            float middle = dot_bytes(x + r * D, q + i * D, D) * scale[i], off = 1.0001f * norms[r] * error[i];
            low[r * V + i] = middle - off;
            high[r * V + i] = middle + off;
        }
    }
}

#else /* for one type of weight */

static inline float NAMED(rest)(float sum, const float *x, const W *w, int64_t j, int64_t n) {
    for (; j < n; j++) sum = fmaf(x[j], NAMED(wide)(w[j]), sum);
    return sum;
}

static inline float NAMED(dot)(const float *x, const W *w, int64_t n) {
    vec s = {0.0f};
    int64_t j = 0;
    for (; j + LANES <= n; j += LANES) s = fused(load_f32(x + j), NAMED(load)(w + j), s);
    return NAMED(rest)(total(s), x, w, j, n);
}

/* The products of two weight rows with all R rows of x: sa[r] = x[r] . a, sb[r] = x[r] . b. Four rows of x at a time
 * share what widening a weight costs, and eight sums fit the registers of AVX2. Meanwhile the weights that are `ahead`
 * of these are fetched: several rows take longer to multiply than to read, and the hardware stops at every page. */
static inline void NAMED(pair)(const float *x, const W *a, const W *b, int64_t R, int64_t n, int64_t ahead, float *sa,
                               float *sb) {
    int64_t r = 0;
    for (; r + 4 <= R; r += 4) {
        const float *x0 = x + r * n, *x1 = x0 + n, *x2 = x1 + n, *x3 = x2 + n;
        vec a0 = {0.0f}, a1 = a0, a2 = a0, a3 = a0, b0 = a0, b1 = a0, b2 = a0, b3 = a0;
        int64_t j = 0;
        for (; j + LANES <= n; j += LANES) {
            if (r == 0) __builtin_prefetch(a + j + ahead), __builtin_prefetch(b + j + ahead);
            vec p = NAMED(load)(a + j), q = NAMED(load)(b + j), v0 = load_f32(x0 + j), v1 = load_f32(x1 + j);
            vec v2 = load_f32(x2 + j), v3 = load_f32(x3 + j);
            a0 = fused(v0, p, a0), a1 = fused(v1, p, a1), a2 = fused(v2, p, a2), a3 = fused(v3, p, a3);
            b0 = fused(v0, q, b0), b1 = fused(v1, q, b1), b2 = fused(v2, q, b2), b3 = fused(v3, q, b3);
        }
        vec sums_a[4] = {a0, a1, a2, a3}, sums_b[4] = {b0, b1, b2, b3};
        for (int k = 0; k < 4; k++) {
            sa[r + k] = NAMED(rest)(total(sums_a[k]), x0 + k * n, a, j, n);
            sb[r + k] = NAMED(rest)(total(sums_b[k]), x0 + k * n, b, j, n);
        }
    }
    for (; r < R; r++) sa[r] = NAMED(dot)(x + r * n, a, n), sb[r] = NAMED(dot)(x + r * n, b, n);
}

/* y[r][i] (+)= x[r] . w[i] for all R rows of x; each weight row is read from memory once. Within a parallel region. */
static void NAMED(product)(const float *x, const W *w, float *y, int64_t R, int64_t out, int64_t in, int add) {
#pragma omp for schedule(static)
    for (int64_t block = 0; block < (out + 3) / 4; block++) {
        int64_t i = 4 * block, here = out - i < 4 ? out - i : 4;
        const W *a = w + i * in, *b = a + in, *c = b + in, *e = c + in;
        float sums[4][MOST_ROWS];
        if (here < 4) {
            for (int64_t k = 0; k < here; k++)
                for (int64_t r = 0; r < R; r++) sums[k][r] = NAMED(dot)(x + r * in, a + k * in, in);
        } else if (R < 4) {
            for (int64_t r = 0; r < R; r++) { /* four rows at once: four streams from memory and one load of x */
                const float *v = x + r * in;
                vec s0 = {0.0f}, s1 = s0, s2 = s0, s3 = s0;
                int64_t j = 0;
                for (; j + LANES <= in; j += LANES) {
                    vec u = load_f32(v + j);
                    s0 = fused(u, NAMED(load)(a + j), s0), s1 = fused(u, NAMED(load)(b + j), s1);
                    s2 = fused(u, NAMED(load)(c + j), s2), s3 = fused(u, NAMED(load)(e + j), s3);
                }
                sums[0][r] = NAMED(rest)(total(s0), v, a, j, in), sums[1][r] = NAMED(rest)(total(s1), v, b, j, in);
                sums[2][r] = NAMED(rest)(total(s2), v, c, j, in), sums[3][r] = NAMED(rest)(total(s3), v, e, j, in);
            }
        } else {
            NAMED(pair)(x, a, b, R, in, 4 * in, sums[0], sums[1]);
            NAMED(pair)(x, c, e, R, in, 4 * in, sums[2], sums[3]);
        }
        for (int64_t r = 0; r < R; r++) {
            float *o = y + r * out + i;
            for (int64_t k = 0; k < here; k++) o[k] = add ? o[k] + sums[k][r] : sums[k][r];
        }
    }
}

/* y = x * rsqrt(mean(x^2) + eps) * weight. Within a parallel region. */
static void NAMED(norm)(const float *x, const W *weight, float *y, int64_t R, int64_t D, float eps) {
#pragma omp for schedule(static)
    for (int64_t r = 0; r < R; r++) {
        const float *in = x + r * D;
        float *out = y + r * D, square = dot_f32(in, in, D);
        float inv = 1.0f / sqrtf(square / (float)D + eps);
#pragma omp simd
        for (int64_t j = 0; j < D; j++) out[j] = in[j] * inv * NAMED(wide)(weight[j]);
    }
}

/* One query over n cached keys and values; overwrites q with the result. */
static void NAMED(attend)(float *q, const W *keys, const W *values, int64_t n, int64_t d, float *scores) {
    float scale = 1.0f / sqrtf((float)d), peak = -INFINITY, sum = 0.0f;
    for (int64_t t = 0; t < n; t++) {
        scores[t] = NAMED(dot)(q, keys + t * d, d) * scale;
        peak = scores[t] > peak ? scores[t] : peak;
    }
    memset(q, 0, (size_t)d * sizeof(float));
    for (int64_t t = 0; t < n; t++) {
        float p = expf(scores[t] - peak);
        const W *v = values + t * d;
        sum += p;
#pragma omp simd
        for (int64_t j = 0; j < d; j++) q[j] += p * NAMED(wide)(v[j]);
    }
    for (int64_t j = 0; j < d; j++) q[j] /= sum;
}

/* weights: for each layer attention norm, qkv, out, feed-forward norm, gate_up, down; then the last norm and the output
 * matrix. x: (R, D) embeddings, overwritten. logits: (R, V), or NULL: then the output layer is left out and its input is
 * the first R * D floats of scratch. rows, slots: which row of the cache each sequence has, and
 * where in it its token goes. cos, sin: (R, d/2). scratch: R * (D + (H + 2K) d + F) + threads * C floats.
 * R <= MOST_ROWS. */
void NAMED(lumina_decode)(const W *const *weights, float *x, float *logits, W *keys, W *values, const int64_t *rows,
                          const int64_t *slots, const float *cos, const float *sin, float *scratch, int64_t L, int64_t R,
                          int64_t D, int64_t H, int64_t K, int64_t d, int64_t F, int64_t V, int64_t N, int64_t C,
                          float eps, int threads) {
    int64_t width = (H + 2 * K) * d, group = H / K, half = d / 2;
    float *normed = scratch, *qkv = normed + R * D, *hidden = qkv + R * width, *scores = hidden + R * F;
#pragma omp parallel num_threads(threads)
    {
        float *own = scores + omp_get_thread_num() * C;
        for (int64_t l = 0; l < L; l++) {
            const W *const *w = weights + 6 * l;
            W *layer_keys = keys + l * N * K * C * d, *layer_values = values + l * N * K * C * d;
            NAMED(norm)(x, w[0], normed, R, D, eps);
            NAMED(product)(normed, w[1], qkv, R, width, D, 0);
#pragma omp for schedule(static)
            for (int64_t i = 0; i < R * K; i++) {
                int64_t r = i / K, k = i % K, at = (rows[r] * K + k) * C * d;
                float *q = qkv + r * width + k * group * d;
                float *key = qkv + r * width + (H + k) * d, *value = qkv + r * width + (H + K + k) * d;
                W *row_keys = layer_keys + at, *row_values = layer_values + at;
                rotate(key, cos + r * half, sin + r * half, half);
                for (int64_t j = 0; j < d; j++) {
                    row_keys[slots[r] * d + j] = NAMED(narrow)(key[j]);
                    row_values[slots[r] * d + j] = NAMED(narrow)(value[j]);
                }
                for (int64_t g = 0; g < group; g++) {
                    rotate(q + g * d, cos + r * half, sin + r * half, half);
                    NAMED(attend)(q + g * d, row_keys, row_values, slots[r] + 1, d, own);
                }
            }
            /* The queries of a row lie first in its qkv, so the product reads rows of H * d with a stride of width. */
#pragma omp for schedule(static)
            for (int64_t r = 0; r < R; r++) memcpy(normed + r * D, qkv + r * width, (size_t)(H * d) * sizeof(float));
            NAMED(product)(normed, w[2], x, R, D, D, 1);
            NAMED(norm)(x, w[3], normed, R, D, eps);
#pragma omp for schedule(static)
            for (int64_t j = 0; j < F; j++) {
                float gate[MOST_ROWS], up[MOST_ROWS];
                NAMED(pair)(normed, w[4] + j * D, w[4] + (F + j) * D, R, D, D, gate, up);
                for (int64_t r = 0; r < R; r++) hidden[r * F + j] = gate[r] / (1.0f + expf(-gate[r])) * up[r];
            }
            NAMED(product)(hidden, w[5], x, R, D, F, 1);
        }
        NAMED(norm)(x, weights[6 * L], normed, R, D, eps);
        if (logits) NAMED(product)(normed, weights[6 * L + 1], logits, R, V, D, 0);
    }
}

/* out[i] = x . w[ids[i]], as the whole product has it. */
void NAMED(lumina_some)(const float *x, const W *w, const int64_t *ids, float *out, int64_t n, int64_t D, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (n > 256)
    for (int64_t i = 0; i < n; i++) out[i] = NAMED(dot)(x, w + ids[i] * D, D);
}

#endif
