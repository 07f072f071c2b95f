// Rotary embedding, with the write to the KV cache.
//
// The cache of a (sequence, layer, kv head) is blocks of 32 positions, each K [head_dim / 2][32][2] and then
// V [16][head_dim][2]: the right operands, in pairs, of q K^T and of (softmax) V.
#pragma once

#include "simd.h"

namespace octavo::OCTAVO_ISA {

// One head: normed (Qwen3) if there is a weight, then rotated in pairs (i, i + dim / 2), into `to`.
OCTAVO_INLINE void rotate_head(const float* x, const float* weight, const Step& step, const float* rotary, float* to) {
    const int64_t dim = step.shape->head_dim, half = dim / 2;
    F32 scale = splat(1.0f);
    if (weight) {
        F32 squares = {};
        for (int64_t i = 0; i < dim; i += kLanes) squares = fma(load(x + i), load(x + i), squares);
        scale = splat(1.0f / __builtin_sqrtf(sum(squares) / float(dim) + step.shape->norm_eps));
    }
    for (int64_t i = 0; i < dim; i += kLanes)
        store(to + i, weight ? load(x + i) * scale * load(weight + i) : load(x + i));
    int64_t i = 0;
    for (; i + kLanes <= half; i += kLanes) {
        const F32 a = load(to + i), b = load(to + half + i), cosine = load(rotary + i), sine = load(rotary + half + i);
        store(to + i, a * cosine - b * sine);
        store(to + half + i, b * cosine + a * sine);
    }
    for (; i < half; i++) {
        const float a = to[i], b = to[half + i], cosine = rotary[i], sine = rotary[half + i];
        to[i] = a * cosine - b * sine;
        to[half + i] = b * cosine + a * sine;
    }
}

// Into position `slot` of a block of K: pairs of dimensions, a line apart.
OCTAVO_INLINE void write_k(const float* from, int64_t slot, int64_t dim, bf16* k) {
    for (int64_t i = 0; i < dim; i += kLanes) {
        bf16 half[kLanes];
        store_bf16(half, load(from + i));
        OCTAVO_UNROLL for (int64_t j = 0; j < kLanes; j += 2)
            std::memcpy(k + (i + j) * kSpan + slot * 2, half + j, 2 * sizeof(bf16));
    }
}

// Into position `slot` of a block of V: one half of a pair of positions, in a row.
OCTAVO_INLINE void write_v(const float* from, int64_t slot, int64_t dim, bf16* v) {
    const int shift = slot % 2 * 16;
    bf16* row = v + slot / 2 * dim * 2;
    for (int64_t i = 0; i < dim; i += kLanes) {
        const U32 neighbour = load_as<U32>(row + 2 * i) & ~(uint32_t{0xffff} << shift);
        store_as<U32>(row + 2 * i, neighbour | to_bf16(load(from + i)) << shift);
    }
}

// A tile is the rows that fall into one block of the cache: a block has one writer, which goes in order of position.
void rope_and_cache(const Instruction& op, const Step& step, int64_t tile, Scratch& scratch) {
    const Shape& shape = *step.shape;
    const RowTile rows = step.cache_tiles[tile];
    const int64_t dim = shape.head_dim, block = step.positions[rows.first] / kSpan;
    const float q_scale = kLog2E / __builtin_sqrtf(float(dim));  // so that attention's weights are 2^(q K^T)
    float* head = scratch.part_sums;
    for (int64_t r = rows.first; r < rows.first + rows.count; r++) {
        const float* x = op.x.f32(r);
        if (r + 1 < rows.first + rows.count) prefetch(op.x.f32(r + 1), op.x.stride * sizeof(float));
        const float* rotary = step.rotary + r * dim;
        const int64_t slot = step.positions[r] % kSpan;
        for (int64_t h = 0; h < shape.heads; h++) {
            rotate_head(x + h * dim, op.vector, step, rotary, head);
            for (int64_t i = 0; i < dim; i += kLanes)
                store_bf16(op.out.b16(r) + h * dim + i, load(head + i) * splat(q_scale));
        }
        for (int64_t h = 0; h < shape.kv_heads; h++) {
            bf16* k = step.kv_block(rows.sequence, block, op.layer, h);
            bf16* v = k + shape.block_elements();
            // What an earlier owner left behind may be NaN, and attention multiplies the rows it must not see by 0.
            if (slot == 0) std::memset(v, 0, shape.block_elements() * sizeof(bf16));
            rotate_head(x + (shape.heads + h) * dim, op.vector2, step, rotary, head);
            write_k(head, slot, dim, k);
            write_v(x + (shape.heads + shape.kv_heads + h) * dim, slot, dim, v);
        }
    }
}

}  // namespace octavo::OCTAVO_ISA
