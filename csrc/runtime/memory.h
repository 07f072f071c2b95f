// Anonymous memory mapped from the operating system: zeroed, aligned to 2 MiB, in huge pages where they are available.
#pragma once

#include <cstddef>

namespace octavo {

class Memory {
public:
    Memory() = default;
    explicit Memory(size_t bytes);  // throws std::bad_alloc; a page takes physical memory once it is written
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
