#include "rank_group.h"

#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <climits>

#include "waiting.h"

namespace octavo {

namespace {

constexpr size_t kCounterBytes = 4096, kMemoryOffset = size_t{2} << 20;  // of the memfd

uint32_t* word_of(std::atomic<uint32_t>& value) { return reinterpret_cast<uint32_t*>(&value); }

// Sleep until the value changes. The kernel compares it once more, so no change is missed.
void sleep_while(std::atomic<uint32_t>& value, uint32_t seen) {
    syscall(SYS_futex, word_of(value), FUTEX_WAIT, seen, nullptr, nullptr, 0);
}

void wake_all(std::atomic<uint32_t>& value) {
    syscall(SYS_futex, word_of(value), FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
}

}  // namespace

RankGroup::RankGroup(int rank, int size, int fd)
    : rank_(rank), size_(size), fd_(fd), counters_(Memory::shared(fd, 0, kCounterBytes)) {
    static_assert(sizeof(Counters) <= kCounterBytes);
    barriers_ = counters().arrived[rank].value;  // of an earlier group with the same memory
}

std::byte* RankGroup::map(size_t bytes) {
    memory_ = Memory::shared(fd_, kMemoryOffset, bytes);
    return memory_.data();
}

void RankGroup::advance(Signal& signal) {
    // Sequential consistency here and in wait_for(): either this reads the new sleeper, or the sleeper the new value.
    signal.value.fetch_add(1);
    if (signal.sleepers.load()) wake_all(signal.value);
}

// Wait until the signal has reached `wanted`, which may have wrapped around.
bool RankGroup::wait_for(Signal& signal, uint32_t wanted, std::chrono::microseconds patience) {
    using Clock = std::chrono::steady_clock;
    const auto reached = [&](uint32_t value) { return int32_t(value - wanted) >= 0; };
    const auto start = Clock::now();
    do {
        for (int i = 0; i < 64; i++) {
            if (reached(signal.value.load(std::memory_order_acquire))) return true;
            relax();
        }
        if (stopped()) return false;
    } while (Clock::now() - start < patience);
    signal.sleepers.fetch_add(1);
    uint32_t value;
    while (!reached(value = signal.value.load()) && !counters().stopped.load()) sleep_while(signal.value, value);
    signal.sleepers.fetch_sub(1);
    return !stopped();
}

bool RankGroup::barrier() {
    barriers_++;
    advance(counters().arrived[rank_]);
    for (int rank = 0; rank < size_; rank++)
        if (!wait_for(counters().arrived[rank], barriers_, kBarrierPatience)) return false;
    return !stopped();
}

void RankGroup::start_step() { advance(counters().steps); }

bool RankGroup::wait_for_step() { return wait_for(counters().steps, ++steps_, kStepPatience) && !stopped(); }

void RankGroup::stop() {
    counters().stopped.store(1);
    const auto wake = [](Signal& signal) {
        signal.value.fetch_add(1);  // so that a rank that is about to sleep on the value does not
        wake_all(signal.value);
    };
    for (Signal& signal : counters().arrived) wake(signal);
    wake(counters().steps);
}

}  // namespace octavo
