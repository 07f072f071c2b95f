#include "thread_pool.h"

#include <pthread.h>
#include <sched.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <thread>

#include "waiting.h"

namespace octavo {

namespace {

using std::chrono::microseconds;

void confine_to(const std::vector<int>& processors) {
    if (processors.empty()) return;
    cpu_set_t set;
    CPU_ZERO(&set);
    for (int processor : processors) CPU_SET(processor, &set);
    pthread_setaffinity_np(pthread_self(), sizeof set, &set);  // if it fails, the scheduler chooses
}

// A counter that threads can wait on. (std::atomic::wait of GCC 12 can miss a notification.)
class Signal {
public:
    uint32_t value() const { return value_.load(std::memory_order_acquire); }

    void advance() {
        // Sequential consistency here and in wait_past(): either this reads the new sleeper, or the sleeper the new
        // value.
        value_.fetch_add(1);
        if (sleepers_.load() == 0) return;
        {
            std::lock_guard lock(mutex_);
        }
        changed_.notify_all();
    }

    void wait_past(uint32_t old, microseconds patience) {
        using Clock = std::chrono::steady_clock;
        const auto start = Clock::now();
        do {
            for (int i = 0; i < 64; i++) {
                if (value() != old) return;
                relax();
            }
        } while (Clock::now() - start < patience);
        std::unique_lock lock(mutex_);
        sleepers_.fetch_add(1);
        changed_.wait(lock, [&] { return value_.load() != old; });
        sleepers_.fetch_sub(1);
    }

private:
    alignas(64) std::atomic<uint32_t> value_{0};
    alignas(64) std::atomic<int> sleepers_{0};
    std::mutex mutex_;
    std::condition_variable changed_;
};

}  // namespace

// The threads of one process, other than the caller of run().
class ThreadPool::Team {
public:
    explicit Team(const std::vector<std::vector<int>>& processors) : size(processors.size()) {
        for (size_t i = 1; i < size; i++) threads.emplace_back([this, i, own = processors[i]] { loop(int(i), own); });
    }

    ~Team() {
        work = nullptr;
        calls.advance();
        for (auto& thread : threads) thread.join();
    }

    void barrier(const std::function<void()>* then = nullptr) {
        const uint32_t phase = passed.value();
        if (arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == size) {
            arrived.store(0, std::memory_order_relaxed);
            if (then) (*then)();
            passed.advance();
        } else {
            passed.wait_past(phase, kBarrierPatience);
        }
    }

    const pid_t process = getpid();
    const size_t size;
    const std::function<void(int)>* work = nullptr;
    Signal calls;   // number of calls of run()
    Signal passed;  // number of barriers that all threads have reached
    alignas(64) std::atomic<uint32_t> arrived{0};
    std::vector<std::thread> threads;

private:
    void loop(int thread, const std::vector<int>& processors) {
        confine_to(processors);
        for (uint32_t seen = 0;; seen++) {
            calls.wait_past(seen, kStepPatience);
            if (!work) return;
            (*work)(thread);
            barrier();
        }
    }
};

ThreadPool::ThreadPool(std::vector<std::vector<int>> processors) : processors_(std::move(processors)) {}

ThreadPool::~ThreadPool() {
    if (team_ && team_->process != getpid()) (void)team_.release();
}

void ThreadPool::run(const std::function<void(int)>& work) {
    // Threads do not survive a fork: in a child, the team's threads are gone and its locks may be held. Leak it.
    if (team_ && team_->process != getpid()) (void)team_.release();
    if (!team_) team_ = std::make_unique<Team>(processors_);

    cpu_set_t before;
    const bool confined =
        !processors_[0].empty() && pthread_getaffinity_np(pthread_self(), sizeof before, &before) == 0;
    if (confined) confine_to(processors_[0]);
    team_->work = &work;
    team_->calls.advance();
    work(0);
    barrier();
    if (confined) pthread_setaffinity_np(pthread_self(), sizeof before, &before);
}

void ThreadPool::barrier() { team_->barrier(); }

void ThreadPool::barrier(const std::function<void()>& then) { team_->barrier(&then); }

}  // namespace octavo
