// What the program tells the kernels, and the table of kernels that each instruction set fills in.
//
// A step runs the program's instructions one after another. Each is cut into tiles; any thread may run any tile, at any
// time between the two barriers around the instruction, and the cut never changes a bit of the result.
//
// These headers are compiled once per instruction set, with its compiler flags. A function of the standard library that
// such a file leaves behind could be the copy that the linker keeps for everybody, and crash an older machine; so what
// they include is plain data and functions that are always inlined.
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
constexpr int64_t kMaxPanel = 6;        // blocks in a tile of a linear, at most
constexpr int64_t kGroup = 32;          // rows that a linear sums up before it writes them out, at most
constexpr int64_t kPart = 512;          // positions that attention sums up before it merges them with those before
constexpr int64_t kPeakFloats = 512;   // that peak_products writes, at most
constexpr int64_t kAttentionRows = 48;  // (position, query head) pairs in a tile of attention, where one position fits

enum class Activation { none, silu, gelu_tanh };

// What makes int8 activations whole again, for each group of kQuantGroup. The sums are of the int8, exact.
struct ActivationGroup {
    float scale;
    float scaled_sum;    // scale * their sum, for the minima of a weight
    int32_t offset;      // -128 * their sum, for weights without minima
    int32_t half_offset; // the same of the first half
};

// The same for a whole row.
struct RowScale {
    float scale;
    int32_t offset;  // -128 * their sum
};

// How activations are held: after int8 come the row's ActivationGroups, or its RowScale.
enum class Element { f32, bf16, i8_groups, i8_rows };

// Activations. Rows and columns past the ones in use exist (up to multiples of 64), so that kernels work on whole
// vectors and tiles; the columns hold zeros.
struct Matrix {
    void* data = nullptr;
    int64_t stride = 0;  // elements
    Element element = Element::f32;
    int64_t row_bytes = 0;

    OCTAVO_INLINE std::byte* row(int64_t row) const { return static_cast<std::byte*>(data) + row * row_bytes; }
    OCTAVO_INLINE float* f32(int64_t r) const { return reinterpret_cast<float*>(row(r)); }
    OCTAVO_INLINE bf16* b16(int64_t r) const { return reinterpret_cast<bf16*>(row(r)); }
    OCTAVO_INLINE int8_t* i8(int64_t r) const { return reinterpret_cast<int8_t*>(row(r)); }
    OCTAVO_INLINE ActivationGroup* groups(int64_t r) const { return reinterpret_cast<ActivationGroup*>(i8(r) + stride); }
    OCTAVO_INLINE RowScale& row_scale(int64_t r) const { return *reinterpret_cast<RowScale*>(i8(r) + stride); }
};

constexpr int64_t bytes_of_row(Element element, int64_t stride) {
    switch (element) {
        case Element::f32: return stride * int64_t(sizeof(float));
        case Element::bf16: return stride * int64_t(sizeof(bf16));
        case Element::i8_groups: return stride + stride / kQuantGroup * int64_t(sizeof(ActivationGroup));
        case Element::i8_rows: return stride + 64;  // rows of whole cache lines, as AMX likes them
    }
    return 0;
}

// A weight [rows, columns], packed in blocks of 16 rows, padded with zeros. If `gated`, blocks of the upper half of the
// rows (up) alternate with those of the lower half (gate), so that a tile has both and can combine them.
//
// In bf16, a block is [pairs of columns][16][2]: a pair is one vector operand of vdpbf16ps, 16 pairs are one AMX tile.
// With integers, it is [groups][8][16][4] of 8 bits: 4 columns of 16 rows are one vector operand of vpdpbusd, a group
// is half an AMX tile; or [groups][4][16][4] of 2 x 4 bits, the low ones from the group's first half. After the integers
// come the scales of each group, [scales][16], and its minima; or, if they are per row, the 16 scales.
struct Weight {
    int64_t rows = 0, columns = 0;
    Encoding encoding = {};
    bool gated = false;
    int64_t blocks = 0, groups = 0;  // of kQuantGroup columns
    int64_t block_bytes = 0;
    std::byte* data = nullptr;

    OCTAVO_INLINE int64_t words() const { return groups * kQuantGroup * encoding.bits / 32; }  // of 4 bytes, in a row
    OCTAVO_INLINE std::byte* block(int64_t index) const { return data + index * block_bytes; }
    OCTAVO_INLINE bf16* b16_block(int64_t index) const { return reinterpret_cast<bf16*>(block(index)); }
};

// The sizes that do not change from one step to the next.
struct Shape {
    int64_t heads, kv_heads, head_dim, page_size;
    float norm_eps;
    bool int8_kv;

    OCTAVO_INLINE int64_t block_elements() const { return kSpan * head_dim; }  // of K, or of V, of one head in a block
    OCTAVO_INLINE int64_t kv_bytes() const {  // of that
        return int8_kv ? block_elements() + kSpan * int64_t(sizeof(float)) : block_elements() * int64_t(sizeof(bf16));
    }
    OCTAVO_INLINE int64_t sums_stride() const { return head_dim + 2 * kBlock; }   // floats, of attention's sums
    OCTAVO_INLINE int64_t blocks_per_page() const { return page_size / kSpan; }
};

