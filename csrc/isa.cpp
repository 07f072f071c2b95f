#include "isa.h"

#include <algorithm>
#include <stdexcept>

#if defined(__x86_64__)
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

// The kernel gives AMX's 8 KiB of registers only to a process that asks for them (ARCH_REQ_XCOMP_PERM, XTILEDATA), and
// says no where there are none. It alone is asked, so that tests can put an emulator in its place.
bool may_use_amx() {
    static const bool granted = syscall(SYS_arch_prctl, 0x1023, 18) == 0;
    return granted;
}

bool has_avx2() {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}

bool has_avx512() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16");
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
        throw std::invalid_argument("this machine has no " + isa);
#if defined(__x86_64__)
    if (isa == "amx") return amx::kernels;
    if (isa == "avx512") return avx512::kernels;
    if (isa == "avx2") return avx2::kernels;
#endif
    return portable::kernels;
}

}  // namespace octavo
