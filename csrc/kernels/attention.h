// Attention over the KV cache (its layout is in rope_and_cache.h). For a query q of a row at position p, over the
// positions i to which it attends, max(0, p - window + 1) <= i <= p:
//
//   out = sum over i of 2^(q . K[i]) V[i]  /  sum over i of 2^(q . K[i])        q is scaled by log2(e) / sqrt(head_dim)
//
// The sums are computed in blocks of 32 positions with a running maximum (online softmax: Milakov and Gimelshein,
// 2018), in parts of 512 positions, cut at fixed positions. The parts are always merged in order of position. So a row
// has the same bits whether one thread computes all parts (best for many rows) or each part is a tile of its own (so
// that all threads share a single long context).
#pragma once

#include "activations.h"
#include "product.h"
#ifdef OCTAVO_AMX
#include "amx.h"
#endif

namespace octavo::OCTAVO_ISA {

constexpr float kHeadroom = 8;  // weights may reach 2^8 before the sums are rescaled to a new maximum
constexpr int64_t kPartBlocks = kPart / kSpan;

// K and V are prefetched so many blocks ahead. Each of the two products prefetches 1 / kProductShare of a block, and the
// softmax the rest: evenly over the time that a block takes, so that reading overlaps with computing. Without AMX, the
// products take most of that time.
#ifdef OCTAVO_AMX
constexpr int64_t kBlocksAhead = 3, kProductShare = 4;
#else
constexpr int64_t kBlocksAhead = 2, kProductShare = 2;
#endif

// The running sums of a query: `values` [head_dim], sum of 2^(score - maximum) V; `weights` [kBlock], sum of 2^(score -
// maximum) by lane; and the maximum that both are relative to.
struct Sums {
    float *values, *weights, *maximum;

    OCTAVO_INLINE Sums(float* at, int64_t dim) : values(at), weights(at + dim), maximum(weights + kBlock) {}
};

OCTAVO_INLINE void clear(Sums sums, int64_t dim) {
    for (int64_t i = 0; i < dim + kBlock; i += kLanes) store(sums.values + i, zero());
    *sums.maximum = -__builtin_inff();
}

// sums += part, relative to the larger of both maxima. `sums` may be empty.
OCTAVO_INLINE void merge(Sums part, int64_t dim, Sums sums) {
    const bool rises = *part.maximum > *sums.maximum;
    const Sums low = rises ? sums : part, high = rises ? part : sums;
    const F32 factor = exp2(splat(*low.maximum - *high.maximum));
    for (int64_t i = 0; i < dim + kBlock; i += kLanes)
        store(sums.values + i, fma(load(low.values + i), factor, load(high.values + i)));
    *sums.maximum = *high.maximum;
}

// sums = the same sums, relative to a higher maximum.
OCTAVO_INLINE void raise_maximum(float top, int64_t dim, Sums sums) {
    const F32 factor = exp2(splat(*sums.maximum - top));
    for (int64_t i = 0; i < dim + kBlock; i += kLanes) store(sums.values + i, load(sums.values + i) * factor);
    *sums.maximum = top;
}

// The scales of K and of V in a block, or null.
struct Scales {
    const float *k, *v;
};

// Online softmax of one query over one block: weight[i] = 2^(score[i] - maximum) is added to the sums of weights, and
// shares[i] = weight[i], times the scale of V[i] if it has one. Positions of the block outside begin:end weigh 0,
// whatever they hold.
OCTAVO_INLINE void weigh(const float* scores, Scales scales, int64_t begin, int64_t end, int64_t dim, Sums sums,
                         bf16* shares) {
    constexpr int kCount = kSpan / kLanes;
    F32 score[kCount], highest = splat(-__builtin_inff());
    const bool partial = begin > 0 || end < kSpan;
    OCTAVO_UNROLL for (int j = 0; j < kCount; j++) {
        score[j] = load(scores + j * kLanes);
        if (scales.k) score[j] = score[j] * load(scales.k + j * kLanes);
        if (partial) score[j] = select(in_range(j * kLanes, begin, end), score[j], splat(-__builtin_inff()));
        highest = max(highest, score[j]);
    }
    if (any_above(highest, *sums.maximum + kHeadroom)) raise_maximum(maximum(highest), dim, sums);
    F32 total = load(sums.weights);
    const F32 top = splat(*sums.maximum);
    OCTAVO_UNROLL for (int j = 0; j < kCount; j += 2) {
        F32 a = exp2_or_zero(score[j] - top), b = exp2_or_zero(score[j + 1] - top);
        total = total + (a + b);
        if (scales.v) a = a * load(scales.v + j * kLanes), b = b * load(scales.v + (j + 1) * kLanes);
        store_bf16(shares + j * kLanes, a, b);
    }
    store(sums.weights, total);
}

// Return the first position that a row at `position` sees. Window 0: no window.
OCTAVO_INLINE int64_t first_seen(int64_t position, int64_t window) {
    return window && position >= window ? position - window + 1 : 0;
}

// K or V of a block as a right operand of products, and a scale for each position, or null.
struct Operand {
    const bf16* values;
    const float* scales;
};

// Return K or V as stored; int8 is converted to bf16 first, exactly, into `widened`.
OCTAVO_INLINE Operand operand(const std::byte* stored, const Shape& shape, bf16* widened) {
    if (!shape.int8_kv) return {reinterpret_cast<const bf16*>(stored), nullptr};
    const auto* bytes = reinterpret_cast<const int8_t*>(stored);
    for (int64_t i = 0; i < shape.block_elements(); i += 2 * kLanes)
        store_bf16(widened + i, from_int8(bytes + i), from_int8(bytes + i + kLanes));
    return {widened, reinterpret_cast<const float*>(bytes + shape.block_elements())};
}

// K and V of one head in one block, and their memory.
struct Block {
    const std::byte *k, *v;
    Ahead memory;

