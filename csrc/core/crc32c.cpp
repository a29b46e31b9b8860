#include "core/crc32c.hpp"

#include <array>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace dualpath {
namespace {

// The polynomial, reflected: bit 31 - i is the coefficient of x^i.
constexpr std::uint32_t kPolynomial = 0x82F63B78U;

using Tables = std::array<std::array<std::uint32_t, 256>, 8>;

constexpr std::uint32_t times_x(std::uint32_t value) {
    return (value >> 1) ^ ((value & 1U) != 0 ? kPolynomial : 0U);
}

// tables[k][b]: the state after byte b and k zero bytes, for eight bytes at a time.
constexpr Tables make_tables() {
    Tables tables{};
    for (std::uint32_t byte = 0; byte < 256; ++byte) {
        std::uint32_t state = byte;
        for (int bit = 0; bit < 8; ++bit) state = times_x(state);
        tables[0][byte] = state;
    }
    for (std::size_t k = 1; k < 8; ++k) {
        for (std::uint32_t byte = 0; byte < 256; ++byte) {
            const std::uint32_t previous = tables[k - 1][byte];
            tables[k][byte] = (previous >> 8) ^ tables[0][previous & 0xFFU];
        }
    }
    return tables;
}

constexpr Tables kTables = make_tables();

std::uint64_t load_u64(const unsigned char* data) {
    std::uint64_t word;
    std::memcpy(&word, data, sizeof word);
    return word;
}

std::uint32_t update_portable(std::uint32_t state, const unsigned char* data, std::size_t size) {
    for (; size >= 8; size -= 8, data += 8) {
        std::uint32_t next = 0;
        for (std::size_t i = 0; i < 8; ++i) {
            const std::uint32_t byte = data[i] ^ (i < 4 ? (state >> (8 * i)) & 0xFFU : 0U);
            next ^= kTables[7 - i][byte];
        }
        state = next;
    }
    for (; size > 0; --size, ++data) state = (state >> 8) ^ kTables[0][(state ^ *data) & 0xFFU];
    return state;
}

#if defined(__x86_64__)

// x^n modulo the polynomial, reflected.
constexpr std::uint32_t power_of_x(std::size_t n) {
    std::uint32_t value = 0x80000000U;
    for (std::size_t i = 0; i < n; ++i) value = times_x(value);
    return value;
}

// The state after `Bytes` more zero bytes. The carry-less product of two reflected 32-bit values
// read as a reflected 64-bit one is a*b*x, and the crc32 instruction multiplies by x^32 while it
// reduces: hence the exponent 8 * Bytes - 33.
template <std::size_t Bytes>
__attribute__((target("sse4.2,pclmul"))) std::uint32_t append_zeros(std::uint32_t state) {
    constexpr std::uint32_t kFactor = power_of_x(8 * Bytes - 33);
    const __m128i product = _mm_clmulepi64_si128(_mm_cvtsi32_si128(static_cast<int>(state)),
                                                 _mm_cvtsi32_si128(static_cast<int>(kFactor)), 0);
    return static_cast<std::uint32_t>(
        _mm_crc32_u64(0, static_cast<std::uint64_t>(_mm_cvtsi128_si64(product))));
}

// Three independent lanes hide the instruction's latency of three cycles.
template <std::size_t LaneBytes>
__attribute__((target("sse4.2,pclmul"))) std::uint32_t update_lanes(std::uint32_t state,
                                                                    const unsigned char*& data,
                                                                    std::size_t& size) {
    while (size >= 3 * LaneBytes) {
        std::uint64_t first = state;
        std::uint64_t second = 0;
        std::uint64_t third = 0;
        for (std::size_t i = 0; i < LaneBytes; i += 8) {
            first = _mm_crc32_u64(first, load_u64(data + i));
            second = _mm_crc32_u64(second, load_u64(data + LaneBytes + i));
            third = _mm_crc32_u64(third, load_u64(data + 2 * LaneBytes + i));
        }
        state = append_zeros<2 * LaneBytes>(static_cast<std::uint32_t>(first)) ^
                append_zeros<LaneBytes>(static_cast<std::uint32_t>(second)) ^
                static_cast<std::uint32_t>(third);
        data += 3 * LaneBytes;
        size -= 3 * LaneBytes;
    }
    return state;
}

__attribute__((target("sse4.2,pclmul"))) std::uint32_t update_sse42(std::uint32_t state,
                                                                    const unsigned char* data,
                                                                    std::size_t size) {
    state = update_lanes<2048>(state, data, size);
    state = update_lanes<128>(state, data, size);
    for (; size >= 8; size -= 8, data += 8) {
        state = static_cast<std::uint32_t>(_mm_crc32_u64(state, load_u64(data)));
    }
    for (; size > 0; --size, ++data) state = _mm_crc32_u8(state, *data);
    return state;
}

__attribute__((target("avx512f"))) inline __m512i load_512(const unsigned char* from) {
    return _mm512_loadu_si512(from);
}

// Only a hint: addresses beyond the data do no harm.
inline void prefetch(const unsigned char* from, std::size_t num_bytes) {
    constexpr std::size_t kCacheLine = 64;
    for (std::size_t offset = 0; offset < num_bytes; offset += kCacheLine) {
        __builtin_prefetch(from + offset);
    }
}

// Carry-less multiplication of both halves of each 128-bit lane by x^Bits: the lane, moved to where
// the bytes `Bits` further on lie, in the reflected notation of Gopal et al., "Fast CRC Computation
// for Generic Polynomials Using PCLMULQDQ Instruction" (Intel, 2009).
template <std::size_t Bits>
__attribute__((target("avx512f,vpclmulqdq"))) __m512i fold(__m512i state, __m512i next) {
    constexpr auto kLow = static_cast<long long>(std::uint64_t{power_of_x(Bits + 32)} << 1);
    constexpr auto kHigh = static_cast<long long>(std::uint64_t{power_of_x(Bits - 32)} << 1);
    const __m512i factors = _mm512_set_epi64(kHigh, kLow, kHigh, kLow, kHigh, kLow, kHigh, kLow);
    const __m512i low = _mm512_clmulepi64_epi128(state, factors, 0x00);
    const __m512i high = _mm512_clmulepi64_epi128(state, factors, 0x11);
    return _mm512_ternarylogic_epi64(low, high, next, 0x96);  // low ^ high ^ next
}

// 256 bytes a step instead of 24 a three cycles: as fast as one core's memory, which the crc32
// instruction is not.
__attribute__((target("avx512f,vpclmulqdq,sse4.2,pclmul"))) std::uint32_t update_avx512(
    std::uint32_t state, const unsigned char* data, std::size_t size) {
    constexpr std::size_t kStep = 256;
    // The CPU's own prefetcher stops at each page: measured 8.5 GB/s from memory, with this 9.3.
    constexpr std::size_t kAhead = 4096;
    if (size < 2 * kStep) return update_sse42(state, data, size);
    __m512i first = _mm512_xor_si512(
        load_512(data), _mm512_zextsi128_si512(_mm_cvtsi32_si128(static_cast<int>(state))));
    __m512i second = load_512(data + 64);
    __m512i third = load_512(data + 128);
    __m512i fourth = load_512(data + 192);
    for (data += kStep, size -= kStep; size >= kStep; data += kStep, size -= kStep) {
        prefetch(data + kAhead, kStep);
        first = fold<8 * kStep>(first, load_512(data));
        second = fold<8 * kStep>(second, load_512(data + 64));
        third = fold<8 * kStep>(third, load_512(data + 128));
        fourth = fold<8 * kStep>(fourth, load_512(data + 192));
    }
    const __m512i rest = fold<512>(fold<512>(fold<512>(first, second), third), fourth);
    alignas(64) unsigned char bytes[64];
    _mm512_store_si512(bytes, rest);
    return update_sse42(update_sse42(0, bytes, sizeof bytes), data, size);
}

bool has_sse42() { return __builtin_cpu_supports("sse4.2") && __builtin_cpu_supports("pclmul"); }

bool has_avx512() {
    return has_sse42() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("vpclmulqdq");
}

#endif

using Update = std::uint32_t (*)(std::uint32_t, const unsigned char*, std::size_t);

struct Implementation {
    Update update;
    const char* name;
};

// Only little-endian 64-bit CPUs run vLLM; those without a path of their own take the table.
const Implementation& chosen() {
    static const Implementation implementation = [] {
#if defined(__x86_64__)
        if (has_avx512()) return Implementation{update_avx512, "avx512+vpclmulqdq"};
        if (has_sse42()) return Implementation{update_sse42, "sse4.2+pclmul"};
#endif
        return Implementation{update_portable, "portable"};
    }();
    return implementation;
}

}  // namespace

std::uint32_t crc32c(const void* data, std::size_t num_bytes, std::uint32_t seed) {
    return ~chosen().update(~seed, static_cast<const unsigned char*>(data), num_bytes);
}

std::uint32_t crc32c_portable(const void* data, std::size_t num_bytes, std::uint32_t seed) {
    return ~update_portable(~seed, static_cast<const unsigned char*>(data), num_bytes);
}

const char* crc32c_implementation() { return chosen().name; }

}  // namespace dualpath
