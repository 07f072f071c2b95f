// A pool of threads and the barrier between the instructions of a program. Each thread may be pinned to a core.
#pragma once

#include <functional>
#include <memory>
#include <vector>

namespace octavo {

class ThreadPool {
public:
    static constexpr int kAnyCore = -1;  // in `cores`: a thread that is not pinned

    // One thread per entry of `cores`. The thread that calls run() is thread 0, pinned to cores[0] for that time.
    explicit ThreadPool(std::vector<int> cores);
    ~ThreadPool();
    ThreadPool(const ThreadPool&) = delete;
    ThreadPool& operator=(const ThreadPool&) = delete;

    int size() const { return int(cores_.size()); }

    // Call work(thread) on every thread at the same time; return when all calls have returned. `work` must not throw.
    void run(const std::function<void(int)>& work);

    // Within run(): wait until every thread has called barrier(). Writes before it are visible to all threads after it.
    void barrier();

    // The same, where the last thread to arrive runs `then` before any of them goes on.
    void barrier(const std::function<void()>& then);

private:
    class Team;

    std::vector<int> cores_;
    std::unique_ptr<Team> team_;
};

}  // namespace octavo
