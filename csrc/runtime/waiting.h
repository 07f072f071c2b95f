// How threads and ranks wait for each other: for some time by spinning, which notices a change within a cache miss,
// then asleep, which leaves the core to other programs.
#pragma once

#include <chrono>

namespace octavo {

// How long to spin. Barriers within a step are a few microseconds apart, steps a few hundred.
constexpr std::chrono::microseconds kBarrierPatience{50}, kStepPatience{100};

// What to do in each turn of a loop that spins.
inline void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

}  // namespace octavo
