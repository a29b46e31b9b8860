#include <fcntl.h>
#include <poll.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <fstream>
#include <iostream>
#include <map>
#include <system_error>
#include <thread>
#include <vector>

#include "check.hpp"
#include "core/crc32c.hpp"
#include "io/aligned_buffer.hpp"
#include "io/block_engine.hpp"
#include "scratch_directory.hpp"

using namespace dualpath;
using dualpath::test::ScratchDirectory;

namespace {

constexpr std::uint64_t kPage = 4096;
constexpr std::uint64_t kPayload = 40 * kPage;
constexpr std::chrono::seconds kPatience(30);
using Status = BlockOutcome::Status;

BlockLayout layout() {
    return {kPage, kPayload, 16, kPage - 4, {50000, 70000, 43000}};
}

// Every way that this machine and directory allow.
std::vector<EngineIoOptions> ways(const ScratchDirectory& directory) {
    std::vector<EngineIoOptions> found;
    for (const Backend backend : {Backend::kIoUring, Backend::kThreads}) {
        for (const bool direct : {true, false}) {
            EngineIoOptions options{backend, direct, 2, 8, 8 * kPage, directory.path().string()};
            try {
                BlockEngine engine(layout(), options);
                CHECK(engine.close(kPatience));
                found.push_back(options);
            } catch (const std::system_error& error) {
                std::cout << "  left out: " << error.what() << "\n";
            }
        }
    }
    return found;
}

void fill(const AlignedBuffer& payload, std::uint64_t seed) {
    for (std::uint64_t idx = 0; idx < kPayload; ++idx) {
        payload.data()[idx] = static_cast<std::byte>((idx * 31 + seed * 7 + idx / 256) & 0xFF);
    }
}

BlockRequest write_request(const ScratchDirectory& directory, const std::string& name,
                           std::byte* payload) {
    BlockRequest request;
    request.kind = BlockRequest::Kind::kWrite;
    request.path = directory.path() / "aa" / "bb" / name;
    request.temporary = directory.path() / (name + ".new");
    request.payload = payload;
    request.header = std::string(kPage, 'h');
    return request;
}

BlockRequest read_request(const ScratchDirectory& directory, const std::string& name,
                          std::byte* payload) {
    BlockRequest request;
    request.path = directory.path() / "aa" / "bb" / name;
    request.payload = payload;
    return request;
}

// Waits for `count` outcomes of submit().
std::map<std::uint64_t, BlockOutcome> collect(BlockEngine& engine, std::size_t count) {
    std::map<std::uint64_t, BlockOutcome> outcomes;
    while (outcomes.size() < count) {
        pollfd waiting{engine.fd(), POLLIN, 0};
        CHECK(::poll(&waiting, 1, 30000) == 1);
        for (BlockOutcome& outcome : engine.poll()) {
            CHECK(outcomes.emplace(outcome.id, std::move(outcome)).second);
        }
    }
    return outcomes;
}

}  // namespace

TEST(a_block_comes_back_with_its_checksums) {
    const ScratchDirectory directory;
    for (const EngineIoOptions& options : ways(directory)) {
        BlockEngine engine(layout(), options);
        const AlignedBuffer written(kPayload), found(kPayload);
        fill(written, 1);
        const BlockRequest write = write_request(directory, "block", written.data());
        CHECK(engine.run(write).num_bytes == kPage + kPayload);
        CHECK(engine.run(write).status == Status::kExists);
        CHECK(::access(write.temporary.c_str(), F_OK) != 0);
        const BlockOutcome read = engine.run(read_request(directory, "block", found.data()));
        CHECK(read.status == Status::kDone && read.num_bytes == kPage + kPayload);
        CHECK(std::memcmp(written.data(), found.data(), kPayload) == 0);
        CHECK(read.crcs.size() == 3 && read.crcs[0] == crc32c(written.data(), 50000, 0));
        CHECK(std::memcmp(read.header.data() + 16, read.crcs.data(), 12) == 0);
        std::uint32_t header_crc;
        std::memcpy(&header_crc, read.header.data() + kPage - 4, 4);
        CHECK(header_crc == crc32c(read.header.data(), kPage - 4, 0));
        CHECK(engine.close(kPatience));
        std::filesystem::remove_all(directory.path() / "aa");
    }
}

