// A UCP context: the transports of this process, and the memory registered with them.
#pragma once

#include <memory>
#include <string>

#include "ucx/ucx_library.hpp"

namespace dualpath {

// Any thread: created with UCX's own lock on, because memory is registered by the owner thread
// while the progress thread runs.
class UcxContext {
  public:
    explicit UcxContext(std::shared_ptr<const UcxLibrary> library);
    ~UcxContext();
    UcxContext(const UcxContext&) = delete;
    UcxContext& operator=(const UcxContext&) = delete;

    const UcxLibrary& library() const { return *library_; }
    ucp_context_h handle() const { return handle_; }
    // UCX's own description of its resources, one line each.
    std::string info() const;

  private:
    std::shared_ptr<const UcxLibrary> library_;
    ucp_context_h handle_ = nullptr;
};

}  // namespace dualpath
