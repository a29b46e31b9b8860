#include "core/put_batch.hpp"

#include "check.hpp"

using namespace dualpath;

TEST(put_batch_merges_what_is_adjacent_on_both_sides) {
    const Piece pieces[] = {{100, 1000, 10}, {110, 1010, 10}, {120, 2000, 10}, {140, 2010, 10}};
    const PutBatch batch(1, pieces, 4, "", 1 << 20);
    CHECK(batch.puts.size() == 3);
    CHECK(batch.puts[0].num_bytes == 20);
    CHECK(batch.puts[1].local == 120 && batch.puts[2].local == 140);
}

TEST(put_batch_splits_at_the_largest_put) {
    const Piece pieces[] = {{0x1000, 0x9000, 25}, {0x1000 + 25, 0x9000 + 25, 5}};
    const PutBatch batch(1, pieces, 2, "", 10);
    CHECK(batch.puts.size() == 3);
    std::uint64_t covered = 0;
    for (const Put& put : batch.puts) {
        CHECK(put.local == 0x1000 + covered && put.remote == 0x9000 + covered);
        covered += put.num_bytes;
    }
    CHECK(covered == 30);
}

TEST(put_batch_without_pieces_ends_with_its_notice) {
    PutBatch batch(1, nullptr, 0, "hello", 10);
    CHECK(batch.all_posted() && !batch.ended());
    batch.flushed = true;
    CHECK(batch.notice_due() && !batch.ended());
    batch.notice_posted = true;
    CHECK(batch.ended());
}

TEST(put_batch_keeps_its_first_error_and_ends_when_nothing_is_outstanding) {
    const Piece pieces[] = {{100, 1000, 10}};
    PutBatch batch(1, pieces, 1, "", 10);
    batch.outstanding = 1;
    batch.fail("first");
    batch.fail("second");
    CHECK(batch.error == "first" && batch.all_posted() && !batch.ended());
    batch.outstanding = 0;
    CHECK(batch.ended());
}