TEST(failures_name_their_step_and_leave_nothing) {
    const ScratchDirectory directory;
    for (const EngineIoOptions& options : ways(directory)) {
        BlockEngine engine(layout(), options);
        const AlignedBuffer payload(kPayload);
        BlockOutcome outcome = engine.run(read_request(directory, "none", payload.data()));
        CHECK(outcome.status == Status::kFailed && outcome.step == Step::kOpen);
        CHECK(outcome.error == ENOENT);
        BlockRequest write = write_request(directory, "block", payload.data());
        write.path = directory.path() / "file" / "b" / "block";
        std::ofstream(directory.path() / "file") << "in the way";
        outcome = engine.run(write);
        CHECK(outcome.status == Status::kFailed && outcome.error == ENOTDIR);
        write.path = directory.path() / "aa" / "bb" / "block";
        write.temporary = directory.path() / "gone" / "block";
        outcome = engine.run(write);
        CHECK(outcome.step == Step::kOpen && outcome.error == ENOENT);
        CHECK(engine.close(kPatience));
        CHECK(!std::filesystem::exists(directory.path() / "block.new"));
    }
}

TEST(a_file_of_another_size_or_kind_is_not_read) {
    const ScratchDirectory directory;
    for (const EngineIoOptions& options : ways(directory)) {
        BlockEngine engine(layout(), options);
        const AlignedBuffer payload(kPayload);
        CHECK(engine.run(write_request(directory, "block", payload.data())).num_bytes > 0);
        const auto path = directory.path() / "aa" / "bb" / "block";
        for (const std::uint64_t size : {std::uint64_t{0}, kPage, 2 * kPayload}) {
            std::filesystem::resize_file(path, size);
            const BlockOutcome outcome =
                engine.run(read_request(directory, "block", payload.data()));
            CHECK(outcome.status == Status::kWrongSize && outcome.found_bytes == size);
        }
        CHECK(engine.close(kPatience));
        std::filesystem::remove_all(directory.path() / "aa");
    }
}

TEST(many_blocks_from_several_threads_stay_apart) {
    constexpr int kThreads = 3;
    constexpr int kRounds = 12;
    const ScratchDirectory directory;
    for (const EngineIoOptions& options : ways(directory)) {
        BlockEngine engine(layout(), options);
        std::atomic<int> num_good{0};
        const auto work = [&](int thread) {
            const AlignedBuffer written(kPayload), found(kPayload);
            for (int round = 0; round < kRounds; ++round) {
                const std::string name = std::to_string(thread) + "-" + std::to_string(round);
                fill(written, static_cast<std::uint64_t>(thread * 100 + round));
                engine.run(write_request(directory, name, written.data()));
                engine.run(read_request(directory, name, found.data()));
                num_good += std::memcmp(written.data(), found.data(), kPayload) == 0;
            }
        };
        std::vector<std::thread> threads;
        for (int thread = 0; thread < kThreads; ++thread) threads.emplace_back(work, thread);
        for (std::thread& thread : threads) thread.join();
        CHECK(num_good == kThreads * kRounds);
        CHECK(engine.close(kPatience));
        std::filesystem::remove_all(directory.path() / "aa");
    }
}