    Block(const Step& step, int64_t layer, int64_t sequence, int64_t block, int64_t kv_head) {
        const int64_t bytes = step.shape->kv_bytes();
        k = step.kv_block(sequence, block, layer, kv_head);
        v = k + bytes;
        const auto* begin = reinterpret_cast<const char*>(k);
        memory = {begin, begin + 2 * bytes};
    }
};

// The queries of a tile: consecutive rows of a sequence, times the query heads that share a kv head. K and V are read
// once for all of them.
struct Queries {
    const Instruction& op;
    const Step& step;
    const AttentionTile& tile;
    const int64_t kv_head, group, dim, first, last;  // positions of the rows
    const int64_t begin, end;                        // blocks that at least one row sees

    OCTAVO_INLINE Queries(const Instruction& op, const Step& step, int64_t index)
        : op(op), step(step), tile(step.attention_tiles[index / step.shape->kv_heads]),
          kv_head(index % step.shape->kv_heads), group(step.shape->heads / step.shape->kv_heads),
          dim(step.shape->head_dim), first(step.positions[tile.rows.first]), last(first + tile.rows.count - 1),
          begin(first_seen(first, op.window) / kSpan), end(last / kSpan + 1) {}

    OCTAVO_INLINE int64_t count() const { return tile.rows.count * group; }
    OCTAVO_INLINE Block block(int64_t index) const { return {step, op.layer, tile.rows.sequence, index, kv_head}; }
    OCTAVO_INLINE int64_t part_begin(int64_t part) const { return larger(begin, part * kPartBlocks); }
    OCTAVO_INLINE int64_t part_end(int64_t part) const { return smaller(end, (part + 1) * kPartBlocks); }
    OCTAVO_INLINE int64_t tile_begin() const { return tile.part < 0 ? begin : part_begin(tile.part); }
    OCTAVO_INLINE int64_t tile_end() const { return tile.part < 0 ? end : part_end(tile.part); }

