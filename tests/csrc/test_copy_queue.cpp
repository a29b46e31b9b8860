// Copies of pages through the queue: right bytes, right order, no torn ends.
#include <atomic>
#include <chrono>
#include <cstring>
#include <memory>
#include <numeric>
#include <semaphore>
#include <thread>
#include <vector>

#include "check.hpp"
#include "copy/copy_queue.hpp"
#include "core/stream_copy.hpp"

using namespace dualpath;
using std::chrono::seconds;

namespace {

constexpr std::size_t kBlocks = 16, kSlots = 8, kPages = 2, kLayers = 3;

// A cache of `num_runs` pieces a page, apart by one piece, and slots beside it.
struct Memories {
    std::size_t num_runs, run_bytes, page_stride, slot_bytes;
    std::vector<std::byte> cache, staging;
    std::shared_ptr<const PageMap> map;

    Memories(std::size_t num_runs, std::size_t run_bytes)
        : num_runs(num_runs),
          run_bytes(run_bytes),
          page_stride(2 * num_runs * run_bytes),
          slot_bytes(kLayers * kPages * num_runs * run_bytes + 64),
          cache(kLayers * kBlocks * page_stride),
          staging(kSlots * slot_bytes) {
        for (std::size_t i = 0; i < cache.size(); ++i) cache[i] = std::byte(i * 7 + i / 251);
        std::vector<LayerPages> layers;
        for (std::size_t layer = 0; layer < kLayers; ++layer) {
            layers.push_back(
                {reinterpret_cast<std::uintptr_t>(cache.data()) + layer * kBlocks * page_stride,
                 page_stride, num_runs, 2 * run_bytes, run_bytes,
                 layer * kPages * num_runs * run_bytes});
        }
        map =
            std::make_shared<PageMap>(layers, kBlocks,
                                      StagingSlots{reinterpret_cast<std::uintptr_t>(staging.data()),
                                                   slot_bytes, kSlots, kPages});
    }

    std::shared_ptr<const PageRows> rows(std::vector<PageRow> rows) const {
        return std::make_shared<PageRows>(map, std::move(rows));
    }
    const std::byte* run(std::size_t layer, std::size_t block, std::size_t run) const {
        return cache.data() + (layer * kBlocks + block) * page_stride + run * 2 * run_bytes;
    }
    const std::byte* staged(std::size_t layer, std::size_t slot, std::size_t page) const {
        return staging.data() + slot * slot_bytes + (layer * kPages + page) * num_runs * run_bytes;
    }
};

CopyOrder order(std::shared_ptr<const PageRows> rows, CopyDirection direction,
                std::size_t first = 0, std::size_t end = kLayers) {
    return {std::move(rows), direction, first, end, nullptr};
}

// Notes which layer of which rows it was asked for; each copy waits to be let through.
class GatedDevice final : public CopyDevice {
  public:
    struct Log {
        std::vector<std::size_t> layers;
        std::counting_semaphore<> allowed{0};
        std::counting_semaphore<> entered{0};
    };
    explicit GatedDevice(Log& log) : log_(log) {}
    std::size_t slice_bytes() const override { return 1 << 20; }
    void copy(const CopyOrder& order, CopyLane, std::size_t layer, std::size_t first,
              std::size_t) override {
        log_.entered.release();
        log_.allowed.acquire();
        log_.layers.push_back(100 * order.rows->rows()[first].slot + layer);
    }

  private:
    Log& log_;
};

// Fails at its second copy, and takes its time to come to rest.
class FailingDevice final : public CopyDevice {
  public:
    struct Log {
        std::atomic<int> num_copies{0};
        std::atomic<bool> at_rest{false};
        std::counting_semaphore<> settling{0};
        std::counting_semaphore<> allowed{0};
    };
    explicit FailingDevice(Log& log) : log_(log) {}
    std::size_t slice_bytes() const override { return 1 << 20; }
    void copy(const CopyOrder&, CopyLane, std::size_t, std::size_t, std::size_t) override {
        if (++log_.num_copies == 2) throw std::runtime_error("the device is gone");
    }
    void settle() noexcept override {
        log_.settling.release();
        log_.allowed.acquire();
        log_.at_rest = true;
    }

