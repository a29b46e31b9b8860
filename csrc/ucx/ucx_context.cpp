#include "ucx/ucx_context.hpp"

#include <cstdio>
#include <cstdlib>
#include <utility>

namespace dualpath {

UcxContext::UcxContext(std::shared_ptr<const UcxLibrary> library) : library_(std::move(library)) {
    ucp_config_t* config = nullptr;
    library_->check(library_->ucp_config_read(nullptr, nullptr, &config), "reading UCX_* settings");
    ucp_params_t params{};
    params.field_mask =
        UCP_PARAM_FIELD_FEATURES | UCP_PARAM_FIELD_MT_WORKERS_SHARED | UCP_PARAM_FIELD_NAME;
    params.features = UCP_FEATURE_RMA | UCP_FEATURE_AM | UCP_FEATURE_WAKEUP;
    params.mt_workers_shared = 1;
    params.name = "vllm-dualpath";
    const ucs_status_t status = library_->ucp_init_version(
        UcxLibrary::kOldestMajor, UcxLibrary::kOldestMinor, &params, config, &handle_);
    library_->ucp_config_release(config);
    library_->check(status, "starting UCX (are UCX_TLS and UCX_NET_DEVICES right?)");
}

UcxContext::~UcxContext() { library_->ucp_cleanup(handle_); }

std::string UcxContext::info() const {
    char* text = nullptr;
    std::size_t size = 0;
    std::FILE* stream = open_memstream(&text, &size);
    if (stream == nullptr) return {};
    library_->ucp_context_print_info(handle_, stream);
    std::fclose(stream);
    std::string info(text, size);
    std::free(text);
    return info;
}

}  // namespace dualpath
