// The extension module octavo.kv._page_keys: a chain of BLAKE2b hashes over pages of tokens.
//
//     key[i] = BLAKE2b(tokens of page i as little-endian int32, salt = key[i - 1], 16 bytes)
//
// The salt is part of the initial state (RFC 7693; the parameters in section 2.8 of the BLAKE2 paper), so a page of 32
// tokens takes one call of the compression function. A key in BLAKE2's sense would take a second one.
#include <nanobind/nanobind.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cstdint>
#include <cstring>
#include <vector>

namespace nb = nanobind;
using namespace nb::literals;

namespace {

static_assert(std::endian::native == std::endian::little);

constexpr size_t kKeyBytes = 16, kBlockBytes = 128;
using Key = std::array<uint8_t, kKeyBytes>;
using Words = std::array<uint64_t, 8>;

constexpr Words kIv = {0x6a09e667f3bcc908, 0xbb67ae8584caa73b, 0x3c6ef372fe94f82b, 0xa54ff53a5f1d36f1,
                       0x510e527fade682d1, 0x9b05688c2b3e6c1f, 0x1f83d9abfb41bd6b, 0x5be0cd19137e2179};

constexpr uint8_t kSigma[10][16] = {
    {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}, {14, 10, 4, 8, 9, 15, 13, 6, 1, 12, 0, 2, 11, 7, 5, 3},
    {11, 8, 12, 0, 5, 2, 15, 13, 10, 14, 3, 6, 7, 1, 9, 4}, {7, 9, 3, 1, 13, 12, 11, 14, 2, 6, 5, 10, 4, 0, 15, 8},
    {9, 0, 5, 7, 2, 4, 10, 15, 14, 1, 11, 12, 6, 8, 3, 13}, {2, 12, 6, 10, 0, 11, 8, 3, 4, 13, 7, 5, 15, 14, 1, 9},
    {12, 5, 1, 15, 14, 13, 4, 10, 0, 7, 6, 3, 9, 2, 8, 11}, {13, 11, 7, 14, 12, 1, 3, 9, 5, 0, 15, 4, 8, 6, 2, 10},
    {6, 15, 14, 9, 11, 3, 0, 8, 12, 2, 13, 7, 1, 4, 10, 5}, {10, 2, 8, 4, 7, 6, 1, 5, 15, 11, 9, 14, 3, 12, 13, 0}};

// The compression function F. `hashed` counts the bytes of the message up to the end of this block.
void compress(Words& state, const uint8_t* block, uint64_t hashed, bool last) {
    uint64_t m[16], v[16];
    std::memcpy(m, block, kBlockBytes);
    std::copy(state.begin(), state.end(), v);
    std::copy(kIv.begin(), kIv.end(), v + 8);
    v[12] ^= hashed;
    if (last) v[14] = ~v[14];

    auto mix = [&v](int a, int b, int c, int d, uint64_t x, uint64_t y) {
        v[a] += v[b] + x;
        v[d] = std::rotr(v[d] ^ v[a], 32);
        v[c] += v[d];
        v[b] = std::rotr(v[b] ^ v[c], 24);
        v[a] += v[b] + y;
        v[d] = std::rotr(v[d] ^ v[a], 16);
        v[c] += v[d];
        v[b] = std::rotr(v[b] ^ v[c], 63);
    };
#pragma GCC unroll 12
    for (int round = 0; round < 12; ++round) {
        const uint8_t* s = kSigma[round % 10];
        mix(0, 4, 8, 12, m[s[0]], m[s[1]]);
        mix(1, 5, 9, 13, m[s[2]], m[s[3]]);
        mix(2, 6, 10, 14, m[s[4]], m[s[5]]);
        mix(3, 7, 11, 15, m[s[6]], m[s[7]]);
        mix(0, 5, 10, 15, m[s[8]], m[s[9]]);
        mix(1, 6, 11, 12, m[s[10]], m[s[11]]);
        mix(2, 7, 8, 13, m[s[12]], m[s[13]]);
        mix(3, 4, 9, 14, m[s[14]], m[s[15]]);
    }
    for (int i = 0; i < 8; ++i) state[i] ^= v[i] ^ v[i + 8];
}

// The size must not be 0.
Key hash(const uint8_t* message, size_t size, const Key& salt) {
    uint64_t salt_words[2];
    std::memcpy(salt_words, salt.data(), kKeyBytes);
    Words state = kIv;
    state[0] ^= 0x01010000 ^ kKeyBytes;  // fanout 1, depth 1, the length of the digest
    state[4] ^= salt_words[0];
    state[5] ^= salt_words[1];

    for (size_t done = 0; done < size; done += kBlockBytes) {
        size_t part = std::min(kBlockBytes, size - done);
        uint8_t block[kBlockBytes] = {};
        std::memcpy(block, message + done, part);
        compress(state, block, done + part, done + part == size);
    }
    Key digest;
    std::memcpy(digest.data(), state.data(), kKeyBytes);
    return digest;
}

// Copies tokens [start, start + count) of an array of int32 or of a list, which has so many, to `out`.
void read_tokens(nb::handle tokens, size_t start, size_t count, int32_t* out) {
    if (PyList_Check(tokens.ptr())) {
        for (size_t i = 0; i < count; ++i) {
            PyObject* token = PyList_GET_ITEM(tokens.ptr(), Py_ssize_t(start + i));
            long value = PyLong_AsLong(token);
            if (value == -1 && PyErr_Occurred()) throw nb::python_error();
            if (value != int32_t(value)) throw nb::value_error("a token is beyond 32 bits");
            out[i] = int32_t(value);
        }
        return;
    }
    Py_buffer view;
    if (PyObject_GetBuffer(tokens.ptr(), &view, PyBUF_CONTIG_RO | PyBUF_FORMAT)) throw nb::python_error();
    bool is_int32 = view.itemsize == 4 && view.ndim == 1 && view.format && std::strcmp(view.format, "i") == 0;
    if (is_int32) std::memcpy(out, static_cast<const int32_t*>(view.buf) + start, count * 4);
    PyBuffer_Release(&view);
    if (!is_int32) throw nb::type_error("tokens must be a list or an array of int32");
}

nb::list page_keys(nb::bytes parent, nb::handle tokens, size_t page_size, size_t first, size_t count) {
    if (parent.size() != kKeyBytes) throw nb::value_error("a key has 16 bytes");
    if (page_size == 0) throw nb::value_error("a page has one token or more");
    Key key;
    std::memcpy(key.data(), parent.c_str(), kKeyBytes);
    size_t available = nb::len(tokens) / page_size;
    if (first > available || count > available - first) throw nb::index_error("the pages end beyond the tokens");
    std::vector<int32_t> page(page_size);
    nb::list keys;
    for (size_t i = first; i < first + count; ++i) {
        read_tokens(tokens, i * page_size, page_size, page.data());
        key = hash(reinterpret_cast<const uint8_t*>(page.data()), page_size * 4, key);
        keys.append(nb::bytes(reinterpret_cast<const char*>(key.data()), kKeyBytes));
    }
    return keys;
}

}  // namespace

NB_MODULE(_page_keys, module) {
    module.def("page_keys", &page_keys, "parent"_a, "tokens"_a, "page_size"_a, "first"_a, "count"_a);
}
