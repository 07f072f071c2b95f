// Split qkv [rows, heads + 2 kv_heads, head_dim] into q, k and v; apply the optional norm and the rotary embedding to q
// and k; write q to the output, and k and v to the KV cache:
//
//   h' = h / sqrt(mean(h^2) + eps) * weight         if there is a norm (Qwen3)
//   rope(h')[i] = h'[i] cos_i - h'[i + d/2] sin_i,  rope(h')[i + d/2] = h'[i + d/2] cos_i + h'[i] sin_i
//   out = bf16(rope(q) * log2(e) / sqrt(head_dim))  so that attention computes 2^(q . k)
//
// The cache of a (sequence, layer, kv head) is in blocks of 32 positions: K [head_dim / 2][32][2], then V
// [16][head_dim][2], which are right operands, in pairs along k, of the products q K^T and softmax V. Values are bf16;
// or int8, K and V each followed by a scale for each of the 32 positions: max|h| / 127.
#pragma once

#include "activations.h"

namespace octavo::OCTAVO_ISA {

// to = rope(x), one head; normed first if there is a `weight`.
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

// Write a head as int8; return its scale.
OCTAVO_INLINE float quantize_head(const float* from, int64_t dim, int8_t* to) {
    I32 bits = {};
    for (int64_t i = 0; i < dim; i += kLanes) bits = magnitude_bits(load(from + i), bits);
    const Int8Scale s(bits);
    for (int64_t i = 0; i < dim; i += kLanes) store_int8(load(from + i), s.back, to + i);
    return s.scale;
}

// Write a head to position `slot` of a block of K: pairs of dimensions, kSpan pairs apart.
template <typename T>
OCTAVO_INLINE void write_k(const T* from, int64_t slot, int64_t dim, T* k) {
    for (int64_t i = 0; i < dim; i += 2) std::memcpy(k + i * kSpan + slot * 2, from + i, 2 * sizeof(T));
}

// Write a head to position `slot` of a block of V: each value is one half of a pair of positions.
template <typename Pair, typename T>
OCTAVO_INLINE void write_v(const T* from, int64_t slot, int64_t dim, T* v) {
    typedef T Values __attribute__((vector_size(kLanes * sizeof(T))));
    typedef Pair Pairs __attribute__((vector_size(kLanes * sizeof(Pair))));
    const int shift = slot % 2 * 8 * int(sizeof(T));
    const Pair other = Pair(~(Pair(T(-1)) << shift));
    T* row = v + slot / 2 * dim * 2;
    for (int64_t i = 0; i < dim; i += kLanes) {
        const Pairs value = __builtin_convertvector(load_as<Values>(from + i), Pairs) << shift;
        store_as<Pairs>(row + 2 * i, (load_as<Pairs>(row + 2 * i) & other) | value);
    }
}

// Write K and V of a head to position `slot` of the block at `k`.
OCTAVO_INLINE void write_position(const float* k_from, const float* v_from, int64_t slot, const Shape& shape,
                                  std::byte* k, Scratch& scratch) {
    const int64_t dim = shape.head_dim;
    std::byte* v = k + shape.kv_bytes();
    // Attention multiplies positions it does not see by 0, and an earlier use of the page may have left NaN there.
    if (slot == 0) std::memset(v, 0, shape.kv_bytes());
    if (shape.int8_kv) {
        auto* bytes = reinterpret_cast<uint8_t*>(scratch.queries);
        auto* integers = reinterpret_cast<int8_t*>(bytes);
        auto* k_scales = reinterpret_cast<float*>(k + shape.block_elements());
        auto* v_scales = reinterpret_cast<float*>(v + shape.block_elements());
        k_scales[slot] = quantize_head(k_from, dim, integers);
        write_k(bytes, slot, dim, reinterpret_cast<uint8_t*>(k));
        v_scales[slot] = quantize_head(v_from, dim, integers);
        write_v<uint16_t>(bytes, slot, dim, reinterpret_cast<uint8_t*>(v));
    } else {
        bf16* halves = scratch.queries;
        for (int64_t i = 0; i < dim; i += kLanes) store_bf16(halves + i, load(k_from + i));
        write_k(halves, slot, dim, reinterpret_cast<bf16*>(k));
        for (int64_t i = 0; i < dim; i += kLanes) store_bf16(halves + i, load(v_from + i));
        write_v<uint32_t>(halves, slot, dim, reinterpret_cast<bf16*>(v));
    }
}

// Prefetch what `write_position` changes: a word in each of many cache lines.
OCTAVO_INLINE void prefetch_position(const std::byte* k, int64_t slot, const Shape& shape) {
    const int64_t dim = shape.head_dim, bytes = shape.int8_kv ? 1 : 2;  // of a value
    for (int64_t i = 0; i < dim; i += 2) prefetch(k + (i * kSpan + slot * 2) * bytes, 1);
    prefetch(k + shape.kv_bytes() + slot / 2 * dim * 2 * bytes, dim * 2 * bytes);
}

// Compute one tile: the rows that fall into one block of the cache. So a block has one writer, in order of position.
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
        for (int64_t h = 0; r == rows.first && h < shape.kv_heads; h++)
            prefetch_position(step.kv_block(rows.sequence, block, op.layer, h), slot, shape);
        for (int64_t h = 0; h < shape.heads; h++) {
            rotate_head(x + h * dim, op.vector, step, rotary, head);
            for (int64_t i = 0; i < dim; i += kLanes)
                store_bf16(op.out.b16(r) + h * dim + i, load(head + i) * splat(q_scale));
        }
        for (int64_t h = 0; h < shape.kv_heads; h++) {
            rotate_head(x + (shape.heads + h) * dim, op.vector2, step, rotary, head);
            write_position(head, x + (shape.heads + shape.kv_heads + h) * dim, slot, shape,
                           step.kv_block(rows.sequence, block, op.layer, h), scratch);
        }
    }
}

}  // namespace octavo::OCTAVO_ISA
