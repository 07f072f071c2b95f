// Threads that live as long as the program, and the barrier between its instructions.
#pragma once

#include <functional>
#include <memory>
#include <vector>

namespace octavo {

class ThreadPool {
public:
    static constexpr int kAnyCore = -1;  // in `cores`: a thread that is not pinned

    // One thread per entry of `cores`, pinned to that core; the caller of run() is the first of them while it runs.
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
    class Team;

    std::vector<int> cores_;
    std::unique_ptr<Team> team_;
};

}  // namespace octavo
