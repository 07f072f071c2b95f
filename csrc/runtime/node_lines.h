// The connections between the nodes (machines) over which a model is divided. The first rank of each node has one to
// that of every other node.
#pragma once

#include <sys/uio.h>

#include <chrono>
#include <cstddef>
#include <utility>
#include <vector>

namespace octavo {

// Memory that is sent to a node, or filled with what it sends.
struct Transfer {
    int node;
    bool sends;
    std::vector<iovec> parts;

    void add(std::byte* at, size_t bytes);
};

class NodeLines {
public:
    // sockets[i]: a stream to node i, borrowed; -1: none.
    explicit NodeLines(std::vector<int> sockets) : sockets_(std::move(sockets)) {}

    int nodes() const { return int(sockets_.size()); }

    // Run all transfers at the same time, so that nodes which send to each other do not wait for each other. Wait by
    // spinning for `patience` without progress, then asleep. Return false if a connection has ended.
    bool run(std::vector<Transfer> transfers, std::chrono::microseconds patience) const;

private:
    std::vector<int> sockets_;
};

}  // namespace octavo
