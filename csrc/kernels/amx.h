// The products of product.h and integers.h on AMX tiles: 32 rows times 32 columns in four tiles of sums, 64 bytes of k
// at a time; with integers that are scaled in groups, 16 rows times 16 columns.
//
// This is inline assembly because GCC 12's intrinsics are unsafe: _tile_loadconfig is declared to read 8 of its 64
// bytes, and _tile_loadd is not ordered after earlier stores.
#pragma once

#include <type_traits>

#include "integers.h"
#include "product.h"

namespace octavo::OCTAVO_ISA {

constexpr int64_t kGroupRows = 32, kIntegerGroupRows = 32, kSpanBlocks = 2, kSpanBlocksAlone = 2;

// All eight tiles have 16 rows of 64 bytes. Rows past the ones in use may hold anything: rows of a product are
// independent.
struct TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
static_assert(sizeof(TileConfig) == 64);

OCTAVO_INLINE void configure(const TileConfig& config) { asm volatile("ldtilecfg %0" ::"m"(config) : "memory"); }

inline void start_thread() { configure({}); }

inline void stop_thread() { asm volatile("tilerelease" ::: "memory"); }

template <int kTile>
OCTAVO_INLINE void tile_load(const void* from, int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(kTile) : "memory");
}

// Load what is not soon used again, and leave the first-level cache to other data.
template <int kTile>
OCTAVO_INLINE void tile_load_once(const void* from, int64_t stride) {
    asm volatile("tileloaddt1 (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(kTile) : "memory");
}

template <int kTile>
OCTAVO_INLINE void tile_store(void* to, int64_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(kTile) : "memory");
}

template <int kTile>
OCTAVO_INLINE void tile_zero() {
    asm volatile("tilezero %%tmm%c0" ::"i"(kTile));
}

// Multiply bf16 by bf16 if Sum is F32, int8 by uint8 if it is I32, and add to tile kSums.
template <class Sum, int kSums, int kA, int kB>
OCTAVO_INLINE void tile_multiply() {
    if constexpr (std::is_same_v<Sum, F32>)
        asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSums), "i"(kA), "i"(kB));
    else
        asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSums), "i"(kA), "i"(kB));
}

// Load sums to add to, or begin with zeros.
template <int kTile, bool kAdd>
OCTAVO_INLINE void tile_begin(const float* from, int64_t stride) {
    if constexpr (kAdd)
        tile_load<kTile>(from, stride);
    else
        tile_zero<kTile>();
}

// Compute c = a * b, or c += a * b if kAdd, on up to 2 x 2 tiles: tiles 0 and 1 have the sums of the upper 16 rows of
// `a` (kUpper), tiles 2 and 3 those of the lower ones (kLower).
template <class Sum, bool kAdd, bool kUpper, bool kLower, bool kTwoColumns>
OCTAVO_INLINE void tile_product(Rows a, Columns b, int64_t tiles, float* c, int64_t c_stride, Ahead ahead,
                                int64_t ahead_rate) {
    const auto* columns = static_cast<const std::byte*>(b.data);
    const auto* upper = static_cast<const std::byte*>(a.data);
    const auto* lower = upper + (kUpper ? 16 * a.stride : 0);
    float* lower_c = c + (kUpper ? 16 * c_stride : 0);
    const int64_t stride = c_stride * 4;
    if constexpr (kUpper) tile_begin<0, kAdd>(c, stride);
    if constexpr (kUpper && kTwoColumns) tile_begin<1, kAdd>(c + 16, stride);
    if constexpr (kLower) tile_begin<2, kAdd>(lower_c, stride);
    if constexpr (kLower && kTwoColumns) tile_begin<3, kAdd>(lower_c + 16, stride);
    for (int64_t k = 0; k < tiles; k++) {
        if constexpr (kUpper) tile_load<4>(upper + k * 64, a.stride);
        if constexpr (kLower) tile_load<5>(lower + k * 64, a.stride);
        tile_load_once<6>(columns + k * 16 * b.word, b.word);
        if constexpr (kUpper) tile_multiply<Sum, 0, 4, 6>();
        if constexpr (kLower) tile_multiply<Sum, 2, 5, 6>();
        if constexpr (kTwoColumns) {
            tile_load_once<7>(columns + k * 16 * b.word + b.block, b.word);
            if constexpr (kUpper) tile_multiply<Sum, 1, 4, 7>();
            if constexpr (kLower) tile_multiply<Sum, 3, 5, 7>();
        }
        ahead.next(ahead_rate * 64).prefetch();
    }
    if constexpr (kUpper) tile_store<0>(c, stride);
    if constexpr (kUpper && kTwoColumns) tile_store<1>(c + 16, stride);
    if constexpr (kLower) tile_store<2>(lower_c, stride);
    if constexpr (kLower && kTwoColumns) tile_store<3>(lower_c + 16, stride);
}

