#include "memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <new>
#include <utility>

namespace octavo {

namespace {
constexpr size_t kHugePage = Memory::kHugePage;

constexpr size_t round_up(size_t bytes) { return (bytes + kHugePage - 1) / kHugePage * kHugePage; }

}  // namespace

Memory::Memory(size_t bytes) : size_(bytes) {
    mapped_ = round_up(bytes) + kHugePage;  // one more, to align within
    mapping_ = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapping_ == MAP_FAILED) {
        mapping_ = nullptr;
        throw std::bad_alloc();
    }
    data_ = reinterpret_cast<std::byte*>(round_up(reinterpret_cast<uintptr_t>(mapping_)));
#ifdef MADV_HUGEPAGE
    madvise(data_, mapped_ - kHugePage, MADV_HUGEPAGE);  // fewer TLB misses; may fail, which does no harm
#endif
}

Memory Memory::shared(int fd, size_t offset, size_t bytes) {
    if (fd < 0) return Memory(bytes);
    Memory memory;
    memory.size_ = bytes, memory.mapped_ = round_up(bytes) + kHugePage;
    memory.mapping_ = mmap(nullptr, memory.mapped_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory.mapping_ == MAP_FAILED) memory.mapping_ = nullptr;
    void* at = reinterpret_cast<void*>(round_up(reinterpret_cast<uintptr_t>(memory.mapping_)));
    constexpr int kFlags = MAP_SHARED | MAP_NORESERVE | MAP_FIXED;
    if (!at || mmap(at, round_up(bytes), PROT_READ | PROT_WRITE, kFlags, fd, off_t(offset)) == MAP_FAILED)
        throw std::bad_alloc();
    memory.data_ = static_cast<std::byte*>(at);
    return memory;
}

void Memory::take(size_t bytes) const {
    constexpr int kCollapse = 25;  // MADV_COLLAPSE of Linux 6.1, which C libraries before 2.37 do not define
    for (std::byte* at = data_; at < data_ + bytes; at += kHugePage) {
        if (madvise(at, kHugePage, kCollapse) == 0) continue;
        touch(at - data_);  // it must have some physical memory
        if (madvise(at, kHugePage, kCollapse) != 0 && errno == EINVAL) return;
    }
}

void Memory::touch(size_t offset) const {
    __atomic_fetch_or(reinterpret_cast<char*>(data_ + offset), 0, __ATOMIC_RELAXED);
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
