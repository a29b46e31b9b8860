// Our end of a connection to one peer: its queue of batches, their flushes and notices.
#pragma once

#include <chrono>
#include <cstdint>
#include <deque>
#include <memory>
#include <optional>
#include <string>

#include "core/event_queue.hpp"
#include "core/put_batch.hpp"
#include "core/socket_address.hpp"
#include "ucx/peer_memory.hpp"
#include "ucx/ucx_worker.hpp"

namespace dualpath {

using Clock = std::chrono::steady_clock;

// How to reach a peer's memory.
struct PeerTarget {
    // Set: connect through the peer's listener, with UCX's peer failure handling. Otherwise connect
    // to its `worker_address`, without it, because it excludes UCX's shared-memory transports.
    std::optional<SocketAddress> listener;
    std::string worker_address;
    std::string remote_key;
    // Set: puts are plain stores into it, and UCX carries the notices alone.
    std::shared_ptr<PeerMemory> memory;
};

// Bytes that may be with UCX at once, over all endpoints. Progress thread only.
class PutBudget {
  public:
    explicit PutBudget(std::uint64_t limit_bytes) : limit_bytes_(limit_bytes) {}
    // A put larger than the limit goes alone.
    bool take(std::uint64_t num_bytes) {
        if (used_bytes_ != 0 && used_bytes_ + num_bytes > limit_bytes_) return false;
        used_bytes_ += num_bytes;
        return true;
    }
    void give_back(std::uint64_t num_bytes) { used_bytes_ -= num_bytes; }

  private:
    std::uint64_t limit_bytes_;
    std::uint64_t used_bytes_ = 0;
};

// Progress thread only. Life: open -> draining (disconnect) -> closing -> finished. UCX's callbacks
// only count and set flags; every transition happens in advance(), disconnect() and abort().
//
// UCX cannot take a put back. A batch ends when all its requests have; only where an endpoint does
// not close within kCloseTimeout (a peer on this host without error handling that is stopped or
// dead) is it abandoned: its batches end as failed while UCX still holds their requests, and the
// transport keeps the endpoint until the worker is destroyed.
class UcxEndpoint {
  public:
    static constexpr auto kDrainTimeout = std::chrono::seconds(1);
    static constexpr auto kCloseTimeout = std::chrono::seconds(1);

    // Wire-up goes on behind. Throws UcxError when UCX refuses at once.
    UcxEndpoint(std::shared_ptr<UcxWorker> worker, std::shared_ptr<PutBudget> budget,
                std::uint64_t peer_id, const PeerTarget& target);
    ~UcxEndpoint();
    UcxEndpoint(const UcxEndpoint&) = delete;
    UcxEndpoint& operator=(const UcxEndpoint&) = delete;

    std::uint64_t peer_id() const { return peer_id_; }
    void enqueue(std::unique_ptr<PutBatch> batch);
    // Posts no more puts, lets what is posted finish, then closes.
    void disconnect(Clock::time_point now);
    // Closes without waiting for the target to take what is posted.
    void abort(const std::string& why, Clock::time_point now);
    // Ends now, abandoned, whatever UCX still holds.
    void give_up(EventQueue& events);
    // One step; events of ended batches go to `events`. Whether anything was done.
    bool advance(EventQueue& events, Clock::time_point now);

    bool accepts_puts() const { return state_ == State::kOpen && failure_.empty(); }
    bool finished() const { return state_ == State::kFinished; }
    bool abandoned() const { return abandoned_; }
    // Why it ended.
    const std::string& error() const { return failure_; }
    // When advance() has to be called although nothing happens.
    std::optional<Clock::time_point> deadline() const;
    // After finished(), for an abandoned endpoint: lets go of the worker, which then keeps it.
    std::shared_ptr<UcxWorker> release_worker() { return std::move(worker_); }

  private:
    enum class State { kOpen, kDraining, kClosing, kFinished };

    static void on_wired(void* request, ucs_status_t status, void* self);
    static void on_put(void* request, ucs_status_t status, void* put);
    static void on_flush(void* request, ucs_status_t status, void* batch);
    static void on_notice(void* request, ucs_status_t status, void* batch);
    static void on_close(void* request, ucs_status_t status, void* self);
    static void on_error(void* self, ucp_ep_h endpoint, ucs_status_t status);

    const UcxLibrary& library() const { return *library_; }
    void note_failure(ucs_status_t status, const char* during);
    void start_wire_up();
    void unpack_key();
    bool can_post();
    bool post_puts();
    void write_put(Put& put);
    void post_put(Put& put);
    void post_flush(PutBatch& batch);
    bool post_notices();
    void post_notice(PutBatch& batch);
    // What a post returned: done, failed, or a request that a callback will end.
    void track(ucs_status_ptr_t result, PutBatch& batch, ucp_send_nbx_callback_t done, void* arg);
    bool retire_batches(EventQueue& events);
    void fail_batches(const std::string& why);
    bool end_drain(EventQueue& events, Clock::time_point now);
    bool end_close(EventQueue& events, Clock::time_point now);
    void start_close(Clock::time_point now);
    void finish(EventQueue& events, bool abandon);

    std::shared_ptr<UcxWorker> worker_;
    const UcxLibrary* library_;
    std::shared_ptr<PutBudget> budget_;
    const std::uint64_t peer_id_;
    const bool error_handling_;
    ucp_ep_h handle_ = nullptr;
    const std::shared_ptr<PeerMemory> memory_;
    std::string packed_key_;
    ucp_rkey_h remote_key_ = nullptr;
    bool wiring_ = true;  // until the first flush has ended
    State state_ = State::kOpen;
    bool closed_ = false;
    bool abandoned_ = false;
    std::string failure_;
    Clock::time_point deadline_{};
    std::deque<std::unique_ptr<PutBatch>> batches_;
    std::size_t posting_ = 0;  // index of the first batch with puts to post
};

}  // namespace dualpath
