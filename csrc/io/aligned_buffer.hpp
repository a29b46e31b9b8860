// Memory that direct I/O takes.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <memory>
#include <new>

#include "io/block_layout.hpp"

namespace dualpath {

// Owns `num_bytes` uninitialised bytes (a multiple of kDirectAlignment), aligned to it.
class AlignedBuffer {
  public:
    // Throws std::bad_alloc.
    explicit AlignedBuffer(std::size_t num_bytes)
        : data_(static_cast<std::byte*>(std::aligned_alloc(kDirectAlignment, num_bytes))) {
        if (data_ == nullptr) throw std::bad_alloc();
    }

    std::byte* data() const { return data_.get(); }

  private:
    struct Free {
        void operator()(std::byte* data) const { std::free(data); }
    };
    std::unique_ptr<std::byte, Free> data_;
};

}  // namespace dualpath
