#include "pack.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "quantize.h"
#include "quants.h"

namespace octavo {

namespace {

bf16 to_bf16(float value) {  // to nearest, ties to even
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return bf16(value != value ? 0x7fc0 : rounded);
}

// The largest magnitude that can be quantized: to 8 bits, so that sums in the rotation stay finite; to 4 bits, so that
// scale and minimum fit in half precision.
constexpr float kMost8 = 1e30f, kMost4 = 65504;

struct StoredRow {
    int part;  // index of the tensor that the row belongs to
    int format;
    const uint8_t* data;
};

// The rows of one block of a packed weight; fewer than kBlock in the last one.
struct BlockRows {
    StoredRow row[kBlock];
    int64_t count = 0;
};

StoredRow find_row(const std::vector<Part>& parts, int64_t index) {
    auto part = parts.begin();
    for (; index >= part->rows; ++part) index -= part->rows;
    const uint8_t* data = part->data + (part->row_order ? part->row_order[index] : index) * part->row_bytes;
    return {int(part - parts.begin()), part->format, data};
}

BlockRows find_rows(const Weight& weight, const std::vector<Part>& parts, int64_t block) {
    const int64_t rows = weight.gated ? weight.rows / 2 : weight.rows;  // of each half
    const int64_t first = (weight.gated ? block / 2 : block) * kBlock;
    const int64_t offset = weight.gated && block % 2 ? rows : 0;
    BlockRows found;
    for (; found.count < kBlock && first + found.count < rows; found.count++)
        found.row[found.count] = find_row(parts, offset + first + found.count);
    return found;
}

bool all_finite(const bf16* values, int64_t n) {
    int32_t any = 0;
    for (int64_t i = 0; i < n; i++) any |= (values[i] & 0x7f80) == 0x7f80;
    return !any;
}

bool all_finite(const Group* groups, int64_t n) {
    bool all = true;
    for (int64_t g = 0; g < n; g++)
        for (int part = 0; part < 2; part++)
            all &= std::isfinite(groups[g].scale[part]) && std::isfinite(groups[g].minimum[part]);
    return all;
}

// Returns whether all values are finite.
bool read_bf16(StoredRow row, int64_t columns, float* floats, bf16* to) {
    if (row.format == FORMAT_BF16) {
        std::memcpy(to, row.data, columns * sizeof(bf16));
    } else {
        dequantize_row(row.format, row.data, floats, columns);
        for (int64_t i = 0; i < columns; i++) to[i] = to_bf16(floats[i]);
    }
    return all_finite(to, columns);
}

// Reads the file's own integers if the encoding stores them without loss, else quantizes to kW8. Returns whether all
// values are finite.
bool read_integers(StoredRow row, Encoding encoding, const Spans& spans, int64_t columns, float* floats, Group* to) {
    if (!holds_losslessly(encoding, row.format)) {
        dequantize_row(row.format, row.data, floats, columns);
        const bool finite = all_within(floats, columns, kMost8);
        for (int64_t span = 0; span < spans.count; span++) {
            const int64_t begin = spans.begin(span), end = spans.ends[span];
            quantize_groups(floats + begin * kQuantGroup, to + begin,
                            std::min(columns, end * kQuantGroup) - begin * kQuantGroup);
        }
        return finite;
    }
    const int64_t groups = columns / kQuantGroup;
    const int zero = read_groups(row.format, row.data, to, columns);
    for (int64_t g = 0; !encoding.minimum && g < groups; g++)
        for (uint8_t& q : to[g].q) q = uint8_t(q + encoding.zero() - zero);
    return all_finite(to, groups);
}

// Writes the scale or the minimum of one row of the 16 in a line.
void store_scale(Encoding encoding, std::byte* scales, int64_t line, int64_t lane, float value) {
    const int64_t index = line * kBlock + lane;
    const uint16_t half = to_half(value);
    if (encoding.wide)
        std::memcpy(scales + index * sizeof value, &value, sizeof value);
    else
        std::memcpy(scales + index * sizeof half, &half, sizeof half);
}

void store_integers(const Weight& weight, int64_t block, int64_t lane, const Group* groups) {
    const Encoding e = weight.encoding;
    std::byte* values = weight.block(block);
    std::byte* scales = values + weight.groups * e.value_bytes();
    for (int64_t g = 0; g < weight.groups; g++, values += e.value_bytes(), scales += e.scale_bytes()) {
        const Group& group = groups[g];
        for (int word = 0; word < e.bits; word++) {  // of 4 columns; with 4 bits, also of the 4 that are 16 further on
            std::byte* to = values + (word * kBlock + lane) * 4;
            for (int i = 0; i < 4; i++)
                to[i] = std::byte(group.q[word * 4 + i] | (e.bits == 4 ? group.q[word * 4 + i + 16] << 4 : 0));
        }
        for (int part = 0; part < e.scales; part++) {
            store_scale(e, scales, part, lane, group.scale[part]);
            if (e.minimum) store_scale(e, scales, e.scales + part, lane, group.minimum[part]);
        }
    }
    for (int64_t span = 0; e.per_row() && span < weight.spans.count; span++)
        store_scale(e, scales, span, lane, groups[weight.spans.begin(span)].scale[0]);
}

// Quantizes the rows of a block to 4 bits. Rows that kW4 stores without loss are skipped: their lanes get zeros. Returns
// the part of a row with a value that cannot be quantized, or -1.
int quantize_to_4(const Weight& weight, int64_t block, const BlockRows& rows, const float* column_weights,
                  FourBitsKernel search, float* scratch) {
    int damaged = -1;
    const float* floats[kBlock] = {};
    for (int64_t i = 0; i < rows.count; i++) {
        if (holds_losslessly(kW4, rows.row[i].format)) continue;
        float* to = scratch + i * weight.columns;
        dequantize_row(rows.row[i].format, rows.row[i].data, to, weight.columns);
        if (!all_within(to, weight.columns, kMost4)) damaged = rows.row[i].part;
        floats[i] = to;
    }
    std::byte* values = weight.block(block);
    std::byte* scales = values + weight.groups * kW4.value_bytes();
    for (int64_t g = 0; g < weight.groups; g++, values += kW4.value_bytes(), scales += kW4.scale_bytes()) {
        float x[kQuantGroup][kBlock];
        FourBits found;
        gather_columns(floats, g, weight.columns, x);
        search(x, column_weights + g * kQuantGroup, found);
        for (int64_t lane = 0; lane < kBlock; lane++) {
            for (int word = 0; word < kW4.bits; word++)
                for (int i = 0, column = word * 4; i < 4; i++, column++)
                    values[(word * kBlock + lane) * 4 + i] =
                        std::byte(found.q[column][lane] | found.q[column + kQuantGroup / 2][lane] << 4);
            store_scale(kW4, scales, 0, lane, found.scale[lane]);
            store_scale(kW4, scales, 1, lane, found.minimum[lane]);
        }
    }
    return damaged;
}

int pack_integers(const Weight& weight, int64_t block, const BlockRows& rows, const float* column_weights,
                  FourBitsKernel search, float* scratch) {
    const auto is_new = [&](const StoredRow& row) {
        return weight.encoding == kW4 && !holds_losslessly(kW4, row.format);
    };
    int damaged = -1;
    if (std::any_of(rows.row, rows.row + rows.count, is_new))
        damaged = quantize_to_4(weight, block, rows, column_weights, search, scratch);
    for (int64_t i = 0; i < rows.count; i++) {
        if (is_new(rows.row[i])) continue;
        Group* groups = reinterpret_cast<Group*>(scratch + weight.groups * kQuantGroup);
        if (!read_integers(rows.row[i], weight.encoding, weight.spans, weight.columns, scratch, groups))
            damaged = rows.row[i].part;
        store_integers(weight, block, i, groups);
    }
    return damaged;
}

int pack_bf16(const Weight& weight, int64_t block, const BlockRows& rows, float* scratch) {
    const int64_t pairs = (weight.columns + 1) / 2;
    bf16* lines = reinterpret_cast<bf16*>(scratch + weight.columns);  // [kBlock][2 pairs]
    std::memset(lines, 0, kBlock * pairs * sizeof(uint32_t));
    int damaged = -1;
    for (int64_t i = 0; i < rows.count; i++)
        if (!read_bf16(rows.row[i], weight.columns, scratch, lines + i * 2 * pairs)) damaged = rows.row[i].part;
    bf16* to = weight.b16_block(block);
    for (int64_t p = 0; p < pairs; p++)
        for (int64_t i = 0; i < kBlock; i++)
            std::memcpy(to + (p * kBlock + i) * 2, lines + (i * pairs + p) * 2, sizeof(uint32_t));
    return damaged;
}

}  // namespace

bool holds_losslessly(Encoding encoding, int format) {
    const Encoding own = encoding_of(format);
    return own.is_integer() && own.joined(encoding) == encoding;
}

int pack_block(const Weight& weight, const std::vector<Part>& parts, const float* column_weights, FourBitsKernel search,
               int64_t block, float* scratch) {
    const BlockRows rows = find_rows(weight, parts, block);  // the rest of the block stays zero, as it was allocated
    if (weight.encoding.is_integer()) return pack_integers(weight, block, rows, column_weights, search, scratch);
    return pack_bf16(weight, block, rows, scratch);
}

}  // namespace octavo
