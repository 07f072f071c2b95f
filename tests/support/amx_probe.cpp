// Runs AMX instructions for tests/test_amx.py, on the processor or on the emulator: `amx_probe CASE`.
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include <sys/syscall.h>
#include <unistd.h>

namespace {

struct Config {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};

    void tile(int number, int tile_rows, int bytes) { rows[number] = tile_rows, row_bytes[number] = bytes; }
};

void configure(const Config& config) { asm volatile("ldtilecfg %0" ::"m"(config) : "memory"); }

void load_6(const void* from, int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm6" ::"r"(from), "r"(stride) : "memory");
}

// stdin: which product, rows, elements of k, columns (int32), then a, b and c; stdout: c.
int product() {
    int32_t header[4];
    if (fread(header, sizeof header, 1, stdin) != 1) return 1;
    const auto [which, rows, elements, columns] = header;
    const int64_t stride_a = elements * 4 + 12, stride_b = columns * 4 + 20, stride_c = columns * 4;
    std::vector<char> a(rows * stride_a), b(elements * stride_b), c(rows * stride_c);
    for (int r = 0; r < rows; ++r)
        if (fread(&a[r * stride_a], elements * 4, 1, stdin) != 1) return 1;
    for (int r = 0; r < elements; ++r)
        if (fread(&b[r * stride_b], columns * 4, 1, stdin) != 1) return 1;
    if (fread(c.data(), c.size(), 1, stdin) != 1) return 1;
    Config config;
    config.tile(5, rows, columns * 4), config.tile(6, rows, elements * 4), config.tile(7, elements, columns * 4);
    configure(config);
    load_6(a.data(), stride_a);
    asm volatile("tileloadd (%0,%1,1), %%tmm7" ::"r"(b.data()), "r"(stride_b) : "memory");
    asm volatile("tileloadd (%0,%1,1), %%tmm5" ::"r"(c.data()), "r"(stride_c) : "memory");
    switch (which) {
        case 0: asm volatile("tdpbf16ps %tmm7, %tmm6, %tmm5"); break;
        case 1: asm volatile("tdpbssd %tmm7, %tmm6, %tmm5"); break;
        case 2: asm volatile("tdpbsud %tmm7, %tmm6, %tmm5"); break;
        case 3: asm volatile("tdpbusd %tmm7, %tmm6, %tmm5"); break;
        case 4: asm volatile("tdpbuud %tmm7, %tmm6, %tmm5"); break;
    }
    asm volatile("tilestored %%tmm5, (%0,%1,1)" ::"r"(c.data()), "r"(stride_c) : "memory");
    asm volatile("tilerelease");
    return fwrite(c.data(), c.size(), 1, stdout) == 1 ? 0 : 1;
}

char memory[8192];

// Loads 3 rows of 8 bytes through one way to write an address, stores them and compares with what lies there.
#define CHECK(text, base_register, base, index_register, index, first, stride)                                     \
    {                                                                                                               \
        register int64_t b asm(base_register) = (int64_t)(base);                                                    \
        register int64_t i asm(index_register) = (index);                                                           \
        char stored[24];                                                                                            \
        asm volatile("tileloadd " text ", %%tmm0" ::"r"(b), "r"(i) : "memory");                                     \
        asm volatile("tilestored %%tmm0, (%0,%1,1)" ::"r"(stored), "r"(int64_t{8}) : "memory");                     \
        for (int row = 0; row < 3; ++row)                                                                           \
            if (memcmp(stored + row * 8, (first) + row * (stride), 8) != 0) return printf("%s\n", text), 1;         \
    }

