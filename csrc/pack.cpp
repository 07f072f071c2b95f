#include "pack.h"

#include <cstring>
#include <unordered_map>

#include "quantise.h"
#include "quants.h"

namespace octavo {

namespace {

bf16 to_bf16(float value) {  // to nearest, ties to even
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return bf16(value != value ? 0x7fc0 : rounded);
}

struct StoredRow {
    int format;
    const uint8_t* data;
};

StoredRow find_row(const std::vector<Part>& parts, int64_t index) {
    auto part = parts.begin();
    for (; index >= part->rows; ++part) index -= part->rows;
    return {part->format, part->data + (part->row_order ? part->row_order[index] : index) * part->row_bytes};
}

void read_bf16(StoredRow row, int64_t columns, float* floats, bf16* to) {
    if (row.format == GGML_BF16) {
        std::memcpy(to, row.data, columns * sizeof(bf16));
    } else {
        dequantize_row(row.format, row.data, floats, columns);
        for (int64_t i = 0; i < columns; i++) to[i] = to_bf16(floats[i]);
    }
}

// The file's own integers, if the encoding can hold them; else new ones.
void read_integers(StoredRow row, Encoding encoding, int64_t columns, float* floats, Group* to) {
    if (!holds_losslessly(encoding, row.format)) {
        dequantize_row(row.format, row.data, floats, columns);
        quantise_groups(encoding, floats, to, columns);
        return;
    }
    const int zero = read_groups(row.format, row.data, to, columns);
    if (encoding.minimum) return;
    for (int64_t g = 0; g < columns / kQuantGroup; g++)
        for (uint8_t& q : to[g].q) q = uint8_t(q + encoding.zero() - zero);
}

// The scale or the minimum of one row in a line of 16.
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
        for (int word = 0; word < e.bits; word++) {  // of four columns; in 4 bits, beside the four that are 16 further
            std::byte* to = values + (word * kBlock + lane) * 4;
            for (int i = 0; i < 4; i++)
                to[i] = std::byte(group.q[word * 4 + i] | (e.bits == 4 ? group.q[word * 4 + i + 16] << 4 : 0));
        }
        for (int part = 0; part < e.scales; part++) {
            store_scale(e, scales, part, lane, group.scale[part]);
            if (e.minimum) store_scale(e, scales, e.scales + part, lane, group.minimum[part]);
        }
    }
    if (e.per_row()) store_scale(e, scales, 0, lane, groups[0].scale[0]);
}

}  // namespace

int format_named(const std::string& name) {
    static const std::unordered_map<std::string, int> formats = {
        {"F32", GGML_F32},   {"F16", GGML_F16},   {"BF16", GGML_BF16}, {"Q4_0", GGML_Q4_0}, {"Q4_1", GGML_Q4_1},
        {"Q5_0", GGML_Q5_0}, {"Q5_1", GGML_Q5_1}, {"Q8_0", GGML_Q8_0}, {"Q2_K", GGML_Q2_K}, {"Q3_K", GGML_Q3_K},
        {"Q4_K", GGML_Q4_K}, {"Q5_K", GGML_Q5_K}, {"Q6_K", GGML_Q6_K}, {"W4G32", W4G32},    {"W8G32", W8G32},
    };
    const auto found = formats.find(name);
    return found == formats.end() ? -1 : found->second;
}

bool holds_losslessly(Encoding encoding, int format) {
    const Encoding own = encoding_of(format);
    return own.is_integer() && own.joined(encoding) == encoding;
}

void pack_block(const Weight& weight, const std::vector<Part>& parts, int64_t block, float* scratch) {
    const int64_t rows = weight.gated ? weight.rows / 2 : weight.rows;  // of each half
    const int64_t first = (weight.gated ? block / 2 : block) * kBlock;
    const int64_t offset = weight.gated && block % 2 ? rows : 0;
    const int64_t columns = weight.columns, pairs = (columns + 1) / 2;
    bf16* lines = reinterpret_cast<bf16*>(scratch + columns + kRotated);  // [kBlock][2 pairs]
    std::memset(lines, 0, kBlock * pairs * sizeof(uint32_t));
    // What is not written is zero: the memory is fresh.
    for (int64_t i = 0; i < kBlock && first + i < rows; i++) {
        const StoredRow row = find_row(parts, offset + first + i);
        if (weight.encoding.is_integer()) {
            Group* groups = reinterpret_cast<Group*>(lines);
            read_integers(row, weight.encoding, columns, scratch, groups);
            store_integers(weight, block, i, groups);
        } else {
            read_bf16(row, columns, scratch, lines + i * 2 * pairs);
        }
    }
    if (weight.encoding.is_integer()) return;
    bf16* to = weight.b16_block(block);
    for (int64_t p = 0; p < pairs; p++)
        for (int64_t i = 0; i < kBlock; i++)
            std::memcpy(to + (p * kBlock + i) * 2, lines + (i * pairs + p) * 2, sizeof(uint32_t));
}

}  // namespace octavo
