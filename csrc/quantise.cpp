#include "quantise.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "rotation.h"

namespace octavo {
namespace {

// Vectors that every machine has, spelt out: a compiler does not reorder float sums by itself.
typedef float Floats __attribute__((vector_size(16)));
typedef int32_t Ints __attribute__((vector_size(16)));
constexpr int kSize = int(kQuantGroup), kLanes = 4, kVectors = kSize / kLanes;

struct Values {
    Floats v[kVectors];
};

float rounded_to_half(float value) { return from_half(to_half(value)); }

float sum(Floats v) { return v[0] + v[1] + (v[2] + v[3]); }

float mean(const Values& x) {
    Floats total = {};
    for (Floats v : x.v) total += v;
    return sum(total) / kSize;
}

// (x - minimum) / scale, to the nearest of 0 .. top.
Values assign(const Values& x, float scale, float minimum, float top) {
    const float back = scale != 0 ? 1 / scale : 0;
    Values q;
    for (int i = 0; i < kVectors; i++) {
        Floats v = (x.v[i] - minimum) * back + 0.5f;
        v = v > 0 ? v : Floats{};
        v = v < top ? v : top - Floats{};
        q.v[i] = __builtin_convertvector(__builtin_convertvector(v, Ints), Floats);
    }
    return q;
}

float squared_error(const Values& x, float scale, float minimum, const Values& q) {
    Floats error = {};
    for (int i = 0; i < kVectors; i++) {
        const Floats difference = x.v[i] - (scale * q.v[i] + minimum);
        error += difference * difference;
    }
    return sum(error);
}

void store(const Values& q, float scale, float minimum, Group& group) {
    for (int i = 0; i < kSize; i++) group.q[i] = uint8_t(q.v[i / kLanes][i % kLanes]);
    group.scale[0] = group.scale[1] = scale;
    group.minimum[0] = group.minimum[1] = minimum;
}

float largest_magnitude(const float* x, int64_t n) {
    float largest = 0;
    for (int64_t i = 0; i < n; i++) largest = std::max(largest, std::abs(x[i]));
    return largest;
}

// Symmetric.
void quantise_to_8(const Values& x, float scale, Group& group) {
    store(assign(x, scale, -128 * scale, 255), scale, -128 * scale, group);
}

// The scale and minimum with the least squared error of sixteen. Values at the ends of a group are rare, so a narrower
// range, of finer steps, is often better: four ranges are tried, and each three times more with the scale and minimum
// that fit the integers found before best (linear least squares).
void quantise_to_4(const Values& x, Group& group) {
    float lowest = x.v[0][0], highest = lowest;
    for (int i = 0; i < kSize; i++) {
        lowest = std::min(lowest, x.v[i / kLanes][i % kLanes]);
        highest = std::max(highest, x.v[i / kLanes][i % kLanes]);
    }
    const float x_mean = mean(x);
    float least = std::numeric_limits<float>::infinity(), best_scale = 0, best_minimum = 0;
    for (int attempt = 0; attempt < 4; attempt++) {
        const float low = lowest * (attempt & 1 ? 0.85f : 1), high = highest * (attempt & 2 ? 0.85f : 1);
        float minimum = rounded_to_half(low), scale = rounded_to_half((high - low) / 15);
        for (int fits = 0; fits < 4; fits++) {
            const Values q = assign(x, scale, minimum, 15);
            const float error = squared_error(x, scale, minimum, q);
            if (error < least) least = error, best_scale = scale, best_minimum = minimum;
            const float q_mean = mean(q);
            Floats covariances = {}, variances = {};
            for (int i = 0; i < kVectors; i++) {
                const Floats difference = q.v[i] - q_mean;
                covariances += difference * x.v[i];
                variances += difference * difference;
            }
            const float variance = sum(variances);
            if (variance == 0) break;
            scale = rounded_to_half(sum(covariances) / variance);
            minimum = rounded_to_half(x_mean - sum(covariances) / variance * q_mean);
        }
    }
    store(assign(x, best_scale, best_minimum, 15), best_scale, best_minimum, group);
}

Values load(const float* from) {
    Values values;
    std::memcpy(&values, from, sizeof values);
    return values;
}

}  // namespace

void quantise_groups(Encoding encoding, float* values, Group* groups, int64_t n) {
    const int64_t multiple = encoding.column_multiple(), padded = (n + multiple - 1) / multiple * multiple;
    std::fill(values + n, values + padded, 0.0f);
    if (encoding == kW8) rotate<Floats, Ints>(values, padded);
    const float row_scale = largest_magnitude(values, padded) / 127;
    for (int64_t i = 0; i < padded; i += kSize, groups++) {
        if (encoding == kW8)
            quantise_to_8(load(values + i), row_scale, *groups);
        else
            quantise_to_4(load(values + i), *groups);
    }
}

bool quantise_row(int format, const float* values, uint8_t* to, int64_t n) {
    if (format != GGML_Q8_0 && format != GGML_Q4_1) return false;
    for (int64_t i = 0; i < n; i += kSize) {
        Group group;
        if (format == GGML_Q8_0)
            quantise_to_8(load(values + i), rounded_to_half(largest_magnitude(values + i, kSize) / 127), group);
        else
            quantise_to_4(load(values + i), group);
        const uint16_t scale = to_half(group.scale[0]), minimum = to_half(group.minimum[0]);
        std::memcpy(to, &scale, 2), to += 2;
        if (format == GGML_Q8_0) {
            for (int j = 0; j < kSize; j++) *to++ = group.q[j] ^ 0x80;
        } else {
            std::memcpy(to, &minimum, 2), to += 2;
            for (int j = 0; j < kSize / 2; j++) *to++ = uint8_t(group.q[j] | group.q[j + kSize / 2] << 4);
        }
    }
    return true;
}

}  // namespace octavo
