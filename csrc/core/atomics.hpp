// Atomic operations on 64-bit words in memory that several processes share.
#pragma once

#include <atomic>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>

namespace dualpath {

// The word at `address`, which the caller keeps mapped and writable for the call.
// Throws std::invalid_argument for null or an address that is not a multiple of 8.
inline std::atomic_ref<std::uint64_t> shared_word(std::uintptr_t address) {
    // A lock inside one process would not be seen by another.
    static_assert(std::atomic_ref<std::uint64_t>::is_always_lock_free);
    if (address == 0 || address % 8 != 0) {
        throw std::invalid_argument("atomic access needs an address that is a multiple of 8, got " +
                                    std::to_string(address));
    }
    return std::atomic_ref<std::uint64_t>(*reinterpret_cast<std::uint64_t*>(address));
}

// All four are sequentially consistent, lock-free and safe from any thread or process.
inline std::uint64_t atomic_load_u64(std::uintptr_t address) { return shared_word(address).load(); }

inline void atomic_store_u64(std::uintptr_t address, std::uint64_t value) {
    shared_word(address).store(value);
}

inline std::uint64_t atomic_fetch_add_u64(std::uintptr_t address, std::uint64_t delta) {
    return shared_word(address).fetch_add(delta);
}

// Returns (whether `desired` was written, the value seen before).
inline std::pair<bool, std::uint64_t> atomic_compare_exchange_u64(std::uintptr_t address,
                                                                  std::uint64_t expected,
                                                                  std::uint64_t desired) {
    const bool written = shared_word(address).compare_exchange_strong(expected, desired);
    return {written, expected};
}

}  // namespace dualpath
