// Copying bytes between host memories without filling the cache with them.
#pragma once

#include <cstddef>

namespace dualpath {

// Copies like memcpy. Where the CPU can, whole cache lines of the destination are written past the
// caches: they are not read first, and what the copying CPU has cached stays. Such writes become
// visible in order only after finish_copies().
void copy_bytes(std::byte* to, const std::byte* from, std::size_t num_bytes);

// Orders everything copied so far before all later stores of this thread.
void finish_copies();

// Which instructions copy_bytes runs on here: "avx512", "avx" or "memcpy".
const char* copy_implementation();

}  // namespace dualpath
