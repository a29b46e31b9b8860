#include "copy/cuda_driver.hpp"

#include <dlfcn.h>

namespace dualpath {
namespace {

constexpr const char* kLibrary = "libcuda.so.1";
constexpr unsigned kStreamNonBlocking = 1;                  // CU_STREAM_NON_BLOCKING
constexpr unsigned kEventBlockingSync = 1;                  // CU_EVENT_BLOCKING_SYNC
constexpr unsigned kEventDisableTiming = 2;                 // CU_EVENT_DISABLE_TIMING
constexpr int kSourceAccessOrderStream = 1;                 // CU_MEMCPY_SRC_ACCESS_ORDER_STREAM
constexpr int kBatchWithFailIndex = 12080, kBatch = 13000;  // the versions whose form we know

template <class Function>
void find(const CudaDriver::Lookup& lookup, const char* name, Function*& function) {
    function = reinterpret_cast<Function*>(lookup(name));
    if (function == nullptr) {
        throw CudaError(std::string(kLibrary) + " has no function " + name +
                        "; update the NVIDIA driver");
    }
}

}  // namespace

std::shared_ptr<const CudaDriver> CudaDriver::load() {
    // Never closed: the driver keeps threads of its own.
    void* library = dlopen(kLibrary, RTLD_NOW);
    if (library == nullptr) throw CudaError(dlerror());
    return std::make_shared<CudaDriver>(
        [library](const char* name) { return dlsym(library, name); });
}

CudaDriver::CudaDriver(const Lookup& lookup) {
    find(lookup, "cuDriverGetVersion", get_version_);
    find(lookup, "cuGetErrorString", get_error_string_);
    find(lookup, "cuInit", init_);
    find(lookup, "cuDevicePrimaryCtxRetain", context_retain_);
    find(lookup, "cuDevicePrimaryCtxRelease_v2", context_release_);
    find(lookup, "cuCtxSetCurrent", context_set_);
    find(lookup, "cuStreamCreate", stream_create_);
    find(lookup, "cuStreamDestroy_v2", stream_destroy_);
    find(lookup, "cuStreamWaitEvent", stream_wait_);
    find(lookup, "cuStreamSynchronize", stream_synchronize_);
    find(lookup, "cuEventCreate", event_create_);
    find(lookup, "cuEventDestroy_v2", event_destroy_);
    find(lookup, "cuEventRecord", event_record_);
    find(lookup, "cuEventSynchronize", event_synchronize_);
    find(lookup, "cuMemcpyAsync", copy_);
    check(init_(0), "starting");
    check(get_version_(&version_), "asking for its version");
    get_proc_address_ =
        reinterpret_cast<decltype(get_proc_address_)>(lookup("cuGetProcAddress_v2"));
    find_batch_copy();
}

void CudaDriver::find_batch_copy() {
    if (get_proc_address_ == nullptr || version_ < kBatchWithFailIndex) return;
    // The driver gives the form that a program built for that version of CUDA would have used.
    const int form = version_ >= kBatch ? kBatch : kBatchWithFailIndex;
    void* function = nullptr;
    int status = 0;
    if (get_proc_address_("cuMemcpyBatchAsync", &function, form, 0, &status) != 0) return;
    if (form == kBatch) {
        batch_13000_ = reinterpret_cast<Batch13000>(function);
    } else {
        batch_12080_ = reinterpret_cast<Batch12080>(function);
    }
}

CudaContext CudaDriver::retain_context(int device) const {
    CudaContext context = nullptr;
    check(context_retain_(&context, device), "taking the device's context");
    return context;
}

void CudaDriver::release_context(int device) const noexcept { (void)context_release_(device); }

void CudaDriver::use_context(CudaContext context) const {
    check(context_set_(context), "entering the device's context");
}

CudaStream CudaDriver::create_stream() const {
    CudaStream stream = nullptr;
    check(stream_create_(&stream, kStreamNonBlocking), "making a stream");
    return stream;
}

void CudaDriver::destroy_stream(CudaStream stream) const noexcept { (void)stream_destroy_(stream); }

void CudaDriver::stream_wait(CudaStream stream, CudaEvent event) const {
    check(stream_wait_(stream, event, 0), "ordering a stream behind an event");
}

void CudaDriver::stream_synchronize(CudaStream stream) const {
    check(stream_synchronize_(stream), "waiting for a stream");
}

CudaEvent CudaDriver::create_event() const {
    CudaEvent event = nullptr;
    check(event_create_(&event, kEventBlockingSync | kEventDisableTiming), "making an event");
    return event;
}

void CudaDriver::destroy_event(CudaEvent event) const noexcept { (void)event_destroy_(event); }

void CudaDriver::record(CudaEvent event, CudaStream stream) const {
    check(event_record_(event, stream), "recording an event");
}

void CudaDriver::event_synchronize(CudaEvent event) const {
    check(event_synchronize_(event), "waiting for an event");
}

void CudaDriver::copy(CudaAddress to, CudaAddress from, std::size_t num_bytes,
                      CudaStream stream) const {
    check(copy_(to, from, num_bytes, stream), "copying");
}

void CudaDriver::copy_batch(CudaAddress* to, CudaAddress* from, std::size_t* sizes,
                            std::size_t count, CudaStream stream) const {
    CudaCopyAttributes attributes{};
    attributes.source_access_order = kSourceAccessOrderStream;
    std::size_t first = 0;  // the attributes hold from the first copy on
    if (batch_13000_ != nullptr) {
        check(batch_13000_(to, from, sizes, count, &attributes, &first, 1, stream), "copying");
    } else if (batch_12080_ != nullptr) {
        std::size_t failed = 0;
        check(batch_12080_(to, from, sizes, count, &attributes, &first, 1, &failed, stream),
              "copying");
    } else {
        throw CudaError("this driver has no batched copies; CUDA 12.8 has them");
    }
}

void CudaDriver::check(int result, const char* what) const {
    if (result == 0) return;
    const char* reason = nullptr;
    (void)get_error_string_(result, &reason);
    throw CudaError(std::string("CUDA: ") + what + " failed with error " + std::to_string(result) +
                    " (" + (reason == nullptr ? "unknown" : reason) + ")");
}

}  // namespace dualpath
