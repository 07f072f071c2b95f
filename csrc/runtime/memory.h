// Memory mapped from the operating system: zeroed, and in huge pages where they are available.
#pragma once

#include <cstddef>

namespace octavo {

class Memory {
public:
    Memory() = default;
    // Memory of this process, aligned to 2 MiB. Throws std::bad_alloc; a page takes physical memory once it is written.
    explicit Memory(size_t bytes);

    // Bytes of a memfd from `offset` on, a multiple of 2 MiB, which other processes may map too. fd -1: as above.
    static Memory shared(int fd, size_t offset, size_t bytes);

    // Put the first `bytes` of shared memory into huge pages, which the system does only when told to, and so take
    // physical memory for all of them. They keep their content. Where the system cannot (Linux before 6.1), nothing
    // changes.
    void take(size_t bytes) const;

    // Make the huge page at `offset` take physical memory now, without a change of its content.
    void touch(size_t offset) const;

    Memory(Memory&& other) noexcept;
    Memory& operator=(Memory&& other) noexcept;
    ~Memory();

    static constexpr size_t kHugePage = size_t{2} << 20;

    std::byte* data() const { return data_; }
    size_t size() const { return size_; }

private:
    void* mapping_ = nullptr;
    size_t mapped_ = 0;
    std::byte* data_ = nullptr;
    size_t size_ = 0;
};

}  // namespace octavo