    // Return what to prefetch while block `index` is computed: the block that is kBlocksAhead later, in this tile or
    // the next.
    OCTAVO_INLINE Ahead ahead_of(int64_t index, const Queries& next) const {
        const int64_t ahead = index + kBlocksAhead, past = ahead - tile_end();
        if (past < 0 || &next == this) return block(smaller(ahead, end - 1)).memory;
        return next.block(smaller(next.tile_begin() + past, next.end - 1)).memory;
    }

    // Return the rows that attend to some of the positions start ... start + size - 1: those from position `start` on,
    // before the first one whose window begins after them. A row sums only over such ranges, so its sums are the
    // same in any tile.
    OCTAVO_INLINE int64_t from(int64_t start) const { return larger(start - first, 0); }
    OCTAVO_INLINE int64_t to(int64_t start, int64_t size) const {
        return op.window ? smaller(start + size - 1 + op.window - first, tile.rows.count) : tile.rows.count;
    }

    OCTAVO_INLINE Sums sums(float* of_all, int64_t query) const {
        return {of_all + query * step.shape->sums_stride(), dim};
    }

    // Return the sums of a part of a tile that is cut into parts.
    OCTAVO_INLINE float* part_sums(int64_t part) const {
        const int64_t before = tile.part_sums + (part * step.shape->kv_heads + kv_head) * count();
        return step.part_sums + before * step.shape->sums_stride();
    }

