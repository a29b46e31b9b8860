// What the bindings of the engines that move pieces have in common.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "core/event_queue.hpp"
#include "core/put_batch.hpp"

namespace dualpath {

using PutArray = pybind11::array_t<std::uint64_t, pybind11::array::c_style>;

// The pieces of a PutArray, which must outlive them. Throws std::invalid_argument for another
// shape.
struct PieceList {
    explicit PieceList(const PutArray& array) {
        if (array.ndim() != 2 || array.shape(1) != 3) {
            throw std::invalid_argument("pieces must have the shape (num_pieces, 3)");
        }
        first = reinterpret_cast<const Piece*>(array.data());
        size = static_cast<std::size_t>(array.shape(0));
    }
    const Piece* first;
    std::size_t size;
};

template <typename Engine>
std::uint64_t put_pieces(Engine& engine, std::uint64_t peer_id, const PutArray& array,
                         const std::string& notice) {
    const PieceList pieces(array);
    const pybind11::gil_scoped_release release;
    return engine.put(peer_id, pieces.first, pieces.size, notice);
}

// (kind, id, ok, text, untouched) tuples: the bytes of a notice need not be UTF-8.
template <typename Engine>
pybind11::list poll_events(Engine& engine) {
    std::vector<TransportEvent> events;
    {
        const pybind11::gil_scoped_release release;
        events = engine.poll();
    }
    pybind11::list list;
    for (const TransportEvent& event : events) {
        list.append(pybind11::make_tuple(static_cast<int>(event.kind), event.id, event.ok,
                                         pybind11::bytes(event.text), event.untouched));
    }
    return list;
}

}  // namespace dualpath
