// Accepts connections of peers on other hosts.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "core/socket_address.hpp"
#include "ucx/ucx_worker.hpp"

namespace dualpath {

// Our end of a peer's connection. UCX holds its address, so it never moves.
struct IncomingConnection {
    const UcxLibrary* library = nullptr;
    ucp_ep_h handle = nullptr;
    bool failed = false;
    bool closing = false;
    bool closed = false;
};

// Progress thread only, after construction. close() comes before destruction and destroys our
// ends, so that UCX rejects what a peer still writes.
class UcxListener {
  public:
    UcxListener(std::shared_ptr<UcxWorker> worker, const SocketAddress& address);
    ~UcxListener();
    UcxListener(const UcxListener&) = delete;
    UcxListener& operator=(const UcxListener&) = delete;

    // The port in use, where 0 was asked for.
    std::uint16_t port() const;
    // Accepts what waits and closes what failed. Whether anything was done.
    bool advance();
    // Starts to close every connection; closed() tells when all are gone.
    void close();
    bool closed() const { return connections_.empty(); }

  private:
    static void handle_request(ucp_conn_request_h request, void* self);
    static void handle_error(void* connection, ucp_ep_h, ucs_status_t);
    void accept(ucp_conn_request_h request);
    void close_connection(IncomingConnection& connection);

    std::shared_ptr<UcxWorker> worker_;
    ucp_listener_h handle_ = nullptr;
    bool accepting_ = true;
    std::vector<ucp_conn_request_h> requests_;
    std::vector<std::shared_ptr<IncomingConnection>> connections_;
};

}  // namespace dualpath
