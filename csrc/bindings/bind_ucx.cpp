// The UCX engine. Every method releases the GIL while it is in C++.
#include <pybind11/stl.h>

#include <memory>
#include <optional>
#include <string>

#include "bindings/bindings.hpp"
#include "bindings/transport_bindings.hpp"
#include "ucx/ucx_engine.hpp"

namespace py = pybind11;

namespace dualpath {
namespace {

std::uint64_t connect(UcxEngine& engine, const std::string& host, std::uint16_t port,
                      const std::string& worker_address, const std::string& remote_key,
                      std::uint64_t remote_address, std::uint64_t remote_bytes,
                      std::shared_ptr<PeerMemory> memory) {
    PeerTarget target{std::nullopt, worker_address, remote_key, std::move(memory)};
    if (!host.empty()) target.listener = SocketAddress::parse(host, port);
    const py::gil_scoped_release release;
    return engine.connect(std::move(target), remote_address, remote_bytes);
}

}  // namespace

void bind_ucx(py::module_& module) {
    using release = py::call_guard<py::gil_scoped_release>;
    py::register_exception<UcxError>(module, "UcxError", PyExc_RuntimeError);
    py::register_exception<PeerClosedError>(module, "PeerClosedError", PyExc_RuntimeError);
    py::class_<UcxLibrary, std::shared_ptr<UcxLibrary>>(module, "UcxLibrary")
        .def(py::init<const std::string&>(), py::arg("path"), release())
        .def_property_readonly("path", &UcxLibrary::path)
        .def_property_readonly("version", &UcxLibrary::version)
        .def("context_info", [](const std::shared_ptr<UcxLibrary>& library) {
            const py::gil_scoped_release guard;
            return UcxContext(library).info();
        });
    py::class_<PeerMemory, std::shared_ptr<PeerMemory>>(module, "PeerMemory")
        .def(py::init([](pid_t pid, int fd, std::uint64_t device, std::uint64_t inode,
                         std::uint64_t remote_address, std::size_t num_bytes) {
                 const py::gil_scoped_release guard;
                 return std::make_shared<PeerMemory>(SharedFile{pid, fd, device, inode},
                                                     remote_address, num_bytes);
             }),
             py::arg("pid"), py::arg("fd"), py::arg("device"), py::arg("inode"),
             py::arg("remote_address"), py::arg("num_bytes"));
    py::class_<UcxEngine>(module, "UcxEngine")
        .def(py::init([](const std::shared_ptr<UcxLibrary>& library, const std::string& host,
                         std::uint16_t port, std::uint64_t max_inflight_bytes,
                         std::uint64_t max_put_bytes) {
                 const py::gil_scoped_release guard;
                 return std::make_unique<UcxEngine>(
                     library, EngineOptions{host, port, max_inflight_bytes, max_put_bytes});
             }),
             py::arg("library"), py::arg("listen_host"), py::arg("listen_port"),
             py::arg("max_inflight_bytes"), py::arg("max_put_bytes"))
        .def_property_readonly(
            "worker_address",
            [](const UcxEngine& engine) { return py::bytes(engine.worker_address()); })
        .def_property_readonly("listen_port", &UcxEngine::listen_port)
        .def("context_info", &UcxEngine::context_info, release())
        .def("fileno", &UcxEngine::event_fd)
        .def("register_region",
             [](UcxEngine& engine, std::uintptr_t address, std::size_t num_bytes) {
                 return py::bytes(engine.register_region(address, num_bytes));
             })
        .def("connect", &connect, py::arg("host"), py::arg("port"), py::arg("worker_address"),
             py::arg("remote_key"), py::arg("remote_address"), py::arg("remote_bytes"),
             py::arg("memory") = nullptr)
        .def("put", &put_pieces<UcxEngine>, py::arg("peer_id"), py::arg("pieces"),
             py::arg("notice"))
        .def("disconnect", &UcxEngine::disconnect, py::arg("peer_id"), release())
        .def("poll", &poll_events<UcxEngine>)
        .def("close", &UcxEngine::close, release());
}

}  // namespace dualpath
