#include "copy/cuda_copies.hpp"

#include <utility>
#include <vector>

namespace dualpath {
namespace {

// Enough to keep the bus busy while the next slice is handed over.
constexpr std::size_t kSliceBytes = std::size_t{16} << 20;

// Sets one copy between the events of its lane. A background copy also goes behind the urgent ones
// that were handed over before it: the streams know nothing of each other.
class LaneFences final : public CopyFences {
  public:
    using LastUrgent = std::shared_ptr<std::shared_ptr<const CudaEventHandle>>;

    LaneFences(std::shared_ptr<const CudaLanes> lanes, CopyLane lane, CudaMark after,
               std::shared_ptr<const CudaEventHandle> reached, LastUrgent last_urgent)
        : lanes_(std::move(lanes)),
          lane_(lane),
          after_(std::move(after)),
          reached_(std::move(reached)),
          last_urgent_(std::move(last_urgent)) {}

    void before() override {
        const CudaDriver& driver = lanes_->enter();
        const CudaStream stream = lanes_->stream(lane_);
        if (after_.event) driver.stream_wait(stream, after_.event->get());
        if (lane_ == CopyLane::kBackground && *last_urgent_) {
            driver.stream_wait(stream, (*last_urgent_)->get());
        }
    }

    void after() override {
        lanes_->enter().record(reached_->get(), lanes_->stream(lane_));
        if (lane_ == CopyLane::kUrgent) *last_urgent_ = reached_;
    }

  private:
    std::shared_ptr<const CudaLanes> lanes_;
    CopyLane lane_;
    CudaMark after_;
    std::shared_ptr<const CudaEventHandle> reached_;
    LastUrgent last_urgent_;
};

class CudaDevice final : public CopyDevice {
  public:
    CudaDevice(std::shared_ptr<const CudaLanes> lanes, CudaMethod method)
        : lanes_(std::move(lanes)), method_(method) {}

    std::size_t slice_bytes() const override { return kSliceBytes; }
    void enter_thread() override { lanes_->enter(); }

    void copy(const CopyOrder& order, CopyLane lane, std::size_t layer, std::size_t first_row,
              std::size_t end_row) override {
        collect(order, layer, first_row, end_row);
        const CudaDriver& driver = lanes_->enter();
        const CudaStream stream = lanes_->stream(lane);
        if (to_.empty()) return;
        if (method_ == CudaMethod::kBatch) {
            driver.copy_batch(to_.data(), from_.data(), sizes_.data(), to_.size(), stream);
            return;
        }
        for (std::size_t i = 0; i < to_.size(); ++i) {
            driver.copy(to_[i], from_[i], sizes_[i], stream);
        }
    }

    void settle() noexcept override {
        for (const CopyLane lane : {CopyLane::kUrgent, CopyLane::kBackground}) {
            try {
                lanes_->enter().stream_synchronize(lanes_->stream(lane));
            } catch (const CudaError&) {
                // The context is broken: the driver has ended what ran in it.
            }
        }
    }

  private:
    void collect(const CopyOrder& order, std::size_t layer, std::size_t first_row,
                 std::size_t end_row) {
        const PageMap& map = order.rows->map();
        const LayerPages& pages = map.layers()[layer];
        to_.clear();
        from_.clear();
        sizes_.clear();
        for (std::size_t i = first_row; i < end_row; ++i) {
            const PageRow& row = order.rows->rows()[i];
            for (std::size_t run = 0; run < pages.num_runs; ++run) {
                const CudaAddress cache = map.cache_page(pages, row) + run * pages.run_stride;
                const CudaAddress staged = map.staging_page(pages, row) + run * pages.run_bytes;
                const bool load = order.direction == CopyDirection::kLoad;
                add(load ? cache : staged, load ? staged : cache, pages.run_bytes);
            }
        }
    }

    // Pieces that go on where the last one ended, on both sides, are one copy.
    void add(CudaAddress to, CudaAddress from, std::size_t num_bytes) {
        if (!to_.empty() && to_.back() + sizes_.back() == to &&
            from_.back() + sizes_.back() == from) {
            sizes_.back() += num_bytes;
            return;
        }
        to_.push_back(to);
        from_.push_back(from);
        sizes_.push_back(num_bytes);
    }

