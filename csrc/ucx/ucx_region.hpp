// Existing memory registered with UCX.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

#include "ucx/ucx_context.hpp"

namespace dualpath {

// Unregisters when destroyed; the caller keeps the memory mapped until then. Any thread.
class UcxRegion {
  public:
    UcxRegion(std::shared_ptr<UcxContext> context, std::uintptr_t address, std::size_t num_bytes);
    ~UcxRegion();
    UcxRegion(const UcxRegion&) = delete;
    UcxRegion& operator=(const UcxRegion&) = delete;

    // What a peer needs, besides the address, to write here.
    std::string packed_key() const;

  private:
    std::shared_ptr<UcxContext> context_;
    ucp_mem_h handle_ = nullptr;
};

}  // namespace dualpath
