// The products of a linear, whose columns k are in spans (Spans in kernels.h). With x in bf16, or in int8 as x[r, k] =
// s[r, span] * p[r, k], and weight[j, k] = t[j, span] * (q[j, k] - 128):
//
//   sums[r, j] = the sum of all spans, added in their tree, of
//                sum over k in the span of x[r, k] * weight[j, k]                                      bf16
//                float(sum over k in the span of p[r, k] * (q[j, k] - 128)) * (t[j, span] * s[r, span])      int8
//
// A pair of spans is multiplied, then added; the subtrees that are done wait. All of it is small enough for the
// first-level cache, which is why only kSpanBlocks blocks are computed at a time.
#pragma once

#include <type_traits>

#include "integers.h"
#include "product.h"
#ifdef OCTAVO_AMX
#include "amx.h"
#endif

namespace octavo::OCTAVO_ISA {

#ifndef OCTAVO_AMX
constexpr int64_t kGroupRows = kTileRows, kIntegerGroupRows = kGroup / kIntegerRows * kIntegerRows;
constexpr int64_t kSpanBlocks = 3, kSpanBlocksAlone = 1;  // as in `product`, a single row is computed block by block

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

constexpr int64_t kSpanStride = kSpanBlocks * kBlock;  // of the sums of spans
static_assert(kSpanBlocks <= kMostSpanBlocks);

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

    // Return t[j, span] for a vector of columns from j on.
    OCTAVO_INLINE F32 column_scales(int64_t span, int64_t j) const {
        if constexpr (std::is_same_v<Sum, F32>) return zero();
        const Weight& w = *op.weight;
        const std::byte* end = w.block(block + j / kBlock) + w.groups * w.encoding.value_bytes();
        return load(reinterpret_cast<const float*>(end) + span * kBlock + j % kBlock);
    }

    // Return the sums of a span from its product, with the s and the offset of the row.
    OCTAVO_INLINE static F32 scaled(const float* product, const RowScale& of_row, F32 column_scales) {
        if constexpr (std::is_same_v<Sum, F32>) return load(product);
        return to_float(load_as<I32>(product) + of_row.offset) * (column_scales * splat(of_row.scale));
    }

    // to = waiting[1] + (waiting[0] + (even + odd)): a pair of spans, and the kMerged subtrees that wait for it.
    template <int kMerged>
    OCTAVO_INLINE void add_pair(int64_t pair, float* to, int64_t stride, const Scratch& scratch) const {
        const float *even = scratch.even, *odd = scratch.odd, *waiting[] = {scratch.waiting[0], scratch.waiting[1]};
        const int64_t row_bytes = op.x.row_bytes, height = rows, width = blocks * kBlock;
        for (int64_t j = 0; j < width; j += kLanes) {
            const F32 even_scales = column_scales(2 * pair, j), odd_scales = column_scales(2 * pair + 1, j);
            const std::byte* row_scales = reinterpret_cast<const std::byte*>(op.x.row_scales(row) + 2 * pair);
            for (int64_t r = 0; r < height; r++, row_scales += row_bytes) {
                const int64_t at = r * kSpanStride + j;
                const auto* of_row = reinterpret_cast<const RowScale*>(row_scales);
                F32 sum = scaled(even + at, of_row[0], even_scales) + scaled(odd + at, of_row[1], odd_scales);
                if constexpr (kMerged > 0) sum = load(waiting[0] + at) + sum;
                if constexpr (kMerged > 1) sum = load(waiting[1] + at) + sum;
                store(to + r * stride + j, sum);
            }
        }
    }

    // Multiply a pair of spans, then add it to the subtrees of which it is the last part: pair 1 to one, pair 3 to two.
    OCTAVO_INLINE void sum_spans(float* sums, Ahead ahead, const Scratch& scratch) const {
        const int64_t pairs = op.weight->spans.count / 2, lines = (ahead.end - ahead.at) / 64;
        const int64_t bytes = (lines / (2 * pairs) + 1) * 64;  // to prefetch in each span
        for (int64_t pair = 0; pair < pairs; pair++) {
            multiply(2 * pair, scratch.even, kSpanStride, ahead.next(bytes));
            multiply(2 * pair + 1, scratch.odd, kSpanStride, ahead.next(bytes));
            const bool last = pair + 1 == pairs;
            float* to = last ? sums : scratch.waiting[pair % 2];
            const int64_t stride = last ? kSumsStride : kSpanStride;
            if (pair == 3)
                add_pair<2>(pair, to, stride, scratch);
            else if (pair == 1)
                add_pair<1>(pair, to, stride, scratch);
            else
                add_pair<0>(pair, to, stride, scratch);
        }
    }

    OCTAVO_INLINE void multiply_whole(float* sums, Ahead ahead) const {
        multiply(0, sums, kSumsStride, ahead);
        for (int64_t j = 0; std::is_same_v<Sum, I32> && j < blocks * kBlock; j += kLanes) {
            const F32 scales = column_scales(0, j);
            for (int64_t r = 0; r < rows; r++) {
                float* at = sums + r * kSumsStride + j;
                store(at, scaled(at, op.x.row_scales(row + r)[0], scales));
            }
        }
    }
};

template <class Sum>
OCTAVO_INLINE void span_product(const Instruction& op, int64_t row, int64_t rows, int64_t block, int64_t blocks,
                                Ahead ahead, Scratch& scratch) {
    if (op.weight->spans.count == 1)
        return SpanProduct<Sum>{op, row, rows, block, blocks}.multiply_whole(scratch.sums, ahead);
    const int64_t widest = rows == 1 ? kSpanBlocksAlone : kSpanBlocks, steps = (blocks + widest - 1) / widest;
    for (int64_t i = 0; i < steps; i++) {
        const int64_t first = i * widest, width = blocks - first < widest ? blocks - first : widest;
        SpanProduct<Sum>{op, row, rows, block + first, width}.sum_spans(scratch.sums + first * kBlock,
                                                                        ahead.part(i, steps), scratch);
    }
}

}  // namespace octavo::OCTAVO_ISA