    std::shared_ptr<const CudaLanes> lanes_;
    CudaMethod method_;
    std::vector<CudaAddress> to_, from_;
    std::vector<std::size_t> sizes_;
};

std::shared_ptr<const CudaLanes> make_lanes(std::shared_ptr<const CudaDriver> driver, int device,
                                            CudaMethod method) {
    if (method == CudaMethod::kBatch && !driver->has_batch_copy()) {
        throw CudaError("the driver (" + std::to_string(driver->version()) +
                        ") has no batched copies; CUDA 12.8 and later have");
    }
    return std::make_shared<CudaLanes>(std::move(driver), device);
}

}  // namespace

CudaLanes::CudaLanes(std::shared_ptr<const CudaDriver> driver, int device)
    : driver_(std::move(driver)), device_(device), context_(driver_->retain_context(device)) {
    try {
        driver_->use_context(context_);
        for (CudaStream& stream : streams_) stream = driver_->create_stream();
    } catch (...) {
        driver_->release_context(device_);
        throw;
    }
}

CudaLanes::~CudaLanes() {
    for (const CudaStream stream : streams_) driver_->destroy_stream(stream);
    driver_->release_context(device_);
}

const CudaDriver& CudaLanes::enter() const {
    driver_->use_context(context_);
    return *driver_;
}

CudaEventHandle::CudaEventHandle(std::shared_ptr<const CudaLanes> lanes)
    : lanes_(std::move(lanes)), event_(lanes_->enter().create_event()) {}

CudaEventHandle::~CudaEventHandle() {
    try {
        lanes_->enter().destroy_event(event_);
    } catch (const CudaError&) {
        // The context is gone, and its events with it.
    }
}

CudaCopies::CudaCopies(std::shared_ptr<const CudaDriver> driver, int device, CudaMethod method)
    : lanes_(make_lanes(std::move(driver), device, method)),
      last_urgent_(std::make_shared<std::shared_ptr<const CudaEventHandle>>()),
      queue_(std::make_unique<CudaDevice>(lanes_, method)) {}

CudaMark CudaCopies::submit(std::shared_ptr<const PageRows> rows, CopyDirection direction,
                            std::size_t first_layer, std::size_t end_layer, CopyLane lane,
                            const CudaMark& after, bool reported) {
    auto reached = std::make_shared<const CudaEventHandle>(lanes_);
    auto fences = std::make_shared<LaneFences>(lanes_, lane, after, reached, last_urgent_);
    CopyOrder order{std::move(rows), direction, first_layer, end_layer, std::move(fences)};
    if (!reported) return {queue_.submit(std::move(order), lane), std::move(reached)};
    const std::lock_guard lock(mutex_);
    const auto ticket = queue_.submit(std::move(order), lane, true);
    unreported_.push_back(reached);
    return {ticket, std::move(reached)};
}

void CudaCopies::submit_barrier() {
    auto reached = std::make_shared<const CudaEventHandle>(lanes_);
    auto fences =
        std::make_shared<LaneFences>(lanes_, CopyLane::kUrgent, CudaMark{}, reached, last_urgent_);
    const std::lock_guard lock(mutex_);
    queue_.submit_barrier(std::move(fences));
    unreported_.push_back(std::move(reached));
}

std::uint64_t CudaCopies::wait_reports(std::uint64_t seen, std::chrono::nanoseconds timeout) {
    const std::uint64_t handed_over = queue_.wait_reports(seen, timeout);
    for (; seen < handed_over; ++seen) {
        std::shared_ptr<const CudaEventHandle> event;
        {
            const std::lock_guard lock(mutex_);
            event = std::move(unreported_.front());
            unreported_.pop_front();
        }
        // After a failure nothing runs any more, and some events were never recorded.
        if (!error().empty()) continue;
        try {
            lanes_->enter().event_synchronize(event->get());
        } catch (const CudaError& failure) {
            const std::lock_guard lock(mutex_);
            error_ = failure.what();
        }
    }
    return handed_over;
}

std::string CudaCopies::error() const {
    {
        const std::lock_guard lock(mutex_);
        if (!error_.empty()) return error_;
    }
    return queue_.error();
}

CudaMark CudaCopies::now(CudaStream stream) const {
    auto event = std::make_shared<const CudaEventHandle>(lanes_);
    lanes_->enter().record(event->get(), stream);
    return {0, std::move(event)};
}

bool CudaCopies::hold(CudaStream stream, const CudaMark& mark,
                      std::chrono::nanoseconds timeout) const {
    // An event that is not recorded yet holds nobody.
    if (!queue_.wait(mark.ticket, timeout)) return false;
    lanes_->enter().stream_wait(stream, mark.event->get());
    return true;
}

bool CudaCopies::wait(const CudaMark& mark, std::chrono::nanoseconds timeout) const {
    if (!queue_.wait(mark.ticket, timeout)) return false;
    lanes_->enter().event_synchronize(mark.event->get());
    return true;
}

bool CudaCopies::close(std::chrono::nanoseconds timeout) {
    if (!queue_.close(timeout)) return false;
    const CudaDriver& driver = lanes_->enter();
    for (const CopyLane lane : {CopyLane::kUrgent, CopyLane::kBackground}) {
        driver.stream_synchronize(lanes_->stream(lane));
    }
    return true;
}

}  // namespace dualpath
