#include "ucx/raw_put_loop.hpp"

#include <utility>

namespace dualpath {
namespace {

using Clock = std::chrono::steady_clock;

// Outlives the flush that sets it, also one that is given up.
struct Flush {
    bool done = false;
    ucs_status_t status = UCS_OK;
};

}  // namespace

RawPutLoop::RawPutLoop(std::shared_ptr<const UcxLibrary> library, std::uintptr_t address,
                       std::size_t num_bytes, const std::string& remote_worker,
                       const std::string& remote_key, std::chrono::milliseconds timeout)
    : worker_(std::move(library), address, num_bytes), remote_key_(nullptr, KeyDeleter{nullptr}) {
    connect(remote_worker, remote_key);
    // Over TCP a target that connects back while it takes its first large put crashes now and then.
    flush(Clock::now() + timeout);
}

void RawPutLoop::connect(const std::string& remote_worker, const std::string& remote_key) {
    const UcxLibrary& library = worker_.library();
    ucp_ep_params_t params{};
    params.field_mask = UCP_EP_PARAM_FIELD_REMOTE_ADDRESS;
    params.address = reinterpret_cast<const ucp_address_t*>(remote_worker.data());
    library.check(library.ucp_ep_create(worker_.handle(), &params, &endpoint_), "connecting");
    ucp_rkey_h key = nullptr;
    library.check(library.ucp_ep_rkey_unpack(endpoint_, remote_key.data(), &key),
                  "unpacking the target's memory key");
    remote_key_ = std::unique_ptr<ucp_rkey, KeyDeleter>(key, KeyDeleter{&library});
}

double RawPutLoop::put(const Piece* pieces, std::size_t num_pieces, std::size_t progress_every,
                       std::chrono::milliseconds timeout) {
    for (const Piece* piece = pieces; piece != pieces + num_pieces; ++piece) {
        if (!worker_.span().contains((*piece)[0], (*piece)[2])) {
            throw std::invalid_argument("a piece is outside the registered memory");
        }
    }
    const Clock::time_point start = Clock::now();
    for (std::size_t index = 0; index < num_pieces; ++index) {
        post(pieces[index]);
        if (progress_every != 0 && index % progress_every == progress_every - 1) worker_.progress();
    }
    flush(start + timeout);
    return std::chrono::duration<double>(Clock::now() - start).count();
}

void RawPutLoop::post(const Piece& piece) {
    const UcxLibrary& library = worker_.library();
    const ucp_request_param_t param{};
    const auto [local, remote, num_bytes] = piece;
    const ucs_status_ptr_t result =
        library.ucp_put_nbx(endpoint_, reinterpret_cast<const void*>(local), num_bytes, remote,
                            remote_key_.get(), &param);
    if (UCS_PTR_IS_ERR(result)) library.check(UCS_PTR_STATUS(result), "put");
    // One that is under way is freed when it completes; the flush waits for it.
    if (result != nullptr) library.ucp_request_free(result);
}

void RawPutLoop::flush(Clock::time_point deadline) {
    const UcxLibrary& library = worker_.library();
    auto* state = new Flush;
    ucp_request_param_t param{};
    param.op_attr_mask = UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_USER_DATA;
    param.user_data = state;
    param.cb.send = [](void*, ucs_status_t status, void* user_data) {
        auto* ended = static_cast<Flush*>(user_data);
        ended->status = status;
        ended->done = true;
    };
    const ucs_status_ptr_t result = library.ucp_ep_flush_nbx(endpoint_, &param);
    if (!UCS_PTR_IS_PTR(result)) {
        delete state;
        library.check(UCS_PTR_STATUS(result), "flush");
        return;
    }
    while (!state->done) {
        // With nothing to do the clock is looked at; under load it costs nothing that counts.
        if (worker_.progress() == 0 && Clock::now() > deadline) {
            // Left behind: UCX may still call back when the worker is destroyed.
            throw UcxError("flush: the target did not take the bytes in time");
        }
    }
    const ucs_status_t status = state->status;
    delete state;
    library.ucp_request_free(result);
    library.check(status, "flush");
}

}  // namespace dualpath
