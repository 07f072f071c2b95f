// A vector of floats as wide as the instruction set's registers, and the operations on it that the kernels need. The
// including file defines OCTAVO_ISA (the namespace), and OCTAVO_AVX512 or OCTAVO_AVX2 or neither.
//
// Arithmetic is elementwise and compiled with -ffp-contract=off, so a lane's result depends only on its operands.
#pragma once

#if defined(OCTAVO_AVX512) || defined(OCTAVO_AVX2)
#include <immintrin.h>
#endif

#include <cstdint>
#include <cstring>

#include "kernels.h"

#define OCTAVO_UNROLL _Pragma("GCC unroll 24")  // early, so that small arrays become registers

namespace octavo::OCTAVO_ISA {

#ifdef OCTAVO_AVX512
constexpr int kLanes = 16;
#elif defined(OCTAVO_AVX2)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;  // SSE2 or NEON; GCC 12 splits vectors that are wider than the machine's into scalars
#endif
constexpr float kLog2E = 1.44269504088896341f;
constexpr int kVectors = kBlock / kLanes;  // in a block of 16 columns

typedef float F32 __attribute__((vector_size(kLanes * 4)));
typedef int32_t I32 __attribute__((vector_size(kLanes * 4)));
typedef uint32_t U32 __attribute__((vector_size(kLanes * 4)));
typedef uint16_t U16 __attribute__((vector_size(kLanes * 2)));

// A vector at any address. (With memcpy instead, GCC 12 keeps the vectors in memory, not in registers.)
template <typename V>
struct Unaligned {
    typedef V Type __attribute__((aligned(1), may_alias));
};

template <typename V, typename T>
OCTAVO_INLINE V load_as(const T* from) {
    return *reinterpret_cast<const typename Unaligned<V>::Type*>(from);
}

template <typename V, typename T>
OCTAVO_INLINE void store_as(T* to, V v) {
    *reinterpret_cast<typename Unaligned<V>::Type*>(to) = v;
}

OCTAVO_INLINE F32 load(const float* from) { return load_as<F32>(from); }
OCTAVO_INLINE void store(float* to, F32 v) { store_as<F32>(to, v); }
OCTAVO_INLINE F32 splat(float x) { return x - F32{}; }
OCTAVO_INLINE F32 zero() { return F32{}; }
OCTAVO_INLINE F32 select(I32 mask, F32 yes, F32 no) { return mask ? yes : no; }
OCTAVO_INLINE F32 max(F32 a, F32 b) { return a > b ? a : b; }

// Prefetch `bytes` from `from` on into the first-level cache: loading memory that another core has just written is
// slow.
OCTAVO_INLINE void prefetch(const void* from, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(from) + i);
}

// Return the size of the next step, at most `limit`, of a walk through `left`; the last two steps are about equal.
OCTAVO_INLINE int64_t even_step(int64_t left, int64_t limit) {
    return left <= limit ? left : left < 2 * limit ? (left + 1) / 2 : limit;
}

// Return a mask of the lanes, numbered from `first` on, that are in begin:end.
OCTAVO_INLINE I32 in_range(int64_t first, int64_t begin, int64_t end) {
    I32 lane;
    OCTAVO_UNROLL for (int i = 0; i < kLanes; i++) lane[i] = i;
    return (lane >= int32_t(begin - first)) & (lane < int32_t(end - first));
}

OCTAVO_INLINE F32 fma(F32 a, F32 b, F32 c) {
#if defined(OCTAVO_AVX512)
    return (F32)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(OCTAVO_AVX2)
    return (F32)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
    return a * b + c;
#endif
}

// Return the sum of the lanes, added in one order.
OCTAVO_INLINE float sum(F32 v) {
#ifdef OCTAVO_AVX512
    return _mm512_reduce_add_ps((__m512)v);
#else
    float lane[kLanes];
    store(lane, v);
    for (int width = kLanes / 2; width; width /= 2)
        for (int i = 0; i < width; i++) lane[i] += lane[i + width];
    return lane[0];
#endif
}

