// Threads that live as long as the program, each on its own core, and the barrier between its instructions.
#pragma once

#include <sys/types.h>

#include <atomic>
#include <cstdint>
#include <functional>
#include <thread>
#include <vector>

namespace octavo {

class ThreadPool {
public:
    // One thread per core of `cores`; the caller of run() is the first of them while it runs.
    explicit ThreadPool(std::vector<int> cores);
    ~ThreadPool();
    ThreadPool(const ThreadPool&) = delete;
    ThreadPool& operator=(const ThreadPool&) = delete;

    int size() const { return int(cores_.size()); }

    // Calls work(thread) on every thread at the same time, and returns when all have. `work` must not throw.
    void run(const std::function<void(int)>& work);

    // Within run(): waits for every thread to get here. What they wrote before is seen by all after.
    void barrier();

private:
    void start();
    void forget();
    void loop(int thread, uint32_t seen);

    std::vector<int> cores_;
    std::vector<std::thread> threads_;
    pid_t owner_ = 0;  // threads do not survive a fork: the child starts its own
    const std::function<void(int)>* work_ = nullptr;
    bool stopping_ = false;
    alignas(64) std::atomic<uint32_t> calls_{0};    // of run
    alignas(64) std::atomic<uint32_t> arrived_{0};  // at the barrier
    alignas(64) std::atomic<uint32_t> phase_{0};    // barriers passed
};

}  // namespace octavo
