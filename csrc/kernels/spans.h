// The products of a linear, whose columns k are in spans (Spans in kernels.h). With x in bf16, or in int8 as x[r, k] =
// s[r, span] * p[r, k], and weight[j, k] = t[j, span] * (q[j, k] - 128):
//
//   sums[r, j] = the sum of all spans, added in their tree, of
//                sum over k in the span of x[r, k] * weight[j, k]                                      bf16
//                float(sum over k in the span of p[r, k] * (q[j, k] - 128)) * (t[j, span] * s[r, span])      int8
//
// A pair of spans is multiplied, then added; the pairs and larger subtrees that are done wait in the first-level cache.
#pragma once

#include <type_traits>

#include "integers.h"
#include "product.h"
#ifdef OCTAVO_AMX
#include "amx.h"
#endif

namespace octavo::OCTAVO_ISA {

constexpr int64_t kSpanStride = kSpanBlocks * kBlock;  // of the sums of spans

#ifndef OCTAVO_AMX
constexpr int64_t kGroupRows = kTileRows, kIntegerGroupRows = kGroup / kIntegerRows * kIntegerRows;

OCTAVO_INLINE int64_t span_blocks(int64_t rows) { return rows == 1 ? 1 : kSpanBlocks; }

template <class Sum>
OCTAVO_INLINE void weight_product(Rows a, int64_t rows, Columns b, int64_t blocks, int64_t words, float* c,
                                  int64_t c_stride, Ahead ahead) {
    product<Sum>(a, rows, b, blocks, words, false, c, c_stride, ahead);
}

OCTAVO_INLINE void group_product(const Instruction& op, int64_t row, int64_t rows, int64_t block, int64_t blocks,
                                 Ahead ahead, Scratch& scratch) {
    integer_product(op.x, row, rows, *op.weight, block, blocks, scratch.sums, kSumsStride, ahead);
}
#endif

// Some rows of x times some blocks of the weight. Sum: F32 for bf16, I32 for int8.
template <class Sum>
struct SpanProduct {
    const Instruction& op;
    int64_t row, rows, block, blocks;

    OCTAVO_INLINE void multiply(int64_t span, float* sums, int64_t stride, Ahead ahead) const {
        const Weight& w = *op.weight;
        const int64_t words = w.encoding.bits, first = w.spans.begin(span) * words;  // 4-byte words in a group
        const Rows x = {op.x.row(row) + 4 * first, op.x.row_bytes};
        const Columns columns = {w.block(block) + 4 * kBlock * first, 4 * kBlock, w.block_bytes};
        weight_product<Sum>(x, rows, columns, blocks, w.spans.size(span) * words, sums, stride, ahead);
    }

    // Return t[j, span] for the columns j ... of a vector.
    OCTAVO_INLINE F32 column_scales(int64_t span, int64_t j) const {
        if constexpr (std::is_same_v<Sum, F32>) return zero();
        const Weight& w = *op.weight;
        const std::byte* end = w.block(block + j / kBlock) + w.groups * w.encoding.value_bytes();
        return load(reinterpret_cast<const float*>(end) + span * kBlock + j % kBlock);
    }

    // Return the sums of a span from its product.
    OCTAVO_INLINE F32 scaled(int64_t span, int64_t r, F32 column_scales, const float* product) const {
        if constexpr (std::is_same_v<Sum, F32>) return load(product);
        const RowScale& of_row = op.x.row_scales(row + r)[span];
        return to_float(load_as<I32>(product) + of_row.offset) * (column_scales * splat(of_row.scale));
    }

    // to = waiting[1] + (waiting[0] + (even + odd)): a pair of spans, and the kMerged subtrees that wait for it.
    template <int kMerged>
    OCTAVO_INLINE void merge(int64_t pair, int64_t begin, int64_t end, const Scratch& scratch, float* to,
                             int64_t stride) const {
        float* const* products = scratch.pairs[pair % 2];
        for (int64_t j = begin * kBlock; j < end * kBlock; j += kLanes) {
            const F32 even = column_scales(2 * pair, j), odd = column_scales(2 * pair + 1, j);
            _Pragma("GCC unroll 4") for (int64_t r = 0; r < rows; r++) {
                const int64_t at = r * kSpanStride + j;
                F32 sum = scaled(2 * pair, r, even, products[0] + at) + scaled(2 * pair + 1, r, odd, products[1] + at);
                OCTAVO_UNROLL for (int level = 0; level < kMerged; level++)
                    sum = load(scratch.waiting[level] + at) + sum;
                store(to + r * stride + j, sum);
            }
        }
    }

    // Add a pair of spans, in blocks begin ... end - 1, to the subtrees of which it is the last part: one for pair 1,
    // two for pair 3.
    OCTAVO_INLINE void add_pair(int64_t pair, int64_t begin, int64_t end, float* sums, Scratch& scratch) const {
        const bool last = pair == op.weight->spans.count / 2 - 1;
        float* to = last ? sums : scratch.waiting[pair % 2];
        const int64_t stride = last ? kSumsStride : kSpanStride;
        if (pair == 3)
            merge<2>(pair, begin, end, scratch, to, stride);
        else if (pair == 1)
            merge<1>(pair, begin, end, scratch, to, stride);
        else
            merge<0>(pair, begin, end, scratch, to, stride);
    }

    // While AMX multiplies a span, the vector units add half of the columns of the pair before.
    OCTAVO_INLINE void sum_spans(float* sums, Ahead ahead, Scratch& scratch) const {
        const int64_t spans = op.weight->spans.count, half = (blocks + 1) / 2;
        for (int64_t span = 0; span < spans; span++) {
            multiply(span, scratch.pairs[span / 2 % 2][span % 2], kSpanStride, ahead.part(span, spans));
            if (span > 1) add_pair(span / 2 - 1, span % 2 * half, span % 2 ? blocks : half, sums, scratch);
        }
        add_pair(spans / 2 - 1, 0, blocks, sums, scratch);
    }

    OCTAVO_INLINE void multiply_whole(float* sums, Ahead ahead) const {
        multiply(0, sums, kSumsStride, ahead);
        for (int64_t j = 0; std::is_same_v<Sum, I32> && j < blocks * kBlock; j += kLanes) {
            const F32 scales = column_scales(0, j);
            _Pragma("GCC unroll 4") for (int64_t r = 0; r < rows; r++) {
                float* at = sums + r * kSumsStride + j;
                store(at, scaled(0, r, scales, at));
            }
        }
    }
};

template <class Sum>
OCTAVO_INLINE void span_product(const Instruction& op, int64_t row, int64_t rows, int64_t block, int64_t blocks,
                                Ahead ahead, Scratch& scratch) {
    if (op.weight->spans.count == 1) return SpanProduct<Sum>{op, row, rows, block, blocks}.multiply_whole(scratch.sums, ahead);
    const int64_t widest = span_blocks(rows), steps = (blocks + widest - 1) / widest;
    for (int64_t i = 0; i < steps; i++) {
        const int64_t first = i * widest, width = blocks - first < widest ? blocks - first : widest;
        SpanProduct<Sum>{op, row, rows, block + first, width}.sum_spans(scratch.sums + first * kBlock,
                                                                        ahead.part(i, steps), scratch);
    }
}

}  // namespace octavo::OCTAVO_ISA