OCTAVO_INLINE int32_t sum(I32 v) {
#ifdef OCTAVO_AVX512
    return _mm512_reduce_add_epi32((__m512i)v);
#else
    int32_t total = v[0];
    for (int i = 1; i < kLanes; i++) total += v[i];
    return total;
#endif
}

OCTAVO_INLINE float maximum(F32 v) {
#ifdef OCTAVO_AVX512
    return _mm512_reduce_max_ps((__m512)v);
#else
    float lane[kLanes];
    store(lane, v);
    for (int width = kLanes / 2; width; width /= 2)
        for (int i = 0; i < width; i++) lane[i] = lane[i] > lane[i + width] ? lane[i] : lane[i + width];
    return lane[0];
#endif
}

// Whether any lane is greater than `limit`.
OCTAVO_INLINE bool any_above(F32 v, float limit) {
#if defined(OCTAVO_AVX512)
    return _mm512_cmp_ps_mask((__m512)v, (__m512)splat(limit), _CMP_GT_OQ) != 0;
#elif defined(OCTAVO_AVX2)
    return _mm256_movemask_ps(_mm256_cmp_ps((__m256)v, (__m256)splat(limit), _CMP_GT_OQ)) != 0;
#else
    return maximum(v) > limit;
#endif
}

OCTAVO_INLINE int32_t maximum(I32 v) {
#ifdef OCTAVO_AVX512
    return _mm512_reduce_max_epi32((__m512i)v);
#else
    int32_t highest = v[0];
    for (int i = 1; i < kLanes; i++) highest = v[i] > highest ? v[i] : highest;
    return highest;
#endif
}

// Round to bf16, to nearest, ties to even; the result is in the low half of each lane.
OCTAVO_INLINE U32 to_bf16(F32 v) {
#ifdef OCTAVO_AVX512
    return __builtin_convertvector((U16)_mm512_cvtneps_pbh((__m512)v), U32);
#else
    const U32 bits = (U32)v, is_nan = (U32)(v != v);
    return (is_nan & 0x7fc0) | (~is_nan & ((bits + 0x7fff + ((bits >> 16) & 1)) >> 16));
#endif
}

OCTAVO_INLINE void store_bf16(bf16* to, F32 v) {
#ifdef OCTAVO_AVX512
    store_as<U16>(to, (U16)_mm512_cvtneps_pbh((__m512)v));
#else
    store_as<U16>(to, __builtin_convertvector(to_bf16(v), U16));
#endif
}

// Store two vectors, one after the other.
OCTAVO_INLINE void store_bf16(bf16* to, F32 a, F32 b) {
#ifdef OCTAVO_AVX512
    store_as<__m512i>(to, (__m512i)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a));
#else
    store_bf16(to, a);
    store_bf16(to + kLanes, b);
#endif
}

// Return sum + a.even * b.even + a.odd * b.odd, where each lane of a and b is a pair of bf16, the even one in the low
// half.
OCTAVO_INLINE F32 dot2(F32 sum, U32 a, U32 b) {
#ifdef OCTAVO_AVX512
    return (F32)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#else
    sum = fma((F32)(a << 16), (F32)(b << 16), sum);
    return fma((F32)(a & 0xffff0000), (F32)(b & 0xffff0000), sum);
#endif
}

// Return the word at `from` (two bf16, or four bytes) in every lane.
template <typename T>
OCTAVO_INLINE U32 splat_word(const T* from) {
    uint32_t word;
    std::memcpy(&word, from, sizeof word);
    U32 lanes = word - U32{};
#ifdef OCTAVO_AVX2
    asm("" : "+x"(lanes));  // else GCC shifts and masks the scalar, and broadcasts each result from a general register
#endif
    return lanes;
}

OCTAVO_INLINE F32 from_bf16(const bf16* from) {
    return (F32)(__builtin_convertvector(load_as<U16>(from), U32) << 16);
}

// Convert half precision, which must be finite.
OCTAVO_INLINE F32 from_half(const uint16_t* from) {
#if defined(OCTAVO_AVX512)
    return (F32)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)from));
#elif defined(OCTAVO_AVX2)
    return (F32)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)from));