  private:
    Log& log_;
};

void check_round_trip(std::size_t num_runs, std::size_t run_bytes) {
    Memories m(num_runs, run_bytes);
    const auto before = m.cache;
    CopyQueue queue(std::make_unique<HostDevice>());
    const auto out = m.rows({{3, 5, 1}, {9, 0, 0}, {15, 7, 1}});
    CHECK(
        queue.wait(queue.submit(order(out, CopyDirection::kSave), CopyLane::kUrgent), seconds(30)));
    CHECK(m.cache == before);
    for (std::size_t layer = 0; layer < kLayers; ++layer) {
        for (const PageRow& row : out->rows()) {
            for (std::size_t r = 0; r < num_runs; ++r) {
                CHECK(std::memcmp(m.run(layer, row.block, r),
                                  m.staged(layer, row.slot, row.page) + r * run_bytes,
                                  run_bytes) == 0);
            }
        }
    }
    const auto in = m.rows({{4, 5, 1}, {2, 0, 0}, {0, 7, 1}});
    CHECK(queue.wait(queue.submit(order(in, CopyDirection::kLoad), CopyLane::kBackground),
                     seconds(30)));
    auto want = before;
    for (std::size_t layer = 0; layer < kLayers; ++layer) {
        for (std::size_t i = 0; i < 3; ++i) {
            for (std::size_t r = 0; r < num_runs; ++r) {
                const auto offset = m.run(layer, in->rows()[i].block, r) - m.cache.data();
                std::memcpy(
                    want.data() + offset,
                    before.data() + (m.run(layer, out->rows()[i].block, r) - m.cache.data()),
                    run_bytes);
            }
        }
    }
    CHECK(m.cache == want);
}

}  // namespace

TEST(stream_copy_of_every_alignment) {
    std::vector<std::byte> from(42000), to(42000);
    for (std::size_t i = 0; i < from.size(); ++i) from[i] = std::byte(i * 31 + 5);
    for (std::size_t size : {0, 1, 63, 64, 1023, 1024, 1025, 4096, 16384, 16500, 40000}) {
        for (std::size_t skew = 0; skew < 130; skew += 13) {
            std::fill(to.begin(), to.end(), std::byte{0});
            stream_copy_unordered(to.data() + skew, from.data() + skew / 2, size);
            order_streamed_copies();
            CHECK(std::memcmp(to.data() + skew, from.data() + skew / 2, size) == 0);
            for (std::size_t i = 0; i < skew; ++i) CHECK(to[i] == std::byte{0});
            for (std::size_t i = skew + size; i < to.size(); ++i) CHECK(to[i] == std::byte{0});
        }
    }
}

TEST(copy_whole_pages) {
    check_round_trip(1, 4096);
}
TEST(copy_pages_in_pieces) {
    check_round_trip(4, 512);
}
TEST(copy_odd_sizes) {
    check_round_trip(3, 1037);
}

TEST(copy_pages_larger_than_a_slice) {
    check_round_trip(2, (std::size_t{1} << 20) + 64);
}

TEST(copy_rows_outside_the_memories_are_refused) {
    Memories m(1, 64);
    CHECK_THROWS(m.rows({{kBlocks, 0, 0}}), std::invalid_argument);
    CHECK_THROWS(m.rows({{0, kSlots, 0}}), std::invalid_argument);
    CHECK_THROWS(m.rows({{0, 0, kPages}}), std::invalid_argument);
    CopyQueue queue(std::make_unique<HostDevice>());
    const auto rows = m.rows({{0, 0, 0}});
    CHECK_THROWS(queue.submit(order(rows, CopyDirection::kSave, 0, kLayers + 1), CopyLane::kUrgent),
                 std::invalid_argument);
    CHECK_THROWS(queue.submit(order(rows, CopyDirection::kSave, 1, 1), CopyLane::kUrgent),
                 std::invalid_argument);
    std::vector<LayerPages> layers = m.map->layers();
    layers[0].slot_offset = m.slot_bytes - 64;
    CHECK_THROWS(PageMap(layers, kBlocks, m.map->staging()), std::invalid_argument);
}

