// The interface between a program and the kernels: plain data, and a table of kernels for each instruction set.
//
// A step runs the program's instructions one after another, with a barrier between any two. Each instruction is divided
// into tiles, which any thread may run in any order; the division never changes a bit of the result.
//
// The kernels' headers are compiled once per instruction set, each time with its compiler flags. They must not
// instantiate inline functions of the standard library: the linker keeps one copy of such a function for the whole
// module, and if that is the AVX-512 copy, it crashes older machines. So these headers include only plain data and
// always-inlined functions.
#pragma once

#include <cstddef>
#include <cstdint>

#include "formats/encoding.h"
#include "scan.h"

#define OCTAVO_INLINE inline __attribute__((always_inline))

namespace octavo {

using bf16 = uint16_t;

constexpr int64_t kBlock = 16;          // output columns in a block of a packed weight
constexpr int64_t kSpan = 32;           // positions in a block of the KV cache, the unit in which attention walks
constexpr int64_t kMaxPanel = 6;        // maximum blocks in a tile of a linear
constexpr int64_t kGroup = 32;          // maximum rows whose sums a linear keeps before it writes them out
constexpr int64_t kMaxSpans = 8;        // of the columns of a weight, see Spans
constexpr int64_t kMostSpanBlocks = 3;  // maximum blocks for which the sums of spans are kept
constexpr int64_t kPart = 512;          // positions in a part of attention's sums; parts are merged in order
constexpr int64_t kPeakFloats = 512;    // maximum floats that peak_products writes
constexpr int64_t kAttentionRows = 48;  // maximum (position, query head) pairs in a tile of attention; >= 1 position

enum class Activation { none, silu, gelu_tanh };

// For each group of kQuantGroup int8 activations q: x = scale * q. The sums are over the group's q, and exact.
struct ActivationGroup {
    float scale;
    float scaled_sum;     // scale * sum(q): is multiplied by the minimum of a weight's group
    int32_t offset;       // -128 * sum(q): corrects for weights that are stored unsigned, with a zero of 128
    int32_t half_offset;  // -128 * sum(q) over the first half of the group
};

// The same for a span of a row of int8 activations.
struct RowScale {
    float scale;
    int32_t offset;  // -128 * sum(q)
};

// The fixed spans in which a linear sums its columns k, 1, 2, 4 or 8 of them. The sums of spans are added in a binary
// tree: ((s0 + s1) + (s2 + s3)) + ((s4 + s5) + (s6 + s7)). So 2, 4 or 8 ranks that have a part of the spans each sum up
// whole subtrees, and the sums of all ranks, added in the same way, have the same bits as on one rank.
//
// A span ends at a multiple of 64 columns or at the last column. Units: groups of kQuantGroup columns.
struct Spans {
    int64_t count = 1;
    int64_t ends[kMaxSpans] = {};

    OCTAVO_INLINE int64_t begin(int64_t span) const { return span ? ends[span - 1] : 0; }
    OCTAVO_INLINE int64_t size(int64_t span) const { return ends[span] - begin(span); }
    OCTAVO_INLINE int64_t groups() const { return ends[count - 1]; }
    bool operator==(const Spans&) const = default;
};

// How a row of activations is stored. i8_groups: int8 and then an ActivationGroup per group; i8_rows: int8 and then a
// RowScale per span.
enum class Element { f32, bf16, i8_groups, i8_rows };

// Activations [rows, stride]. Rows and columns are padded to multiples of 64, so that kernels work on whole vectors and
// tiles; the padding columns hold zeros, the padding rows anything.
struct Matrix {
    void* data = nullptr;
    int64_t stride = 0;  // elements
    Element element = Element::f32;
    int64_t row_bytes = 0;
    Spans spans = {};  // of i8_rows

