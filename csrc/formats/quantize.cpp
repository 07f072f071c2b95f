#include "quantize.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>

#include "kernels/rotation.h"

namespace octavo {
namespace {

// Vectors of a size that every processor has. Written out, because compilers do not vectorize sums of floats.
typedef float Floats __attribute__((vector_size(16)));
typedef int32_t Ints __attribute__((vector_size(16)));
constexpr int kSize = int(kQuantGroup), kLanes = 4, kVectors = kSize / kLanes;

// Of columns without importance: their inputs were zero while it was measured, but need not stay so.
constexpr float kLeastWeight = 0.01f;

struct Values {
    Floats v[kVectors];
};

float rounded_to_half(float value) { return from_half(to_half(value)); }

// q = (x - minimum) / scale, rounded to the nearest of 0 ... top.
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

// Symmetric: the minimum is -128 * scale.
void quantize_to_8(const Values& x, float scale, Group& group) {
    store(assign(x, scale, -128 * scale, 255), scale, -128 * scale, group);
}

Values load(const float* from) {
    Values values;
    std::memcpy(&values, from, sizeof values);
    return values;
}

}  // namespace

void quantize_groups(float* values, Group* groups, int64_t n) {
    const int64_t padded = (n + kRotated - 1) / kRotated * kRotated;
    std::fill(values + n, values + padded, 0.0f);
    rotate<Floats, Ints>(values, padded);
    const float row_scale = largest_magnitude(values, padded) / 127;
    for (int64_t i = 0; i < padded; i += kSize) quantize_to_8(load(values + i), row_scale, *groups++);
}

void quantize_to_q8_0(const float* values, uint8_t* to, int64_t n) {
    for (int64_t i = 0; i < n; i += kSize) {
        Group group;
        quantize_to_8(load(values + i), rounded_to_half(largest_magnitude(values + i, kSize) / 127), group);
        const uint16_t scale = to_half(group.scale[0]);
        std::memcpy(to, &scale, 2), to += 2;
        for (uint8_t q : group.q) *to++ = q ^ 0x80;
    }
}

std::vector<float> column_weights(const float* importance, int64_t n) {
    std::vector<float> weights((n + kSize - 1) / kSize * kSize, 1.0f);
    for (int64_t begin = 0; importance && begin < n; begin += kSize) {
        const int64_t end = std::min<int64_t>(n, begin + kSize);
        const double mean = std::accumulate(importance + begin, importance + end, 0.0) / double(end - begin);
        const bool sound = std::all_of(importance + begin, importance + end, [](float x) { return x >= 0; });
        if (!sound || !(mean > 0) || std::isinf(mean)) continue;
        for (int64_t i = begin; i < end; i++) weights[i] = kLeastWeight + float(importance[i] / mean);
    }
    return weights;
}

void gather_columns(const float* const rows[kBlock], int64_t group, int64_t n, float (*to)[kBlock]) {
    const int64_t first = group * kSize, count = std::min<int64_t>(kSize, n - first);
    std::fill_n(to[0], kSize * kBlock, 0.0f);
    for (int64_t row = 0; row < kBlock; row++)
        for (int64_t i = 0; rows[row] && i < count; i++) to[i][row] = rows[row][first + i];
}

void quantize_to_q4_1(FourBitsKernel search, const float* values, const float* weights, uint8_t* to, int64_t rows,
                      int64_t n) {
    const float* row_of[kBlock] = {};
    for (int64_t row = 0; row < rows; row++) row_of[row] = values + row * n;
    const int64_t groups = n / kSize, block_bytes = 4 + kSize / 2;
    for (int64_t group = 0; group < groups; group++) {
        float x[kSize][kBlock];
        FourBits found;
        gather_columns(row_of, group, n, x);
        search(x, weights + group * kSize, found);
        for (int64_t row = 0; row < rows; row++) {
            uint8_t* block = to + (row * groups + group) * block_bytes;
            const uint16_t scale = to_half(found.scale[row]), minimum = to_half(found.minimum[row]);
            std::memcpy(block, &scale, 2);
            std::memcpy(block + 2, &minimum, 2);
            for (int i = 0; i < kSize / 2; i++)
                block[4 + i] = uint8_t(found.q[i][row] | found.q[i + kSize / 2][row] << 4);
        }
    }
}

}  // namespace octavo
