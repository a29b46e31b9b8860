// What travels on a connection between two movers: a greeting, then batches; acknowledgements back.
//
//   -> Greeting
//   -> FrameHeader, WirePiece[num_pieces], notice, the bytes of all pieces in their order
//   <- the batch id, once the bytes are in place and the notice is delivered
#pragma once

#include <array>
#include <bit>
#include <cstdint>

namespace dualpath {

static_assert(std::endian::native == std::endian::little, "the wire is little-endian");

// Known to those who learnt it over authenticated control alone.
using Token = std::array<unsigned char, 16>;

struct Greeting {
    static constexpr std::array<char, 8> kMagic{'D', 'P', 'T', 'C', 'P', 0, 0, 1};
    std::array<char, 8> magic = kMagic;
    Token token{};
};

struct FrameHeader {
    // 64 MiB of descriptors: far above any batch, so that a length that makes no sense ends here.
    static constexpr std::uint32_t kMaxPieces = 1 << 22;
    std::uint64_t batch_id = 0;
    std::uint32_t num_pieces = 0;
    std::uint32_t notice_bytes = 0;
};

struct WirePiece {
    std::uint64_t remote = 0;
    std::uint64_t num_bytes = 0;
};

}  // namespace dualpath