enum class Op { rotary, embed, norm, linear, rope_and_cache, attention, quantize, observe, sampled_rows, sample };

struct Instruction {
    Op op;
    Matrix x = {}, out = {}, residual = {};  // residual.data may be null
    const Weight* weight = nullptr;          // embed, linear
    const float* vector = nullptr;   // norm: its weight; linear: the bias or null; rope_and_cache: q_norm or null
    const float* vector2 = nullptr;  // rope_and_cache: k_norm or null
    double* squares = nullptr;       // observe: a sum per column
    int64_t width = 0;               // columns of x, of embed: of out
    int64_t layer = 0, window = 0;
    Activation activation = Activation::none;
    bool sampled = false;  // on the sampled rows only
};

// Rows of one sequence, one after another.
struct RowTile {
    int32_t sequence, first, count;
};

// Rows, times a kv head, times a part of their context or all of it.
struct AttentionTile {
    RowTile rows;
    int32_t part;      // or -1: all of them
    int32_t split;     // how many `rows` before these are cut into parts
    int64_t part_sums; // how many queries of parts before these have their sums in Step::part_sums
};

// How this step cuts a linear: into panels of the weight, and each of those by rows.
struct Cut {
    int64_t panel;  // blocks
    int64_t rows;   // a multiple of kGroup
    int64_t row_tiles;
};

// Memory that will be wanted soon, to be fetched into the second-level cache on the way.
struct Ahead {
    const char *at = nullptr, *end = nullptr;

    // The `index`-th of `parts` even parts.
    OCTAVO_INLINE Ahead part(int64_t index, int64_t parts) const {
        const int64_t lines = (end - at) / 64;
        return {at + index * lines / parts * 64, at + (index + 1) * lines / parts * 64};
    }
};

struct Step {
    const Shape* shape;
    int64_t rows, sampled;
    const int32_t *tokens, *positions, *sample_rows;
    const int32_t* page_tables;
    int64_t pages_per_sequence;
    std::byte* kv;
    int64_t page_bytes;
    const float* rotary;             // [rows][2][head_dim / 2]: cosines, then sines
    const RowTile* cache_tiles;      // rows that fall into one block of the KV cache
    const AttentionTile* attention_tiles;  // each for every kv head
    float* part_sums;     // [of parts: queries][sums_stride]
    int32_t* parts_done;  // [rows that are cut into parts][kv_heads]
    int64_t rows_per_tile;           // of row-wise instructions

    // K of block `block` (positions 32 block ... 32 block + 31) of a sequence; V follows it.
    OCTAVO_INLINE std::byte* kv_block(int64_t sequence, int64_t block, int64_t layer, int64_t kv_head) const {
        const int64_t per_page = shape->blocks_per_page();
        const int64_t page = page_tables[sequence * pages_per_sequence + block / per_page];
        const int64_t index = (layer * shape->kv_heads + kv_head) * per_page + block % per_page;
        return kv + page * page_bytes + index * 2 * shape->kv_bytes();
    }
};

// A group of columns of 16 rows in 4 bits: q * scale + minimum. The floats are exact in half precision.
struct FourBits {
    uint8_t q[kQuantGroup][kBlock];
    float scale[kBlock], minimum[kBlock];
};

// A thread's own working memory.
struct Scratch {
    float* sums;     // [kGroup][kMaxPanel * kBlock]
    float* scores;   // [attention rows][kSpan]
    float* part_sums;    // [attention rows][sums_stride]: of one part
    float* sums_so_far;  // [attention rows][sums_stride]: of all parts
    bf16* queries;   // [attention rows][head_dim]
    bf16* shares;    // [attention rows][kSpan], the softmax's weights
    bf16* kv;        // [block_elements], K or V of a block, if the cache holds int8
    float* row;          // of activations
    std::byte* widened;  // the integers of a block, a byte each
};

using RowKernel = void (*)(const Instruction&, const Step&, int64_t begin, int64_t end, Scratch&);
using CacheKernel = void (*)(const Instruction&, const Step&, int64_t tile, Scratch&);
using AttentionKernel = void (*)(const Instruction&, const Step&, int64_t tile, int64_t next_tile, Scratch&);
using LinearKernel = void (*)(const Instruction&, const Cut&, int64_t rows, int64_t tile, Ahead, Scratch&);
using FourBitsKernel = void (*)(const float (*x)[kBlock], const float* importance, FourBits&);

struct Kernels {
    void (*start_thread)();  // before a thread's first tile of a step
    void (*stop_thread)();   // after its last
    RowKernel embed, norm, quantize, sampled_rows;
    CacheKernel rope_and_cache;
    AttentionKernel attention;
    LinearKernel linear;
    FourBitsKernel quantize_to_4;  // x: [kQuantGroup][kBlock]; importance: of its columns
    int64_t (*peak_products)(float* out);  // for the ceilings, see peak.h
    int64_t (*peak_integer_products)(float* out);
    Scan scan;
};

}  // namespace octavo
