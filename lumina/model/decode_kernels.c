/* One decoding step of the whole model on a CPU: R sequences, one new token each, weights in bfloat16.
 *
 * Decoding reads every weight once for a handful of multiplications, so its floor is the time to read them from memory.
 * Operator by operator, torch pays a call and a barrier for each of a dozen small products per layer, and its bfloat16
 * matrix-vector product does not reach the memory's speed on small matrices. Here one parallel region runs through all
 * layers. Activations stay float32; keys and values are rounded to bfloat16 as the cache holds them.
 *
 * Shapes: L layers, R rows, D hidden, H query heads, K key/value heads, d head width, F feed-forward, V vocabulary,
 * N rows of the cache, C its capacity.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>

#ifdef __AVX512F__
#include <immintrin.h>
#endif

#ifdef _OPENMP
#include <omp.h>
#else
static int omp_get_thread_num(void) { return 0; }
#endif

typedef uint16_t bf16;

static inline float widen(bf16 h) {
    uint32_t u = (uint32_t)h << 16;
    float f;
    memcpy(&f, &u, 4);
    return f;
}

static inline bf16 narrow(float f) {
    uint32_t u;
    memcpy(&u, &f, 4);
    return (bf16)((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}

static inline float dot(const float *x, const bf16 *w, int64_t n) {
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < n; j++) sum += x[j] * widen(w[j]);
    return sum;
}

/* y[r][i] (+)= x[r] . w[i] for all R rows of x; each weight row is read from memory once. Within a parallel region. */
static void product(const float *x, const bf16 *w, float *y, int64_t R, int64_t out, int64_t in, int add) {
#pragma omp for schedule(static)
    for (int64_t block = 0; block < (out + 3) / 4; block++) {
        int64_t i = 4 * block;
        for (int64_t r = 0; r < R; r++) {
            const float *v = x + r * in;
            float s[4] = {0.0f, 0.0f, 0.0f, 0.0f};
            int64_t here = out - i < 4 ? out - i : 4;
            if (here == 4) { /* four rows at once: four streams from memory and one load of x */
                const bf16 *a = w + i * in, *b = a + in, *c = b + in, *e = c + in;
                float s0 = 0.0f, s1 = 0.0f, s2 = 0.0f, s3 = 0.0f;
#pragma omp simd reduction(+ : s0, s1, s2, s3)
                for (int64_t j = 0; j < in; j++) {
                    s0 += v[j] * widen(a[j]);
                    s1 += v[j] * widen(b[j]);
                    s2 += v[j] * widen(c[j]);
                    s3 += v[j] * widen(e[j]);
                }
                s[0] = s0, s[1] = s1, s[2] = s2, s[3] = s3;
            } else {
                for (int64_t k = 0; k < here; k++) s[k] = dot(v, w + (i + k) * in, in);
            }
            float *o = y + r * out + i;
            for (int64_t k = 0; k < here; k++) o[k] = add ? o[k] + s[k] : s[k];
        }
    }
}

/* y = x * rsqrt(mean(x^2) + eps) * weight. Within a parallel region. */
static void norm(const float *x, const bf16 *weight, float *y, int64_t R, int64_t D, float eps) {
#pragma omp for schedule(static)
    for (int64_t r = 0; r < R; r++) {
        const float *in = x + r * D;
        float *out = y + r * D, square = 0.0f;
#pragma omp simd reduction(+ : square)
        for (int64_t j = 0; j < D; j++) square += in[j] * in[j];
        float inv = 1.0f / sqrtf(square / (float)D + eps);
#pragma omp simd
        for (int64_t j = 0; j < D; j++) out[j] = in[j] * inv * widen(weight[j]);
    }
}

/* Rotate the halves of one head by its token's angles. */
static void rotate(float *x, const float *cos, const float *sin, int64_t half) {
    for (int64_t j = 0; j < half; j++) {
        float a = x[j], b = x[half + j];
        x[j] = a * cos[j] - b * sin[j];
        x[half + j] = b * cos[j] + a * sin[j];
    }
}

/* One query over n cached keys and values; overwrites q with the result. */
static void attend(float *q, const bf16 *keys, const bf16 *values, int64_t n, int64_t d, float *scores) {
    float scale = 1.0f / sqrtf((float)d), peak = -INFINITY, sum = 0.0f;
    for (int64_t t = 0; t < n; t++) {
        scores[t] = dot(q, keys + t * d, d) * scale;
        peak = scores[t] > peak ? scores[t] : peak;
    }
    memset(q, 0, (size_t)d * sizeof(float));
    for (int64_t t = 0; t < n; t++) {
        float p = expf(scores[t] - peak);
        const bf16 *v = values + t * d;
        sum += p;
#pragma omp simd
        for (int64_t j = 0; j < d; j++) q[j] += p * widen(v[j]);
    }
    for (int64_t j = 0; j < d; j++) q[j] /= sum;
}

