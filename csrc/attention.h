// Attention over the KV cache, whose layout is told in rope_and_cache.h.
#pragma once

#include "activations.h"
#include "product.h"

namespace octavo::OCTAVO_ISA {

// Online softmax (Milakov and Gimelshein, 2018) of one query over one block: turns its scores into weights, and
// rescales what it has summed up so far (of the weights, lane by lane). Positions outside begin:end of the block do not
// count, whatever they hold.
OCTAVO_INLINE void softmax_block(const float* scores, float scale, int64_t begin, int64_t end, int64_t dim,
                                 float* maximum_so_far, float* weight_so_far, float* values, bf16* shares) {
    constexpr int kParts = kSpan / kLanes;
    const bool partial = begin > 0 || end < kSpan;
    F32 score[kParts], highest = splat(*maximum_so_far), total = {};
    OCTAVO_UNROLL for (int i = 0; i < kParts; i++) {
        score[i] = load(scores + i * kLanes) * splat(scale);
        if (partial) score[i] = select(in_range(i * kLanes, begin, end), score[i], splat(-__builtin_inff()));
        highest = max(highest, score[i]);
    }
    const float top = maximum(highest);
    OCTAVO_UNROLL for (int i = 0; i < kParts; i++) {
        F32 weight = exp2(score[i] - splat(top));
        if (partial) weight = select(in_range(i * kLanes, begin, end), weight, F32{});
        store_bf16(shares + i * kLanes, weight);
        total = total + weight;
    }
    F32 weight = load(weight_so_far);
    if (top != *maximum_so_far) {  // otherwise the factor is exactly 1
        const F32 factor = exp2(splat(*maximum_so_far - top));
        for (int64_t i = 0; i < dim; i += kLanes) store(values + i, load(values + i) * factor);
        weight = weight * factor;
        *maximum_so_far = top;
    }
    store(weight_so_far, weight + total);
}

// The first position that a row at `position` sees.
OCTAVO_INLINE int64_t first_seen(int64_t position, int64_t window) {
    return window && position >= window ? position - window + 1 : 0;
}

// Where the K and V of one head in one block are.
struct Block {
    const bf16 *k, *v;
    Ahead k_memory, v_memory;

    Block(const Step& step, int64_t layer, int64_t sequence, int64_t block, int64_t kv_head) {
        const int64_t size = step.shape->block_elements();
        k = step.kv_block(sequence, block, layer, kv_head);
        v = k + size;
        const auto* memory = reinterpret_cast<const char*>(k);
        k_memory = {memory, memory + size * int64_t(sizeof(bf16))};
        v_memory = {k_memory.end, k_memory.end + size * int64_t(sizeof(bf16))};
    }
};

// The block that tile `tile` begins with.
OCTAVO_INLINE Block first_block(const Instruction& op, const Step& step, int64_t tile) {
    const RowTile rows = step.attention_tiles[tile / step.shape->kv_heads];
    const int64_t first = first_seen(step.positions[rows.first], op.window) / kSpan;
    return {step, op.layer, rows.sequence, first, tile % step.shape->kv_heads};
}

// Neighbouring rows of a sequence times the query heads of one kv head, so that K and V are read once for all of them.
// A row takes part only in the blocks that it sees something of: the same ones, and the same sums, in any tile.
// `next_tile`, or -1, is the one whose first block is fetched at the end.
void attention(const Instruction& op, const Step& step, int64_t tile, int64_t next_tile, Scratch& scratch) {
    const Shape& shape = *step.shape;
    const RowTile rows = step.attention_tiles[tile / shape.kv_heads];
    const int64_t kv_head = tile % shape.kv_heads, group = shape.heads / shape.kv_heads, dim = shape.head_dim;
    const int64_t first = step.positions[rows.first], last = first + rows.count - 1, queries = rows.count * group;
    const float scale = kLog2E / __builtin_sqrtf(float(dim));

    for (int64_t r = 0; r < rows.count; r++)
        std::memcpy(scratch.queries + r * group * dim, op.x.b16(rows.first + r) + kv_head * group * dim,
                    group * dim * sizeof(bf16));
    std::memset(scratch.values, 0, queries * dim * sizeof(float));
    std::memset(scratch.weights, 0, queries * kBlock * sizeof(float));
    for (int64_t q = 0; q < queries; q++) scratch.maxima[q] = -__builtin_inff();
    const int64_t last_block = last / kSpan;
    for (int64_t block = first_seen(first, op.window) / kSpan; block <= last_block; block++) {
        const int64_t start = block * kSpan;
        // The rows at positions start ... see the block, up to the one whose window begins past it.
        const int64_t from = start > first ? start - first : 0;
        const int64_t past = op.window ? start + kSpan - 1 + op.window - first : rows.count;
        const int64_t to = past < rows.count ? past : rows.count, count = (to - from) * group;
        const Block here(step, op.layer, rows.sequence, block, kv_head);
        const Block ahead = block < last_block ? Block(step, op.layer, rows.sequence, block + 1, kv_head)
                            : next_tile >= 0   ? first_block(op, step, next_tile)
                                               : here;
        product<F32>({scratch.queries + from * group * dim, dim * 2}, count, {here.k, kSpan * 4, kBlock * 4},
                     kSpan / kBlock, dim / 2, false, scratch.scores, kSpan, ahead.k_memory);
        for (int64_t r = from, i = 0; r < to; r++) {
            const int64_t begin = first_seen(first + r, op.window) - start, end = first + r + 1 - start;
            for (int64_t q = r * group; q < (r + 1) * group; q++, i++)
                softmax_block(scratch.scores + i * kSpan, scale, begin, end, dim, scratch.maxima + q,
                              scratch.weights + q * kBlock, scratch.values + q * dim, scratch.shares + i * kSpan);
        }
        product<F32>({scratch.shares, kSpan * 2}, count, {here.v, dim * 4, kBlock * 4}, dim / kBlock, kSpan / 2, true,
                     scratch.values + from * group * dim, dim, ahead.v_memory);
    }
    for (int64_t q = 0; q < queries; q++) {
        const F32 back = splat(1.0f / sum(load(scratch.weights + q * kBlock)));
        const float* values = scratch.values + q * dim;
        const int64_t row = rows.first + q / group, column = (kv_head * group + q % group) * dim;
        if (op.out.element == Element::bf16)
            for (int64_t i = 0; i < dim; i += kLanes) store_bf16(op.out.b16(row) + column + i, load(values + i) * back);
        else  // dim is a multiple of the groups' size
            for (int64_t i = 0; i < dim; i += kQuantGroup) {
                F32 scaled[kGroupVectors];
                OCTAVO_UNROLL for (int j = 0; j < kGroupVectors; j++) scaled[j] = load(values + i + j * kLanes) * back;
                store_group(op.out, row, column + i, scaled);
            }
    }
}

}  // namespace octavo::OCTAVO_ISA