    OCTAVO_INLINE static int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
    OCTAVO_INLINE static int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
};

// The products of attention: c = a * b, or c += a * b if kAdd. AMX tiles sum in another order than vectors, so they
// are used for every number of rows, or (if k is not whole tiles) for none.
template <bool kAdd>
OCTAVO_INLINE void attention_product(Rows a, int64_t rows, Columns b, int64_t blocks, int64_t words, float* c,
                                     int64_t c_stride, Ahead ahead) {
#ifdef OCTAVO_AMX
    if (words % 16 == 0) return exact_product<kAdd>(a, rows, b, blocks, words, c, c_stride, ahead);
#endif
    product<F32>(a, rows, b, blocks, words, kAdd, c, c_stride, ahead);
}

#ifndef OCTAVO_AMX
OCTAVO_INLINE void set_last_rows(int64_t) {}
#endif

// Compute the sums of all queries over one part. `next`: the thread's next tile, or `q` itself if there is none.
void attend_part(const Queries& q, int64_t part, const Queries& next, Scratch& scratch, float* sums) {
    const int64_t dim = q.dim, group = q.group, stride = q.step.shape->sums_stride();
    for (int64_t i = 0; i < q.count(); i++) clear(q.sums(sums, i), dim);
    int64_t last_rows = 0;
    for (int64_t block = q.part_begin(part); block < q.part_end(part); block++) {
        const int64_t start = block * kSpan, from = q.from(start), to = q.to(start, kSpan), count = (to - from) * group;
        const Block here = q.block(block);
        Ahead ahead = q.ahead_of(block, next);
        const int64_t lines = (ahead.end - ahead.at) / 64, of_product = lines / kProductShare;
        if (count % 16 != last_rows) set_last_rows(last_rows = count % 16);
        const Operand k = operand(here.k, *q.step.shape, scratch.kv);
        attention_product<false>({scratch.queries + from * group * dim, dim * 2}, count,
                                 {k.values, kSpan * 4, kBlock * 4}, kSpan / kBlock, dim / 2, scratch.scores, kSpan,
                                 ahead.next(of_product * 64));
        const Operand v = operand(here.v, *q.step.shape, scratch.kv);
        const int64_t of_softmax = lines - 2 * of_product, of_query = of_softmax / Queries::larger(count, 1) + 1;
        Ahead ahead_in_softmax = ahead.next(of_softmax * 64);
        for (int64_t r = from, i = 0; r < to; r++) {
            const int64_t begin = first_seen(q.first + r, q.op.window) - start, end = q.first + r + 1 - start;
            for (int64_t g = 0; g < group; g++, i++) {
                ahead_in_softmax.next(of_query * 64).prefetch();
                weigh(scratch.scores + i * kSpan, {k.scales, v.scales}, begin, end, dim, q.sums(sums, r * group + g),
                      scratch.shares + i * kSpan);
            }
        }
        attention_product<true>({scratch.shares, kSpan * 2}, count, {v.values, dim * 4, kBlock * 4}, dim / kBlock,
                                kSpan / 2, sums + from * group * stride, stride, ahead);
    }
    if (last_rows) set_last_rows(0);
}

OCTAVO_INLINE void merge_part(const Queries& q, int64_t part, float* part_sums, float* sums) {
    const int64_t from = q.from(part * kPart), to = q.to(part * kPart, kPart);
    for (int64_t i = from * q.group; i < to * q.group; i++) merge(q.sums(part_sums, i), q.dim, q.sums(sums, i));
}

OCTAVO_INLINE void write_values(const Queries& q, float* sums) {
    for (int64_t i = 0; i < q.count(); i++) {
        const Sums of_query = q.sums(sums, i);
        const F32 back = splat(1.0f / sum(load(of_query.weights)));
        const Matrix& out = q.op.out;
        const int64_t row = q.tile.rows.first + i / q.group, column = (q.kv_head * q.group + i % q.group) * q.dim;
        if (out.element == Element::bf16)
            for (int64_t d = 0; d < q.dim; d += kLanes)
                store_bf16(out.b16(row) + column + d, load(of_query.values + d) * back);
        else  // dim is a multiple of the groups' size
            for (int64_t d = 0; d < q.dim; d += kQuantGroup) {
                F32 scaled[kGroupVectors];
                OCTAVO_UNROLL for (int j = 0; j < kGroupVectors; j++)
                    scaled[j] = load(of_query.values + d + j * kLanes) * back;
                store_group(out, row, column + d, scaled);
            }
    }
}

// Compute one tile. Its last blocks prefetch the first blocks of `next_tile`, unless that is -1.
void attention(const Instruction& op, const Step& step, int64_t tile, int64_t next_tile, Scratch& scratch) {
    const Queries q(op, step, tile), q_of_next(op, step, next_tile < 0 ? tile : next_tile);
    const Queries& next = next_tile < 0 ? q : q_of_next;
    const int64_t width = q.group * q.dim;
    for (int64_t r = 0; r < q.tile.rows.count; r++)
        std::memcpy(scratch.queries + r * width, op.x.b16(q.tile.rows.first + r) + q.kv_head * width,
                    width * sizeof(bf16));
    const int64_t first_part = q.begin / kPartBlocks, last_part = (q.end - 1) / kPartBlocks;
    if (q.tile.part < 0) {
        for (int64_t part = first_part; part <= last_part; part++) {
            float* sums = part == first_part ? scratch.sums_so_far : scratch.part_sums;
            attend_part(q, part, next, scratch, sums);
            if (part > first_part) merge_part(q, part, sums, scratch.sums_so_far);
        }
        return write_values(q, scratch.sums_so_far);
    }
    attend_part(q, q.tile.part, next, scratch, q.part_sums(q.tile.part));
    int32_t* done = step.parts_done + q.tile.split * step.shape->kv_heads + q.kv_head;
    if (__atomic_add_fetch(done, 1, __ATOMIC_ACQ_REL) <= last_part) return;
    *done = 0;  // for the next layer. The thread that finishes the last part merges them all.
    for (int64_t part = first_part + 1; part <= last_part; part++)
        merge_part(q, part, q.part_sums(part), q.part_sums(first_part));
    write_values(q, q.part_sums(first_part));
}

}  // namespace octavo::OCTAVO_ISA
