// Memory mapped from the operating system: zeroed, and in huge pages where they are available.
#pragma once

#include <cstddef>

namespace octavo {

class Memory {
public:
    Memory() = default;
    // Memory of this process, aligned to 2 MiB. Throws std::bad_alloc; a page takes physical memory once it is written.
    explicit Memory(size_t bytes);

    // Bytes of a memfd from `offset` on, a multiple of 2 MiB, which other processes may map too. The first `at_once` bytes
    // take physical memory now, in huge pages where the system has them. fd -1: as above.
    static Memory shared(int fd, size_t offset, size_t bytes, size_t at_once);

    Memory(Memory&& other) noexcept;
    Memory& operator=(Memory&& other) noexcept;
    ~Memory();

    std::byte* data() const { return data_; }
    size_t size() const { return size_; }

private:
    void* mapping_ = nullptr;
    size_t mapped_ = 0;
    std::byte* data_ = nullptr;
    size_t size_ = 0;
};

}  // namespace octavo