#else
    const U32 half = __builtin_convertvector(load_as<U16>(from), U32);
    const F32 magnitude = (F32)((half & 0x7fff) << 13) * splat(0x1p112f);  // subnormal or not
    return (F32)((U32)magnitude | (half & 0x8000) << 16);
#endif
}

// Return sum + the four products of unsigned bytes of a with signed bytes of b (not -128) in each lane. Exact.
OCTAVO_INLINE I32 dot4(I32 sum, U32 a, U32 b) {
#if defined(OCTAVO_AVX512)
    return (I32)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)a, (__m512i)b);
#elif defined(OCTAVO_AVX2)  // vpmaddubsw would saturate
    const __m256i even_b = _mm256_srai_epi16(_mm256_slli_epi16((__m256i)b, 8), 8);
    const __m256i odd_b = _mm256_srai_epi16((__m256i)b, 8);
    const I32 even = (I32)_mm256_madd_epi16((__m256i)(a & 0x00ff00ff), even_b);
    return sum + even + (I32)_mm256_madd_epi16(_mm256_srli_epi16((__m256i)a, 8), odd_b);
#else
    typedef int16_t I16 __attribute__((vector_size(kLanes * 4)));  // 255 * 127 fits
    const I32 even = (I32)((I16)(a & 0x00ff00ff) * (((I16)b << 8) >> 8));
    const I32 odd = (I32)((I16)(a >> 8 & 0x00ff00ff) * ((I16)b >> 8));
    return sum + ((even << 16) >> 16) + (even >> 16) + ((odd << 16) >> 16) + (odd >> 16);
#endif
}

OCTAVO_INLINE F32 to_float(I32 v) { return __builtin_convertvector(v, F32); }

OCTAVO_INLINE F32 from_int8(const int8_t* from) {
#if defined(OCTAVO_AVX512)
    return to_float((I32)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)from)));
#elif defined(OCTAVO_AVX2)
    return to_float((I32)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)from)));
#else
    I32 v;
    OCTAVO_UNROLL for (int i = 0; i < kLanes; i++) v[i] = from[i];
    return to_float(v);
#endif
}

// Return 2^x with a relative error of 2e-7; exactly 1 at 0. x is clamped to -126 ... 127.
OCTAVO_INLINE F32 exp2(F32 x) {
    const F32 magic = splat(12582912.0f);  // 1.5 x 2^23: adding it rounds to an integer, held in the low bits
    x = max(x, splat(-126.0f));            // NaN becomes -126 here; callers that must keep NaN do so themselves
    x = x < splat(127.0f) ? x : splat(127.0f);
    const F32 shifted = x + magic;
    const F32 f = x - (shifted - magic);  // in [-0.5, 0.5]
    F32 p = splat(0.00015345810970757157f);
    p = fma(p, f, splat(0.0013399930903688073f));
    p = fma(p, f, splat(0.009618489071726799f));
    p = fma(p, f, splat(0.05550328642129898f));
    p = fma(p, f, splat(0.24022646248340607f));
    p = fma(p, f, splat(0.6931471824645996f));
    p = fma(p, f, splat(1.0f));
    return (F32)((I32)p + ((I32)shifted << 23));
}

// Return 2^x for the softmax: x is at most kHeadroom; 0 for x < -126.
OCTAVO_INLINE F32 exp2_or_zero(F32 x) {
#ifdef OCTAVO_AVX512
    const F32 f = (F32)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);  // x - floor(x)
    F32 p = splat(0.0018671307479962707f);  // to 1e-7 in [0, 1)
    p = fma(p, f, splat(0.009017028845846653f));
    p = fma(p, f, splat(0.05579991266131401f));
    p = fma(p, f, splat(0.24016444385051727f));
    p = fma(p, f, splat(0.6931512951850891f));
    p = fma(p, f, splat(1.0f));
    return (F32)_mm512_scalef_ps((__m512)p, (__m512)x);  // p 2^floor(x)
#else
    return select(x < splat(-126.0f), F32{}, exp2(x));
#endif
}

}  // namespace octavo::OCTAVO_ISA
