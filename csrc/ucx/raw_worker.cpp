#include "ucx/raw_worker.hpp"

#include <utility>

namespace dualpath {

RawWorker::RawWorker(std::shared_ptr<const UcxLibrary> library, std::uintptr_t address,
                     std::size_t num_bytes)
    : library_(std::move(library)), span_{address, num_bytes} {
    if (address == 0 || num_bytes == 0 || address + num_bytes < address) {
        throw std::invalid_argument("memory needs an address and a size");
    }
    try {
        open();
    } catch (...) {
        close();
        throw;
    }
}

RawWorker::~RawWorker() { close(); }

void RawWorker::open() {
    ucp_config_t* config = nullptr;
    library_->check(library_->ucp_config_read(nullptr, nullptr, &config), "reading UCX_* settings");
    ucp_params_t params{};
    params.field_mask = UCP_PARAM_FIELD_FEATURES;
    params.features = UCP_FEATURE_RMA;
    const ucs_status_t status = library_->ucp_init_version(
        UcxLibrary::kOldestMajor, UcxLibrary::kOldestMinor, &params, config, &context_);
    library_->ucp_config_release(config);
    library_->check(status, "starting UCX (is UCX_TLS right?)");

    ucp_worker_params_t worker_params{};
    worker_params.field_mask = UCP_WORKER_PARAM_FIELD_THREAD_MODE;
    worker_params.thread_mode = UCS_THREAD_MODE_SINGLE;
    library_->check(library_->ucp_worker_create(context_, &worker_params, &worker_),
                    "creating a UCX worker");

    ucp_mem_map_params_t memory_params{};
    memory_params.field_mask = UCP_MEM_MAP_PARAM_FIELD_ADDRESS | UCP_MEM_MAP_PARAM_FIELD_LENGTH;
    memory_params.address = reinterpret_cast<void*>(span_.address);
    memory_params.length = span_.num_bytes;
    library_->check(library_->ucp_mem_map(context_, &memory_params, &memory_),
                    "registering memory");
}

void RawWorker::close() {
    if (memory_ != nullptr) library_->ucp_mem_unmap(context_, memory_);
    if (worker_ != nullptr) library_->ucp_worker_destroy(worker_);
    if (context_ != nullptr) library_->ucp_cleanup(context_);
}

std::string RawWorker::worker_address() const {
    ucp_address_t* packed = nullptr;
    std::size_t size = 0;
    library_->check(library_->ucp_worker_get_address(worker_, &packed, &size),
                    "packing the worker's address");
    std::string address(reinterpret_cast<const char*>(packed), size);
    library_->ucp_worker_release_address(worker_, packed);
    return address;
}

std::string RawWorker::packed_key() const {
    void* buffer = nullptr;
    std::size_t size = 0;
    library_->check(library_->ucp_rkey_pack(context_, memory_, &buffer, &size),
                    "packing a memory key");
    std::string key(static_cast<const char*>(buffer), size);
    library_->ucp_rkey_buffer_release(buffer);
    return key;
}

}  // namespace dualpath
