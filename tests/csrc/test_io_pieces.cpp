#include <cerrno>
#include <numeric>
#include <random>

#include "check.hpp"
#include "core/crc32c.hpp"
#include "io/aligned_buffer.hpp"
#include "io/layer_checksums.hpp"
#include "io/piece_transfer.hpp"

using namespace dualpath;

namespace {

constexpr std::uint64_t kPage = 4096;
using Progress = PieceTransfer::Progress;

std::uint64_t bytes_of(const Operation& operation) {
    std::uint64_t sum = 0;
    for (unsigned idx = 0; idx < operation.num_parts; ++idx) sum += operation.parts[idx].iov_len;
    return sum;
}

}  // namespace

// The pieces lie side by side, start at sectors, and only the first one holds the header.
TEST(pieces_cover_a_file_without_gaps) {
    const AlignedBuffer header(kPage);
    for (const std::uint64_t payload_bytes : {kPage, 3 * kPage, 100 * kPage, 627 * kPage}) {
        const AlignedBuffer payload(payload_bytes);
        for (const std::uint64_t piece_bytes : {kPage, 16 * kPage, 256 * kPage}) {
            PieceTransfer pieces(header.data(), kPage, payload.data(), payload_bytes, piece_bytes,
                                 true);
            std::uint64_t position = 0;
            for (std::size_t piece = 0; piece < pieces.size(); ++piece) {
                const Operation operation = pieces.operation(Step::kRead, 3, piece);
                CHECK(operation.offset == position && position % kPage == 0);
                CHECK(operation.num_bytes == bytes_of(operation));
                CHECK((operation.num_parts == 2) == (piece == 0));
                position += operation.num_bytes;
                CHECK(pieces.payload_end(piece) == position - kPage);
                CHECK(operation.num_bytes <= std::max(2 * piece_bytes, 2 * kPage));
            }
            CHECK(position == kPage + payload_bytes);
        }
    }
}

TEST(a_short_transfer_asks_for_the_rest) {
    const AlignedBuffer header(kPage), payload(8 * kPage);
    PieceTransfer pieces(header.data(), kPage, payload.data(), 8 * kPage, 64 * kPage, true);
    CHECK(pieces.size() == 1);
    CHECK(pieces.advance(0, 2 * kPage) == Progress::kAgain);
    CHECK(pieces.operation(Step::kRead, 3, 0).offset == 2 * kPage);
    CHECK(pieces.operation(Step::kRead, 3, 0).parts[0].iov_base == payload.data() + kPage);
    // A direct call starts at a sector: the half one is moved again.
    CHECK(pieces.advance(0, kPage + 100) == Progress::kAgain);
    CHECK(pieces.operation(Step::kRead, 3, 0).offset == 3 * kPage);
    CHECK(pieces.advance(0, 6 * kPage) == Progress::kDone);
}

TEST(interruptions_are_repeated_but_not_for_ever) {
    const AlignedBuffer header(kPage), payload(kPage);
    PieceTransfer pieces(header.data(), kPage, payload.data(), kPage, kPage, true);
    unsigned num_repeats = 0;
    while (pieces.advance(0, -EINTR) == Progress::kAgain) ++num_repeats;
    CHECK(num_repeats > 3 && num_repeats < 100);
    CHECK(pieces.advance(0, -EIO) == Progress::kFailed);
    CHECK(pieces.advance(0, 0) == Progress::kEndOfFile);
}

// Bytes that never fill a sector: the file ends in the middle of one.
TEST(half_a_sector_again_and_again_is_the_end_of_the_file) {
    const AlignedBuffer header(kPage), payload(kPage);
    PieceTransfer pieces(header.data(), kPage, payload.data(), kPage, kPage, true);
    Progress progress = Progress::kAgain;
    for (int idx = 0; idx < 100 && progress == Progress::kAgain; ++idx) {
        progress = pieces.advance(0, 100);
    }
    CHECK(progress == Progress::kEndOfFile);
}

TEST(checksums_do_not_depend_on_how_the_payload_grows) {
    BlockLayout layout{kPage, 16 * kPage, 0, kPage - 4, {1, 4095, 10000, 7, 20000}};
    layout.check();
    const AlignedBuffer payload(layout.payload_bytes);
    std::mt19937 generator(3);
    for (std::uint64_t idx = 0; idx < layout.payload_bytes; ++idx) {
        payload.data()[idx] = static_cast<std::byte>(generator());
    }
    for (const std::uint64_t stride : {std::uint64_t{1000}, kPage, layout.payload_bytes}) {
        LayerChecksums checksums(layout, payload.data());
        for (std::uint64_t end = stride; end < layout.payload_bytes; end += stride) {
            checksums.advance(end);
        }
        checksums.advance(layout.payload_bytes);
        std::uint64_t offset = 0;
        for (std::size_t layer = 0; layer < layout.layer_bytes.size(); ++layer) {
            const std::uint64_t size = layout.layer_bytes[layer];
            CHECK(checksums.values()[layer] == crc32c(payload.data() + offset, size, 0));
            offset += size;
        }
    }
}

TEST(a_layout_that_does_not_fit_is_refused) {
    const BlockLayout good{kPage, kPage, 0, kPage - 4, {100}};
    good.check();
    for (int part = 0; part < 5; ++part) {
        BlockLayout bad = good;
        if (part == 0) bad.header_bytes = 100;
        if (part == 1) bad.payload_bytes = 5000;
        if (part == 2) bad.layer_bytes = {5000};
        if (part == 3) bad.header_crc_offset = kPage - 3;
        if (part == 4) bad.crc_table_offset = kPage - 7;
        CHECK_THROWS(bad.check(), std::invalid_argument);
    }
}