int addresses() {
    for (size_t i = 0; i < sizeof memory; ++i) memory[i] = static_cast<char>(i * 7 + i / 256);
    Config config;
    config.tile(0, 3, 8);
    configure(config);
    char* middle = memory + 4096;
    CHECK("(%%rax,%%rcx,1)", "rax", middle, "rcx", 40, middle, 40)
    CHECK("(%%rbx,%%rdx,8)", "rbx", middle, "rdx", 16, middle, 128)
    CHECK("64(%%rsi,%%rdi,2)", "rsi", middle, "rdi", 24, middle + 64, 48)
    CHECK("-100(%%r12,%%r13,4)", "r12", middle, "r13", 10, middle - 100, 40)
    CHECK("1000(%%r13,%%r12,1)", "r13", middle, "r12", 33, middle + 1000, 33)
    CHECK("-2000(%%r8,%%r15,1)", "r8", middle, "r15", 11, middle - 2000, 11)
    CHECK("(%%r13,%%r9,1)", "r13", middle, "r9", -48, middle, -48)
    CHECK("(%%r10)", "r10", middle, "r11", 0, middle, 0)
    return 0;
}

// A thread's own configuration, through an address relative to the instruction; what tiles hold after it.
int states() {
    static Config config, read;
    config.tile(0, 16, 64), config.tile(3, 4, 12), config.tile(7, 1, 64);
    asm volatile("ldtilecfg %0" ::"m"(config) : "memory");
    asm volatile("sttilecfg %0" : "=m"(read)::"memory");
    if (memcmp(&read, &config, sizeof config) != 0) return puts("sttilecfg"), 1;

    std::vector<char> ones(1024, 1), zeros(1024, 0), stored(1024, 2);
    const auto store_0 = [&] {
        asm volatile("tilestored %%tmm0, (%0,%1,1)" ::"r"(stored.data()), "r"(int64_t{64}) : "memory");
    };
    store_0();
    if (stored != zeros) return puts("ldtilecfg left something in a tile"), 1;
    asm volatile("tileloaddt1 (%0,%1,1), %%tmm0" ::"r"(ones.data()), "r"(int64_t{64}) : "memory");
    std::thread([] {
        Config other;  // the one that Linux gives to a new thread is not specified
        other.tile(0, 1, 4);
        configure(other);
        asm volatile("tilezero %tmm0");
        asm volatile("tilerelease");
    }).join();
    store_0();
    if (stored != ones) return puts("another thread changed a tile"), 1;
    asm volatile("tilezero %tmm0");
    store_0();
    if (stored != zeros) return puts("tilezero"), 1;
    asm volatile("tilerelease");
    asm volatile("sttilecfg %0" : "=m"(read)::"memory");
    const Config none{.palette = 0};
    return memcmp(&read, &none, sizeof read) == 0 ? 0 : (puts("tilerelease"), 1);
}

// What a processor refuses.
int violation(const std::string& name) {
    Config config;
    for (int number = 0; number < 3; ++number) config.tile(number, 16, 64);
    config.tile(3, 8, 64), config.tile(4, 16, 32);
    if (name == "palette") config.palette = 2;
    if (name == "reserved") config.reserved[5] = 1;
    if (name == "rows") config.rows[0] = 17;
    if (name == "row bytes") config.row_bytes[0] = 68;
    if (name == "no rows") config.rows[0] = 0;
    if (name == "ninth tile") config.tile(8, 1, 4);
    if (name != "unconfigured") configure(config);
    if (name == "released") asm volatile("tilerelease");
    if (name == "unconfigured" || name == "released" || name == "no permission") asm volatile("tilezero %tmm0");
    if (name == "unused tile") load_6(memory, 64);
    if (name == "same tile") asm volatile(".byte 0xc4, 0xe2, 0x72, 0x5c, 0xc1");  // tdpbf16ps tmm0, tmm1, tmm1
    if (name == "other rows") asm volatile("tdpbf16ps %tmm2, %tmm3, %tmm0");
    if (name == "other columns") asm volatile("tdpbf16ps %tmm4, %tmm1, %tmm0");
    if (name == "other k") asm volatile("tdpbssd %tmm2, %tmm4, %tmm0");
    if (name == "not AMX") asm volatile("ud2");
    return 0;
}

}  // namespace

int main(int argc, char** argv) {
    const std::string name = argc > 1 ? argv[1] : "";
    if (name != "no permission" && syscall(SYS_arch_prctl, 0x1023, 18) != 0) return puts("no AMX"), 3;
    if (name == "product") return product();
    if (name == "addresses") return addresses();
    if (name == "states") return states();
    return violation(name);
}
