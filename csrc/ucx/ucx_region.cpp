#include "ucx/ucx_region.hpp"

#include <utility>

namespace dualpath {

UcxRegion::UcxRegion(std::shared_ptr<UcxContext> context, std::uintptr_t address,
                     std::size_t num_bytes)
    : context_(std::move(context)) {
    if (address == 0 || num_bytes == 0 || address + num_bytes < address) {
        throw std::invalid_argument("a region needs an address and a size");
    }
    ucp_mem_map_params_t params{};
    params.field_mask = UCP_MEM_MAP_PARAM_FIELD_ADDRESS | UCP_MEM_MAP_PARAM_FIELD_LENGTH;
    params.address = reinterpret_cast<void*>(address);
    params.length = num_bytes;
    context_->library().check(
        context_->library().ucp_mem_map(context_->handle(), &params, &handle_),
        "registering memory (is memlock, `ulimit -l`, large enough?)");
}

UcxRegion::~UcxRegion() { context_->library().ucp_mem_unmap(context_->handle(), handle_); }

std::string UcxRegion::packed_key() const {
    void* buffer = nullptr;
    std::size_t size = 0;
    const UcxLibrary& library = context_->library();
    library.check(library.ucp_rkey_pack(context_->handle(), handle_, &buffer, &size),
                  "packing a memory key");
    std::string key(static_cast<const char*>(buffer), size);
    library.ucp_rkey_buffer_release(buffer);
    return key;
}

}  // namespace dualpath
