#include "core/stream_copy.hpp"

#include <algorithm>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace dualpath {
namespace {

#if defined(__x86_64__)

constexpr std::size_t kLineBytes = 64;
// Below this the fence costs more than the saved traffic.
constexpr std::size_t kSmallBytes = 1024;
// A gather jumps at the end of each piece: without this its start would wait for the hardware's
// prefetcher to find the new direction.
constexpr std::size_t kPrefetchBytes = 1024;

// Whole lines to an aligned target.
using CopyLines = void (*)(char* to, const char* from, std::size_t num_bytes);

__attribute__((target("avx512f"))) void copy_lines_avx512(char* to, const char* from,
                                                          std::size_t num_bytes) {
    for (std::size_t i = 0; i < num_bytes; i += kLineBytes) {
        _mm_prefetch(from + i + kPrefetchBytes, _MM_HINT_T0);
        _mm512_stream_si512(reinterpret_cast<__m512i*>(to + i), _mm512_loadu_si512(from + i));
    }
    _mm_sfence();
}

__attribute__((target("avx2"))) void copy_lines_avx2(char* to, const char* from,
                                                     std::size_t num_bytes) {
    for (std::size_t i = 0; i < num_bytes; i += kLineBytes) {
        _mm_prefetch(from + i + kPrefetchBytes, _MM_HINT_T0);
        const auto* source = reinterpret_cast<const __m256i*>(from + i);
        auto* target = reinterpret_cast<__m256i*>(to + i);
        const __m256i first = _mm256_loadu_si256(source);
        const __m256i second = _mm256_loadu_si256(source + 1);
        _mm256_stream_si256(target, first);
        _mm256_stream_si256(target + 1, second);
    }
    _mm_sfence();
}

void stream(CopyLines copy_lines, char* to, const char* from, std::size_t num_bytes) {
    const std::size_t head = -reinterpret_cast<std::uintptr_t>(to) % kLineBytes;
    const std::size_t lines = (num_bytes - head) / kLineBytes * kLineBytes;
    std::memcpy(to, from, head);
    copy_lines(to + head, from + head, lines);
    std::memcpy(to + head + lines, from + head + lines, num_bytes - head - lines);
}

CopyLines chosen_copy() {
    static const CopyLines chosen = __builtin_cpu_supports("avx512f") ? copy_lines_avx512
                                    : __builtin_cpu_supports("avx2")  ? copy_lines_avx2
                                                                      : nullptr;
    return chosen;
}

#endif

}  // namespace

void stream_copy(void* to, const void* from, std::size_t num_bytes) {
#if defined(__x86_64__)
    if (const CopyLines copy_lines = chosen_copy(); copy_lines && num_bytes >= kSmallBytes) {
        stream(copy_lines, static_cast<char*>(to), static_cast<const char*>(from), num_bytes);
        return;
    }
#endif
    if (num_bytes != 0) std::memcpy(to, from, num_bytes);
}

const char* stream_copy_implementation() {
#if defined(__x86_64__)
    if (chosen_copy() == copy_lines_avx512) return "avx512";
    if (chosen_copy() == copy_lines_avx2) return "avx2";
#endif
    return "memcpy";
}

}  // namespace dualpath
