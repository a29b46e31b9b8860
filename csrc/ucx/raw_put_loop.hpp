// The benchmark's baseline: a plain loop of ucp_put_nbx, then one flush.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

#include "core/put_batch.hpp"
#include "ucx/raw_worker.hpp"

namespace dualpath {

// What a user would write around UCX: no queue, no thread, no notice, no bound of what is in flight
// unless `progress_every` gives one. One thread.
class RawPutLoop {
  public:
    // Connects to the worker address and unpacks the key; returns once the connection stands.
    // Throws UcxError, also after `timeout`.
    RawPutLoop(std::shared_ptr<const UcxLibrary> library, std::uintptr_t address,
               std::size_t num_bytes, const std::string& remote_worker,
               const std::string& remote_key, std::chrono::milliseconds timeout);
    RawPutLoop(const RawPutLoop&) = delete;
    RawPutLoop& operator=(const RawPutLoop&) = delete;

    // Puts every piece, flushes, and returns the seconds until all bytes were in the target's
    // memory. The worker is progressed after every `progress_every` puts; 0: only by the flush.
    // Throws UcxError, also after `timeout`; std::invalid_argument for a piece outside the memory.
    double put(const Piece* pieces, std::size_t num_pieces, std::size_t progress_every,
               std::chrono::milliseconds timeout);

  private:
    void connect(const std::string& remote_worker, const std::string& remote_key);
    void post(const Piece& piece);
    void flush(std::chrono::steady_clock::time_point deadline);

    struct KeyDeleter {
        const UcxLibrary* library;
        void operator()(ucp_rkey_h key) const { library->ucp_rkey_destroy(key); }
    };

    // The worker takes the endpoint with it: closing in order would wait for the target.
    RawWorker worker_;
    ucp_ep_h endpoint_ = nullptr;
    // After the worker, so that it goes first; a member, so that it goes when connecting fails too.
    std::unique_ptr<ucp_rkey, KeyDeleter> remote_key_;
};

}  // namespace dualpath
