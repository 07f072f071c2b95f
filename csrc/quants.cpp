// The block layouts are GGML's (ggml-common.h and ggml-quants.c of llama.cpp): a block is scales, then packed integers.
#include "quants.h"

#include <bit>
#include <cstring>

namespace octavo {
namespace {

constexpr int kSuper = 256;  // values in a block of a K-quant

uint16_t u16(const uint8_t* p) { return static_cast<uint16_t>(p[0] | p[1] << 8); }

uint32_t u32(const uint8_t* p) { return u16(p) | static_cast<uint32_t>(u16(p + 2)) << 16; }

float half(const uint8_t* p) {
    const uint16_t h = u16(p);
    const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16, exponent = h >> 10 & 31, fraction = h & 1023;
    if (exponent == 0) {  // zero or subnormal: fraction * 2^-24
        const float value = static_cast<float>(fraction) * 0x1p-24f;
        return sign ? -value : value;
    }
    const uint32_t wide = exponent == 31 ? 255 : exponent + 112;
    return std::bit_cast<float>(sign | wide << 23 | fraction << 13);
}

void f32(const uint8_t* block, float* y) { std::memcpy(y, block, sizeof *y); }

void f16(const uint8_t* block, float* y) { *y = half(block); }

void bf16(const uint8_t* block, float* y) { *y = std::bit_cast<float>(static_cast<uint32_t>(u16(block)) << 16); }

void q8_0(const uint8_t* block, float* y) {
    const float d = half(block);
    for (int i = 0; i < 32; ++i) y[i] = d * static_cast<int8_t>(block[2 + i]);
}

// The low nibbles are the first 16 values, the high ones the last 16.
void q4_0(const uint8_t* block, float* y) {
    const float d = half(block);
    for (int i = 0; i < 16; ++i) {
        y[i] = d * ((block[2 + i] & 15) - 8);
        y[i + 16] = d * ((block[2 + i] >> 4) - 8);
    }
}

void q4_1(const uint8_t* block, float* y) {
    const float d = half(block), min = half(block + 2);
    for (int i = 0; i < 16; ++i) {
        y[i] = d * (block[4 + i] & 15) + min;
        y[i + 16] = d * (block[4 + i] >> 4) + min;
    }
}

// As Q4, and bit i of 32 bits is the fifth bit of value i.
void q5_0(const uint8_t* block, float* y) {
    const float d = half(block);
    const uint32_t high = u32(block + 2);
    for (int i = 0; i < 16; ++i) {
        y[i] = d * (static_cast<int>((block[6 + i] & 15) | (high >> i & 1) << 4) - 16);
        y[i + 16] = d * (static_cast<int>((block[6 + i] >> 4) | (high >> (i + 16) & 1) << 4) - 16);
    }
}

void q5_1(const uint8_t* block, float* y) {
    const float d = half(block), min = half(block + 2);
    const uint32_t high = u32(block + 4);
    for (int i = 0; i < 16; ++i) {
        y[i] = d * static_cast<float>((block[8 + i] & 15) | (high >> i & 1) << 4) + min;
        y[i + 16] = d * static_cast<float>((block[8 + i] >> 4) | (high >> (i + 16) & 1) << 4) + min;
    }
}

// 16 groups of 16: 4-bit scales and minima [16], 2-bit values [64], d, dmin.
void q2_k(const uint8_t* block, float* y) {
    const float d = half(block + 80), dmin = half(block + 82);
    for (int i = 0; i < kSuper; ++i) {
        const uint8_t scale = block[i / 16];
        const int q = block[16 + i / 128 * 32 + i % 32] >> (i / 32 % 4 * 2) & 3;
        y[i] = d * (scale & 15) * q - dmin * (scale >> 4);
    }
}

// 16 groups of 16: third bits [32], low 2 bits [64], 6-bit scales [12], d. A clear third bit means minus 4.
void q3_k(const uint8_t* block, float* y) {
    const float d = half(block + 108);
    const uint8_t* packed = block + 96;  // low nibbles of the 16 scales in 8 bytes, then their high 2 bits in 4
    for (int i = 0; i < kSuper; ++i) {
        const int group = i / 16;
        const int low = packed[group % 8] >> (group / 8 * 4) & 15, high = packed[8 + group % 4] >> (group / 4 * 2) & 3;
        const int q = block[32 + i / 128 * 32 + i % 32] >> (i / 32 % 4 * 2) & 3;
        const int minus = block[i % 32] >> (i / 32) & 1 ? 0 : 4;
        y[i] = d * ((low | high << 4) - 32) * (q - minus);
    }
}

struct ScaleMin {
    int scale, min;
};

// Group 0..7 of the 6-bit scales and minima of Q4_K and Q5_K, in 12 bytes.
ScaleMin scale_min(const uint8_t* packed, int group) {
    if (group < 4) return {packed[group] & 63, packed[group + 4] & 63};
    return {(packed[group + 4] & 15) | packed[group - 4] >> 6 << 4, packed[group + 4] >> 4 | packed[group] >> 6 << 4};
}

// 8 groups of 32: d, dmin, scales and minima [12], 4-bit values [128].
void q4_k(const uint8_t* block, float* y) {
    const float d = half(block), dmin = half(block + 2);
    for (int group = 0; group < 8; ++group, y += 32) {
        const ScaleMin s = scale_min(block + 4, group);
        const uint8_t* q = block + 16 + group / 2 * 32;
        for (int i = 0; i < 32; ++i) y[i] = d * s.scale * (q[i] >> (group % 2 * 4) & 15) - dmin * s.min;
    }
}

// As Q4_K, with fifth bits [32] before the values: bit g of byte i belongs to value i of group g.
void q5_k(const uint8_t* block, float* y) {
    const float d = half(block), dmin = half(block + 2);
    for (int group = 0; group < 8; ++group, y += 32) {
        const ScaleMin s = scale_min(block + 4, group);
        const uint8_t *high = block + 16, *q = block + 48 + group / 2 * 32;
        for (int i = 0; i < 32; ++i)
            y[i] = d * s.scale * ((q[i] >> (group % 2 * 4) & 15) | (high[i] >> group & 1) << 4) - dmin * s.min;
    }
}

// 16 groups of 16: low 4 bits [128], high 2 bits [64], signed scales [16], d.
void q6_k(const uint8_t* block, float* y) {
    const float d = half(block + 208);
    for (int i = 0; i < kSuper; ++i) {
        const int low = block[i / 128 * 64 + i % 64] >> (i / 64 % 2 * 4) & 15;
        const int high = block[128 + i / 128 * 32 + i % 32] >> (i / 32 % 4 * 2) & 3;
        y[i] = d * static_cast<int8_t>(block[192 + i / 16]) * ((low | high << 4) - 32);
    }
}

struct Format {
    int type;
    int64_t values, bytes;  // of a block
    void (*read)(const uint8_t* src, float* dst, int64_t blocks);
};

template <int type, int64_t values, int64_t bytes, void (*block)(const uint8_t*, float*)>
constexpr Format make_format() {
    return {type, values, bytes, [](const uint8_t* src, float* dst, int64_t blocks) {
                for (int64_t i = 0; i < blocks; ++i) block(src + i * bytes, dst + i * values);
            }};
}

constexpr Format kFormats[] = {
    make_format<GGML_F32, 1, 4, f32>(),           make_format<GGML_F16, 1, 2, f16>(),
    make_format<GGML_BF16, 1, 2, bf16>(),         make_format<GGML_Q8_0, 32, 34, q8_0>(),
    make_format<GGML_Q4_0, 32, 18, q4_0>(),       make_format<GGML_Q4_1, 32, 20, q4_1>(),
    make_format<GGML_Q5_0, 32, 22, q5_0>(),       make_format<GGML_Q5_1, 32, 24, q5_1>(),
    make_format<GGML_Q2_K, kSuper, 84, q2_k>(),   make_format<GGML_Q3_K, kSuper, 110, q3_k>(),
    make_format<GGML_Q4_K, kSuper, 144, q4_k>(),  make_format<GGML_Q5_K, kSuper, 176, q5_k>(),
    make_format<GGML_Q6_K, kSuper, 210, q6_k>(),
};

const Format* find_format(int ggml_type) {
    for (const Format& format : kFormats)
        if (format.type == ggml_type) return &format;
    return nullptr;
}

}  // namespace

size_t row_bytes(int ggml_type, int64_t n) {
    const Format* format = find_format(ggml_type);
    return format && n >= 0 && n % format->values == 0 ? static_cast<size_t>(n / format->values * format->bytes) : 0;
}

bool dequantize_row(int ggml_type, const void* src, float* dst, int64_t n) {
    if (row_bytes(ggml_type, n) == 0) return false;
    const Format& format = *find_format(ggml_type);
    format.read(static_cast<const uint8_t*>(src), dst, n / format.values);
    return true;
}

}  // namespace octavo
