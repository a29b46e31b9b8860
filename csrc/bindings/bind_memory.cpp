// Checksums and atomics: functions on (address, bytes).
#include <pybind11/stl.h>

#include <cstdint>
#include <vector>

#include "bindings/bindings.hpp"
#include "core/atomics.hpp"
#include "core/crc32c.hpp"
#include "core/stream_copy.hpp"

namespace py = pybind11;

namespace dualpath {
namespace {

const void* readable(std::uintptr_t address, std::size_t num_bytes) {
    if (address == 0 && num_bytes != 0) throw std::invalid_argument("null address");
    return reinterpret_cast<const void*>(address);
}

std::vector<std::uint32_t> crc32c_many(std::uintptr_t address,
                                       const std::vector<std::size_t>& sizes) {
    std::vector<std::uint32_t> checksums;
    checksums.reserve(sizes.size());
    for (const std::size_t size : sizes) {
        checksums.push_back(crc32c(readable(address, size), size, 0));
        address += size;
    }
    return checksums;
}

}  // namespace

void bind_memory(py::module_& module) {
    using release = py::call_guard<py::gil_scoped_release>;
    module.def(
        "crc32c",
        [](std::uintptr_t address, std::size_t num_bytes, std::uint32_t seed) {
            return crc32c(readable(address, num_bytes), num_bytes, seed);
        },
        py::arg("address"), py::arg("num_bytes"), py::arg("seed") = 0, release());
    module.def(
        "crc32c_portable",
        [](std::uintptr_t address, std::size_t num_bytes, std::uint32_t seed) {
            return crc32c_portable(readable(address, num_bytes), num_bytes, seed);
        },
        py::arg("address"), py::arg("num_bytes"), py::arg("seed") = 0, release());
    module.def("crc32c_many", &crc32c_many, py::arg("address"), py::arg("sizes"), release());
    module.def("crc32c_implementation", &crc32c_implementation);
    module.def("stream_copy_implementation", &stream_copy_implementation);
    module.def("atomic_load_u64", &atomic_load_u64, py::arg("address"));
    module.def("atomic_store_u64", &atomic_store_u64, py::arg("address"), py::arg("value"));
    module.def("atomic_fetch_add_u64", &atomic_fetch_add_u64, py::arg("address"), py::arg("delta"));
    module.def("atomic_compare_exchange_u64", &atomic_compare_exchange_u64, py::arg("address"),
               py::arg("expected"), py::arg("desired"));
}

}  // namespace dualpath
