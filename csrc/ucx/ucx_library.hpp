// libucp, loaded at run time, so that one build uses whichever UCX a host has.
#pragma once

#include <ucp/api/ucp.h>

#include <stdexcept>
#include <string>

namespace dualpath {

// Anything UCX refuses, with its own words.
class UcxError : public std::runtime_error {
  public:
    using std::runtime_error::runtime_error;
};

// Every function we call. All exist since UCX 1.13, the oldest release supported.
#define DUALPATH_UCX_FUNCTIONS(X)     \
    X(ucp_am_send_nbx)                \
    X(ucp_cleanup)                    \
    X(ucp_config_read)                \
    X(ucp_config_release)             \
    X(ucp_context_print_info)         \
    X(ucp_ep_close_nbx)               \
    X(ucp_ep_create)                  \
    X(ucp_ep_flush_nbx)               \
    X(ucp_ep_print_info)              \
    X(ucp_ep_rkey_unpack)             \
    X(ucp_get_version)                \
    X(ucp_get_version_string)         \
    X(ucp_init_version)               \
    X(ucp_listener_create)            \
    X(ucp_listener_destroy)           \
    X(ucp_listener_query)             \
    X(ucp_listener_reject)            \
    X(ucp_mem_map)                    \
    X(ucp_mem_unmap)                  \
    X(ucp_put_nbx)                    \
    X(ucp_request_free)               \
    X(ucp_rkey_buffer_release)        \
    X(ucp_rkey_destroy)               \
    X(ucp_rkey_pack)                  \
    X(ucp_worker_arm)                 \
    X(ucp_worker_create)              \
    X(ucp_worker_destroy)             \
    X(ucp_worker_get_address)         \
    X(ucp_worker_get_efd)             \
    X(ucp_worker_progress)            \
    X(ucp_worker_release_address)     \
    X(ucp_worker_set_am_recv_handler) \
    X(ucs_status_string)

// The function table of one libucp. Immutable, any thread. The library is never unloaded: UCX
// starts threads and installs hooks that do not survive it.
class UcxLibrary {
  public:
    static constexpr unsigned kOldestMajor = 1;
    static constexpr unsigned kOldestMinor = 13;

    // Throws UcxError when `path` cannot be loaded, lacks a function, or is too old.
    explicit UcxLibrary(const std::string& path);

    const std::string& path() const { return path_; }
    std::string version() const;
    // Throws UcxError with `what` unless `status` is UCS_OK.
    void check(ucs_status_t status, const char* what) const;

#define DUALPATH_DECLARE(function) decltype(&::function) function;
    DUALPATH_UCX_FUNCTIONS(DUALPATH_DECLARE)
#undef DUALPATH_DECLARE

  private:
    void check_version() const;

    std::string path_;
};

}  // namespace dualpath
