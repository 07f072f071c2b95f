// The block layouts are GGML's (ggml-common.h and ggml-quants.c of llama.cpp): a block is scales, then packed integers.
#include "quants.h"

#include <bit>
#include <cstring>

namespace octavo {
namespace {

constexpr int kSuper = 256;  // values in a block of a K-quant

uint16_t u16(const uint8_t* p) { return static_cast<uint16_t>(p[0] | p[1] << 8); }

uint32_t u32(const uint8_t* p) { return u16(p) | static_cast<uint32_t>(u16(p + 2)) << 16; }

float half(const uint8_t* p) { return from_half(u16(p)); }

float f32(const uint8_t* p) { return std::bit_cast<float>(u32(p)); }

float bf16(const uint8_t* p) { return std::bit_cast<float>(static_cast<uint32_t>(u16(p)) << 16); }

template <float (*value)(const uint8_t*), int64_t bytes>
void read_floats(const uint8_t* src, float* dst, int64_t n) {
    for (int64_t i = 0; i < n; ++i) dst[i] = value(src + i * bytes);
}

// Each of the following functions reads one block of a format.

void set_scale(Group& group, float scale) { group.scale[0] = group.scale[1] = scale; }

void set_minimum(Group& group, float minimum) { group.minimum[0] = group.minimum[1] = minimum; }

void q8_0(const uint8_t* block, Group* group) {
    set_scale(*group, half(block));
    for (int i = 0; i < 32; ++i) group->q[i] = block[2 + i] ^ 0x80;  // + 128
}

// Low nibbles are values 0 ... 15, high nibbles 16 ... 31.
void read_nibbles(const uint8_t* packed, uint8_t* q) {
    for (int i = 0; i < 16; ++i) {
        q[i] = packed[i] & 15;
        q[i + 16] = packed[i] >> 4;
    }
}

// Bit i is the fifth bit of value i.
void add_fifth_bits(uint32_t bits, uint8_t* q) {
    for (int i = 0; i < 32; ++i) q[i] |= (bits >> i & 1) << 4;
}

void q4_0(const uint8_t* block, Group* group) {
    set_scale(*group, half(block));
    read_nibbles(block + 2, group->q);
}

void q4_1(const uint8_t* block, Group* group) {
    set_scale(*group, half(block));
    set_minimum(*group, half(block + 2));
    read_nibbles(block + 4, group->q);
}

void w4g32(const uint8_t* block, Group* group) {
    set_scale(*group, f32(block));
    set_minimum(*group, f32(block + 4));
    read_nibbles(block + 8, group->q);
}

// The integers are signed: adding 128 to make them unsigned moves the minimum by -128 * scale.
void w8g32(const uint8_t* block, Group* group) {
    const float scale = f32(block);
    set_scale(*group, scale);
    set_minimum(*group, f32(block + 4) - 128 * scale);
    for (int i = 0; i < 32; ++i) group->q[i] = block[8 + i] ^ 0x80;  // + 128
}

void q5_0(const uint8_t* block, Group* group) {
    set_scale(*group, half(block));
    read_nibbles(block + 6, group->q);
    add_fifth_bits(u32(block + 2), group->q);
}

void q5_1(const uint8_t* block, Group* group) {
    set_scale(*group, half(block));
    set_minimum(*group, half(block + 2));
    read_nibbles(block + 8, group->q);
    add_fifth_bits(u32(block + 4), group->q);
}

// 16 groups of 16: 4-bit scales and minima [16], 2-bit values [64], d, dmin.
void q2_k(const uint8_t* block, Group* groups) {
    const float d = half(block + 80), dmin = half(block + 82);
    for (int i = 0; i < 16; ++i) {
        groups[i / 2].scale[i % 2] = d * (block[i] & 15);
        groups[i / 2].minimum[i % 2] = -dmin * (block[i] >> 4);
    }
    for (int i = 0; i < kSuper; ++i)
        groups[i / 32].q[i % 32] = block[16 + i / 128 * 32 + i % 32] >> (i / 32 % 4 * 2) & 3;
}

// 16 groups of 16: third bits [32], low 2 bits [64], 6-bit scales [12], d. A clear third bit means minus 4.
void q3_k(const uint8_t* block, Group* groups) {
    const float d = half(block + 108);
    const uint8_t* packed = block + 96;  // low nibbles of the 16 scales in 8 bytes, then their high 2 bits in 4
    for (int i = 0; i < 16; ++i) {
        const int low = packed[i % 8] >> (i / 8 * 4) & 15, high = packed[8 + i % 4] >> (i / 4 * 2) & 3;
        groups[i / 2].scale[i % 2] = d * ((low | high << 4) - 32);
    }
    for (int i = 0; i < kSuper; ++i) {
        const int low = block[32 + i / 128 * 32 + i % 32] >> (i / 32 % 4 * 2) & 3, high = block[i % 32] >> (i / 32) & 1;
        groups[i / 32].q[i % 32] = static_cast<uint8_t>(low | high << 2);
    }
}

// Scale and minimum of group 0 ... 7 of Q4_K and Q5_K: d and dmin, times integers of 6 bits that are packed in 12 bytes.
void read_scale(const uint8_t* block, int group, Group* to) {
    const uint8_t* packed = block + 4;
    int scale = packed[group % 4], minimum = packed[group % 4 + 4];
    if (group < 4) {
        scale &= 63, minimum &= 63;
    } else {
        const int both = packed[group + 4];
        scale = (both & 15) | scale >> 6 << 4, minimum = both >> 4 | minimum >> 6 << 4;
    }
    set_scale(*to, half(block) * scale);
    set_minimum(*to, -half(block + 2) * minimum);
}

// 8 groups of 32: d, dmin, scales and minima [12], 4-bit values [128].
void q4_k(const uint8_t* block, Group* groups) {
    for (int group = 0; group < 8; ++group) {
        read_scale(block, group, groups + group);
        const uint8_t* q = block + 16 + group / 2 * 32;
        for (int i = 0; i < 32; ++i) groups[group].q[i] = q[i] >> (group % 2 * 4) & 15;
    }
}

// As Q4_K, with fifth bits [32] before the values: bit g of byte i belongs to value i of group g.
void q5_k(const uint8_t* block, Group* groups) {
    for (int group = 0; group < 8; ++group) {
        read_scale(block, group, groups + group);
        const uint8_t *high = block + 16, *q = block + 48 + group / 2 * 32;
        for (int i = 0; i < 32; ++i)
            groups[group].q[i] = static_cast<uint8_t>((q[i] >> (group % 2 * 4) & 15) | (high[i] >> group & 1) << 4);
    }
}

// 16 groups of 16: low 4 bits [128], high 2 bits [64], signed scales [16], d.
void q6_k(const uint8_t* block, Group* groups) {
    const float d = half(block + 208);
    for (int i = 0; i < 16; ++i) groups[i / 2].scale[i % 2] = d * static_cast<int8_t>(block[192 + i]);
    for (int i = 0; i < kSuper; ++i) {
        const int low = block[i / 128 * 64 + i % 64] >> (i / 64 % 2 * 4) & 15;
        const int high = block[128 + i / 128 * 32 + i % 32] >> (i / 32 % 4 * 2) & 3;
        groups[i / 32].q[i % 32] = static_cast<uint8_t>(low | high << 4);
    }
}

// How to read a format. `zero`: see read_groups.
struct Reader {
    Encoding encoding;
    int zero;
    void (*read)(const uint8_t* block, Group* groups);               // of a format of integers
    void (*read_floats)(const uint8_t* src, float* dst, int64_t n);  // of a format of floats
};

constexpr Encoding kTwoScales{8, 2, false, true};

// By the names of block_formats.def.
namespace readers {
constexpr Reader F32{{}, 0, nullptr, read_floats<f32, 4>};
constexpr Reader F16{{}, 0, nullptr, read_floats<half, 2>};
constexpr Reader BF16{{}, 0, nullptr, read_floats<bf16, 2>};
constexpr Reader Q4_0{{4}, 8, q4_0, nullptr};
constexpr Reader Q4_1{{4, 1, true}, 0, q4_1, nullptr};
constexpr Reader Q5_0{{8}, 16, q5_0, nullptr};
constexpr Reader Q5_1{{8, 1, true}, 0, q5_1, nullptr};
constexpr Reader Q8_0{{8}, 128, q8_0, nullptr};
constexpr Reader Q2_K{{8, 2, true, true}, 0, q2_k, nullptr};
constexpr Reader Q3_K{kTwoScales, 4, q3_k, nullptr};
constexpr Reader Q4_K{{4, 1, true, true}, 0, q4_k, nullptr};
constexpr Reader Q5_K{{8, 1, true, true}, 0, q5_k, nullptr};
constexpr Reader Q6_K{kTwoScales, 32, q6_k, nullptr};
constexpr Reader W4G32{{4, 1, true, true}, 0, w4g32, nullptr};
constexpr Reader W8G32{{8, 1, true, true}, 0, w8g32, nullptr};
}  // namespace readers

struct Layout : Reader {
    const char* name;
    int format;
    int64_t values, bytes;  // of a block
};

constexpr Layout kLayouts[] = {
#define OCTAVO_FORMAT(name, number, values, bytes) {readers::name, #name, number, values, bytes},
#include "../../src/octavo/formats/block_formats.def"
#undef OCTAVO_FORMAT
};

const Layout* find_layout(int format) {
    for (const Layout& layout : kLayouts)
        if (layout.format == format) return &layout;
    return nullptr;
}

}  // namespace

int format_named(const std::string& name) {
    for (const Layout& layout : kLayouts)
        if (name == layout.name) return layout.format;
    return -1;
}

size_t row_bytes(int format, int64_t n) {
    const Layout* layout = find_layout(format);
    return layout && n >= 0 && n % layout->values == 0 ? static_cast<size_t>(n / layout->values * layout->bytes) : 0;
}

Encoding encoding_of(int format) {
    const Layout* layout = find_layout(format);
    return layout ? layout->encoding : Encoding{};
}

int read_groups(int format, const void* src, Group* dst, int64_t n) {
    const Layout& layout = *find_layout(format);
    const auto* block = static_cast<const uint8_t*>(src);
    for (int64_t i = 0; i < n; i += layout.values, block += layout.bytes) layout.read(block, dst + i / kQuantGroup);
    for (Group* group = dst; layout.zero && group < dst + n / kQuantGroup; ++group)
        for (int part = 0; part < 2; ++part)
            group->minimum[part] = static_cast<float>(-layout.zero) * group->scale[part];
    return layout.zero;
}

bool dequantize_row(int format, const void* src, float* dst, int64_t n) {
    if (row_bytes(format, n) == 0) return false;
    const Layout& layout = *find_layout(format);
    const auto* block = static_cast<const uint8_t*>(src);
    if (layout.read_floats) layout.read_floats(block, dst, n);
    for (int64_t i = 0; layout.read && i < n; i += layout.values, block += layout.bytes) {
        Group groups[kSuper / kQuantGroup];
        layout.read(block, groups);
        for (int64_t v = 0; v < layout.values; ++v) {
            const Group& group = groups[v / kQuantGroup];
            const int q = group.q[v % kQuantGroup] - layout.zero, half = v % kQuantGroup / 16;
            dst[i + v] = group.scale[half] * static_cast<float>(q);
            if (layout.zero == 0) dst[i + v] += group.minimum[half];
        }
    }
    return true;
}

bool all_within(const float* values, int64_t n, float limit) {
    const auto most =
        std::bit_cast<int32_t>(limit);  // magnitudes are in the order of their bits; NaN is above infinity
    int32_t above = 0;
    for (int64_t i = 0; i < n; ++i) above |= (std::bit_cast<int32_t>(values[i]) & 0x7fffffff) > most;
    return !above;
}

float from_half(uint16_t h) {
    const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16, exponent = h >> 10 & 31, fraction = h & 1023;
    if (exponent == 0) {  // zero or subnormal: fraction * 2^-24
        const float value = static_cast<float>(fraction) * 0x1p-24f;
        return sign ? -value : value;
    }
    const uint32_t wide = exponent == 31 ? 255 : exponent + 112;
    return std::bit_cast<float>(sign | wide << 23 | fraction << 13);
}

uint16_t to_half(float value) {
    const uint32_t bits = std::bit_cast<uint32_t>(value), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
    if (magnitude >= 0x47800000) return static_cast<uint16_t>(sign | (magnitude > 0x7f800000 ? 0x7e00 : 0x7c00));
    if (magnitude < 0x38800000) {  // subnormal: the last bit of 0.5 is 2^-24
        const float shifted = std::bit_cast<float>(magnitude) + 0.5f;
        return static_cast<uint16_t>(sign | (std::bit_cast<uint32_t>(shifted) - std::bit_cast<uint32_t>(0.5f)));
    }
    const uint32_t rounded = magnitude + 0xfff + (magnitude >> 13 & 1);
    return static_cast<uint16_t>(sign | (rounded - 0x38000000) >> 13);
}

}  // namespace octavo
