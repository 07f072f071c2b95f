// What a thread does in each turn of a loop in which it waits for another.
#pragma once

namespace octavo {

inline void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

}  // namespace octavo
