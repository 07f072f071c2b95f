#include "isa.h"

#include <algorithm>
#include <initializer_list>
#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace octavo {

namespace portable {
extern const Kernels kernels;
}
#if defined(__x86_64__)
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
namespace amx {
extern const Kernels kernels;
}

namespace {

// Linux lets a process use the 8 KiB of AMX registers only after it requests them (ARCH_REQ_XCOMP_PERM, XTILEDATA), and
// refuses on a processor without AMX. CPUID is not consulted, so that tests can substitute an emulator.
bool may_use_amx() {
    static const bool granted = syscall(SYS_arch_prctl, 0x1023, 18) == 0;
    return granted;
}

struct Registers {
    unsigned eax, ebx, ecx, edx;
};

Registers cpuid(unsigned leaf, unsigned subleaf) {
    Registers r{};
    __get_cpuid_count(leaf, subleaf, &r.eax, &r.ebx, &r.ecx, &r.edx);
    return r;
}

// Return the register sets that the operating system saves (XCR0): bits 1 and 2 for AVX, 5 to 7 for AVX-512.
unsigned saved_registers() {
    constexpr unsigned osxsave = 1u << 27;
    if (!(cpuid(1, 0).ecx & osxsave)) return 0;
    unsigned low, high;
    asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return low;
}

bool all(unsigned bits, std::initializer_list<int> wanted) {
    return std::all_of(wanted.begin(), wanted.end(), [&](int bit) { return bits >> bit & 1; });
}

bool has_avx2() {
    return all(saved_registers(), {1, 2}) && all(cpuid(1, 0).ecx, {12 /* fma */, 28 /* avx */, 29 /* f16c */}) &&
           all(cpuid(7, 0).ebx, {5});
}

bool has_avx512() {
    return has_avx2() && all(saved_registers(), {5, 6, 7}) &&
           all(cpuid(7, 0).ebx, {16 /* f */, 17 /* dq */, 30 /* bw */, 31 /* vl */}) &&
           all(cpuid(7, 0).ecx, {11 /* vnni */}) && all(cpuid(7, 1).eax, {5 /* bf16 */});
}

}  // namespace
#endif

std::vector<std::string> available_isas() {
    std::vector<std::string> isas;
#if defined(__x86_64__)
    if (has_avx512() && may_use_amx()) isas.push_back("amx");
    if (has_avx512()) isas.push_back("avx512");
    if (has_avx2()) isas.push_back("avx2");
#endif
    isas.push_back("portable");
    return isas;
}

const Kernels& kernels_for(const std::string& isa) {
    const auto isas = available_isas();
    if (std::find(isas.begin(), isas.end(), isa) == isas.end())
        throw std::invalid_argument("this machine cannot run the kernels for " + isa);
#if defined(__x86_64__)
    if (isa == "amx") return amx::kernels;
    if (isa == "avx512") return avx512::kernels;
    if (isa == "avx2") return avx2::kernels;
#endif
    return portable::kernels;
}

}  // namespace octavo
