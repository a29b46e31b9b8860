// Copies large pieces of memory past the cache.
#pragma once

#include <cstddef>

namespace dualpath {

// Copies `num_bytes` from `from` to `to`, which do not overlap. What is written is not read again
// by this core, so it goes to memory without being fetched first: a third of the traffic less than
// memcpy. When it returns, every thread and process that is told so by later means sees the bytes.
// Pure; any thread. Picks the CPU's instructions once, on first use.
void stream_copy(void* to, const void* from, std::size_t num_bytes);

// The same for many pieces: what they wrote is seen by others only after order_streamed_copies() of
// the same thread, which takes longer than a small piece.
void stream_copy_unordered(void* to, const void* from, std::size_t num_bytes);
void order_streamed_copies();

// "avx512", "avx2" or "memcpy": what stream_copy() runs on here. For diagnosis.
const char* stream_copy_implementation();

}  // namespace dualpath
