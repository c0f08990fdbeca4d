/* Fused bfloat16 loops for training on a CPU: one read and one write of memory where eager torch makes several passes.
 *
 * Plain C with no torch headers: it compiles in a second (lumina/model/cpu.py builds, caches and binds it). Arithmetic
 * is float32; bfloat16 is widened on load and rounded to nearest even on store. Rows are dealt to OpenMP threads in
 * fixed blocks and reduced in a fixed order, so results do not depend on timing.
 *
 * Not compiled with -ffast-math: a NaN that comes in must come out, since the trainer skips a step by it.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

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

/* exp(x) to 2e-7 relative, branch-free so that it vectorises: 2^n * 2^f, the second by its Taylor series. */
static inline float expf_fast(float x) {
    x = x < -87.0f ? -87.0f : x;
    x = x > 88.0f ? 88.0f : x;
    float t = x * 1.44269504088896f;
    float n = rintf(t);
    float f = (t - n) * 0.693147180559945f;
    float p = 1.0f + f * (1.0f + f * (0.5f + f * (0.166666667f + f * (0.0416666667f + f * (0.00833333333f + f * 0.00138888889f)))));
    int32_t bits = ((int32_t)n + 127) << 23;
    float scale;
    memcpy(&scale, &bits, 4);
    return p * scale;
}

/* In place: logits -> weight * (softmax(logits) - onehot(target)). losses[i] = -log softmax(logits_i)[target_i],
 * without the weight. A row (V bfloat16) stays in L2 between the passes, so memory sees one read and one write. */
void lumina_cross_entropy(bf16 *logits, const int64_t *targets, const float *weights, float *losses, int64_t rows,
                          int64_t V, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t r = 0; r < rows; r++) {
        bf16 *x = logits + r * V;
        float peak = -INFINITY, sum = 0.0f;
#pragma omp simd reduction(max : peak)
        for (int64_t j = 0; j < V; j++) {
            float v = widen(x[j]);
            peak = v > peak ? v : peak;
        }
#pragma omp simd reduction(+ : sum)
        for (int64_t j = 0; j < V; j++) sum += expf_fast(widen(x[j]) - peak);
        float lse = peak + logf(sum), w = weights[r];
        float hit = widen(x[targets[r]]);
        losses[r] = lse - hit;
#pragma omp simd
        for (int64_t j = 0; j < V; j++) x[j] = narrow(w * expf_fast(widen(x[j]) - lse));
        x[targets[r]] = narrow(w * (expf_fast(hit - lse) - 1.0f));
    }
}

/* Causal softmax of attention scores, in place. scores: (heads, rows, n); row r of a head belongs to the query at
 * position first + r / group and sees `window` keys at most, that of its position the last. lse: (heads, rows), natural
 * log. With `known` the lse is read instead of computed (the backward pass rebuilds the probabilities). */
void lumina_causal_softmax(bf16 *scores, float *lse, int64_t heads, int64_t rows, int64_t n, int64_t group,
                           int64_t first, int64_t window, float scale, int known, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static, 16)
    for (int64_t i = 0; i < heads * rows; i++) {
        bf16 *s = scores + i * n;
        int64_t seen = first + (i % rows) / group + 1, unseen = seen > window ? seen - window : 0;
        if (!known) {
            float peak = -INFINITY, sum = 0.0f;
#pragma omp simd reduction(max : peak)
            for (int64_t j = unseen; j < seen; j++) {
                float v = widen(s[j]);
                peak = v > peak ? v : peak;
            }
#pragma omp simd reduction(+ : sum)
            for (int64_t j = unseen; j < seen; j++) sum += expf_fast((widen(s[j]) - peak) * scale);
            lse[i] = peak * scale + logf(sum);
        }
        float l = lse[i];
#pragma omp simd
        for (int64_t j = unseen; j < seen; j++) s[j] = narrow(expf_fast(widen(s[j]) * scale - l));
        for (int64_t j = 0; j < unseen; j++) s[j] = 0;
        for (int64_t j = seen; j < n; j++) s[j] = 0;
    }
}

/* Gradient of the scores, in place over dP: dS = scale * P * (dP - delta), zero where P is masked. delta is P's mean of
 * the rounded dP itself, not dO . O as flash attention has it: dP loses bits when it is stored, and only with the same
 * loss on both sides do they cancel (a document's first query must get a gradient of exactly zero). */
void lumina_softmax_backward(bf16 *dp, const bf16 *p, int64_t rows, int64_t n, float scale, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < rows; i++) {
        bf16 *d = dp + i * n;
        const bf16 *q = p + i * n;
        float mean = 0.0f, mass = 0.0f;
#pragma omp simd reduction(+ : mean, mass)
        for (int64_t j = 0; j < n; j++) {
            mean += widen(q[j]) * widen(d[j]);
            mass += widen(q[j]);
        }
        float delta = mean / mass;
#pragma omp simd
        for (int64_t j = 0; j < n; j++) d[j] = narrow(scale * widen(q[j]) * (widen(d[j]) - delta));
    }
}

