#include "io/block_engine.hpp"

#include <sys/vfs.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <future>
#include <stdexcept>
#include <system_error>
#include <utility>

namespace dualpath {
namespace {

// From linux/magic.h and the file systems' sources: on these, opening and statting a file asks no
// server. Any other is taken for remote, which costs it a few microseconds a block.
constexpr std::array<std::uint64_t, 7> kLocalFileSystems{
    0xEF53,      // ext2, ext3, ext4
    0x58465342,  // XFS
    0x9123683E,  // Btrfs
    0xF2F52010,  // F2FS
    0x01021994,  // tmpfs
    0x794C7630,  // overlayfs
    0x2FC12FC1,  // ZFS
};

bool is_local(const std::string& directory) {
    struct statfs found{};
    if (::statfs(directory.c_str(), &found) != 0) {
        throw std::system_error(errno, std::generic_category(), directory);
    }
    const auto type = static_cast<std::uint64_t>(static_cast<std::uint32_t>(found.f_type));
    return std::find(kLocalFileSystems.begin(), kLocalFileSystems.end(), type) !=
           kLocalFileSystems.end();
}

void check(const EngineIoOptions& options) {
    if (options.num_threads == 0 || options.depth == 0) {
        throw std::invalid_argument("an I/O engine needs at least one thread and a depth of one");
    }
    if (options.piece_bytes == 0 || options.piece_bytes % kDirectAlignment != 0) {
        throw std::invalid_argument("pieces must be a positive multiple of 4096 bytes");
    }
}

LaneOptions lane_options(const char* name, std::shared_ptr<const BlockLayout> layout,
                         const EngineIoOptions& options) {
    LaneOptions lane;
    lane.name = name;
    lane.backend = options.backend;
    lane.num_threads = options.num_threads;
    lane.transfer = {std::move(layout), options.piece_bytes, options.direct};
    lane.ring.depth = std::max(1U, (options.depth + options.num_threads - 1) / options.num_threads);
    lane.ring.punt_metadata = !is_local(options.directory);
    return lane;
}

}  // namespace

BlockEngine::BlockEngine(BlockLayout layout, const EngineIoOptions& options) : owner_(::getpid()) {
    layout.check();
    dualpath::check(options);
    layout_ = std::make_shared<const BlockLayout>(std::move(layout));
    reads_ = std::make_unique<IoLane>(lane_options("dp-read", layout_, options));
    try {
        writes_ = std::make_unique<IoLane>(lane_options("dp-write", layout_, options));
    } catch (...) {
        reads_->queue().stop(true);
        reads_->join(WorkQueue::Clock::time_point::max());  // nothing was submitted
        throw;
    }
}

BlockEngine::~BlockEngine() {
    if (owner_ != ::getpid()) {
        // The threads were not copied by fork(), only the records of them.
        (void)reads_.release();
        (void)writes_.release();
        return;
    }
    reads_->queue().stop(true);
    writes_->queue().stop(true);
}

std::uint64_t BlockEngine::submit(BlockRequest request) {
    return enqueue(std::move(request), [outcomes = outcomes_](BlockOutcome outcome) {
        outcomes->push(std::move(outcome));
    });
}

BlockOutcome BlockEngine::run(BlockRequest request) {
    // Shared: the sink may still be in set_value() when get() returns.
    auto promise = std::make_shared<std::promise<BlockOutcome>>();
    std::future<BlockOutcome> outcome = promise->get_future();
    enqueue(std::move(request),
            [promise](BlockOutcome ended) { promise->set_value(std::move(ended)); });
    return outcome.get();
}

std::uint64_t BlockEngine::enqueue(BlockRequest request, OutcomeSink sink) {
    check(request);
    const std::uint64_t id = next_id_++;
    request.id = id;
    IoLane& target = lane(request.kind);
    if (!target.queue().submit(std::move(request), std::move(sink))) {
        throw std::logic_error("the I/O engine is closed");
    }
    return id;
}

void BlockEngine::check(const BlockRequest& request) const {
    const auto address = reinterpret_cast<std::uintptr_t>(request.payload);
    if (address == 0 || address % kDirectAlignment != 0) {
        throw std::invalid_argument("payload: expected memory aligned to 4096 bytes");
    }
    if (request.path.find('/') == std::string::npos) {
        throw std::invalid_argument("path: expected a directory and a name");
    }
    if (request.kind == BlockRequest::Kind::kWrite &&
        (request.temporary.empty() || request.header.size() != layout_->header_bytes)) {
        throw std::invalid_argument("a write needs a temporary name and a whole header");
    }
}

IoLane& BlockEngine::lane(BlockRequest::Kind kind) const {
    return kind == BlockRequest::Kind::kRead ? *reads_ : *writes_;
}

bool BlockEngine::cancel(std::uint64_t id) {
    return reads_->queue().cancel(id) || writes_->queue().cancel(id);
}

std::optional<double> BlockEngine::started_s(std::uint64_t id) const {
    auto started = reads_->queue().started(id);
    if (!started) started = writes_->queue().started(id);
    if (!started) return std::nullopt;
    return std::chrono::duration<double>(started->time_since_epoch()).count();
}

std::vector<BlockOutcome> BlockEngine::poll() { return outcomes_->drain(); }

bool BlockEngine::close(std::chrono::duration<double> timeout) {
    if (owner_ != ::getpid()) return true;
    using Clock = WorkQueue::Clock;
    const auto deadline = Clock::now() + std::chrono::duration_cast<Clock::duration>(timeout);
    reads_->queue().stop(true);
    writes_->queue().stop(false);
    const bool reads_ended = reads_->join(deadline);
    return writes_->join(deadline) && reads_ended;
}

}  // namespace dualpath