// Compute a * b for up to 32 rows, `steps` tiles along k: kUpper and kLower say which tiles have rows.
template <class Sum, bool kAdd, bool kUpper, bool kLower>
OCTAVO_INLINE void product_on_tiles(Rows a, Columns b, int64_t blocks, int64_t steps, float* c, int64_t c_stride,
                                    Ahead ahead) {
    const int64_t parts = (blocks + 1) / 2;
    for (int64_t j = 0; j < blocks; j += 2) {
        const Ahead part = ahead.part(j / 2, parts);
        const int64_t rate = ((part.end - part.at) / 64 + steps - 1) / steps;
        if (blocks - j > 1)
            tile_product<Sum, kAdd, kUpper, kLower, true>(a, b.from(j), steps, c + j * kBlock, c_stride, part, rate);
        else
            tile_product<Sum, kAdd, kUpper, kLower, false>(a, b.from(j), steps, c + j * kBlock, c_stride, part, rate);
    }
}

// The product of attention, which reads and writes exactly `rows` rows. The tiles must have been set up for this number
// of rows, or another one with the same rest, by set_last_rows.
template <bool kAdd>
OCTAVO_INLINE void exact_product(Rows a, int64_t rows, Columns b, int64_t blocks, int64_t words, float* c,
                                 int64_t c_stride, Ahead ahead) {
    const int64_t parts = (rows + 15) / 16;
    int64_t r = 0;
    for (; rows - r > 32 || rows - r == 16; r += 16)
        product_on_tiles<F32, kAdd, true, false>(a.from(r), b, blocks, words / 16, c + r * c_stride, c_stride,
                                                 ahead.part(r / 16, parts));
    if (r == rows) return;
    const Ahead rest = {ahead.part(r / 16, parts).at, ahead.end};
    if (rows - r > 16)
        product_on_tiles<F32, kAdd, true, true>(a.from(r), b, blocks, words / 16, c + r * c_stride, c_stride, rest);
    else
        product_on_tiles<F32, kAdd, false, true>(a.from(r), b, blocks, words / 16, c + r * c_stride, c_stride, rest);
}

// Set up the lower tiles for the rows % 16 last rows of a product; for 16 rows if there is no rest.
OCTAVO_INLINE void set_last_rows(int64_t rows) {
    TileConfig config;
    if (rows % 16) config.rows[2] = config.rows[3] = config.rows[5] = rows % 16;
    configure(config);
}

// For groups of integers: tiles 4 and 5 hold activations, 16 rows of 32 bytes; tiles 6 and 7 hold 8 words of the
// weight.
constexpr TileConfig kIntegerConfig = {.row_bytes = {64, 64, 64, 64, 32, 32, 64, 64},
                                       .rows = {16, 16, 16, 16, 16, 16, 8, 8}};

constexpr int kTileHeight = 16;

// dots [16 rows][16 columns] = the integer sums of one group. Turns 0 and 1 use different tiles, so that they overlap.
template <int kTurn>
OCTAVO_INLINE void integer_dots(const int8_t* rows, int64_t row_bytes, const std::byte* values, int32_t* dots) {
    tile_zero<kTurn>();
    tile_load<4 + kTurn>(rows, row_bytes);
    tile_load<6 + kTurn>(values, 64);
    tile_multiply<I32, kTurn, 4 + kTurn, 6 + kTurn>();
    tile_store<kTurn>(dots, 64);
}

// Compute 16 rows times a block whose integers are `values`, one byte each. While the tiles multiply a group, the
// vector units scale the group before it, by the same operations as in integer_tile, so the bits are the same.
template <Encoding kEncoding>
void integer_tile_16(const Matrix& a, int64_t row, const Weight& weight, int64_t block, const std::byte* values,
                     float* c, int64_t c_stride, Ahead ahead, int64_t ahead_rate) {
    const std::byte* scales = weight.block(block) + weight.groups * kEncoding.value_bytes();
    const int8_t* rows = a.i8(row);
    const int64_t row_bytes = a.row_bytes;
    alignas(64) int32_t dots[2][kTileHeight * kLanes];
    F32 sums[kTileHeight] = {};
    SpanTree<kTileHeight> tree;
    int64_t span = 0;
    integer_dots<0>(rows, row_bytes, values, dots[0]);
    for (int64_t g = 0; g < weight.groups; g++) {
        if (const int64_t next = g + 1; next < weight.groups) {
            const int8_t* activations = rows + next * kQuantGroup;
            if (next % 2)
                integer_dots<1>(activations, row_bytes, values + next * kW8.value_bytes(), dots[1]);
            else
                integer_dots<0>(activations, row_bytes, values + next * kW8.value_bytes(), dots[0]);
        }
        ahead.next(ahead_rate * 64).prefetch();
        const F32 scale = load_scale<kEncoding>(scales, 0, 0);
        F32 minimum = {};
        if constexpr (kEncoding.minimum) minimum = load_scale<kEncoding>(scales, 1, 0);
    // clang-format off: it would unindent this line
        OCTAVO_UNROLL for (int r = 0; r < kTileHeight; r++) {
            // clang-format on
            const auto& group = reinterpret_cast<const ActivationGroup*>(rows + r * row_bytes + a.stride)[g];
            const I32 dot = load_as<I32>(dots[g % 2] + r * kLanes) + first_sum<kEncoding>(group, 0);
            sums[r] = add_scaled<kEncoding>(sums[r], dot, group, 0, scale, minimum);
        }
        scales += kEncoding.scale_bytes();
        if (g + 1 == weight.spans.ends[span]) tree.add(weight.spans, span++, sums);
    }
    OCTAVO_UNROLL for (int r = 0; r < kTileHeight; r++) store(c + r * c_stride, sums[r]);
}

