// CRC32C (Castagnoli), the checksum of every Layer Block. Knows nothing of blocks.
#pragma once

#include <cstddef>
#include <cstdint>

namespace dualpath {

// The checksum of `num_bytes` bytes at `data`, continued from `seed` (0 to start): the seed is a
// finished checksum, so crc32c(b, n, crc32c(a, m, 0)) is the checksum of a followed by b.
// Pure; any thread. Picks the CPU's instructions once, on first use.
std::uint32_t crc32c(const void* data, std::size_t num_bytes, std::uint32_t seed);

// The same by table, on any CPU. Exposed so that tests can compare both.
std::uint32_t crc32c_portable(const void* data, std::size_t num_bytes, std::uint32_t seed);

// "avx512+vpclmulqdq", "sse4.2+pclmul" or "portable": what crc32c() runs on here. For diagnosis.
const char* crc32c_implementation();

}  // namespace dualpath
