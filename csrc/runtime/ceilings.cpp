#include "ceilings.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>

#include "memory.h"

namespace octavo {

namespace {

using Clock = std::chrono::steady_clock;

constexpr int kTries = 12;
constexpr int64_t kLine = 64, kBytes = int64_t{512} << 20;  // larger than the caches
constexpr std::chrono::milliseconds kProductTime{15};

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

void read(const std::byte* from, const std::byte* end) {
    typedef uint64_t Vector __attribute__((vector_size(16), may_alias));
    constexpr int64_t kAhead = 4096;
    Vector sums[4] = {};
    for (; from < end; from += kLine) {
        __builtin_prefetch(from + kAhead);
        const auto* line = reinterpret_cast<const Vector*>(from);
        for (int i = 0; i < 4; i++) sums[i] += line[i];
    }
    const Vector sum = sums[0] + sums[1] + sums[2] + sums[3];
    asm volatile("" ::"r"(sum[0] + sum[1]));  // uses the result, so that the compiler keeps the loop
}

double read_rate(ThreadPool& pool) {
    const Memory memory(kBytes);
    const auto part = [&](int64_t thread) { return memory.data() + kBytes / kLine * thread / pool.size() * kLine; };
    pool.run([&](int thread) { std::memset(part(thread), 1, part(thread + 1) - part(thread)); });
    double best = 0;
    for (int i = 0; i < kTries; i++) {
        const auto start = Clock::now();
        pool.run([&](int thread) { read(part(thread), part(thread + 1)); });
        best = std::max(best, kBytes / seconds_since(start));
    }
    return best;
}

double product_rate(const Kernels& kernels, int64_t (*products)(float*), ThreadPool& pool) {
    double best = 0;
    for (int i = 0; i < kTries; i++) {
        std::atomic<int64_t> operations = 0;
        const auto start = Clock::now();
        pool.run([&](int) {
            alignas(64) float out[kPeakFloats];
            int64_t done = 0;
            kernels.start_thread();
            while (Clock::now() - start < kProductTime)
                for (int j = 0; j < 8; j++) done += products(out);
            kernels.stop_thread();
            operations += done;
        });
        best = std::max(best, double(operations) / seconds_since(start));
    }
    return best;
}

}  // namespace

Ceilings measure_ceilings(const Kernels& kernels, ThreadPool& pool) {
    return {read_rate(pool), product_rate(kernels, kernels.peak_products, pool),
            product_rate(kernels, kernels.peak_integer_products, pool)};
}

}  // namespace octavo
