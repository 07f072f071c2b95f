// The processes that compute one model together. Each has a number, its rank. Those of one machine map the same memory:
// here the counters by which they wait for each other, and behind them what Program puts there. There may be several
// machines, or nodes, with as many ranks each, in order: the first rank of each node has connections to the others'.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "memory.h"
#include "node_lines.h"

namespace octavo {

class RankGroup {
public:
    static constexpr int kMostRanks = 8;

    // fd: a memfd that all ranks of the node have, large enough for what they map; -1: memory of this process alone, to
    // lay out a program that is not run. lines: for several nodes, a socket to each other one; -1: none, as for the own
    // node, and for all in a rank that is not its node's first.
    RankGroup(int rank, int size, int fd, std::vector<int> lines = {});

    int rank() const { return rank_; }
    int size() const { return size_; }
    int nodes() const { return std::max(1, lines_.nodes()); }
    int ranks_per_node() const { return size_ / nodes(); }
    int node() const { return rank_ / ranks_per_node(); }
    int rank_in_node() const { return rank_ % ranks_per_node(); }

    // Map memory of this size, the same for all ranks: zeroed, or as an earlier group with the same memfd left it. Each
    // rank calls it once, with the same size.
    std::byte* map(size_t bytes);

    // Take physical memory for the first bytes of it (see Memory::take).
    void take(size_t bytes) const {
        if (fd_ >= 0) memory_.take(bytes);
    }

    // Wait until every rank of this node has called barrier(). What they wrote before it is visible to all after it.
    // Return false, without waiting, once the group is stopped. One thread of a rank at a time.
    bool barrier();

    // The first rank of a node: send memory to other nodes and receive memory from them, at the same time. Return
    // false, with the group stopped, if a connection has ended.
    bool transfer(std::vector<Transfer> transfers, std::chrono::microseconds patience);

    // The first rank of a node: let its other ranks go on with the next step. These: wait for that; false once the
    // group is stopped.
    void start_step();
    bool wait_for_step();

    // End all waiting, in all ranks and for good: one of them has ended, or rank 0 is done. From any thread.
    void stop();
    bool stopped() const { return counters().stopped.load(std::memory_order_relaxed) != 0; }

private:
    // A counter that other processes wait on: first by spinning, then asleep.
    struct alignas(64) Signal {
        std::atomic<uint32_t> value, sleepers;
    };
    struct Counters {
        Signal arrived[kMostRanks];  // barriers that each rank of the node has reached
        Signal steps;
        std::atomic<uint32_t> stopped;
    };

    Counters& counters() const { return *reinterpret_cast<Counters*>(counters_.data()); }
    void advance(Signal& signal);
    bool wait_for(Signal& signal, uint32_t wanted, std::chrono::microseconds patience);

    const int rank_, size_, fd_;
    const NodeLines lines_;
    Memory counters_, memory_;
    uint32_t barriers_ = 0, steps_ = 0;  // that this rank has passed
};

}  // namespace octavo
