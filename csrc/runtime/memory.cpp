#include "memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <new>
#include <utility>

namespace octavo {

namespace {
constexpr size_t kHugePage = size_t{2} << 20;
}

Memory::Memory(size_t bytes) : size_(bytes) {
    mapped_ = (bytes + kHugePage - 1) / kHugePage * kHugePage + kHugePage;  // one more, to align within
    mapping_ = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapping_ == MAP_FAILED) {
        mapping_ = nullptr;
        throw std::bad_alloc();
    }
    const auto address = (reinterpret_cast<uintptr_t>(mapping_) + kHugePage - 1) / kHugePage * kHugePage;
    data_ = reinterpret_cast<std::byte*>(address);
#ifdef MADV_HUGEPAGE
    madvise(data_, mapped_ - kHugePage, MADV_HUGEPAGE);  // fewer TLB misses; may fail, which does no harm
#endif
}

Memory Memory::shared(int fd, size_t offset, size_t bytes) {
    if (fd < 0) return Memory(bytes);
    Memory memory;
    bytes = std::max<size_t>(bytes, 1);
    void* mapping = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd, off_t(offset));
    if (mapping == MAP_FAILED) throw std::bad_alloc();
    memory.mapping_ = mapping, memory.mapped_ = memory.size_ = bytes;
    memory.data_ = static_cast<std::byte*>(mapping);
#ifdef MADV_HUGEPAGE
    madvise(mapping, bytes, MADV_HUGEPAGE);
#endif
    return memory;
}

Memory::Memory(Memory&& other) noexcept { *this = std::move(other); }

Memory& Memory::operator=(Memory&& other) noexcept {
    std::swap(mapping_, other.mapping_);
    std::swap(mapped_, other.mapped_);
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    return *this;
}

Memory::~Memory() {
    if (mapping_) munmap(mapping_, mapped_);
}

}  // namespace octavo