TEST(copy_no_rows_is_done_in_its_turn) {
    Memories m(1, 64);
    CopyQueue queue(std::make_unique<HostDevice>());
    const auto ticket = queue.submit(order(m.rows({}), CopyDirection::kSave), CopyLane::kUrgent);
    CHECK(queue.wait(ticket, seconds(30)) && queue.done(ticket) && queue.done(0));
}

TEST(copy_urgent_overtakes_background) {
    Memories m(1, 64);
    GatedDevice::Log log;
    CopyQueue queue(std::make_unique<GatedDevice>(log));
    const auto slow =
        queue.submit(order(m.rows({{0, 1, 0}}), CopyDirection::kLoad), CopyLane::kBackground);
    log.entered.acquire();  // its first layer is under way
    const auto fast =
        queue.submit(order(m.rows({{1, 2, 0}}), CopyDirection::kSave, 0, 1), CopyLane::kUrgent);
    const auto later =
        queue.submit(order(m.rows({{2, 3, 0}}), CopyDirection::kLoad, 2, 3), CopyLane::kBackground);
    CHECK(!queue.done(slow) && !queue.done(fast) && !queue.wait(fast, seconds(0)));
    log.allowed.release(2);
    CHECK(queue.wait(fast, seconds(30)) && !queue.done(slow));
    log.allowed.release(3);
    CHECK(queue.wait(later, seconds(30)) && queue.done(slow));
    CHECK(queue.done_until(slow) == later && queue.done_until(fast) == fast);
    CHECK(slow % 2 == 1 && later % 2 == 1 && fast % 2 == 0);
    CHECK(log.layers == std::vector<std::size_t>{100, 200, 101, 102, 302});
}

TEST(copy_failure_is_told_with_its_reason) {
    Memories m(1, 64);
    FailingDevice::Log log;
    CopyQueue queue(std::make_unique<FailingDevice>(log));
    const auto ticket =
        queue.submit(order(m.rows({{0, 0, 0}}), CopyDirection::kSave), CopyLane::kUrgent);
    log.settling.acquire();
    // The first copy may still be under way in the device: nobody is told to go on.
    CHECK(!queue.done(ticket) && !queue.wait(ticket, std::chrono::milliseconds(1)));
    log.allowed.release();
    CHECK_THROWS(queue.wait(ticket, seconds(30)), std::runtime_error);
    CHECK(log.at_rest);
    CHECK_THROWS(queue.done(0), std::runtime_error);
    CHECK(queue.close(seconds(30)));
}

TEST(copy_after_a_failure_is_not_carried_out) {
    Memories m(1, 64);
    FailingDevice::Log log;
    log.allowed.release();
    CopyQueue queue(std::make_unique<FailingDevice>(log));
    const auto rows = m.rows({{0, 0, 0}});
    queue.submit(order(rows, CopyDirection::kSave), CopyLane::kUrgent);
    const auto later = queue.submit(order(rows, CopyDirection::kLoad), CopyLane::kBackground);
    CHECK_THROWS(queue.wait(later, seconds(30)), std::runtime_error);
    CHECK(log.num_copies == 2);
    CHECK(queue.close(seconds(30)));
}

