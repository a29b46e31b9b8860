// Copies of pages. Submitting keeps the GIL, which it would take longer to give up; waiting does
// not.
#include <pybind11/stl.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <memory>
#include <string>
#include <tuple>
#include <vector>

#include "bindings/bindings.hpp"
#include "copy/copy_queue.hpp"
#include "copy/cuda_copies.hpp"
#include "core/affinity.hpp"

namespace py = pybind11;

namespace dualpath {
namespace {

// (cache address, block stride, runs a page, run stride, run bytes, offset in a slot)
using LayerTuple =
    std::tuple<std::uintptr_t, std::size_t, std::size_t, std::size_t, std::size_t, std::size_t>;

std::shared_ptr<PageMap> make_map(const std::vector<LayerTuple>& layers, std::size_t num_blocks,
                                  std::uintptr_t address, std::size_t slot_bytes,
                                  std::size_t num_slots, std::size_t pages_per_block) {
    std::vector<LayerPages> pages;
    pages.reserve(layers.size());
    for (const auto& [cache, block_stride, num_runs, run_stride, run_bytes, offset] : layers) {
        pages.push_back({cache, block_stride, num_runs, run_stride, run_bytes, offset});
    }
    return std::make_shared<PageMap>(std::move(pages), num_blocks,
                                     StagingSlots{address, slot_bytes, num_slots, pages_per_block});
}

// Any sequence of Python integers, without a Python object made for each.
class Numbers {
  public:
    explicit Numbers(const py::handle& values)
        : fast_(py::reinterpret_steal<py::object>(
              PySequence_Fast(values.ptr(), "expected a sequence of integers"))) {
        if (!fast_) throw py::error_already_set();
    }
    std::size_t size() const {
        return static_cast<std::size_t>(PySequence_Fast_GET_SIZE(fast_.ptr()));
    }
    std::uint32_t operator[](std::size_t index) const {
        PyObject* item = PySequence_Fast_GET_ITEM(fast_.ptr(), static_cast<Py_ssize_t>(index));
        const long value = PyLong_AsLong(item);
        if (value < 0 || value > static_cast<long>(UINT32_MAX)) refuse(value);
        return static_cast<std::uint32_t>(value);
    }

  private:
    [[noreturn]] static void refuse(long value) {
        if (value == -1 && PyErr_Occurred() != nullptr) throw py::error_already_set();
        throw std::invalid_argument("a block or slot beyond 32 bits: " + std::to_string(value));
    }

