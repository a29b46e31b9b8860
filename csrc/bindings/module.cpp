#include "bindings/bindings.hpp"

PYBIND11_MODULE(_native, module) {
    module.doc() = "The compiled core of vllm-dualpath; vllm_dualpath.native is its only importer.";
    dualpath::bind_io(module);
    dualpath::bind_copy(module);
    dualpath::bind_memory(module);
    dualpath::bind_sim(module);
    dualpath::bind_policy(module);
    dualpath::bind_tcp(module);
    dualpath::bind_ucx(module);
    dualpath::bind_raw_puts(module);
}
