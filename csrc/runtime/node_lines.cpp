#include "node_lines.h"

#include <poll.h>
#include <sys/socket.h>

#include <algorithm>
#include <cerrno>

#include "waiting.h"

namespace octavo {

namespace {

constexpr size_t kMostParts = 512;  // of one call

// A transfer under way.
class Moving {
public:
    Moving(int socket, Transfer& transfer) : socket_(socket), transfer_(transfer) {}

    bool is_done() const { return next_ == transfer_.parts.size(); }
    pollfd waits_for() const { return {socket_, short(transfer_.sends ? POLLOUT : POLLIN), 0}; }

    // Move what can be moved without waiting. Return the bytes; -1 if the connection has ended.
    ssize_t move() {
        msghdr message = {};
        message.msg_iov = &transfer_.parts[next_];
        message.msg_iovlen = std::min(transfer_.parts.size() - next_, kMostParts);
        const ssize_t moved = transfer_.sends ? sendmsg(socket_, &message, MSG_DONTWAIT | MSG_NOSIGNAL)
                                              : recvmsg(socket_, &message, MSG_DONTWAIT);
        if (moved < 0) return errno == EAGAIN || errno == EINTR ? 0 : -1;
        if (moved == 0) return -1;
        advance(size_t(moved));
        return moved;
    }

private:
    void advance(size_t bytes) {
        while (bytes) {
            iovec& part = transfer_.parts[next_];
            const size_t now = std::min(bytes, part.iov_len);
            part.iov_base = static_cast<std::byte*>(part.iov_base) + now;
            part.iov_len -= now, bytes -= now;
            if (!part.iov_len) next_++;
        }
    }

    const int socket_;
    Transfer& transfer_;
    size_t next_ = 0;  // part
};

// Sleep until a transfer can go on.
void sleep_for(const std::vector<Moving>& moving) {
    std::vector<pollfd> waiting;
    for (const Moving& each : moving)
        if (!each.is_done()) waiting.push_back(each.waits_for());
    poll(waiting.data(), waiting.size(), -1);
}

}  // namespace

void Transfer::add(std::byte* at, size_t bytes) {
    if (!bytes) return;
    if (!parts.empty() && static_cast<std::byte*>(parts.back().iov_base) + parts.back().iov_len == at)
        parts.back().iov_len += bytes;
    else
        parts.push_back({at, bytes});
}

bool NodeLines::run(std::vector<Transfer> transfers, std::chrono::microseconds patience) const {
    using Clock = std::chrono::steady_clock;
    std::vector<Moving> moving;
    for (Transfer& transfer : transfers) moving.emplace_back(sockets_[transfer.node], transfer);
    auto since = Clock::now();
    while (true) {
        bool is_done = true, has_moved = false;
        for (Moving& each : moving) {
            if (each.is_done()) continue;
            const ssize_t moved = each.move();
            if (moved < 0) return false;
            has_moved |= moved > 0, is_done &= each.is_done();
        }
        if (is_done) return true;
        if (has_moved)
            since = Clock::now();
        else if (Clock::now() - since > patience)
            sleep_for(moving);
        else
            relax();
    }
}

}  // namespace octavo
