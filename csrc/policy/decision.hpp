// What a policy is asked, and what it answers.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <span>

#include "policy/cluster_view.hpp"
#include "policy/waiting_line.hpp"

namespace dualpath::policy {

// Leading blocks of the prompt that a prefill engine holds in its own KV cache.
struct CachedPrefix {
    std::uint32_t engine;
    std::uint32_t num_blocks;
};

struct Request {
    std::int64_t num_tokens = 0;      // of the prompt
    std::int64_t reserve_tokens = 0;  // KV room it needs on the decode engine; 0: num_tokens
    std::uint32_t num_hit_blocks = 0;
    std::uint32_t block_tokens = 0;
    std::span<const CachedPrefix> cached;  // sparse: engines that hold something
    const WaitingLine* line = nullptr;     // with this request at its head; null: none else waits
    bool ignore_load = false;              // it has waited long enough: neither beta nor room count
    std::uint64_t turn = 0;                // requests placed before: only round robin looks

    // As the router believes: an engine may hold more of it than is stored.
    std::uint32_t cached_blocks(std::uint32_t engine) const {
        for (const CachedPrefix& prefix : cached) {
            if (prefix.engine == engine) return prefix.num_blocks;
        }
        return 0;
    }
    // Of its hit: what need not be read for that engine.
    std::uint32_t cached_hit_blocks(std::uint32_t engine) const {
        return std::min(cached_blocks(engine), num_hit_blocks);
    }
    std::int64_t room_tokens() const { return reserve_tokens > 0 ? reserve_tokens : num_tokens; }
    std::int64_t hit_tokens() const {
        return static_cast<std::int64_t>(num_hit_blocks) * block_tokens;
    }
};

// Blocks [first_block, last_block), read by `engine` over the storage NIC of `node`.
struct ReadSegment {
    std::uint32_t engine;
    std::uint32_t node;
    std::uint32_t first_block;
    std::uint32_t last_block;

    std::uint32_t num_blocks() const { return last_block - first_block; }
    bool operator==(const ReadSegment&) const = default;
};

constexpr std::size_t kMaxReaders = 16;

enum class Verdict : std::uint8_t {
    kPlaced,
    kWaitPrefill,  // no prefill engine takes it now: every one is over beta, or without room
    kWaitDecode,   // no decode engine has room now
    kImpossible,   // no usable engine of a role could take it, even empty
};

struct Decision {
    Verdict verdict = Verdict::kImpossible;
    std::uint32_t prefill = kNone;  // engines
    std::uint32_t decode = kNone;
    std::uint32_t num_cached_blocks =
        0;  // [0, cached): in the prefill engine's own cache, not read
    std::uint32_t num_recompute_blocks = 0;  // the end of the hit: not read, computed again
    std::uint32_t num_segments = 0;
    std::array<ReadSegment, kMaxReaders> segment_array{};
    double read_s = 0;  // when the last reader is expected to end, from now

    bool placed() const { return verdict == Verdict::kPlaced; }
    // In order; they cover [num_cached_blocks, hit blocks - num_recompute_blocks) once.
    std::span<const ReadSegment> segments() const { return {segment_array.data(), num_segments}; }
    // A bit for each, from the lowest on.
    std::uint16_t segment_bits() const {
        return static_cast<std::uint16_t>((1U << num_segments) - 1);
    }
};

// Puts `num_tokens` of a segment on the queues that they pass: its node's reads, and the pushes
// from there. Negative: takes them off again, once they are staged.
void charge_read(ClusterView& view, const Decision& decision, const ReadSegment& segment,
                 std::int64_t num_tokens);

// The same for tokens of the prefill engine's own cache, which go to the decode side from there.
void charge_cached(ClusterView& view, const Decision& decision, std::int64_t num_tokens);

// All of a placed request's reads.
void charge_reads(ClusterView& view, std::uint32_t block_tokens, const Decision& decision);

// Puts a placed request's weight on the view, but for its reads: requests, tokens, room, and what
// its prefill engine has cached.
void charge(ClusterView& view, const Request& request, const Decision& decision);

}  // namespace dualpath::policy
