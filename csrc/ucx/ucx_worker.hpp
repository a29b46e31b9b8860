// A UCP worker: the progress engine under every endpoint and listener.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "ucx/ucx_context.hpp"

namespace dualpath {

// Created by the owner thread, then used by the progress thread alone.
class UcxWorker {
  public:
    static constexpr unsigned kNoticeId = 1;
    using NoticeHandler = std::function<void(std::string_view)>;

    // `on_notice` runs inside progress() and must not call UCX.
    UcxWorker(std::shared_ptr<UcxContext> context, NoticeHandler on_notice);
    ~UcxWorker();
    UcxWorker(const UcxWorker&) = delete;
    UcxWorker& operator=(const UcxWorker&) = delete;

    const UcxLibrary& library() const { return context_->library(); }
    ucp_worker_h handle() const { return handle_; }
    // For peers on this host: lists every device, shared memory too.
    std::string address() const;
    // Readable after arm() once there is something to progress.
    int event_fd() const;
    // Whether anything moved.
    bool progress() { return library().ucp_worker_progress(handle_) != 0; }
    // False when there is more to progress before it is safe to sleep.
    bool arm();
    // Keeps what UCX may still call back until the worker is destroyed.
    void keep(std::shared_ptr<void> object) { kept_.push_back(std::move(object)); }

  private:
    static ucs_status_t handle_notice(void* self, const void* header, std::size_t header_bytes,
                                      void* data, std::size_t num_bytes,
                                      const ucp_am_recv_param_t* param);

    std::shared_ptr<UcxContext> context_;
    NoticeHandler on_notice_;
    std::vector<std::shared_ptr<void>> kept_;
    ucp_worker_h handle_ = nullptr;
};

}  // namespace dualpath
