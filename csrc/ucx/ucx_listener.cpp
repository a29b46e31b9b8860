#include "ucx/ucx_listener.hpp"

#include <utility>

namespace dualpath {

UcxListener::UcxListener(std::shared_ptr<UcxWorker> worker, const SocketAddress& address)
    : worker_(std::move(worker)) {
    ucp_listener_params_t params{};
    params.field_mask = UCP_LISTENER_PARAM_FIELD_SOCK_ADDR | UCP_LISTENER_PARAM_FIELD_CONN_HANDLER;
    params.sockaddr.addr = address.get();
    params.sockaddr.addrlen = address.size;
    params.conn_handler.cb = &UcxListener::handle_request;
    params.conn_handler.arg = this;
    const UcxLibrary& library = worker_->library();
    library.check(library.ucp_listener_create(worker_->handle(), &params, &handle_),
                  "listening for peers (is the address this host's, the port free?)");
}

UcxListener::~UcxListener() {
    worker_->library().ucp_listener_destroy(handle_);
    // What has not closed in time may still be called back.
    for (auto& connection : connections_) worker_->keep(std::move(connection));
}

std::uint16_t UcxListener::port() const {
    ucp_listener_attr_t attributes{};
    attributes.field_mask = UCP_LISTENER_ATTR_FIELD_SOCKADDR;
    const UcxLibrary& library = worker_->library();
    library.check(library.ucp_listener_query(handle_, &attributes), "asking for the port");
    return SocketAddress{attributes.sockaddr, sizeof attributes.sockaddr}.port();
}

bool UcxListener::advance() {
    bool worked = !requests_.empty();
    for (ucp_conn_request_h request : std::exchange(requests_, {})) accept(request);
    for (auto& connection : connections_) {
        if (!connection->failed || connection->closing) continue;
        close_connection(*connection);
        worked = true;
    }
    std::erase_if(connections_, [](const auto& connection) { return connection->closed; });
    return worked;
}

void UcxListener::close() {
    accepting_ = false;
    for (auto& connection : connections_) connection->failed = true;
    advance();
}

void UcxListener::handle_request(ucp_conn_request_h request, void* self) {
    static_cast<UcxListener*>(self)->requests_.push_back(request);
}

void UcxListener::handle_error(void* connection, ucp_ep_h, ucs_status_t) {
    static_cast<IncomingConnection*>(connection)->failed = true;
}

void UcxListener::accept(ucp_conn_request_h request) {
    const UcxLibrary& library = worker_->library();
    if (!accepting_) {
        library.ucp_listener_reject(handle_, request);
        return;
    }
    auto connection = std::make_shared<IncomingConnection>();
    connection->library = &library;
    ucp_ep_params_t params{};
    params.field_mask = UCP_EP_PARAM_FIELD_CONN_REQUEST | UCP_EP_PARAM_FIELD_ERR_HANDLER |
                        UCP_EP_PARAM_FIELD_ERR_HANDLING_MODE;
    params.conn_request = request;
    params.err_mode = UCP_ERR_HANDLING_MODE_PEER;
    params.err_handler.cb = &UcxListener::handle_error;
    params.err_handler.arg = connection.get();
    // A peer that is gone before we answer is its own problem: it sees its side fail.
    if (library.ucp_ep_create(worker_->handle(), &params, &connection->handle) == UCS_OK) {
        connections_.push_back(std::move(connection));
    }
}

void UcxListener::close_connection(IncomingConnection& connection) {
    connection.closing = true;
    ucp_request_param_t param{};
    param.op_attr_mask =
        UCP_OP_ATTR_FIELD_FLAGS | UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_USER_DATA;
    param.flags = UCP_EP_CLOSE_FLAG_FORCE;
    param.user_data = &connection;
    param.cb.send = [](void* request, ucs_status_t, void* user_data) {
        auto* done = static_cast<IncomingConnection*>(user_data);
        done->closed = true;
        done->library->ucp_request_free(request);
    };
    ucs_status_ptr_t request = worker_->library().ucp_ep_close_nbx(connection.handle, &param);
    if (request == nullptr || UCS_PTR_IS_ERR(request)) connection.closed = true;
}

}  // namespace dualpath
