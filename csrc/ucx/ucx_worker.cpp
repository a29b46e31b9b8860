#include "ucx/ucx_worker.hpp"

#include <utility>

#include "core/piece_check.hpp"

namespace dualpath {

UcxWorker::UcxWorker(std::shared_ptr<UcxContext> context, NoticeHandler on_notice)
    : context_(std::move(context)), on_notice_(std::move(on_notice)) {
    ucp_worker_params_t params{};
    params.field_mask = UCP_WORKER_PARAM_FIELD_THREAD_MODE | UCP_WORKER_PARAM_FIELD_EVENTS;
    params.thread_mode = UCS_THREAD_MODE_SERIALIZED;
    params.events = UCP_WAKEUP_RMA | UCP_WAKEUP_TX | UCP_WAKEUP_RX;
    library().check(library().ucp_worker_create(context_->handle(), &params, &handle_),
                    "creating a UCX worker");
    ucp_am_handler_param_t handler{};
    handler.field_mask = UCP_AM_HANDLER_PARAM_FIELD_ID | UCP_AM_HANDLER_PARAM_FIELD_CB |
                         UCP_AM_HANDLER_PARAM_FIELD_ARG;
    handler.id = kNoticeId;
    handler.cb = &UcxWorker::handle_notice;
    handler.arg = this;
    const ucs_status_t status = library().ucp_worker_set_am_recv_handler(handle_, &handler);
    if (status != UCS_OK) {
        library().ucp_worker_destroy(handle_);
        library().check(status, "installing the notice handler");
    }
}

UcxWorker::~UcxWorker() { library().ucp_worker_destroy(handle_); }

std::string UcxWorker::address() const {
    ucp_address_t* packed = nullptr;
    std::size_t size = 0;
    library().check(library().ucp_worker_get_address(handle_, &packed, &size),
                    "packing the worker's address");
    std::string address(reinterpret_cast<const char*>(packed), size);
    library().ucp_worker_release_address(handle_, packed);
    return address;
}

int UcxWorker::event_fd() const {
    int fd = -1;
    library().check(library().ucp_worker_get_efd(handle_, &fd), "getting the worker's event fd");
    return fd;
}

bool UcxWorker::arm() {
    const ucs_status_t status = library().ucp_worker_arm(handle_);
    if (status == UCS_ERR_BUSY) return false;
    library().check(status, "arming the worker");
    return true;
}

ucs_status_t UcxWorker::handle_notice(void* self, const void*, std::size_t, void* data,
                                      std::size_t num_bytes, const ucp_am_recv_param_t* param) {
    // We send notices eagerly and short; anything else is not from a peer of ours.
    const bool whole = (param->recv_attr & UCP_AM_RECV_ATTR_FLAG_RNDV) == 0;
    if (whole && num_bytes <= kMaxNoticeBytes) {
        static_cast<UcxWorker*>(self)->on_notice_({static_cast<const char*>(data), num_bytes});
    }
    return UCS_OK;
}

}  // namespace dualpath