    py::object fast_;
};

// One request: pages from `first_page` on, `slots` from the Full Block that holds it on.
struct RequestPages {
    std::size_t first_page;
    Numbers blocks;
    Numbers slots;
};

// Writes the rows of `pages` from `row` on, and returns their end.
PageRow* fill_rows(PageRow* row, const RequestPages& pages, std::size_t pages_per_block) {
    const auto& [first_page, blocks, slots] = pages;
    std::size_t in_block = first_page % pages_per_block;
    if (in_block + blocks.size() > slots.size() * pages_per_block) {
        throw std::invalid_argument(std::to_string(blocks.size()) + " pages from page " +
                                    std::to_string(first_page) + " on do not fit into " +
                                    std::to_string(slots.size()) + " slots");
    }
    std::size_t i = 0;
    for (std::size_t slot = 0; i < blocks.size(); ++slot, in_block = 0) {
        const std::uint32_t number = slots[slot];
        const std::size_t end = std::min(blocks.size(), i + pages_per_block - in_block);
        for (; i < end; ++i, ++in_block, ++row) {
            *row = {blocks[i], number, static_cast<std::uint32_t>(in_block)};
        }
    }
    return row;
}

std::shared_ptr<PageRows> make_rows(std::shared_ptr<PageMap> map, const py::iterable& copies) {
    std::vector<RequestPages> requests;
    std::size_t num_rows = 0;
    for (const py::handle copy : copies) {
        const auto [first_page, blocks, slots] =
            py::cast<std::tuple<std::size_t, py::object, py::object>>(copy);
        requests.push_back({first_page, Numbers(blocks), Numbers(slots)});
        num_rows += requests.back().blocks.size();
    }
    std::vector<PageRow> rows(num_rows);  // at once: growing costs more than filling
    PageRow* end = rows.data();
    for (const RequestPages& pages : requests) {
        end = fill_rows(end, pages, map->staging().pages_per_block);
    }
    return std::make_shared<PageRows>(std::move(map), std::move(rows));
}

std::chrono::nanoseconds seconds(double value) {
    constexpr double most = 1e9;  // about 30 years: the clock must not overflow
    if (!(value >= 0)) throw std::invalid_argument("a time to wait must not be negative");
    return std::chrono::duration_cast<std::chrono::nanoseconds>(
        std::chrono::duration<double>(std::min(value, most)));
}

CopyDirection direction_of(bool load) { return load ? CopyDirection::kLoad : CopyDirection::kSave; }

CopyLane lane_of(bool background) { return background ? CopyLane::kBackground : CopyLane::kUrgent; }

std::uint64_t submit(CopyQueue& queue, std::shared_ptr<PageRows> rows, bool load,
                     std::size_t first_layer, std::size_t end_layer, bool background,
                     bool reported) {
    return queue.submit({std::move(rows), direction_of(load), first_layer, end_layer, nullptr},
                        lane_of(background), reported);
}

CudaMethod method_named(const std::string& name) {
    if (name == "batch") return CudaMethod::kBatch;
    if (name == "single") return CudaMethod::kSingle;
    throw std::invalid_argument("method: expected batch or single, found " + name);
}

CudaStream stream_at(std::uintptr_t handle) { return reinterpret_cast<CudaStream>(handle); }

// (copies ended, why copies failed)
template <typename Copies>
std::pair<std::uint64_t, std::string> wait_reports(Copies& copies, std::uint64_t seen,
                                                   double timeout_s) {
    const py::gil_scoped_release release;
    const auto count = copies.wait_reports(seen, seconds(timeout_s));
    return {count, copies.error()};
}

void bind_cuda(py::module_& module) {
    using release = py::call_guard<py::gil_scoped_release>;
    py::class_<CudaMark>(module, "CudaMark");
    py::class_<CudaCopies>(module, "CudaCopies")
        .def(py::init([](int device, const std::string& method) {
                 return std::make_unique<CudaCopies>(CudaDriver::load(), device,
                                                     method_named(method));
             }),
             py::arg("device"), py::arg("method"), release())
        .def(
            "submit",
            [](CudaCopies& copies, std::shared_ptr<PageRows> rows, bool load,
               std::size_t first_layer, std::size_t end_layer, const CudaMark& after,
               bool background, bool reported) {
                return copies.submit(std::move(rows), direction_of(load), first_layer, end_layer,
                                     lane_of(background), after, reported);
            },
            py::arg("rows"), py::arg("load"), py::arg("first_layer"), py::arg("end_layer"),
            py::arg("after"), py::arg("background") = false, py::arg("reported") = false)
        .def("submit_barrier", &CudaCopies::submit_barrier)
        .def("wait_reports", &wait_reports<CudaCopies>, py::arg("seen"), py::arg("timeout_s"))
        .def(
            "now",
            [](const CudaCopies& copies, std::uintptr_t stream) {
                return copies.now(stream_at(stream));
            },
            py::arg("stream"))
        .def(
            "hold",
            [](const CudaCopies& copies, std::uintptr_t stream, const CudaMark& mark,
               double timeout_s) {
                return copies.hold(stream_at(stream), mark, seconds(timeout_s));
            },
            py::arg("stream"), py::arg("mark"), py::arg("timeout_s"), release())
        .def(
            "wait",
            [](const CudaCopies& copies, const CudaMark& mark, double timeout_s) {
                return copies.wait(mark, seconds(timeout_s));
            },
            py::arg("mark"), py::arg("timeout_s"), release())
        .def(
            "close",
            [](CudaCopies& copies, double timeout_s) { return copies.close(seconds(timeout_s)); },
            py::arg("timeout_s"), release());
}

// The tickets of all layers, in order.
py::list submit_layers(CopyQueue& queue, std::shared_ptr<PageRows> rows, bool load) {
    const std::size_t num_layers = rows->map().layers().size();
    const auto first = queue.submit_layers(
        {std::move(rows), direction_of(load), 0, num_layers, nullptr}, CopyLane::kUrgent);
    py::list tickets(num_layers);
    for (std::size_t i = 0; i < num_layers; ++i) {
        tickets[i] = py::int_(first + i * CopyQueue::kTicketStep);
    }
    return tickets;
}

}  // namespace

void bind_copy(py::module_& module) {
    using release = py::call_guard<py::gil_scoped_release>;
    py::class_<PageMap, std::shared_ptr<PageMap>>(module, "PageMap")
        .def(py::init(&make_map), py::arg("layers"), py::arg("num_blocks"), py::arg("address"),
             py::arg("slot_bytes"), py::arg("num_slots"), py::arg("pages_per_block"));
    py::class_<PageRows, std::shared_ptr<PageRows>>(module, "PageRows")
        .def(py::init(&make_rows), py::arg("page_map"), py::arg("copies"))
        .def_property_readonly("num_layers",
                               [](const PageRows& rows) { return rows.map().layers().size(); })
        .def("__len__", [](const PageRows& rows) { return rows.rows().size(); });
    py::class_<CopyQueue>(module, "CopyQueue")
        .def(py::init([] { return std::make_unique<CopyQueue>(std::make_unique<HostDevice>()); }))
        .def("submit", &submit, py::arg("rows"), py::arg("load"), py::arg("first_layer"),
             py::arg("end_layer"), py::arg("background") = false, py::arg("reported") = false)
        .def("submit_barrier", [](CopyQueue& queue) { return queue.submit_barrier(); })
        .def("wait_reports", &wait_reports<CopyQueue>, py::arg("seen"), py::arg("timeout_s"))
        .def("submit_layers", &submit_layers, py::arg("rows"), py::arg("load"))
        .def("done_until", &CopyQueue::done_until, py::arg("ticket"))
        .def(
            "wait",
            [](const CopyQueue& queue, std::uint64_t ticket, double timeout_s) {
                return queue.wait(ticket, seconds(timeout_s));
            },
            py::arg("ticket"), py::arg("timeout_s"), release())
        .def(
            "close",
            [](CopyQueue& queue, double timeout_s) { return queue.close(seconds(timeout_s)); },
            py::arg("timeout_s"), release());
    bind_cuda(module);
    module.def("leave_compute_cores", &leave_compute_cores);
}

}  // namespace dualpath
