// One function for each group of bindings; module.cpp calls them all.
#pragma once

#include <pybind11/pybind11.h>

#include "core/event_queue.hpp"

namespace dualpath {

// (kind, id, ok, text, untouched) tuples: the bytes of a notice need not be UTF-8.
pybind11::list to_tuples(const std::vector<TransportEvent>& events);

void bind_io(pybind11::module_& module);
void bind_copy(pybind11::module_& module);
void bind_memory(pybind11::module_& module);
void bind_policy(pybind11::module_& module);
void bind_raw_puts(pybind11::module_& module);
void bind_sim(pybind11::module_& module);
void bind_tcp(pybind11::module_& module);
void bind_ucx(pybind11::module_& module);

}  // namespace dualpath
