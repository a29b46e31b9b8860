// The TCP engine. Every method that may wait releases the GIL.
#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <memory>
#include <string>

#include "bindings/bindings.hpp"
#include "tcp/tcp_engine.hpp"

namespace py = pybind11;

namespace dualpath {
namespace {

using PutArray = py::array_t<std::uint64_t, py::array::c_style>;

Token to_token(const std::string& bytes) {
    Token token{};
    if (bytes.size() != token.size()) throw std::invalid_argument("a token has 16 bytes");
    std::copy(bytes.begin(), bytes.end(), token.begin());
    return token;
}

std::uint64_t put(TcpEngine& engine, std::uint64_t peer_id, const PutArray& pieces,
                  const std::string& notice) {
    if (pieces.ndim() != 2 || pieces.shape(1) != 3) {
        throw std::invalid_argument("pieces must have the shape (num_pieces, 3)");
    }
    const auto* first = reinterpret_cast<const Piece*>(pieces.data());
    const auto num_pieces = static_cast<std::size_t>(pieces.shape(0));
    const py::gil_scoped_release release;
    return engine.put(peer_id, first, num_pieces, notice);
}

py::list poll(TcpEngine& engine) {
    std::vector<TransportEvent> events;
    {
        const py::gil_scoped_release release;
        events = engine.poll();
    }
    return to_tuples(events);
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
        .def("put", &put, py::arg("peer_id"), py::arg("pieces"), py::arg("notice"))
        .def("disconnect", &TcpEngine::disconnect, py::arg("peer_id"))
        .def("poll", &poll)
        .def("close", &TcpEngine::close, release());
}

}  // namespace dualpath
