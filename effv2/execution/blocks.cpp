// The middle of an MBConv block in training: norm, SiLU, depthwise 3x3 convolution, norm, SiLU, squeeze-excitation. Only
// the maps before each norm are stored. The rest is computed again where it is needed, in float32, as many channels at a
// time as a register holds. A norm is four rows: weight, bias, mean, inverse standard deviation. Sums are of groups of
// images, added up in order.
#include "norms.cpp"

#ifdef __AVX512F__
const long LANES = 16;
#else
const long LANES = 8;
#endif
const long GROUP = 8;
typedef float Lanes __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));

// `next` is how far away the same values of the next image are, which are fetched meanwhile.
static inline Lanes lanes(const float *from, long next = 0) {
    __builtin_prefetch(from + next);
    Lanes result;
    memcpy(&result, from, sizeof result);
    return result;
}
static inline Lanes lanes(const BFloat16 *from, long next) {
    __builtin_prefetch(from + next);
    Halves halves;
    memcpy(&halves, from, sizeof halves);
    return (Lanes)(__builtin_convertvector(halves, Words) << 16);
}
static inline void store(float *to, Lanes value, long next = 0) {
    __builtin_prefetch(to + next, 1);
    memcpy(to, &value, sizeof value);
}
static inline void store(BFloat16 *to, Lanes value, long next) {
    __builtin_prefetch(to + next, 1);
    Words bits = value == value ? (Words)value : Words{} + 0x7fc00000;
    Halves halves = __builtin_convertvector((bits + 0x7fff + ((bits >> 16) & 1)) >> 16, Halves);
    memcpy(to, &halves, sizeof halves);
}
static inline Lanes sigmoid(Lanes z) {
    Lanes t = z * -1.44269504f;
    t = t > -126.f ? t : Lanes{} - 126.f;
    t = t < 126.f ? t : Lanes{} + 126.f;
    const Lanes large = t + 12582912.f, n = large - 12582912.f;  // the last bits of `large` are the whole number
    return 1.f / (1.f + power(t - n) * (Lanes)(((Words)large + 127) << 23));
}

struct Shape {  // of maps before the convolution (height, width) and after it (down, across)
    long images, channels, height, width, down, across, stride;
    long before() const { return height * width * channels; }
    long after() const { return down * across * channels; }
    // Calls `group` with its number and a function that calls another one for each of its images and LANES channels.
    template <class Group> void in_groups(Group group) const {
#pragma omp parallel for schedule(static) if (images > GROUP)
        for (long g = 0; g < (images + GROUP - 1) / GROUP; g++)
            group(g, [&](auto part) {
                for (long i = g * GROUP; i < std::min(images, (g + 1) * GROUP); i++)
                    for (long c = 0; c < channels; c += LANES) part(i, c);
            });
    }
};
struct Norm {
    Lanes weight, bias, mean, scale;
    Norm(const float *rows, long channels, long c)
        : weight(lanes(rows + c)), bias(lanes(rows + channels + c)), mean(lanes(rows + 2 * channels + c)),
          scale(lanes(rows + 3 * channels + c)) {}
};
struct Point {  // what a norm and a SiLU make of values: normalised, and activated, with the slope there
    Lanes v, y, s;
    Point(Lanes z, const Norm &norm)
        : v((z - norm.mean) * norm.scale), y(v * norm.weight + norm.bias), s(sigmoid(y)) {}
    Lanes active() const { return y * s; }
    Lanes slope() const { return s * (1.f + y * (1.f - s)); }
};
struct Padded {  // a map of LANES channels with a border of zeros
    long row;
    std::vector<Lanes> values;
    Padded(const Shape &shape) : row(shape.width + 2), values((shape.height + 2) * row) {}
    Lanes &at(long y, long x) { return values[(y + 1) * row + x + 1]; }
    // The nine values around the place, and their sum, each times its tap.
    const Lanes &around(long y, long x, long t) const { return values[(y + t / 3) * row + x + t % 3]; }
    Lanes convolved(long y, long x, const Lanes *taps) const {
        Lanes sum = around(y, x, 0) * taps[0];
        for (long t = 1; t < 9; t++) sum += around(y, x, t) * taps[t];
        return sum;
    }
};
template <class Part> static inline void each_pixel(long height, long width, long channels, Part part) {
    for (long y = 0, at = 0; y < height; y++)
        for (long x = 0; x < width; x++, at += channels) part(y, x, at);
}

