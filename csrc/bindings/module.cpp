#include <system_error>

#include "bindings/bindings.hpp"

namespace py = pybind11;

namespace {

// With its errno, so that Python sees the OSError that it would have seen from its own call.
void translate_system_error(std::exception_ptr pointer) {
    try {
        if (pointer) std::rethrow_exception(pointer);
    } catch (const std::system_error& error) {
        const py::tuple arguments = py::make_tuple(error.code().value(), error.what());
        PyErr_SetObject(PyExc_OSError, arguments.ptr());
    }
}

}  // namespace

PYBIND11_MODULE(_native, module) {
    module.doc() = "The compiled core of vllm-dualpath; vllm_dualpath.native is its only importer.";
    py::register_local_exception_translator(&translate_system_error);
    dualpath::bind_io(module);
    dualpath::bind_copy(module);
    dualpath::bind_memory(module);
    dualpath::bind_policy(module);
    dualpath::bind_sim(module);
    dualpath::bind_tcp(module);
    dualpath::bind_ucx(module);
    dualpath::bind_raw_puts(module);
}
