// The baseline of `bench mover`: a plain ucp_put_nbx loop and its target.
#include <chrono>
#include <memory>
#include <string>

#include "bindings/bindings.hpp"
#include "bindings/transport_bindings.hpp"
#include "ucx/raw_put_loop.hpp"
#include "ucx/raw_put_target.hpp"

namespace py = pybind11;

namespace dualpath {
namespace {

std::chrono::milliseconds milliseconds(double seconds) {
    if (!(seconds > 0 && seconds < 1e6)) throw std::invalid_argument("timeout_s: 0 to 1e6 seconds");
    return std::chrono::milliseconds(static_cast<std::int64_t>(seconds * 1e3) + 1);
}

double put(RawPutLoop& loop, const PutArray& pieces, std::size_t progress_every, double timeout_s) {
    const PieceList list(pieces);
    const py::gil_scoped_release release;
    return loop.put(list.first, list.size, progress_every, milliseconds(timeout_s));
}

}  // namespace

void bind_raw_puts(py::module_& module) {
    py::class_<RawPutTarget>(module, "RawPutTarget")
        .def(py::init<std::shared_ptr<const UcxLibrary>, std::uintptr_t, std::size_t>(),
             py::arg("library"), py::arg("address"), py::arg("num_bytes"),
             py::call_guard<py::gil_scoped_release>())
        .def_property_readonly(
            "worker_address",
            [](const RawPutTarget& target) { return py::bytes(target.worker_address()); })
        .def_property_readonly("packed_key", [](const RawPutTarget& target) {
            return py::bytes(target.packed_key());
        });
    py::class_<RawPutLoop>(module, "RawPutLoop")
        .def(py::init([](const std::shared_ptr<UcxLibrary>& library, std::uintptr_t address,
                         std::size_t num_bytes, const std::string& remote_worker,
                         const std::string& remote_key, double timeout_s) {
                 const py::gil_scoped_release guard;
                 return std::make_unique<RawPutLoop>(library, address, num_bytes, remote_worker,
                                                     remote_key, milliseconds(timeout_s));
             }),
             py::arg("library"), py::arg("address"), py::arg("num_bytes"), py::arg("remote_worker"),
             py::arg("remote_key"), py::arg("timeout_s"))
        .def("put", &put, py::arg("pieces"), py::arg("progress_every"), py::arg("timeout_s"));
}

}  // namespace dualpath