template <class T>
static void depthwise(const T *x, T *y, const float *norm, const float *weight, const Shape &shape) {
    const long channels = shape.channels, stride = shape.stride;
    shape.in_groups([=](long, auto each) {
        Padded in(shape);
        each([&](long i, long c) {
            const Norm before(norm, channels, c);
            const T *from = x + i * shape.before() + c;
            T *to = y + i * shape.after() + c;
            Lanes taps[9];
            for (long t = 0; t < 9; t++) taps[t] = lanes(weight + t * channels + c);
            each_pixel(shape.height, shape.width, channels, [&](long r, long q, long at) {
                in.at(r, q) = Point(lanes(from + at, shape.before()), before).active();
            });
            each_pixel(shape.down, shape.across, channels, [&](long r, long q, long at) {
                store(to + at, in.convolved(r * stride, q * stride, taps), shape.after());
            });
        });
    });
}

// After a norm and a SiLU: the means over the pixels of each image or, where there is a `y`, all times an excitation.
template <class T>
static void excited(const T *x, T *y, const float *norm, float *of_images, const Shape &shape) {
    const long channels = shape.channels;
    shape.in_groups([=](long, auto each) {
        each([&](long i, long c) {
            const Norm after(norm, channels, c);
            const T *from = x + i * shape.after() + c;
            T *to = y ? y + i * shape.after() + c : nullptr;
            float *of_image = of_images + i * channels + c;
            const Lanes factor = y ? lanes(of_image) : Lanes{};
            Lanes sum = {};
            each_pixel(shape.down, shape.across, channels, [&](long, long, long at) {
                const Lanes value = Point(lanes(from + at, shape.after()), after).active();
                if (to) store(to + at, value * factor, shape.after());
                sum += value;
            });
            if (!y) store(of_image, sum / float(shape.down * shape.across));
        });
    });
}

// For each image and channel, the sums over pixels that make the gradients of the excitation and of the norm: gradient
// times activated value, gradient times slope, slope, and these two times the normalised value.
template <class T>
static void sums(const T *x, const T *gradient, const float *norm, float *found, const Shape &shape) {
    const long channels = shape.channels;
    shape.in_groups([=](long, auto each) {
        each([&](long i, long c) {
            const Norm after(norm, channels, c);
            const T *from = x + i * shape.after() + c, *of = gradient + i * shape.after() + c;
            Lanes sums[5] = {};
            each_pixel(shape.down, shape.across, channels, [&](long, long, long at) {
                const Point point(lanes(from + at, shape.after()), after);
                const Lanes g = lanes(of + at, shape.after()), slope = point.slope();
                sums[0] += g * point.active();
                sums[1] += g * slope;
                sums[2] += slope;
                sums[3] += g * slope * point.v;
                sums[4] += slope * point.v;
            });
            for (long k = 0; k < 5; k++) store(found + (k * shape.images + i) * channels + c, sums[k]);
        });
    });
}