/* weights: for each layer attention norm, qkv, out, feed-forward norm, gate_up, down; then the last norm and the output
 * matrix. x: (R, D) embeddings, overwritten. logits: (R, V), or NULL: then the output layer is left out and its input is
 * the first R * D floats of scratch. rows, slots: which row of the cache each sequence has, and
 * where in it its token goes. cos, sin: (R, d/2). scratch: R * (D + (H + 2K) d + F) + threads * C floats. */
void lumina_decode(const bf16 *const *weights, float *x, float *logits, bf16 *keys, bf16 *values, const int64_t *rows,
                   const int64_t *slots, const float *cos, const float *sin, float *scratch, int64_t L, int64_t R,
                   int64_t D, int64_t H, int64_t K, int64_t d, int64_t F, int64_t V, int64_t N, int64_t C, float eps,
                   int threads) {
    int64_t width = (H + 2 * K) * d, group = H / K, half = d / 2;
    float *normed = scratch, *qkv = normed + R * D, *hidden = qkv + R * width, *scores = hidden + R * F;
#pragma omp parallel num_threads(threads)
    {
        float *own = scores + omp_get_thread_num() * C;
        for (int64_t l = 0; l < L; l++) {
            const bf16 *const *w = weights + 6 * l;
            bf16 *layer_keys = keys + l * N * K * C * d, *layer_values = values + l * N * K * C * d;
            norm(x, w[0], normed, R, D, eps);
            product(normed, w[1], qkv, R, width, D, 0);
#pragma omp for schedule(static)
            for (int64_t i = 0; i < R * K; i++) {
                int64_t r = i / K, k = i % K, at = (rows[r] * K + k) * C * d;
                float *q = qkv + r * width + k * group * d;
                float *key = qkv + r * width + (H + k) * d, *value = qkv + r * width + (H + K + k) * d;
                bf16 *row_keys = layer_keys + at, *row_values = layer_values + at;
                rotate(key, cos + r * half, sin + r * half, half);
                for (int64_t j = 0; j < d; j++) {
                    row_keys[slots[r] * d + j] = narrow(key[j]);
                    row_values[slots[r] * d + j] = narrow(value[j]);
                }
                for (int64_t g = 0; g < group; g++) {
                    rotate(q + g * d, cos + r * half, sin + r * half, half);
                    attend(q + g * d, row_keys, row_values, slots[r] + 1, d, own);
                }
            }
            /* The queries of a row lie first in its qkv, so the product reads rows of H * d with a stride of width. */
#pragma omp for schedule(static)
            for (int64_t r = 0; r < R; r++) memcpy(normed + r * D, qkv + r * width, (size_t)(H * d) * sizeof(float));
            product(normed, w[2], x, R, D, D, 1);
            norm(x, w[3], normed, R, D, eps);
#pragma omp for schedule(static)
            for (int64_t j = 0; j < F; j++) {
                for (int64_t r = 0; r < R; r++) {
                    float gate = dot(normed + r * D, w[4] + j * D, D), up = dot(normed + r * D, w[4] + (F + j) * D, D);
                    hidden[r * F + j] = gate / (1.0f + expf(-gate)) * up;
                }
            }
            product(hidden, w[5], x, R, D, F, 1);
        }
        norm(x, weights[6 * L], normed, R, D, eps);
        if (logits) product(normed, weights[6 * L + 1], logits, R, V, D, 0);
    }
}

/* The output matrix in 8 bits: w[i] ~ scale[i] * q[i], with error[i] >= |(x . w[i]) - scale[i] * (x . q[i])| / |x| for
 * any x (Cauchy-Schwarz), the rounding of float32 sums included. */
void lumina_quantise(const bf16 *w, int8_t *q, float *scale, float *error, int64_t V, int64_t D, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < V; i++) {
        const bf16 *row = w + i * D;
        float peak = 0.0f, square = 0.0f, lost = 0.0f;
#pragma omp simd reduction(max : peak)
        for (int64_t j = 0; j < D; j++) {
            float a = fabsf(widen(row[j]));
            peak = a > peak ? a : peak;
        }
        float unit = peak > 0.0f ? peak / 127.0f : 1.0f, inverse = 1.0f / unit;
#pragma omp simd reduction(+ : square, lost)
        for (int64_t j = 0; j < D; j++) {
            float v = widen(row[j]), n = rintf(v * inverse), off = v - n * unit;
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