// Some of many queued reads are cancelled from another thread: each request ends once, as one of
// the two.
TEST(a_request_is_either_done_or_cancelled) {
    constexpr std::size_t kReads = 60;
    const ScratchDirectory directory;
    for (const EngineIoOptions& options : ways(directory)) {
        BlockEngine engine(layout(), options);
        const AlignedBuffer payload(kPayload * kReads);
        CHECK(engine.run(write_request(directory, "block", payload.data())).num_bytes > 0);
        std::vector<std::uint64_t> ids;
        for (std::size_t idx = 0; idx < kReads; ++idx) {
            ids.push_back(
                engine.submit(read_request(directory, "block", payload.data() + idx * kPayload)));
        }
        std::size_t num_cancelled = 0;
        std::thread canceller([&] {
            for (std::size_t idx = kReads; idx-- > 0;) num_cancelled += engine.cancel(ids[idx]);
        });
        const auto outcomes = collect(engine, kReads);
        canceller.join();
        std::size_t num_found = 0;
        for (const auto& [id, outcome] : outcomes) {
            CHECK(outcome.status == Status::kDone || outcome.status == Status::kCancelled);
            num_found += outcome.status == Status::kCancelled;
            CHECK(!engine.cancel(id));
            CHECK(!engine.started_s(id));
        }
        CHECK(num_found == num_cancelled);
        CHECK(engine.close(kPatience));
        std::filesystem::remove_all(directory.path() / "aa");
    }
}

TEST(closing_cancels_waiting_reads_and_finishes_writes) {
    constexpr std::size_t kBlocks = 40;
    const ScratchDirectory directory;
    for (const EngineIoOptions& options : ways(directory)) {
        BlockEngine engine(layout(), options);
        const AlignedBuffer written(kPayload), found(kPayload * kBlocks);
        engine.run(write_request(directory, "block", written.data()));
        for (std::size_t idx = 0; idx < kBlocks; ++idx) {
            engine.submit(write_request(directory, std::to_string(idx), written.data()));
            engine.submit(read_request(directory, "block", found.data() + idx * kPayload));
        }
        CHECK(engine.close(kPatience));
        std::size_t num_written = 0;
        const auto outcomes = collect(engine, 2 * kBlocks);
        for (const auto& [id, outcome] : outcomes) {
            CHECK(outcome.status == Status::kDone || outcome.status == Status::kCancelled);
            num_written += outcome.status == Status::kDone && outcome.header.empty();
        }
        CHECK(num_written == kBlocks);
        CHECK_THROWS(engine.submit(read_request(directory, "block", found.data())),
                     std::logic_error);
        std::filesystem::remove_all(directory.path() / "aa");
    }
}

// A named pipe stands for a store that hangs: opening it blocks a thread of the lane.
TEST(a_hung_read_holds_up_no_other_and_close_gives_up_in_time) {
    const ScratchDirectory directory;
    EngineIoOptions options{Backend::kThreads, false, 2, 8, kPage, directory.path().string()};
    BlockEngine engine(layout(), options);
    const AlignedBuffer payload(kPayload), other(kPayload);
    CHECK(engine.run(write_request(directory, "block", other.data())).num_bytes > 0);
    const std::string pipe = directory.path() / "aa" / "bb" / "pipe";
    CHECK(::mkfifo(pipe.c_str(), 0600) == 0);
    const std::uint64_t hung = engine.submit(read_request(directory, "pipe", payload.data()));
    for (int round = 0; round < 3; ++round) {
        CHECK(engine.run(read_request(directory, "block", other.data())).status == Status::kDone);
    }
    while (!engine.started_s(hung)) std::this_thread::yield();
    CHECK(!engine.cancel(hung));
    CHECK(!engine.close(std::chrono::milliseconds(50)));
    const int writer = ::open(pipe.c_str(), O_WRONLY);
    ::close(writer);
    CHECK(engine.close(kPatience));
    const auto outcomes = collect(engine, 1);
    CHECK(outcomes.at(hung).status == Status::kWrongSize);
}

TEST(memory_that_direct_io_cannot_take_is_refused) {
    const ScratchDirectory directory;
    EngineIoOptions options{Backend::kThreads, true, 1, 8, kPage, directory.path().string()};
    BlockEngine engine(layout(), options);
    const AlignedBuffer payload(kPayload + kPage);
    CHECK_THROWS(engine.submit(read_request(directory, "block", payload.data() + 8)),
                 std::invalid_argument);
    CHECK_THROWS(engine.submit(read_request(directory, "block", nullptr)), std::invalid_argument);
    options.depth = 0;
    CHECK_THROWS(BlockEngine(layout(), options), std::invalid_argument);
    CHECK(engine.close(kPatience));
}
