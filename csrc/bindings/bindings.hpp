// One function for each group of bindings; module.cpp calls them all.
#pragma once

#include <pybind11/pybind11.h>

namespace dualpath {

void bind_io(pybind11::module_& module);
void bind_copy(pybind11::module_& module);
void bind_memory(pybind11::module_& module);
void bind_policy(pybind11::module_& module);
void bind_raw_puts(pybind11::module_& module);
void bind_sim(pybind11::module_& module);
void bind_tcp(pybind11::module_& module);
void bind_ucx(pybind11::module_& module);

}  // namespace dualpath
