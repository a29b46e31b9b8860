// Reads and writes of blocks. Nothing here holds the GIL while it waits.
#include <pybind11/stl.h>

#include <memory>
#include <string>

#include "bindings/bindings.hpp"
#include "io/block_engine.hpp"

namespace py = pybind11;

namespace dualpath {
namespace {

BlockRequest read_request(std::string path, std::uintptr_t address, bool verify) {
    BlockRequest request;
    request.kind = BlockRequest::Kind::kRead;
    request.path = std::move(path);
    request.payload = reinterpret_cast<std::byte*>(address);
    request.verify = verify;
    return request;
}

BlockRequest write_request(std::string path, std::string temporary, std::uintptr_t address,
                           const py::bytes& header) {
    BlockRequest request;
    request.kind = BlockRequest::Kind::kWrite;
    request.path = std::move(path);
    request.temporary = std::move(temporary);
    request.payload = reinterpret_cast<std::byte*>(address);
    request.header = header;
    return request;
}

// Little-endian, as they lie in a header: one comparison tells whether all are right.
py::bytes crc_bytes(const std::vector<std::uint32_t>& crcs) {
    return {reinterpret_cast<const char*>(crcs.data()), crcs.size() * sizeof(std::uint32_t)};
}

py::tuple outcome_tuple(const BlockOutcome& outcome) {
    return py::make_tuple(outcome.id, static_cast<int>(outcome.status),
                          static_cast<int>(outcome.step), outcome.error, outcome.num_bytes,
                          outcome.found_bytes, outcome.modified_s, py::bytes(outcome.header),
                          crc_bytes(outcome.crcs));
}

py::tuple run(BlockEngine& engine, BlockRequest request) {
    BlockOutcome outcome;
    {
        const py::gil_scoped_release release;
        outcome = engine.run(std::move(request));
    }
    return outcome_tuple(outcome);
}

std::uint64_t submit(BlockEngine& engine, BlockRequest request) {
    const py::gil_scoped_release release;
    return engine.submit(std::move(request));
}

py::list poll(BlockEngine& engine) {
    std::vector<BlockOutcome> outcomes;
    {
        const py::gil_scoped_release release;
        outcomes = engine.poll();
    }
    py::list list;
    for (const BlockOutcome& outcome : outcomes) list.append(outcome_tuple(outcome));
    return list;
}

std::unique_ptr<BlockEngine> make_engine(bool io_uring, bool direct, unsigned num_threads,
                                         unsigned depth, std::uint64_t piece_bytes,
                                         std::string directory, std::uint64_t header_bytes,
                                         std::uint64_t payload_bytes,
                                         std::uint64_t crc_table_offset,
                                         std::uint64_t header_crc_offset,
                                         std::vector<std::uint64_t> layer_bytes) {
    BlockLayout layout{header_bytes, payload_bytes, crc_table_offset, header_crc_offset,
                       std::move(layer_bytes)};
    const Backend backend = io_uring ? Backend::kIoUring : Backend::kThreads;
    const EngineIoOptions options{backend, direct,      num_threads,
                                  depth,   piece_bytes, std::move(directory)};
    const py::gil_scoped_release release;
    return std::make_unique<BlockEngine>(std::move(layout), options);
}

}  // namespace

void bind_io(py::module_& module) {
    using release = py::call_guard<py::gil_scoped_release>;
    py::class_<BlockEngine>(module, "BlockEngine")
        .def(py::init(&make_engine), py::kw_only(), py::arg("io_uring"), py::arg("direct"),
             py::arg("num_threads"), py::arg("depth"), py::arg("piece_bytes"), py::arg("directory"),
             py::arg("header_bytes"), py::arg("payload_bytes"), py::arg("crc_table_offset"),
             py::arg("header_crc_offset"), py::arg("layer_bytes"))
        .def("fileno", &BlockEngine::fd)
        .def(
            "read",
            [](BlockEngine& engine, std::string path, std::uintptr_t address, bool verify) {
                return run(engine, read_request(std::move(path), address, verify));
            },
            py::arg("path"), py::arg("address"), py::arg("verify"))
        .def(
            "write",
            [](BlockEngine& engine, std::string path, std::string temporary, std::uintptr_t address,
               const py::bytes& header) {
                return run(engine,
                           write_request(std::move(path), std::move(temporary), address, header));
            },
            py::arg("path"), py::arg("temporary"), py::arg("address"), py::arg("header"))
        .def(
            "submit_read",
            [](BlockEngine& engine, std::string path, std::uintptr_t address, bool verify) {
                return submit(engine, read_request(std::move(path), address, verify));
            },
            py::arg("path"), py::arg("address"), py::arg("verify"))
        .def(
            "submit_write",
            [](BlockEngine& engine, std::string path, std::string temporary, std::uintptr_t address,
               const py::bytes& header) {
                return submit(
                    engine, write_request(std::move(path), std::move(temporary), address, header));
            },
            py::arg("path"), py::arg("temporary"), py::arg("address"), py::arg("header"))
        .def("cancel", &BlockEngine::cancel, py::arg("id"), release())
        .def("started_s", &BlockEngine::started_s, py::arg("id"), release())
        .def("poll", &poll)
        .def(
            "close",
            [](BlockEngine& engine, double timeout_s) {
                return engine.close(std::chrono::duration<double>(timeout_s));
            },
            py::arg("timeout_s"), release());
}

}  // namespace dualpath