// Expand the 4-bit integers of a block to one byte each.
OCTAVO_INLINE void widen(const Weight& weight, int64_t block, std::byte* to) {
    const std::byte* from = weight.block(block);
    for (int64_t g = 0; g < weight.groups; g++, to += kW8.value_bytes(), from += kW4.value_bytes())
        OCTAVO_UNROLL for (int word = 0; word < 4; word++) {
            const U32 stored = load_as<U32>(from + word * sizeof(U32));
            store_as<U32>(to + word * sizeof(U32), stored & 0x0f0f0f0f);
            store_as<U32>(to + (word + 4) * sizeof(U32), stored >> 4 & 0x0f0f0f0f);
        }
}

using IntegerTile16 = decltype(&integer_tile_16<kW8>);

struct IntegerTile16Table {
    IntegerTile16 tile[kEncodings];
};

template <int kNumber>
constexpr IntegerTile16 integer_tile_16_or_null() {
    constexpr Encoding kEncoding = encoding_number(kNumber);
    if constexpr (exists(kEncoding) && kEncoding.parts() == 1) return integer_tile_16<kEncoding>;
    return nullptr;
}

template <int... kNumber>
constexpr IntegerTile16Table make_integer_tiles_16(std::integer_sequence<int, kNumber...>) {
    return {{integer_tile_16_or_null<kNumber>()...}};
}

constexpr IntegerTile16Table kIntegerTiles16 = make_integer_tiles_16(std::make_integer_sequence<int, kEncodings>());
constexpr int64_t kFewRows = 8;  // with fewer rows, vectors are faster than tiles

// Compute integer_product, which this calls for few rows, and for encodings with two scales in a group.
OCTAVO_INLINE void integer_product_on_tiles(const Matrix& a, int64_t row, int64_t rows, const Weight& weight,
                                            int64_t block, int64_t blocks, float* c, int64_t c_stride, Ahead ahead,
                                            std::byte* widened) {
    const IntegerTile16 tile = kIntegerTiles16.tile[number_of(weight.encoding)];
    if (!tile || rows < kFewRows) return integer_product(a, row, rows, weight, block, blocks, c, c_stride, ahead);
    const int64_t count = blocks * ((rows + kTileHeight - 1) / kTileHeight) * weight.groups;
    const int64_t rate = ((ahead.end - ahead.at) / 64 + count - 1) / count;
    configure(kIntegerConfig);
    for (int64_t j = 0; j < blocks; j++) {
        const std::byte* values = weight.encoding.bits == 8 ? weight.block(block + j) : widened;
        if (weight.encoding.bits == 4) widen(weight, block + j, widened);
        for (int64_t r = 0; r < rows; r += kTileHeight) {
            tile(a, row + r, weight, block + j, values, c + r * c_stride + j * kBlock, c_stride, ahead, rate);
            ahead.at += rate * weight.groups * 64;
        }
    }
    configure({});
}

OCTAVO_INLINE void group_product(const Instruction& op, int64_t row, int64_t rows, int64_t block, int64_t blocks,
                                 Ahead ahead, Scratch& scratch) {
    integer_product_on_tiles(op.x, row, rows, *op.weight, block, blocks, scratch.sums, kSumsStride, ahead,
                             scratch.widened);
}

template <class Sum>
OCTAVO_INLINE void weight_product(Rows a, int64_t rows, Columns b, int64_t blocks, int64_t words, float* c,
                                  int64_t c_stride, Ahead ahead) {
    const auto tiles = rows > 16 ? product_on_tiles<Sum, false, true, true> : product_on_tiles<Sum, false, true, false>;
    tiles(a, b, blocks, words / 16, c, c_stride, ahead);
}

}  // namespace octavo::OCTAVO_ISA
