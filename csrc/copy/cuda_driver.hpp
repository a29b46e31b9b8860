// The few functions of NVIDIA's driver library that copies need, found at run time.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>

namespace dualpath {

class CudaError : public std::runtime_error {
  public:
    using std::runtime_error::runtime_error;
};

// The driver's types, declared here so that no CUDA header is needed to build. Names and values are
// those of its stable binary interface.
using CudaStream = struct CUstream_st*;
using CudaEvent = struct CUevent_st*;
using CudaContext = struct CUctx_st*;
using CudaAddress = unsigned long long;

struct CudaMemoryLocation {
    int type;
    int id;
};
struct CudaCopyAttributes {
    int source_access_order;
    CudaMemoryLocation source_hint;
    CudaMemoryLocation target_hint;
    unsigned int flags;
};

// Every call throws CudaError if the driver refuses. Any thread.
class CudaDriver {
  public:
    // Finds a function by the driver's name for it, or returns null.
    using Lookup = std::function<void*(const char*)>;

    // Throws CudaError when there is no driver, or one without a function that is needed.
    static std::shared_ptr<const CudaDriver> load();
    explicit CudaDriver(const Lookup& lookup);

    int version() const { return version_; }  // 12080 is CUDA 12.8
    bool has_batch_copy() const { return batch_12080_ != nullptr || batch_13000_ != nullptr; }

    CudaContext retain_context(int device) const;
    void release_context(int device) const noexcept;
    void use_context(CudaContext context) const;
    CudaStream create_stream() const;
    void destroy_stream(CudaStream stream) const noexcept;
    void stream_wait(CudaStream stream, CudaEvent event) const;
    void stream_synchronize(CudaStream stream) const;
    // An event whose waiters sleep.
    CudaEvent create_event() const;
    void destroy_event(CudaEvent event) const noexcept;
    void record(CudaEvent event, CudaStream stream) const;
    void event_synchronize(CudaEvent event) const;
    void copy(CudaAddress to, CudaAddress from, std::size_t num_bytes, CudaStream stream) const;
    // One call for many copies, of which none may overlap another; in stream order.
    void copy_batch(CudaAddress* to, CudaAddress* from, std::size_t* sizes, std::size_t count,
                    CudaStream stream) const;

  private:
    using Batch12080 = int (*)(CudaAddress*, CudaAddress*, std::size_t*, std::size_t,
                               CudaCopyAttributes*, std::size_t*, std::size_t, std::size_t*,
                               CudaStream);
    using Batch13000 = int (*)(CudaAddress*, CudaAddress*, std::size_t*, std::size_t,
                               CudaCopyAttributes*, std::size_t*, std::size_t, CudaStream);

    void check(int result, const char* what) const;
    void find_batch_copy();

    int version_ = 0;
    int (*get_version_)(int*) = nullptr;
    int (*get_error_string_)(int, const char**) = nullptr;
    int (*get_proc_address_)(const char*, void**, int, std::uint64_t, int*) = nullptr;
    int (*init_)(unsigned) = nullptr;
    int (*context_retain_)(CudaContext*, int) = nullptr;
    int (*context_release_)(int) = nullptr;
    int (*context_set_)(CudaContext) = nullptr;
    int (*stream_create_)(CudaStream*, unsigned) = nullptr;
    int (*stream_destroy_)(CudaStream) = nullptr;
    int (*stream_wait_)(CudaStream, CudaEvent, unsigned) = nullptr;
    int (*stream_synchronize_)(CudaStream) = nullptr;
    int (*event_create_)(CudaEvent*, unsigned) = nullptr;
    int (*event_destroy_)(CudaEvent) = nullptr;
    int (*event_record_)(CudaEvent, CudaStream) = nullptr;
    int (*event_synchronize_)(CudaEvent) = nullptr;
    int (*copy_)(CudaAddress, CudaAddress, std::size_t, CudaStream) = nullptr;
    Batch12080 batch_12080_ = nullptr;
    Batch13000 batch_13000_ = nullptr;
};

}  // namespace dualpath
