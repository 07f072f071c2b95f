#include "thread_pool.h"

#include <pthread.h>
#include <sched.h>
#include <unistd.h>

#include <chrono>

namespace octavo {

namespace {

void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// Waits until `value` is no longer `old`: for a while by looking, which wakes up within a cache miss, then asleep,
// which leaves the core to others. A step's barriers are some microseconds apart, steps some hundred.
void wait_for_change(const std::atomic<uint32_t>& value, uint32_t old, std::chrono::microseconds patience) {
    using Clock = std::chrono::steady_clock;
    const auto start = Clock::now();
    do {
        for (int i = 0; i < 64; i++) {
            if (value.load(std::memory_order_acquire) != old) return;
            relax();
        }
    } while (Clock::now() - start < patience);
    value.wait(old, std::memory_order_acquire);
}

void pin_to(int core) {
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(core, &set);
    pthread_setaffinity_np(pthread_self(), sizeof set, &set);  // refused: it runs where the system puts it
}

}  // namespace

ThreadPool::ThreadPool(std::vector<int> cores) : cores_(std::move(cores)) {}

ThreadPool::~ThreadPool() {
    if (owner_ != getpid()) {
        forget();
        return;
    }
    stopping_ = true;
    calls_.fetch_add(1, std::memory_order_release);
    calls_.notify_all();
    for (auto& thread : threads_) thread.join();
}

// A forked child has the handles of threads that it does not have; they can be neither joined nor detached.
void ThreadPool::forget() { new std::vector<std::thread>(std::move(threads_)); }

void ThreadPool::start() {
    forget();
    threads_.clear();
    arrived_ = 0;
    owner_ = getpid();
    for (int i = 1; i < size(); i++) threads_.emplace_back([this, i, seen = calls_.load()] { loop(i, seen); });
}

void ThreadPool::loop(int thread, uint32_t seen) {
    pin_to(cores_[thread]);
    for (;;) {
        wait_for_change(calls_, seen, std::chrono::microseconds(100));
        if (stopping_) return;
        seen++;
        (*work_)(thread);
        barrier();
    }
}

void ThreadPool::run(const std::function<void(int)>& work) {
    if (size() > 1 && owner_ != getpid()) start();
    cpu_set_t before;
    const bool known = pthread_getaffinity_np(pthread_self(), sizeof before, &before) == 0;
    if (known) pin_to(cores_[0]);
    work_ = &work;
    calls_.fetch_add(1, std::memory_order_release);
    calls_.notify_all();
    work(0);
    barrier();
    if (known) pthread_setaffinity_np(pthread_self(), sizeof before, &before);
}

void ThreadPool::barrier() {
    const uint32_t phase = phase_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == uint32_t(size())) {
        arrived_.store(0, std::memory_order_relaxed);
        phase_.store(phase + 1, std::memory_order_release);
        phase_.notify_all();
    } else {
        wait_for_change(phase_, phase, std::chrono::microseconds(50));
    }
}

}  // namespace octavo
