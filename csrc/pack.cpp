#include "pack.h"

#include <cstring>
#include <unordered_map>

#include "quants.h"

namespace octavo {

namespace {

bf16 to_bf16(float value) {  // to nearest, ties to even
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return bf16(value != value ? 0x7fc0 : rounded);
}

// Row `index` of the weight as bf16.
void read_row(const std::vector<Part>& parts, int64_t index, int64_t columns, float* floats, bf16* to) {
    auto part = parts.begin();
    for (; index >= part->rows; ++part) index -= part->rows;
    const uint8_t* from = part->data + (part->row_order ? part->row_order[index] : index) * part->row_bytes;
    if (part->format == GGML_BF16) {
        std::memcpy(to, from, columns * sizeof(bf16));
    } else {
        dequantize_row(part->format, from, floats, columns);
        for (int64_t i = 0; i < columns; i++) to[i] = to_bf16(floats[i]);
    }
}

}  // namespace

int format_named(const std::string& name) {
    static const std::unordered_map<std::string, int> formats = {
        {"F32", GGML_F32},   {"F16", GGML_F16},   {"BF16", GGML_BF16}, {"Q4_0", GGML_Q4_0}, {"Q4_1", GGML_Q4_1},
        {"Q5_0", GGML_Q5_0}, {"Q5_1", GGML_Q5_1}, {"Q8_0", GGML_Q8_0}, {"Q2_K", GGML_Q2_K}, {"Q3_K", GGML_Q3_K},
        {"Q4_K", GGML_Q4_K}, {"Q5_K", GGML_Q5_K}, {"Q6_K", GGML_Q6_K},
    };
    const auto found = formats.find(name);
    return found == formats.end() ? -1 : found->second;
}

void pack_block(const Weight& weight, const std::vector<Part>& parts, int64_t block, float* scratch) {
    const int64_t rows = weight.gated ? weight.rows / 2 : weight.rows;  // of each half
    const int64_t first = (weight.gated ? block / 2 : block) * kBlock;
    const int64_t offset = weight.gated && block % 2 ? rows : 0;
    const int64_t columns = weight.columns, pairs = (columns + 1) / 2;
    bf16* lines = reinterpret_cast<bf16*>(scratch + columns);  // [kBlock][2 pairs]
    std::memset(lines, 0, kBlock * pairs * sizeof(uint32_t));
    for (int64_t i = 0; i < kBlock && first + i < rows; i++)
        read_row(parts, offset + first + i, columns, scratch, lines + i * 2 * pairs);

    bf16* to = weight.data + block * weight.pairs * kBlock * 2;  // fresh memory: what is not written is zero
    for (int64_t p = 0; p < pairs; p++)
        for (int64_t i = 0; i < kBlock; i++)
            std::memcpy(to + (p * kBlock + i) * 2, lines + (i * pairs + p) * 2, sizeof(uint32_t));
}

}  // namespace octavo
