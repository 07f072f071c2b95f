// A pool of threads and the barrier between the instructions of a program. Each thread may be confined to some
// processors.
#pragma once

#include <functional>
#include <memory>
#include <vector>

namespace octavo {

class ThreadPool {
public:
    // One thread per entry, the processors that it may run on; empty: any. The thread that calls run() is thread 0,
    // and is confined to those of the first entry for that time.
    explicit ThreadPool(std::vector<std::vector<int>> processors);
    ~ThreadPool();
    ThreadPool(const ThreadPool&) = delete;
    ThreadPool& operator=(const ThreadPool&) = delete;

    int size() const { return int(processors_.size()); }

    // Call work(thread) on every thread at the same time; return when all calls have returned. `work` must not throw.
    void run(const std::function<void(int)>& work);

    // Within run(): wait until every thread has called barrier(). Writes before it are visible to all threads after it.
    void barrier();

    // The same, where the last thread to arrive runs `then` before any of them goes on.
    void barrier(const std::function<void()>& then);

private:
    class Team;

    std::vector<std::vector<int>> processors_;
    std::unique_ptr<Team> team_;
};

}  // namespace octavo