TEST(copy_close_carries_out_what_is_queued) {
    Memories m(1, 4096);
    CopyQueue queue(std::make_unique<HostDevice>());
    const auto rows = m.rows({{3, 5, 1}});
    for (int i = 0; i < 50; ++i) queue.submit(order(rows, CopyDirection::kSave), CopyLane::kUrgent);
    const auto last = queue.submit(order(rows, CopyDirection::kSave), CopyLane::kBackground);
    CHECK(queue.close(seconds(30)) && queue.close(seconds(30)));
    CHECK(queue.done(last));
    CHECK_THROWS(queue.submit(order(rows, CopyDirection::kSave), CopyLane::kUrgent),
                 std::runtime_error);
}

TEST(copy_close_that_cannot_end_says_so) {
    Memories m(1, 64);
    GatedDevice::Log log;
    CopyQueue queue(std::make_unique<GatedDevice>(log));
    queue.submit(order(m.rows({{0, 0, 0}}), CopyDirection::kSave, 0, 1), CopyLane::kUrgent);
    log.entered.acquire();
    CHECK(!queue.close(std::chrono::milliseconds(1)));
    log.allowed.release();
    CHECK(queue.close(seconds(30)));
}

TEST(copy_many_threads_submit_and_wait) {
    Memories m(2, 2048);
    CopyQueue queue(std::make_unique<HostDevice>());
    std::atomic<int> num_wrong{0};
    std::vector<std::thread> threads;
    for (std::uint32_t t = 0; t < 4; ++t) {
        threads.emplace_back([&, t] {
            const auto rows = m.rows({{t, t, 0}, {t + 4, t, 1}});
            const auto lane = t % 2 ? CopyLane::kBackground : CopyLane::kUrgent;
            for (int i = 0; i < 100; ++i) {
                const auto ticket = queue.submit(order(rows, CopyDirection::kSave), lane);
                if (i % 3 == 0 && !queue.wait(ticket, seconds(30))) ++num_wrong;
                if (i % 3 == 0 && !queue.done(ticket)) ++num_wrong;
            }
        });
    }
    for (std::thread& thread : threads) thread.join();
    CHECK(num_wrong == 0);
    CHECK(queue.close(seconds(60)));
}

TEST(copy_reports_come_in_order_and_end_with_the_queue) {
    Memories m(1, 64);
    GatedDevice::Log log;
    CopyQueue queue(std::make_unique<GatedDevice>(log));
    const auto rows = m.rows({{0, 0, 0}});
    queue.submit(order(rows, CopyDirection::kSave, 0, 1), CopyLane::kUrgent);
    queue.submit(order(rows, CopyDirection::kSave, 0, 1), CopyLane::kUrgent, true);
    queue.submit_barrier();
    CHECK(queue.wait_reports(0, std::chrono::milliseconds(1)) == 0);
    std::atomic<std::uint64_t> seen{0};
    std::thread reader([&] {
        while (seen < 2) seen = queue.wait_reports(seen, seconds(30));
        queue.wait_reports(2, seconds(30));  // until the queue ends
        seen = 3;
    });
    log.allowed.release();
    CHECK(queue.wait_reports(0, std::chrono::milliseconds(1)) == 0);  // that one is not reported
    log.allowed.release();
    while (seen < 2) std::this_thread::yield();
    CHECK(queue.close(seconds(30)));
    reader.join();
    CHECK(seen == 3 && queue.error().empty());
}

TEST(copy_reports_also_come_after_a_failure) {
    Memories m(1, 64);
    FailingDevice::Log log;
    log.allowed.release();
    CopyQueue queue(std::make_unique<FailingDevice>(log));
    const auto rows = m.rows({{0, 0, 0}});
    queue.submit(order(rows, CopyDirection::kSave), CopyLane::kUrgent, true);
    queue.submit(order(rows, CopyDirection::kSave), CopyLane::kUrgent, true);
    queue.submit_barrier();
    std::uint64_t seen = 0;
    while (seen < 3) seen = queue.wait_reports(seen, seconds(30));
    CHECK(seen == 3 && queue.error() == "the device is gone");
    CHECK(queue.close(seconds(30)));
}
