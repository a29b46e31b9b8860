// A UCX worker with one registered memory and nothing else: what the benchmark's plain loop needs.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

#include "core/span.hpp"
#include "ucx/ucx_library.hpp"

namespace dualpath {

// Cheaper than what the transport runs on: one-sided transfers only, one thread, no wake-ups. A
// baseline must not pay for features that it does not use. Created and used by one thread at a
// time.
class RawWorker {
  public:
    // Throws UcxError; std::invalid_argument for memory without address or size.
    RawWorker(std::shared_ptr<const UcxLibrary> library, std::uintptr_t address,
              std::size_t num_bytes);
    ~RawWorker();
    RawWorker(const RawWorker&) = delete;
    RawWorker& operator=(const RawWorker&) = delete;

    const UcxLibrary& library() const { return *library_; }
    ucp_worker_h handle() const { return worker_; }
    unsigned progress() { return library_->ucp_worker_progress(worker_); }
    // Both for a peer: how to reach the worker, and the key of its memory.
    std::string worker_address() const;
    std::string packed_key() const;
    // The registered memory.
    const Span& span() const { return span_; }

  private:
    void open();
    void close();

    std::shared_ptr<const UcxLibrary> library_;
    Span span_;
    ucp_context_h context_ = nullptr;
    ucp_worker_h worker_ = nullptr;
    ucp_mem_h memory_ = nullptr;
};

}  // namespace dualpath