// From the gradient of the excited maps to that of the maps before the first norm. `excitation` and `of_means` are per
// image. `centre` has the means of the gradient after the second norm, and of it times the normalised value. Finds the
// gradients of the nine taps and of the first norm's bias and weight.
template <class T>
static void back(const T *x, const T *y, const T *gradient, T *of_x, const float *norm_x, const float *norm_y,
                 const float *excitation, const float *of_means, const float *centre, const float *weight,
                 float *found, const Shape &shape) {
    const long channels = shape.channels, stride = shape.stride, groups = (shape.images + GROUP - 1) / GROUP;
    Vector parts(groups * 11 * channels);
    shape.in_groups([=, &parts](long group, auto each) {
        Padded in(shape), slopes(shape), of_out(shape);  // with stride 2, the last has zeros between its values
        each([&](long i, long c) {
            const Norm before(norm_x, channels, c), after(norm_y, channels, c);
            const Lanes factor = lanes(excitation + i * channels + c), mean = lanes(of_means + i * channels + c);
            const Lanes first = lanes(centre + c), second = lanes(centre + channels + c);
            const T *from = x + i * shape.before() + c, *out = y + i * shape.after() + c;
            const T *of = gradient + i * shape.after() + c;
            T *to = of_x + i * shape.before() + c;
            float *part = &parts[group * 11 * channels + c];
            Lanes taps[9], sums[11];
            for (long t = 0; t < 9; t++) taps[t] = lanes(weight + (8 - t) * channels + c);
            for (long k = 0; k < 11; k++) sums[k] = lanes(part + k * channels);
            each_pixel(shape.down, shape.across, channels, [&](long r, long q, long at) {
                const Point point(lanes(out + at, shape.after()), after);
                const Lanes u = (lanes(of + at, shape.after()) * factor + mean) * point.slope();
                of_out.at(r * stride, q * stride) = after.weight * after.scale * (u - first - point.v * second);
            });
            each_pixel(shape.height, shape.width, channels, [&](long r, long q, long at) {
                const Point point(lanes(from + at, shape.before()), before);
                in.at(r, q) = point.active();
                slopes.at(r, q) = point.slope();
            });
            each_pixel(shape.height, shape.width, channels, [&](long r, long q, long at) {
                const Lanes u = of_out.convolved(r, q, taps) * slopes.at(r, q);
                store(to + at, u, shape.before());
                sums[9] += u;
                sums[10] += u * (lanes(from + at, 0) - before.mean) * before.scale;
            });
            each_pixel(shape.down, shape.across, channels, [&](long r, long q, long) {
                const Lanes g = of_out.at(r * stride, q * stride);
                for (long t = 0; t < 9; t++) sums[t] += g * in.around(r * stride, q * stride, t);
            });
            for (long k = 0; k < 11; k++) store(part + k * channels, sums[k]);
        });
    });
    for (long k = 0; k < 11 * channels; k++) {
        double sum = 0;
        for (long group = 0; group < groups; group++) sum += parts[group * 11 * channels + k];
        found[k] = sum;
    }
    const float *of_bias = found + 9 * channels, *mean = norm_x + 2 * channels;
    centred(x, of_x, of_x, norm_x, mean, mean + channels, of_bias + channels, of_bias,
            {shape.images * shape.height * shape.width, channels});
}

#define BLOCK(type, name)                                                                                             \
    void depthwise_##name(const type *x, type *y, const float *n, const float *w, const Shape *s) {                    \
        depthwise(x, y, n, w, *s);                                                                                     \
    }                                                                                                                  \
    void excited_##name(const type *x, type *y, const float *n, float *e, const Shape *s) { excited(x, y, n, e, *s); } \
    void sums_##name(const type *x, const type *g, const float *n, float *found, const Shape *s) {                     \
        sums(x, g, n, found, *s);                                                                                      \
    }                                                                                                                  \
    void back_##name(const type *x, const type *y, const type *g, type *of_x, const float *nx, const float *ny,        \
                     const float *e, const float *m, const float *centre, const float *w, float *found,                \
                     const Shape *s) {                                                                                 \
        back(x, y, g, of_x, nx, ny, e, m, centre, w, found, *s);                                                       \
    }
extern "C" {
BLOCK(float, float32)
BLOCK(BFloat16, bfloat16)
}
