// Kernels that work on single rows, `begin` to `end` - 1 of the step, or on ranges of them.
#pragma once

#include "integers.h"

namespace octavo::OCTAVO_ISA {

// out[r, :] = weight[tokens[r] - first_token, :], float, where the weight has such a row. In the packed weight, row i is
// lane i % 16 of every pair (or group) of columns of block i / 16.
void embed(const Instruction& op, const Step& step, int64_t begin, int64_t end, Scratch&) {
    for (int64_t r = begin; r < end; r++) {
        const int64_t token = step.tokens[r] - op.first_token;
        if (token < 0 || token >= op.weight->rows) continue;
        float* to = op.out.f32(r);
        if (op.weight->encoding.is_integer()) {
            for (int64_t g = 0; g < op.weight->groups; g++)
                read_weight_group(*op.weight, token / kBlock, token % kBlock, g, to + g * kQuantGroup);
            if (op.weight->encoding.per_row()) rotate<F32, I32>(to, op.weight->groups * kQuantGroup, true);
            for (int64_t i = op.width; i < op.out.stride; i++) to[i] = 0;
            continue;
        }
        const bf16* from = op.weight->b16_block(token / kBlock) + token % kBlock * 2;
        for (int64_t p = 0; p < op.width / 2; p++) {
            uint32_t pair;
            std::memcpy(&pair, from + p * kBlock * 2, sizeof pair);
            const uint32_t values[2] = {pair << 16, pair & 0xffff0000};
            std::memcpy(to + 2 * p, values, sizeof values);
        }
    }
}

// Return 1 / sqrt(mean(x[r, :]^2) + eps).
OCTAVO_INLINE float norm_scale(const Instruction& op, const Step& step, int64_t r) {
    const float* x = op.x.f32(r);
    F32 squares[2] = {};
    for (int64_t i = 0; i < op.x.stride; i += 2 * kLanes)
        for (int j = 0; j < 2; j++) {
            const F32 v = load(x + i + j * kLanes);
            squares[j] = fma(v, v, squares[j]);
        }
    const float mean = sum(squares[0] + squares[1]) / float(op.width);
    return 1.0f / __builtin_sqrtf(mean + step.shape->norm_eps);
}

// out[r, :] = x[r, :] / sqrt(mean(x[r, :]^2) + eps) * weight: RMS norm (Zhang and Sennrich, 2019).
void norm(const Instruction& op, const Step& step, int64_t begin, int64_t end, Scratch& scratch) {
    for (int64_t r = begin; r < end; r++) {
        const float* x = op.x.f32(r);
        if (r + 1 < end) prefetch(op.x.f32(r + 1), op.x.stride * sizeof(float));
        const F32 scale = splat(norm_scale(op, step, r));
        const auto normed = [&](int64_t i) { return load(x + i) * scale * load(op.vector + i); };
        write_row(op.out, r, normed, scratch.row);
    }
}

// sums[p, :] += norm(x)[r, :] for rows r = first[p] ... end[p] - 1, one after the other, for p = begin ... end - 1.
void pool_rows(const Instruction& op, const Step& step, int64_t begin, int64_t end, Scratch&) {
    for (int64_t p = begin; p < end; p++) {
        double* sums = step.pooling.sums + p * op.width;
        for (int64_t r = step.pooling.first[p]; r < step.pooling.end[p]; r++) {
            const float *x = op.x.f32(r), scale = norm_scale(op, step, r);
            for (int64_t i = 0; i < op.width; i++) sums[i] += double(x[i] * scale * op.vector[i]);
        }
    }
}

// out = the sum of 1, 2, 4 or 8 vectors of `count` values, a multiple of 16, + bias + residual; these may be null. The
// vectors are partial sums of neighboring spans of a linear, in order; they are added in the tree of Spans.
template <int kVectors>
void sum_vectors(const float* const* partials, const float* bias, const float* residual, float* out, int64_t count) {
    const float* from[kVectors];
    OCTAVO_UNROLL for (int p = 0; p < kVectors; p++) from[p] = partials[p];
    for (int64_t i = 0; i < count; i += kLanes) {
        F32 sums[kVectors];
        OCTAVO_UNROLL for (int p = 0; p < kVectors; p++) sums[p] = load(from[p] + i);
        OCTAVO_UNROLL for (int step = 1; step < kVectors; step *= 2)
            OCTAVO_UNROLL for (int p = 0; p < kVectors; p += 2 * step) sums[p] = sums[p] + sums[p + step];
        if (bias) sums[0] = sums[0] + load(bias + i);
        if (residual) sums[0] = sums[0] + load(residual + i);
        store(out + i, sums[0]);
    }
}

void sum_partials(const float* const* partials, int64_t vectors, const float* bias, const float* residual, float* out,
                  int64_t count) {
    const auto sum = vectors == 8   ? sum_vectors<8>
                     : vectors == 4 ? sum_vectors<4>
                     : vectors == 2 ? sum_vectors<2>
                                    : sum_vectors<1>;
    sum(partials, bias, residual, out, count);
}

// out[r, :] = int8 of x[r, :], bf16 (see activations.h).
void quantize(const Instruction& op, const Step&, int64_t begin, int64_t end, Scratch& scratch) {
    for (int64_t r = begin; r < end; r++)
        write_row(op.out, r, [&](int64_t i) { return from_bf16(op.x.b16(r) + i); }, scratch.row);
}

// out[r, :] = x[sample_rows[r], :].
void sampled_rows(const Instruction& op, const Step& step, int64_t begin, int64_t end, Scratch&) {
    for (int64_t r = begin; r < end; r++)
        std::memcpy(op.out.f32(r), op.x.f32(step.sample_rows[r]), op.x.stride * sizeof(float));
}

}  // namespace octavo::OCTAVO_ISA