    OCTAVO_INLINE std::byte* row(int64_t row) const { return static_cast<std::byte*>(data) + row * row_bytes; }
    OCTAVO_INLINE float* f32(int64_t r) const { return reinterpret_cast<float*>(row(r)); }
    OCTAVO_INLINE bf16* b16(int64_t r) const { return reinterpret_cast<bf16*>(row(r)); }
    OCTAVO_INLINE int8_t* i8(int64_t r) const { return reinterpret_cast<int8_t*>(row(r)); }
    OCTAVO_INLINE ActivationGroup* groups(int64_t r) const {
        return reinterpret_cast<ActivationGroup*>(i8(r) + stride);
    }
    OCTAVO_INLINE Matrix from_column(int64_t column) const {  // of float
        Matrix part = *this;
        if (data) part.data = static_cast<std::byte*>(data) + column * sizeof(float);
        return part;
    }
    OCTAVO_INLINE RowScale* row_scales(int64_t r) const { return reinterpret_cast<RowScale*>(i8(r) + stride); }
};

constexpr int64_t bytes_of_row(Element element, int64_t stride) {
    switch (element) {
        case Element::f32: return stride * int64_t(sizeof(float));
        case Element::bf16: return stride * int64_t(sizeof(bf16));
        case Element::i8_groups: return stride + stride / kQuantGroup * int64_t(sizeof(ActivationGroup));
        case Element::i8_rows:
            return stride + kMaxSpans * int64_t(sizeof(RowScale));  // whole cache lines: fast for AMX
    }
    return 0;
}

// A weight [rows, columns], packed in blocks of 16 rows, padded with zeros. If `gated`, blocks of the upper half of the
// rows (up) alternate with those of the lower half (gate), so that a tile has both and can compute activation(gate) *
// up.
//
// Layout of a block, by encoding:
//   bf16    [pairs of columns][16 rows][2]: a pair is one vector operand of vdpbf16ps, 16 pairs are one AMX tile
//   8 bits  [groups][8][16 rows][4 columns]: 4 columns are one vector operand of vpdpbusd, a group is half an AMX tile
//   4 bits  [groups][4][16 rows][4 columns], two columns a byte: the low bits are from the group's first half
// The integers are followed by the scales and then the minima of each group, [groups][scales][16]; or by the scales of
// each span, [spans][16], if a row has one for a span.
struct Weight {
    int64_t rows = 0, columns = 0;
    Encoding encoding = {};
    bool gated = false;
    Spans spans = {};
    int64_t blocks = 0, groups = 0;  // of kQuantGroup columns
    int64_t block_bytes = 0;
    std::byte* data = nullptr;

    OCTAVO_INLINE std::byte* block(int64_t index) const { return data + index * block_bytes; }
    OCTAVO_INLINE bf16* b16_block(int64_t index) const { return reinterpret_cast<bf16*>(block(index)); }
};

// The sizes that do not change from one step to the next.
struct Shape {
    int64_t heads, kv_heads, head_dim, page_size;
    float norm_eps;
    bool int8_kv;

    // Elements, and bytes, of the K (or the V) of one head in a block.
    OCTAVO_INLINE int64_t block_elements() const { return kSpan * head_dim; }
    OCTAVO_INLINE int64_t kv_bytes() const {
        return int8_kv ? block_elements() + kSpan * int64_t(sizeof(float)) : block_elements() * int64_t(sizeof(bf16));
    }
    OCTAVO_INLINE int64_t sums_stride() const { return head_dim + 2 * kBlock; }  // floats; see Sums
    OCTAVO_INLINE int64_t blocks_per_page() const { return page_size / kSpan; }
};

enum class Op {
    rotary,
    embed,
    norm,
    linear,
    rope_and_cache,
    attention,
    quantize,
    all_reduce,
    observe,
    pool_rows,
    sampled_rows,
    sample
};

struct Instruction {
    Op op;
    Matrix x = {}, out = {}, residual = {};  // residual.data may be null
    const Weight* weight = nullptr;          // embed, linear
    const float* vector = nullptr;   // norm, pool_rows: weight; linear: bias or null; rope_and_cache: q_norm or null
    const float* vector2 = nullptr;  // rope_and_cache: k_norm or null
    double* squares = nullptr;       // observe: a sum per column
    int64_t width = 0;               // columns of x; embed: of out
    int64_t layer = 0, window = 0;
    int64_t first_token = 0;  // embed: the token of the weight's first row; tokens outside of it are other ranks'
    int64_t partials = 0;     // all_reduce: x is the first of so many partial sums,
    int64_t rank_bytes = 0;   // and the i-th lies i * rank_bytes behind it
    Activation activation = Activation::none;
    bool sampled = false;  // runs on the sampled rows only
    bool shared = false;   // other ranks read what it writes
    bool divided = false;  // of the rows, each rank of a node computes its share: all_reduce, and a norm of its result
};

// Consecutive rows of one sequence.
struct RowTile {
    int32_t sequence, first, count;
};

// A tile of attention (for each kv head): some rows, and all of their context or one part of it.
struct AttentionTile {
    RowTile rows;
    int32_t part;       // number of the part; -1: the whole context
    int32_t split;      // index into Step::parts_done: the number of row tiles before this one that are cut into parts
    int64_t part_sums;  // index of the tile's first query in Step::part_sums
};

// How this step cuts a linear into tiles: into panels of the weight, times ranges of rows.
struct Cut {
    int64_t panel;  // blocks
    int64_t rows;   // a multiple of kGroup
    int64_t row_tiles;
};

// Memory that is needed soon: kernels prefetch it into the second-level cache as they compute.
struct Ahead {
    const char *at = nullptr, *end = nullptr;

    // Remove so many bytes from the beginning and return them.
    OCTAVO_INLINE Ahead next(int64_t bytes) {
        const Ahead part = {at, end - at < bytes ? end : at + bytes};
        at = part.end;
        return part;
    }

