// AMX for machines that have none: put in front of a process with LD_PRELOAD, this library catches the illegal
// instructions, executes them on tiles of its own and skips them, so that the AMX kernels can be tested anywhere. What
// would raise #UD or #GP on a processor ends the process with a line that says why.
//
// Semantics are those of Intel's Software Developer's Manual, volume 2 (LDTILECFG ... TDPBUUD), palette 1.
// Build: c++ -std=c++20 -O3 -mavx2 -mfma -ffp-contract=off -fPIC -shared amx_emulator.cpp -o amx_emulator.so
#include <atomic>
#include <cerrno>
#include <csignal>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include <immintrin.h>
#include <sys/syscall.h>
#include <ucontext.h>

namespace {

constexpr int kTiles = 8, kRows = 16, kRowBytes = 64;

struct Config {  // the 64 bytes of ldtilecfg
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
};
static_assert(sizeof(Config) == 64);

union Row {
    uint8_t bytes[kRowBytes];
    uint16_t bf16[32];
    uint8_t u8[16][4];
    int8_t s8[16][4];
    float f32[16];
    int32_t s32[16];
};

struct Registers {
    Config config;  // palette 0: not configured
    Row tiles[kTiles][kRows];
};
// Initial-exec: a signal handler may not allocate the thread's copy.
__attribute__((tls_model("initial-exec"))) thread_local Registers registers;
thread_local const char* mnemonic;
std::atomic<bool> permitted{false};
std::atomic<uint64_t> products{0};

[[noreturn]] void fail(const char* why) {
    dprintf(2, "AMX emulator: %s: %s\n", mnemonic, why);
    abort();
}

void require(bool ok, const char* why) {
    if (!ok) fail(why);
}

// A VEX-encoded instruction of map 0F38 with W = 0 and L = 0: C4, two bytes of VEX, opcode, ModRM, SIB, displacement.
struct Instruction {
    enum Prefix { none, p66, f3, f2 };
    int prefix, opcode;
    bool memory, sib;        // has a memory operand; has a SIB byte
    int reg, rm, vvvv;
    uint8_t* base;           // base + displacement
    int64_t index;           // the index register, times its scale; 0 if there is none
    int length;
};

bool decode(const uint8_t* code, const greg_t* gregs, Instruction& out) {
    if (code[0] != 0xC4 || (code[1] & 31) != 2 || (code[2] & 0x84) != 0) return false;
    constexpr int kOrder[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                                REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
    const int r = ~code[1] >> 7 & 1, x = ~code[1] >> 6 & 1, b = ~code[1] >> 5 & 1;  // stored inverted
    const int mod = code[4] >> 6, rm = code[4] & 7;
    out = {.prefix = code[2] & 3, .opcode = code[3], .memory = mod != 3, .sib = mod != 3 && rm == 4,
           .reg = r << 3 | (code[4] >> 3 & 7), .rm = b << 3 | rm, .vvvv = ~code[2] >> 3 & 15,
           .base = nullptr, .index = 0, .length = 5};
    if (!out.memory) return true;

    int base = rm;
    if (out.sib) {
        const uint8_t sib = code[out.length++];
        const int index = x << 3 | (sib >> 3 & 7);
        if (index != 4) out.index = gregs[kOrder[index]] << (sib >> 6);
        base = sib & 7;
    }
    const bool no_base = mod == 0 && base == 5;  // a displacement alone, or one from the next instruction
    int64_t displacement = 0;
    if (mod == 1) {
        displacement = static_cast<int8_t>(code[out.length++]);
    } else if (mod == 2 || no_base) {
        int32_t wide;
        std::memcpy(&wide, code + out.length, sizeof wide);
        displacement = wide;
        out.length += 4;
    }
    int64_t address = displacement;
    if (!no_base)
        address += gregs[kOrder[b << 3 | base]];
    else if (!out.sib)
        address += reinterpret_cast<int64_t>(code) + out.length;
    out.base = reinterpret_cast<uint8_t*>(address);
    return true;
}

void load_config(const uint8_t* memory) {
    Config config;
    std::memcpy(&config, memory, sizeof config);
    require(config.palette <= 1, "#GP: the palette is neither 0 nor 1");
    if (config.palette == 0) config = {};
    for (uint8_t byte : config.reserved) require(byte == 0, "#GP: a reserved byte is not 0");
    for (int t = 0; t < 16; ++t) {
        require(t < kTiles || (config.row_bytes[t] == 0 && config.rows[t] == 0), "#GP: there are only 8 tiles");
        require(config.row_bytes[t] <= kRowBytes, "#GP: a row has more than 64 bytes");
        require(config.rows[t] <= kRows, "#GP: a tile has more than 16 rows");
        require((config.row_bytes[t] == 0) == (config.rows[t] == 0), "#GP: a tile has rows or bytes per row, not both");
    }
    registers = {};
    registers.config = config;
}

// Rows and bytes per row of a tile that may be used.
struct Tile {
    Row* data;
    int rows, bytes;
};

Tile tile(int number) {
    const Config& config = registers.config;
    require(config.palette != 0, "#UD: no tile is configured (ldtilecfg, once per thread)");
    require(number < kTiles, "#UD: there are only 8 tiles");
    require(config.rows[number] != 0, "#UD: the tile is not configured");
    require(config.start_row < config.rows[number], "#UD: the start row is past the tile's last");
    return {registers.tiles[number], config.rows[number], config.row_bytes[number]};
}

void load_tile(const Instruction& in) {
    const Tile t = tile(in.reg);
    for (int row = registers.config.start_row; row < kRows; ++row) {
        Row loaded{};
        if (row < t.rows) std::memcpy(loaded.bytes, in.base + row * in.index, t.bytes);
        t.data[row] = loaded;
    }
    registers.config.start_row = 0;
}

void store_tile(const Instruction& in) {
    const Tile t = tile(in.reg);
    for (int row = registers.config.start_row; row < t.rows; ++row)
        std::memcpy(in.base + row * in.index, t.data[row].bytes, t.bytes);
    registers.config.start_row = 0;
}

// c += a * b, where each 4-byte element of a and b is a few numbers: `multiply(row of c, row of a, b, elements of k,
// columns)`.
template <class Multiply>
void multiply_tiles(const Instruction& in, Multiply multiply) {
    require(in.reg != in.rm && in.rm != in.vvvv && in.reg != in.vvvv, "#UD: two of the three tiles are the same");
    const Tile c = tile(in.reg), a = tile(in.rm), b = tile(in.vvvv);
    require(registers.config.start_row == 0, "#UD: the start row is not 0");
    require(a.bytes % 4 == 0 && b.bytes % 4 == 0 && c.bytes % 4 == 0, "#UD: rows that are not multiples of 4 bytes");
    require(a.rows == c.rows, "#UD: the first factor and the sum have different rows");
    require(b.bytes == c.bytes, "#UD: the second factor and the sum have different columns");
    require(a.bytes / 4 == b.rows, "#UD: the factors do not fit each other");
    for (int row = 0; row < kRows; ++row) {
        if (row < c.rows) {
            multiply(c.data[row], a.data[row], b.data, b.rows, c.bytes / 4);
            std::memset(c.data[row].bytes + c.bytes, 0, kRowBytes - c.bytes);
        } else {
            c.data[row] = {};
        }
    }
    products.fetch_add(1, std::memory_order_relaxed);
}

float widen(uint16_t bf16) {
    const uint32_t bits = static_cast<uint32_t>(bf16) << 16;
    float wide;
    std::memcpy(&wide, &bits, sizeof wide);
    return wide;
}

// Even and odd halves of the pairs are summed over k apart, by fused multiplications; then both are added to c.
void multiply_bf16(Row& c, const Row& a, const Row* b, int elements, int columns) {
    float sums[32] = {};
    for (int k = 0; k < elements; ++k) {
        const float pair[2] = {widen(a.bf16[2 * k]), widen(a.bf16[2 * k + 1])};
        for (int j = 0; j < 2 * columns; ++j) sums[j] = __builtin_fmaf(pair[j & 1], widen(b[k].bf16[j]), sums[j]);
    }
    for (int n = 0; n < columns; ++n) c.f32[n] += sums[2 * n] + sums[2 * n + 1];
}

template <bool kSignedA, bool kSignedB>
void multiply_int8(Row& c, const Row& a, const Row* b, int elements, int columns) {
    for (int k = 0; k < elements; ++k)
        for (int n = 0; n < columns; ++n) {
            uint32_t sum = static_cast<uint32_t>(c.s32[n]);  // wraps
            for (int i = 0; i < 4; ++i)
                sum += static_cast<uint32_t>((kSignedA ? int{a.s8[k][i]} : int{a.u8[k][i]}) *
                                             (kSignedB ? int{b[k].s8[n][i]} : int{b[k].u8[n][i]}));
            c.s32[n] = static_cast<int32_t>(sum);
        }
}

bool execute(const Instruction& in) {
    const auto is = [&](int opcode, int prefix, bool memory, const char* name) {
        if (in.opcode != opcode || in.prefix != prefix || in.memory != memory) return false;
        mnemonic = name;
        require(permitted, "used before the kernel gave leave (arch_prctl ARCH_REQ_XCOMP_PERM)");
        return true;
    };
    using I = Instruction;
    if (is(0x49, I::none, true, "ldtilecfg")) {
        load_config(in.base + in.index);
    } else if (is(0x49, I::p66, true, "sttilecfg")) {
        std::memcpy(in.base + in.index, &registers.config, sizeof registers.config);
    } else if (is(0x49, I::none, false, "tilerelease")) {
        registers = {};
    } else if (is(0x49, I::f2, false, "tilezero")) {
        std::memset(tile(in.reg).data, 0, sizeof registers.tiles[0]);
        registers.config.start_row = 0;
    } else if (is(0x4B, I::f2, true, "tileloadd") || is(0x4B, I::p66, true, "tileloaddt1")) {
        require(in.sib, "#UD: the address has no SIB byte");
        load_tile(in);
    } else if (is(0x4B, I::f3, true, "tilestored")) {
        require(in.sib, "#UD: the address has no SIB byte");
        store_tile(in);
    } else if (is(0x5C, I::f3, false, "tdpbf16ps")) {
        const unsigned mxcsr = _mm_getcsr();
        _mm_setcsr(0x9FC0);  // to nearest, denormals are zeros in and out, no exceptions
        multiply_tiles(in, multiply_bf16);
        _mm_setcsr(mxcsr);
    } else if (is(0x5E, I::f2, false, "tdpbssd")) {
        multiply_tiles(in, multiply_int8<true, true>);
    } else if (is(0x5E, I::f3, false, "tdpbsud")) {
        multiply_tiles(in, multiply_int8<true, false>);
    } else if (is(0x5E, I::p66, false, "tdpbusd")) {
        multiply_tiles(in, multiply_int8<false, true>);
    } else if (is(0x5E, I::none, false, "tdpbuud")) {
        multiply_tiles(in, multiply_int8<false, false>);
    } else {
        return false;
    }
    return true;
}

void on_illegal_instruction(int, siginfo_t*, void* context) {
    greg_t* gregs = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
    Instruction instruction;
    if (decode(reinterpret_cast<const uint8_t*>(gregs[REG_RIP]), gregs, instruction) && execute(instruction))
        gregs[REG_RIP] += instruction.length;
    else
        signal(SIGILL, SIG_DFL);  // not ours: it is executed again, and ends the process
}

__attribute__((constructor)) void install() {
    struct sigaction action{};
    action.sa_sigaction = on_illegal_instruction;
    action.sa_flags = SA_SIGINFO;
    sigaction(SIGILL, &action, nullptr);
}

}  // namespace

// How many products of tiles were executed: so that a test can tell that AMX was used at all.
extern "C" uint64_t amx_emulator_products() { return products; }

// The C library's syscall(), where the kernel is asked for AMX: granted. All else goes on to the kernel.
extern "C" long syscall(long number, ...) noexcept {
    constexpr long kGetPermission = 0x1022, kRequestPermission = 0x1023, kTileData = 18;
    va_list list;
    va_start(list, number);
    long args[6];
    for (long& arg : args) arg = va_arg(list, long);
    va_end(list);
    if (number == SYS_arch_prctl && args[0] == kRequestPermission && args[1] == kTileData) {
        permitted = true;
        return 0;
    }
    register long r10 asm("r10") = args[3];
    register long r8 asm("r8") = args[4];
    register long r9 asm("r9") = args[5];
    long result;
    asm volatile("syscall"
                 : "=a"(result)
                 : "a"(number), "D"(args[0]), "S"(args[1]), "d"(args[2]), "r"(r10), "r"(r8), "r"(r9)
                 : "rcx", "r11", "memory");
    if (number == SYS_arch_prctl && args[0] == kGetPermission && result == 0 && permitted)
        *reinterpret_cast<uint64_t*>(args[1]) |= uint64_t{1} << kTileData;
    if (result < 0 && result >= -4095) {
        errno = static_cast<int>(-result);
        return -1;
    }
    return result;
}
