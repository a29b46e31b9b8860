// The TCP engine. Every method that may wait releases the GIL.
#include <pybind11/stl.h>

#include <algorithm>
#include <memory>
#include <string>

#include "bindings/bindings.hpp"
#include "bindings/transport_bindings.hpp"
#include "tcp/tcp_engine.hpp"

namespace py = pybind11;

namespace dualpath {
namespace {

Token to_token(const std::string& bytes) {
    Token token{};
    if (bytes.size() != token.size()) throw std::invalid_argument("a token has 16 bytes");
    std::copy(bytes.begin(), bytes.end(), token.begin());
    return token;
}

}  // namespace

void bind_tcp(py::module_& module) {
    using release = py::call_guard<py::gil_scoped_release>;
    py::register_exception<TcpError>(module, "TcpError", PyExc_RuntimeError);
    py::class_<TcpEngine>(module, "TcpEngine")
        .def(py::init([](const std::string& host, std::uint16_t port, const std::string& token,
                         std::uint64_t max_put_bytes, std::uint64_t first_id, int traffic_class) {
                 return std::make_unique<TcpEngine>(TcpOptions{
                     host, port, to_token(token), max_put_bytes, first_id, traffic_class});
             }),
             py::arg("listen_host"), py::arg("listen_port"), py::arg("token"),
             py::arg("max_put_bytes"), py::arg("first_id"), py::arg("traffic_class") = -1)
        .def_property_readonly("listen_port", &TcpEngine::listen_port)
        .def("fileno", &TcpEngine::event_fd)
        .def("register_region", &TcpEngine::register_region, py::arg("address"),
             py::arg("num_bytes"), py::arg("file"))
        .def(
            "connect",
            [](TcpEngine& engine, const std::string& host, std::uint16_t port,
               const std::string& token, std::uint64_t remote_address, std::uint64_t remote_bytes,
               bool by_reference) {
                return engine.connect(SocketAddress::parse(host, port), to_token(token),
                                      {remote_address, remote_bytes}, by_reference);
            },
            py::arg("host"), py::arg("port"), py::arg("token"), py::arg("remote_address"),
            py::arg("remote_bytes"), py::arg("by_reference"))
        .def("put", &put_pieces<TcpEngine>, py::arg("peer_id"), py::arg("pieces"),
             py::arg("notice"))
        .def("disconnect", &TcpEngine::disconnect, py::arg("peer_id"))
        .def("poll", &poll_events<TcpEngine>)
        .def("close", &TcpEngine::close, release());
}

}  // namespace dualpath
