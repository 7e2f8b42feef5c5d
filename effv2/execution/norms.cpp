// Batch norm in training mode on maps (rows = N x H x W, channels) of float32 or bfloat16, by itself or with the SiLU
// after it. Sums are of blocks of rows, added up in order: the number of threads changes no bit. All sums are float32
// within a block and float64 between them.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

struct BFloat16 {
    uint16_t bits;
};
static inline float load(float value) { return value; }
static inline float load(BFloat16 value) {
    uint32_t bits = uint32_t(value.bits) << 16;
    float result;
    memcpy(&result, &bits, 4);
    return result;
}
static inline void store(float *to, float value) { *to = value; }
static inline void store(BFloat16 *to, float value) {  // to the nearest, ties to even
    uint32_t bits;
    memcpy(&bits, &value, 4);
    if (value != value) bits = 0x7fc00000;
    to->bits = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

// 2^f on [-1/2, 1/2], of floats or vectors.
template <class Value> static inline Value power(Value f) {
    Value p = f * 1.53533627e-4f + 1.33989267e-3f;
    for (float factor : {9.61837303e-3f, 5.55033247e-2f, 2.40226462e-1f, 6.93147206e-1f, 1.f}) p = p * f + factor;
    return p;
}
// 1 / (1 + exp(-z)), within 2e-7: a power of two by a whole number, times one by the rest.
static inline float sigmoid(float z) {
    float t = std::min(126.f, std::max(-126.f, z * -1.44269504f)), n = __builtin_rintf(t);
    int32_t bits = (int32_t(n) + 127) << 23;
    float whole;
    memcpy(&whole, &bits, 4);
    return 1.f / (1.f + power(t - n) * whole);
}
template <bool silu> static inline float activated(float z) { return silu ? z * sigmoid(z) : z; }
template <bool silu> static inline float slope(float z) {
    float s = silu ? sigmoid(z) : 0.f;
    return silu ? s * (1.f + z * (1.f - s)) : 1.f;
}

using Vector = std::vector<float>;
struct Maps {
    long rows, channels, repeats = 1, width, step, blocks;
    Maps(long rows, long channels) : rows(rows), channels(channels) {
        while (channels * repeats < 128 && rows % (2 * repeats) == 0) repeats *= 2;  // narrow rows: several as one
        width = channels * repeats;
        step = std::max(1L, 65536 / width);
        blocks = (rows / repeats + step - 1) / step;
    }
    Vector repeated(const float *values) const {
        Vector result(width);
        for (long c = 0; c < width; c++) result[c] = values[c % channels];
        return result;
    }
    template <class Row> void in_rows(long block, Row row) const {
        for (long r = block * step; r < std::min(rows / repeats, (block + 1) * step); r++) row(r * width);
    }
    // Two sums a channel of what `row` adds for the row of an offset.
    template <class Row> std::vector<double> sums(Row row) const {
        Vector parts(blocks * 2 * width);
#pragma omp parallel for schedule(static) if (blocks > 1)
        for (long i = 0; i < blocks; i++) {
            float *first = &parts[i * 2 * width], *second = first + width;
            in_rows(i, [&](long at) { row(at, first, second); });
        }
        std::vector<double> result(2 * channels);
        for (size_t i = 0; i < parts.size(); i += channels)
            for (long c = 0; c < channels; c++) result[(i / width % 2) * channels + c] += parts[i + c];
        return result;
    }
    template <class Row> void each(Row row) const {
#pragma omp parallel for schedule(static) if (blocks > 1)
        for (long i = 0; i < blocks; i++) in_rows(i, row);
    }
};
#define EACH_CHANNEL _Pragma("GCC ivdep") for (long c = 0; c < width; c++)

// The mean of each channel and its inverse standard deviation; updates the running statistics.
template <class T>
static void statistics(const T *x, float *mean, float *scale, float *running_mean, float *running_var, float momentum,
                       float eps, Maps maps) {
    const long width = maps.width, few = std::min(maps.rows, maps.step * maps.repeats);
    Vector shift(maps.channels);
    for (long r = 0; r < few; r++)
        for (long c = 0; c < maps.channels; c++) shift[c] += load(x[r * maps.channels + c]) / few;
    Vector near = maps.repeated(shift.data());  // to the mean, so that no digits cancel
    auto sums = maps.sums([=, k = near.data()](long at, float *first, float *second) {
        EACH_CHANNEL {
            float v = load(x[at + c]) - k[c];
            first[c] += v;
            second[c] += v * v;
        }
    });
    for (long c = 0; c < maps.channels; c++) {
        double n = maps.rows, from = sums[c] / n, var = sums[maps.channels + c] / n - from * from;
        if (var < 0) var = 0;
        mean[c] = shift[c] + from;
        scale[c] = 1 / std::sqrt(var + eps);
        running_mean[c] += momentum * (mean[c] - running_mean[c]);
        running_var[c] += momentum * (float(var * n / (n - 1)) - running_var[c]);
    }
}

template <class T, bool silu>
static void forward(const T *x, T *y, const float *weight, const float *bias, const float *mean, const float *scale,
                    Maps maps) {
    const long width = maps.width;
    Vector factor(maps.channels), shift(maps.channels);
    for (long c = 0; c < maps.channels; c++) {
        factor[c] = weight[c] * scale[c];
        shift[c] = bias[c] - mean[c] * factor[c];
    }
    Vector factors = maps.repeated(factor.data()), shifts = maps.repeated(shift.data());
    maps.each([=, a = factors.data(), b = shifts.data()](long at) {
        EACH_CHANNEL store(y + at + c, activated<silu>(load(x[at + c]) * a[c] + b[c]));
    });
}

// The gradient of x from that of the normalised and scaled values, and its sums: of_bias and of_weight.
template <class T>
static void centred(const T *x, const T *of_z, T *of_x, const float *weight, const float *mean, const float *scale,
                    const float *of_weight, const float *of_bias, Maps maps) {
    const long width = maps.width;
    Vector first(maps.channels), second(maps.channels);
    for (long c = 0; c < maps.channels; c++) first[c] = of_bias[c] / maps.rows, second[c] = of_weight[c] / maps.rows;
    Vector firsts = maps.repeated(first.data()), seconds = maps.repeated(second.data());
    Vector ws = maps.repeated(weight), ms = maps.repeated(mean), ss = maps.repeated(scale);
    maps.each([=, w = ws.data(), m = ms.data(), s = ss.data(), p = firsts.data(), q = seconds.data()](long at) {
        EACH_CHANNEL {
            float v = (load(x[at + c]) - m[c]) * s[c];
            store(of_x + at + c, w[c] * s[c] * (load(of_z[at + c]) - p[c] - v * q[c]));
        }
    });
}

template <class T, bool silu>
static void backward(const T *x, const T *gradient, T *of_x, const float *weight, const float *bias,
                     const float *mean, const float *scale, float *of_weight, float *of_bias, Maps maps) {
    const long width = maps.width;
    Vector ws = maps.repeated(weight), bs = maps.repeated(bias), ms = maps.repeated(mean), ss = maps.repeated(scale);
    const float *w = ws.data(), *b = bs.data(), *m = ms.data(), *s = ss.data();
    auto sums = maps.sums([=](long at, float *first, float *second) {
        EACH_CHANNEL {
            float v = (load(x[at + c]) - m[c]) * s[c], u = load(gradient[at + c]) * slope<silu>(v * w[c] + b[c]);
            if (silu) store(of_x + at + c, u);
            first[c] += u;
            second[c] += u * v;
        }
    });
    for (long c = 0; c < maps.channels; c++) of_bias[c] = sums[c], of_weight[c] = sums[maps.channels + c];
    centred(x, silu ? of_x : gradient, of_x, weight, mean, scale, of_weight, of_bias, maps);
}

#define FORMS(type, name)                                                                                             \
    void statistics_##name(const type *x, float *m, float *s, float *rm, float *rv, float momentum, float eps,         \
                           long rows, long channels) {                                                                 \
        statistics(x, m, s, rm, rv, momentum, eps, {rows, channels});                                                  \
    }                                                                                                                  \
    void forward_##name(const type *x, type *y, const float *w, const float *b, const float *m, const float *s,        \
                        long rows, long channels, long silu) {                                                         \
        (silu ? forward<type, true> : forward<type, false>)(x, y, w, b, m, s, {rows, channels});                       \
    }                                                                                                                  \
    void backward_##name(const type *x, const type *g, type *of_x, const float *w, const float *b, const float *m,     \
                         const float *s, float *of_w, float *of_b, long rows, long channels, long silu) {              \
        (silu ? backward<type, true> : backward<type, false>)(x, g, of_x, w, b, m, s, of_w, of_b, {rows, channels});    \
    }
extern "C" {
FORMS(float, float32)
FORMS(BFloat16, bfloat16)
}