    OCTAVO_INLINE void prefetch() const {
        for (const char* line = at; line < end; line += 64) __builtin_prefetch(line, 0, 2);
    }

    // Return part number `index` of `parts` equal parts.
    OCTAVO_INLINE Ahead part(int64_t index, int64_t parts) const {
        const int64_t lines = (end - at) / 64;
        return {at + index * lines / parts * 64, at + (index + 1) * lines / parts * 64};
    }
};

// The fields of PoolingBatch (src/octavo/backends/base.py): `sums` [ranges, hidden] of rows first[p] ... end[p] - 1, which
// a step adds to; and the logits of tokens after sampled rows, which a step writes.
struct Pooling {
    int64_t ranges = 0, labels = 0;
    const int32_t *first = nullptr, *end = nullptr;
    double* sums = nullptr;
    const int32_t *label_rows = nullptr, *label_tokens = nullptr;
    float* label_logits = nullptr;
};

struct Step {
    const Shape* shape;
    int64_t rows, sampled;
    const int32_t *tokens, *positions, *sample_rows;
    const int32_t* page_tables;
    int64_t pages_per_sequence;
    std::byte* kv;
    int64_t page_bytes;
    const float* rotary;         // [rows][2][head_dim / 2]: cosines, then sines
    const RowTile* cache_tiles;  // rows that fall into one block of the KV cache
    const AttentionTile* attention_tiles;
    float* part_sums;       // [queries of tiles that are parts][sums_stride]
    int32_t* parts_done;    // [row tiles that are cut into parts][kv_heads]: how many parts are done
    int64_t rows_per_tile;  // of instructions that work on single rows
    Pooling pooling;

    // Return the K of a sequence's block (positions 32 block ... 32 block + 31); the V lies behind it.
    OCTAVO_INLINE std::byte* kv_block(int64_t sequence, int64_t block, int64_t layer, int64_t kv_head) const {
        const int64_t per_page = shape->blocks_per_page();
        const int64_t page = page_tables[sequence * pages_per_sequence + block / per_page];
        const int64_t index = (layer * shape->kv_heads + kv_head) * per_page + block % per_page;
        return kv + page * page_bytes + index * 2 * shape->kv_bytes();
    }
};

// A group of 32 columns of 16 rows in 4 bits: x[i][row] = q[i][row] * scale[row] + minimum[row]. Scales and minima are
// exact in half precision.
struct FourBits {
    uint8_t q[kQuantGroup][kBlock];
    float scale[kBlock], minimum[kBlock];
};

// A thread's own working memory.
struct Scratch {
    float* sums;         // [kGroup][kMaxPanel * kBlock]
    float *even, *odd;   // [kGroup][kMostSpanBlocks * kBlock]: the products of a pair of spans; see spans.h
    float* waiting[2];   // the same: sums of subtrees of spans
    float* scores;       // [attention rows][kSpan]
    float* part_sums;    // [attention rows][sums_stride]: of the current part
    float* sums_so_far;  // [attention rows][sums_stride]: of all parts before it
    bf16* queries;       // [attention rows][head_dim]
    bf16* shares;        // [attention rows][kSpan], the softmax's weights
    bf16* kv;            // [block_elements], K or V of a block, if the cache holds int8
    float* row;          // a row of activations
    std::byte* widened;  // the integers of a block of 4 bits, one byte each
};

using RowKernel = void (*)(const Instruction&, const Step&, int64_t begin, int64_t end, Scratch&);
using CacheKernel = void (*)(const Instruction&, const Step&, int64_t tile, Scratch&);
using AttentionKernel = void (*)(const Instruction&, const Step&, int64_t tile, int64_t next_tile, Scratch&);
using LinearKernel = void (*)(const Instruction&, const Cut&, int64_t rows, int64_t tile, Ahead, Scratch&);
using SumKernel = void (*)(const float* const* partials, int64_t vectors, const float* bias, const float* residual,
                           float* out, int64_t count);
using FourBitsKernel = void (*)(const float (*x)[kBlock], const float* importance, FourBits&);

struct Kernels {
    void (*start_thread)();  // before a thread's first tile of a step
    void (*stop_thread)();   // after its last
    RowKernel embed, norm, quantize, pool_rows, sampled_rows;
    SumKernel sum_partials;
    CacheKernel rope_and_cache;
    AttentionKernel attention;
    LinearKernel linear;
    FourBitsKernel quantize_to_4;          // x [kQuantGroup][kBlock], importance [kQuantGroup]; see four_bits.h
    int64_t (*peak_products)(float* out);  // see peak.h
    int64_t (*peak_integer_products)(float* out);
    Scan scan;
};

}  // namespace octavo
