#include "ucx/ucx_context.hpp"

#include <cstdio>
#include <cstdlib>
#include <utility>

namespace dualpath {

namespace {

// UCX's configuration: what the environment says, then what we set.
class Config {
  public:
    Config(const UcxLibrary& library, const UcxContext::Settings& settings) : library_(library) {
        library_.check(library_.ucp_config_read(nullptr, nullptr, &handle_),
                       "reading UCX_* settings");
        try {
            for (const auto& [name, value] : settings) {
                library_.check(library_.ucp_config_modify(handle_, name.c_str(), value.c_str()),
                               ("setting UCX_" + name + "=" + value).c_str());
            }
        } catch (...) {
            library_.ucp_config_release(handle_);
            throw;
        }
    }
    ~Config() { library_.ucp_config_release(handle_); }
    Config(const Config&) = delete;
    Config& operator=(const Config&) = delete;
    const ucp_config_t* get() const { return handle_; }

  private:
    const UcxLibrary& library_;
    ucp_config_t* handle_ = nullptr;
};

}  // namespace

UcxContext::UcxContext(std::shared_ptr<const UcxLibrary> library, const Settings& settings)
    : library_(std::move(library)) {
    const Config config(*library_, settings);
    ucp_params_t params{};
    params.field_mask =
        UCP_PARAM_FIELD_FEATURES | UCP_PARAM_FIELD_MT_WORKERS_SHARED | UCP_PARAM_FIELD_NAME;
    params.features = UCP_FEATURE_RMA | UCP_FEATURE_AM | UCP_FEATURE_WAKEUP;
    params.mt_workers_shared = 1;
    params.name = "vllm-dualpath";
    library_->check(library_->ucp_init_version(UcxLibrary::kOldestMajor, UcxLibrary::kOldestMinor,
                                               &params, config.get(), &handle_),
                    "starting UCX (are UCX_TLS and UCX_NET_DEVICES right?)");
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
