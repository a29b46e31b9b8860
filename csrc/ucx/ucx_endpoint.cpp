#include "ucx/ucx_endpoint.hpp"

#include <utility>

namespace dualpath {
namespace {

// What one endpoint posts before others, incoming traffic and commands have their turn. A turn of
// stores takes about a tenth of a millisecond.
constexpr int kPutsPerTurn = 64;
constexpr std::uint64_t kBytesPerTurn = 1 << 20;

ucp_request_param_t with_callback(ucp_send_nbx_callback_t callback, void* user_data) {
    ucp_request_param_t param{};
    param.op_attr_mask = UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_USER_DATA;
    param.cb.send = callback;
    param.user_data = user_data;
    return param;
}

}  // namespace

UcxEndpoint::UcxEndpoint(std::shared_ptr<UcxWorker> worker, std::shared_ptr<PutBudget> budget,
                         std::uint64_t peer_id, const PeerTarget& target)
    : worker_(std::move(worker)),
      library_(&worker_->library()),
      budget_(std::move(budget)),
      peer_id_(peer_id),
      error_handling_(target.listener.has_value()),
      memory_(target.memory),
      packed_key_(target.remote_key) {
    ucp_ep_params_t params{};
    params.field_mask = UCP_EP_PARAM_FIELD_ERR_HANDLING_MODE;
    params.err_mode = UCP_ERR_HANDLING_MODE_NONE;
    if (error_handling_) {
        params.field_mask |= UCP_EP_PARAM_FIELD_ERR_HANDLER;
        params.err_mode = UCP_ERR_HANDLING_MODE_PEER;
        params.err_handler.cb = &UcxEndpoint::on_error;
        params.err_handler.arg = this;
    }
    if (target.listener) {
        params.field_mask |= UCP_EP_PARAM_FIELD_SOCK_ADDR | UCP_EP_PARAM_FIELD_FLAGS;
        params.flags = UCP_EP_PARAMS_FLAGS_CLIENT_SERVER;
        params.sockaddr.addr = target.listener->get();
        params.sockaddr.addrlen = target.listener->size;
    } else {
        params.field_mask |= UCP_EP_PARAM_FIELD_REMOTE_ADDRESS;
        params.address = reinterpret_cast<const ucp_address_t*>(target.worker_address.data());
    }
    library().check(library().ucp_ep_create(worker_->handle(), &params, &handle_), "connecting");
    start_wire_up();
}

UcxEndpoint::~UcxEndpoint() {
    if (remote_key_ != nullptr && !abandoned_) library().ucp_rkey_destroy(remote_key_);
}

void UcxEndpoint::enqueue(std::unique_ptr<PutBatch> batch) {
    batch->endpoint = this;
    if (!accepts_puts()) batch->fail(failure_.empty() ? "the peer is closed" : failure_);
    batches_.push_back(std::move(batch));
}

void UcxEndpoint::disconnect(Clock::time_point now) {
    if (state_ != State::kOpen) return;
    state_ = State::kDraining;
    deadline_ = now + kDrainTimeout;
    for (auto& batch : batches_) {
        if (!batch->flush_posted) batch->fail("disconnected");
    }
}

void UcxEndpoint::abort(const std::string& why, Clock::time_point now) {
    if (state_ == State::kClosing || finished()) return;
    if (failure_.empty()) failure_ = why;
    fail_batches(failure_);
    if (state_ == State::kOpen) deadline_ = now + kDrainTimeout;
    state_ = State::kDraining;
}

std::optional<Clock::time_point> UcxEndpoint::deadline() const {
    if (state_ == State::kDraining || state_ == State::kClosing) return deadline_;
    return std::nullopt;
}

bool UcxEndpoint::advance(EventQueue& events, Clock::time_point now) {
    if (finished()) return false;
    if (!failure_.empty()) abort(failure_, now);
    bool worked = state_ == State::kOpen && post_puts();
    worked |= state_ != State::kClosing && post_notices();
    worked |= retire_batches(events);
    if (state_ == State::kDraining) worked |= end_drain(events, now);
    if (state_ == State::kClosing) worked |= end_close(events, now);
    return worked;
}

// UCX 1.22 crashes when an endpoint that still connects is closed by force: the flush that waits
// for the connection is resumed on freed memory. So closing waits for it, or gives the endpoint up.
bool UcxEndpoint::end_drain(EventQueue& events, Clock::time_point now) {
    const bool late = now >= deadline_;
    if (wiring_) {
        if (late) finish(events, true);
        return late;
    }
    if (failure_.empty() && !batches_.empty() && !late) return false;
    if (failure_.empty()) failure_ = "disconnected";
    start_close(now);
    return true;
}

bool UcxEndpoint::end_close(EventQueue& events, Clock::time_point now) {
    const bool ended = closed_ && batches_.empty();
    if (!ended && now < deadline_) return false;
    finish(events, !ended);
    return true;
}

// A key cannot be unpacked on an endpoint that still connects through a listener: UCX 1.22 crashes,
// as its lanes are not known yet. A first flush completes when they are.
void UcxEndpoint::start_wire_up() {
    const ucp_request_param_t param = with_callback(&UcxEndpoint::on_wired, this);
    const ucs_status_ptr_t result = library().ucp_ep_flush_nbx(handle_, &param);
    if (!UCS_PTR_IS_PTR(result)) on_wired(nullptr, UCS_PTR_STATUS(result), this);
}

void UcxEndpoint::unpack_key() {
    const ucs_status_t status =
        library().ucp_ep_rkey_unpack(handle_, packed_key_.data(), &remote_key_);
    if (status != UCS_OK) note_failure(status, "unpacking the peer's memory key");
}

bool UcxEndpoint::can_post() {
    if (memory_) return true;
    if (wiring_) return false;
    if (remote_key_ == nullptr) unpack_key();
    return true;
}

bool UcxEndpoint::post_puts() {
    if (!can_post()) return false;
    if (!failure_.empty()) return true;  // the key was refused: the next turn acts on it
    bool worked = false;
    int puts_left = kPutsPerTurn;
    std::uint64_t posted_bytes = 0;
    while (posting_ < batches_.size() && failure_.empty()) {
        PutBatch& batch = *batches_[posting_];
        if (batch.all_posted()) {
            post_flush(batch);
            ++posting_;
            worked = true;
            continue;
        }
        Put& put = batch.puts[batch.next];
        if (puts_left-- == 0 || posted_bytes >= kBytesPerTurn) return true;
        if (memory_) {
            write_put(put);
        } else if (budget_->take(put.num_bytes)) {
            post_put(put);
        } else {
            break;
        }
        posted_bytes += put.num_bytes;
        worked = true;
    }
    return worked;
}

void UcxEndpoint::write_put(Put& put) {
    ++put.batch->next;
    put.batch->touched = true;
    memory_->write(put.remote, reinterpret_cast<const void*>(put.local), put.num_bytes);
}

void UcxEndpoint::post_put(Put& put) {
    ++put.batch->next;
    put.batch->touched = true;
    const ucp_request_param_t param = with_callback(&UcxEndpoint::on_put, &put);
    ++put.batch->outstanding;
    put.batch->inflight_bytes += put.num_bytes;
    const ucs_status_ptr_t result =
        library().ucp_put_nbx(handle_, reinterpret_cast<const void*>(put.local), put.num_bytes,
                              put.remote, remote_key_, &param);
    if (!UCS_PTR_IS_PTR(result)) on_put(nullptr, UCS_PTR_STATUS(result), &put);
}

// A put's own completion is local. The flush completes when all that was posted before it is in the
// target's memory, earlier batches too, so later puts need not wait for it.
void UcxEndpoint::post_flush(PutBatch& batch) {
    if (!batch.error.empty() || batch.flush_posted) return;
    batch.flush_posted = true;
    if (memory_) {
        batch.flushed = true;
        return;
    }
    const ucp_request_param_t param = with_callback(&UcxEndpoint::on_flush, &batch);
    ++batch.outstanding;
    const ucs_status_ptr_t result = library().ucp_ep_flush_nbx(handle_, &param);
    if (!UCS_PTR_IS_PTR(result)) on_flush(nullptr, UCS_PTR_STATUS(result), &batch);
}

// In the order of submission: a later batch's notice waits for this one's.
bool UcxEndpoint::post_notices() {
    bool worked = false;
    for (auto& batch : batches_) {
        if (batch->notice_posted || !batch->error.empty()) continue;
        if (!batch->notice_due()) break;
        batch->notice_posted = true;
        if (!batch->notice.empty()) post_notice(*batch);
        worked = true;
    }
    return worked;
}

void UcxEndpoint::post_notice(PutBatch& batch) {
    ucp_request_param_t param = with_callback(&UcxEndpoint::on_notice, &batch);
    param.op_attr_mask |= UCP_OP_ATTR_FIELD_FLAGS;
    param.flags = UCP_AM_SEND_FLAG_EAGER;
    batch.touched = true;
    ++batch.outstanding;
    const ucs_status_ptr_t result =
        library().ucp_am_send_nbx(handle_, UcxWorker::kNoticeId, nullptr, 0, batch.notice.data(),
                                  batch.notice.size(), &param);
    if (!UCS_PTR_IS_PTR(result)) on_notice(nullptr, UCS_PTR_STATUS(result), &batch);
}

bool UcxEndpoint::retire_batches(EventQueue& events) {
    bool worked = false;
    while (!batches_.empty() && batches_.front()->ended()) {
        PutBatch& batch = *batches_.front();
        events.push({TransportEvent::Kind::kPutDone, batch.id, batch.error.empty(), batch.error,
                     !batch.touched && !batch.error.empty()});
        batches_.pop_front();
        if (posting_ > 0) --posting_;
        worked = true;
    }
    return worked;
}

void UcxEndpoint::fail_batches(const std::string& why) {
    for (auto& batch : batches_) batch->fail(why);
}

void UcxEndpoint::start_close(Clock::time_point now) {
    // A flush that is about to be resumed must not find its endpoint gone, as in end_drain().
    while (worker_->progress()) {
    }
    fail_batches(failure_);
    state_ = State::kClosing;
    deadline_ = now + kCloseTimeout;
    ucp_request_param_t param = with_callback(&UcxEndpoint::on_close, this);
    if (error_handling_) {
        param.op_attr_mask |= UCP_OP_ATTR_FIELD_FLAGS;
        param.flags = UCP_EP_CLOSE_FLAG_FORCE;
    }
    const ucs_status_ptr_t result = library().ucp_ep_close_nbx(handle_, &param);
    if (!UCS_PTR_IS_PTR(result)) closed_ = true;
}

void UcxEndpoint::finish(EventQueue& events, bool abandon) {
    abandoned_ = abandon;
    if (failure_.empty()) failure_ = "disconnected";
    fail_batches(failure_);
    for (auto& batch : batches_) {
        events.push(
            {TransportEvent::Kind::kPutDone, batch->id, false, batch->error, !batch->touched});
        budget_->give_back(batch->inflight_bytes);
    }
    state_ = State::kFinished;
}

void UcxEndpoint::give_up(EventQueue& events) {
    if (!finished()) finish(events, true);
}

void UcxEndpoint::note_failure(ucs_status_t status, const char* during) {
    if (!failure_.empty()) return;
    failure_ = std::string(during) + ": " + library().ucs_status_string(status);
}

void UcxEndpoint::on_wired(void* request, ucs_status_t status, void* user_data) {
    UcxEndpoint& self = *static_cast<UcxEndpoint*>(user_data);
    self.wiring_ = false;
    if (status != UCS_OK) self.note_failure(status, "connecting");
    if (request != nullptr) self.library().ucp_request_free(request);
}

void UcxEndpoint::on_put(void* request, ucs_status_t status, void* user_data) {
    Put& put = *static_cast<Put*>(user_data);
    UcxEndpoint& self = *put.batch->endpoint;
    if (!self.abandoned_) self.budget_->give_back(put.num_bytes);
    --put.batch->outstanding;
    put.batch->inflight_bytes -= put.num_bytes;
    if (status != UCS_OK) self.note_failure(status, "put");
    if (request != nullptr) self.library().ucp_request_free(request);
}

void UcxEndpoint::on_flush(void* request, ucs_status_t status, void* user_data) {
    PutBatch& batch = *static_cast<PutBatch*>(user_data);
    --batch.outstanding;
    batch.flushed = status == UCS_OK;
    if (status != UCS_OK) batch.endpoint->note_failure(status, "flush");
    if (request != nullptr) batch.endpoint->library().ucp_request_free(request);
}

void UcxEndpoint::on_notice(void* request, ucs_status_t status, void* user_data) {
    PutBatch& batch = *static_cast<PutBatch*>(user_data);
    --batch.outstanding;
    if (status != UCS_OK) {
        batch.fail("the notice was not sent");
        batch.endpoint->note_failure(status, "notice");
    }
    if (request != nullptr) batch.endpoint->library().ucp_request_free(request);
}

void UcxEndpoint::on_close(void* request, ucs_status_t, void* user_data) {
    UcxEndpoint& self = *static_cast<UcxEndpoint*>(user_data);
    self.closed_ = true;
    self.library().ucp_request_free(request);
}

void UcxEndpoint::on_error(void* user_data, ucp_ep_h, ucs_status_t status) {
    static_cast<UcxEndpoint*>(user_data)->note_failure(status, "peer lost");
}

}  // namespace dualpath
