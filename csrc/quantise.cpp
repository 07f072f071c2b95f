#include "quantise.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

namespace octavo {
namespace {

constexpr int kSize = int(kQuantGroup);

float rounded_to_half(float value) { return from_half(to_half(value)); }

// (x - minimum) / scale, to the nearest of 0 .. top.
void assign(const float* x, float scale, float minimum, float top, float* q) {
    const float back = scale != 0 ? 1 / scale : 0;
    for (int i = 0; i < kSize; i++) {
        const float v = (x[i] - minimum) * back + 0.5f;
        q[i] = float(int(v > 0 ? (v < top ? v : top) : 0));
    }
}

float squared_error(const float* x, float scale, float minimum, const float* q) {
    float error = 0;
    for (int i = 0; i < kSize; i++) {
        const float difference = x[i] - (scale * q[i] + minimum);
        error += difference * difference;
    }
    return error;
}

void store(const float* q, float scale, float minimum, Group& group) {
    for (int i = 0; i < kSize; i++) group.q[i] = uint8_t(q[i]);
    group.scale[0] = group.scale[1] = scale;
    group.minimum[0] = group.minimum[1] = minimum;
}

float largest_magnitude(const float* x, int64_t n) {
    float largest = 0;
    for (int64_t i = 0; i < n; i++) largest = std::max(largest, std::abs(x[i]));
    return largest;
}

// Symmetric.
void quantise_to_8(const float* x, float scale, Group& group) {
    float q[kSize];
    assign(x, scale, -128 * scale, 255, q);
    store(q, scale, -128 * scale, group);
}

// The scale and minimum with the least squared error of those found from eight ranges. Values at the ends of a group
// are rare, so a narrower range, of finer steps, is often better. Each range is tried as it is, and again with the
// scale and minimum that fit its integers best (linear least squares).
void quantise_to_4(const float* x, Group& group) {
    float lowest = x[0], highest = x[0], mean = 0;
    for (int i = 0; i < kSize; i++) {
        lowest = std::min(lowest, x[i]);
        highest = std::max(highest, x[i]);
        mean += x[i] / kSize;
    }
    float best = std::numeric_limits<float>::infinity();
    store(x, 0, 0, group = {});
    for (int attempt = 0; attempt < 8; attempt++) {
        const float range = 1 - 0.04f * float(attempt);
        float minimum = rounded_to_half(lowest * range), scale = rounded_to_half((highest - lowest) * range / 15);
        for (bool fitted : {false, true}) {
            float q[kSize];
            assign(x, scale, minimum, 15, q);
            const float error = squared_error(x, scale, minimum, q);
            if (error < best) {
                best = error;
                store(q, scale, minimum, group);
            }
            if (fitted) break;
            float q_mean = 0, covariance = 0, variance = 0;
            for (int i = 0; i < kSize; i++) q_mean += q[i] / kSize;
            for (int i = 0; i < kSize; i++) {
                covariance += (q[i] - q_mean) * x[i];
                variance += (q[i] - q_mean) * (q[i] - q_mean);
            }
            if (variance == 0) break;
            scale = rounded_to_half(covariance / variance);
            minimum = rounded_to_half(mean - covariance / variance * q_mean);
        }
    }
}

}  // namespace

void quantise_groups(Encoding encoding, const float* values, Group* groups, int64_t n) {
    const float row_scale = largest_magnitude(values, n) / 127;
    for (int64_t i = 0; i < n; i += kSize, groups++) {
        float x[kSize] = {};
        std::copy(values + i, values + std::min<int64_t>(n, i + kSize), x);
        if (encoding == kW8)
            quantise_to_8(x, row_scale, *groups);
        else
            quantise_to_4(x, *groups);
    }
}

bool quantise_row(int format, const float* values, uint8_t* to, int64_t n) {
    if (format != GGML_Q8_0 && format != GGML_Q4_1) return false;
    for (int64_t i = 0; i < n; i += kSize) {
        Group group;
        if (format == GGML_Q8_0)
            quantise_to_8(values + i, rounded_to_half(largest_magnitude(values + i, kSize) / 127), group);
        else
            quantise_to_4(values + i, group);
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
