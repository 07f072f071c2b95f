#include "thread_pool.h"

#include <pthread.h>
#include <sched.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <thread>

namespace octavo {

namespace {

using std::chrono::microseconds;

// How long a thread looks before it goes to sleep. A step's barriers are some microseconds apart, steps some hundred.
constexpr microseconds kBarrierPatience{50}, kStepPatience{100};

void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

void pin_to(int core) {
    if (core == ThreadPool::kAnyCore) return;
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(core, &set);
    pthread_setaffinity_np(pthread_self(), sizeof set, &set);  // refused: it runs where the system puts it
}

// A number that goes up, and can be waited for: for a while by looking, which sees it within a cache miss, then asleep,
// which leaves the core to others. (GCC 12's std::atomic::wait can miss a notification.)
class Signal {
public:
    uint32_t value() const { return value_.load(std::memory_order_acquire); }

    void advance() {
        // Both orders are sequentially consistent here and in wait(): either this sees the sleeper, or it the value.
        value_.fetch_add(1);
        if (sleepers_.load() == 0) return;
        { std::lock_guard lock(mutex_); }
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

// The threads of one process, but for the caller of run().
class ThreadPool::Team {
public:
    explicit Team(const std::vector<int>& cores) : size(cores.size()) {
        for (size_t i = 1; i < size; i++) threads.emplace_back([this, i, core = cores[i]] { loop(int(i), core); });
    }

    ~Team() {
        work = nullptr;
        calls.advance();
        for (auto& thread : threads) thread.join();
    }

    void barrier() {
        const uint32_t phase = passed.value();
        if (arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == size) {
            arrived.store(0, std::memory_order_relaxed);
            passed.advance();
        } else {
            passed.wait_past(phase, kBarrierPatience);
        }
    }

    const pid_t process = getpid();
    const size_t size;
    const std::function<void(int)>* work = nullptr;
    Signal calls;   // of run
    Signal passed;  // barriers
    alignas(64) std::atomic<uint32_t> arrived{0};
    std::vector<std::thread> threads;

private:
    void loop(int thread, int core) {
        pin_to(core);
        for (uint32_t seen = 0;; seen++) {
            calls.wait_past(seen, kStepPatience);
            if (!work) return;
            (*work)(thread);
            barrier();
        }
    }
};

ThreadPool::ThreadPool(std::vector<int> cores) : cores_(std::move(cores)) {}

ThreadPool::~ThreadPool() {
    if (team_ && team_->process != getpid()) (void)team_.release();
}

void ThreadPool::run(const std::function<void(int)>& work) {
    // A forked child has a team in name only, in whatever state it was: neither to be joined nor to be freed.
    if (team_ && team_->process != getpid()) (void)team_.release();
    if (!team_) team_ = std::make_unique<Team>(cores_);

    cpu_set_t before;
    const bool pinned = cores_[0] != kAnyCore && pthread_getaffinity_np(pthread_self(), sizeof before, &before) == 0;
    if (pinned) pin_to(cores_[0]);
    team_->work = &work;
    team_->calls.advance();
    work(0);
    barrier();
    if (pinned) pthread_setaffinity_np(pthread_self(), sizeof before, &before);
}

void ThreadPool::barrier() { team_->barrier(); }

}  // namespace octavo