/* sum = x + residual (skipped when residual is NULL), y = sum * rsqrt(mean(sum^2) + eps) * weight, rstd kept. */
void lumina_rms_norm(const bf16 *x, const bf16 *residual, const bf16 *weight, bf16 *sum, bf16 *y, float *rstd,
                     int64_t rows, int64_t D, float eps, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t r = 0; r < rows; r++) {
        const bf16 *in = x + r * D;
        float square = 0.0f;
        if (residual) {
            const bf16 *add = residual + r * D;
            bf16 *out = sum + r * D;
#pragma omp simd reduction(+ : square)
            for (int64_t j = 0; j < D; j++) {
                bf16 h = narrow(widen(in[j]) + widen(add[j]));
                float v = widen(h);
                out[j] = h;
                square += v * v;
            }
            in = out;
        } else {
#pragma omp simd reduction(+ : square)
            for (int64_t j = 0; j < D; j++) square += widen(in[j]) * widen(in[j]);
        }
        float inv = 1.0f / sqrtf(square / (float)D + eps);
        rstd[r] = inv;
        bf16 *out = y + r * D;
#pragma omp simd
        for (int64_t j = 0; j < D; j++) out[j] = narrow(widen(in[j]) * inv * widen(weight[j]));
    }
}

/* dx = dsum + rstd * (w*dy - xhat * mean(w*dy*xhat)); dsum (the gradient of the new residual) may be NULL.
 * partial: (threads, D) float32 partial sums of dy*xhat, added up by the caller in order. */
void lumina_rms_norm_backward(const bf16 *dy, const bf16 *dsum, const bf16 *x, const bf16 *weight, const float *rstd,
                              bf16 *dx, float *partial, int64_t rows, int64_t D, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int t = 0; t < threads; t++) {
        float *dw = partial + t * D;
        memset(dw, 0, D * sizeof(float));
        int64_t begin = rows * t / threads, end = rows * (t + 1) / threads;
        for (int64_t r = begin; r < end; r++) {
            const bf16 *g = dy + r * D, *v = x + r * D, *s = dsum ? dsum + r * D : NULL;
            bf16 *out = dx + r * D;
            float inv = rstd[r], dot = 0.0f;
#pragma omp simd reduction(+ : dot)
            for (int64_t j = 0; j < D; j++) {
                float grad = widen(g[j]), hat = widen(v[j]) * inv;
                dw[j] += grad * hat;
                dot += grad * widen(weight[j]) * hat;
            }
            dot /= (float)D;
            if (s) {
#pragma omp simd
                for (int64_t j = 0; j < D; j++)
                    out[j] = narrow(widen(s[j]) + inv * (widen(g[j]) * widen(weight[j]) - widen(v[j]) * inv * dot));
            } else {
#pragma omp simd
                for (int64_t j = 0; j < D; j++)
                    out[j] = narrow(inv * (widen(g[j]) * widen(weight[j]) - widen(v[j]) * inv * dot));
            }
        }
    }
}

/* h = silu(gate) * up over rows of [gate | up], each F wide. */
void lumina_swiglu(const bf16 *gate_up, bf16 *h, int64_t rows, int64_t F, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t r = 0; r < rows; r++) {
        const bf16 *g = gate_up + r * 2 * F, *u = g + F;
        bf16 *out = h + r * F;
#pragma omp simd
        for (int64_t j = 0; j < F; j++) {
            float a = widen(g[j]);
            out[j] = narrow(a / (1.0f + expf_fast(-a)) * widen(u[j]));
        }
    }
}

void lumina_swiglu_backward(const bf16 *dh, const bf16 *gate_up, bf16 *dgate_up, int64_t rows, int64_t F, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t r = 0; r < rows; r++) {
        const bf16 *d = dh + r * F, *g = gate_up + r * 2 * F, *u = g + F;
        bf16 *dg = dgate_up + r * 2 * F, *du = dg + F;
#pragma omp simd
        for (int64_t j = 0; j < F; j++) {
            float a = widen(g[j]), grad = widen(d[j]), sig = 1.0f / (1.0f + expf_fast(-a));
            du[j] = narrow(grad * a * sig);
            dg[j] = narrow(grad * widen(u[j]) * sig * (1.0f + a * (1.0f - sig)));
        }
    }
}

/* Rotate-half rotary embedding of (rows, heads, 2*half) with row and head strides in elements; out is contiguous.
 * table: (rows, half) cosines and sines in float32. sign = -1 rotates back, which is the gradient. */
void lumina_rope(const bf16 *x, bf16 *out, const float *cosines, const float *sines, int64_t rows, int64_t heads,
                 int64_t half, int64_t row_stride, int64_t head_stride, float sign, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t r = 0; r < rows; r++) {
        const float *c = cosines + r * half, *s = sines + r * half;
        for (int64_t h = 0; h < heads; h++) {
            const bf16 *in = x + r * row_stride + h * head_stride;
            bf16 *o = out + (r * heads + h) * 2 * half;
#pragma omp simd
            for (int64_t j = 0; j < half; j++) {
                float a = widen(in[j]), b = widen(in[j + half]), sn = sign * s[j];
                o[j] = narrow(a * c[j] - b * sn);
                o[j + half] = narrow(b * c[j] + a * sn);
            }
        }
    }
}
