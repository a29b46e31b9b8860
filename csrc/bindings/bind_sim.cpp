#include <pybind11/numpy.h>

#include <span>
#include <stdexcept>
#include <string>

#include "bindings/bindings.hpp"
#include "sim/costs.hpp"
#include "sim/simulation.hpp"

namespace py = pybind11;

namespace dualpath {
namespace {

template <class T>
using Array = py::array_t<T, py::array::c_style | py::array::forcecast>;

template <class T>
std::span<const T> span_of(const Array<T>& array) {
    if (array.ndim() != 1) throw std::invalid_argument("simulation: expected flat arrays");
    return {array.data(), static_cast<std::size_t>(array.size())};
}

template <class T>
py::array_t<T> to_array(const std::vector<T>& values) {
    return py::array_t<T>(static_cast<py::ssize_t>(values.size()), values.data());
}

void add_fault(sim::Settings& settings, const std::string& kind, std::uint32_t node, double at_s,
               double factor, double until_s) {
    if (kind != "node_dies" && kind != "storage_slows")
        throw std::invalid_argument("fault: expected node_dies or storage_slows, found '" + kind +
                                    "'");
    const auto what =
        kind == "node_dies" ? sim::FaultKind::kNodeDies : sim::FaultKind::kStorageSlows;
    settings.faults.push_back({what, node, at_s, factor, until_s});
}

py::dict counts_of(const sim::Counts& counts) {
    py::dict result;
    result["turns"] = counts.turns;
    result["repeated_turns"] = counts.repeated_turns;
    result["evicted_turns"] = counts.evicted_turns;
    result["impossible_turns"] = counts.impossible_turns;
    result["finished_agents"] = counts.finished_agents;
    result["read_tokens"] = counts.read_tokens;
    result["recomputed_tokens"] = counts.recomputed_tokens;
    result["cached_tokens"] = counts.cached_tokens;
    result["computed_tokens"] = counts.computed_tokens;
    result["generated_tokens"] = counts.generated_tokens;
    result["persisted_tokens"] = counts.persisted_tokens;
    result["prefill_steps"] = counts.prefill_steps;
    result["events"] = counts.events;
    result["decisions"] = counts.decisions;
    return result;
}

py::list nodes_of(const sim::Cluster& cluster) {
    py::list result;
    for (const sim::StorageNode& node : cluster.nodes()) {
        py::dict entry;
        entry["read_bytes"] = node.read_bytes();
        entry["written_bytes"] = node.written_bytes();
        entry["busy_s"] = node.busy_s();
        entry["peak_staging_bytes"] = node.peak_staging_bytes();
        entry["window_bytes"] = to_array(node.window_bytes());
        result.append(entry);
    }
    return result;
}

py::dict results_of(const sim::Simulation& simulation) {
    const sim::Recorder& recorder = simulation.recorder();
    py::dict result;
    result["end_s"] = simulation.end_s();
    result["last_token_s"] = recorder.last_end_s();
    result["counts"] = counts_of(recorder.counts());
    result["nodes"] = nodes_of(simulation.cluster());
    result["agent_s"] = to_array(recorder.agent_s());
    result["first_token_s"] = to_array(recorder.times().first_token);
    result["second_token_s"] = to_array(recorder.times().second_token);
    result["per_token_s"] = to_array(recorder.times().per_token);
    result["staged_s"] = to_array(recorder.times().staged);
    result["waiting_s"] = to_array(recorder.times().waiting);
    result["attention_slowest_s"] = recorder.attention().slowest_s;
    result["attention_mean_s"] = recorder.attention().mean_s;
    return result;
}

py::dict simulate(const sim::Settings& settings, const Array<std::int64_t>& offsets,
                  const Array<std::int32_t>& append_tokens,
                  const Array<std::int32_t>& generated_tokens,
                  const Array<std::int32_t>& trajectory, const Array<std::int32_t>& first_tokens,
                  const Array<double>& arrival_s) {
    const sim::Workload workload{span_of(offsets),          span_of(append_tokens),
                                 span_of(generated_tokens), span_of(trajectory),
                                 span_of(first_tokens),     span_of(arrival_s)};
    sim::Simulation simulation(settings, workload);
    {
        py::gil_scoped_release release;
        simulation.run();
    }
    return results_of(simulation);
}

void bind_costs(py::module_& module) {
    py::class_<sim::PrefillCost>(module, "SimPrefillCost")
        .def_readwrite("step_s", &sim::PrefillCost::step_s)
        .def_readwrite("token_s", &sim::PrefillCost::token_s)
        .def_readwrite("pair_s", &sim::PrefillCost::pair_s)
        .def_readwrite("selected_pair_s", &sim::PrefillCost::selected_pair_s)
        .def_readwrite("selected", &sim::PrefillCost::selected)
        .def_readwrite("cache_tokens", &sim::PrefillCost::cache_tokens)
        .def("attention_s",
             [](const sim::PrefillCost& cost, std::int64_t num_cached, std::int64_t num_new) {
                 return sim::attention_s(cost, num_cached, num_new);
             });
    py::class_<sim::DecodeCost>(module, "SimDecodeCost")
        .def_readwrite("step_s", &sim::DecodeCost::step_s)
        .def_readwrite("request_s", &sim::DecodeCost::request_s)
        .def_readwrite("token_s", &sim::DecodeCost::token_s)
        .def_readwrite("selected_token_s", &sim::DecodeCost::selected_token_s)
        .def_readwrite("selected", &sim::DecodeCost::selected)
        .def_readwrite("cache_tokens", &sim::DecodeCost::cache_tokens)
        .def("context_s", [](const sim::DecodeCost& cost, std::int64_t context) {
            return sim::context_s(cost, context);
        });
}

void bind_shape(py::module_& module) {
    py::class_<sim::ClusterShape>(module, "SimShape")
        .def_readwrite("num_prefill_nodes", &sim::ClusterShape::num_prefill_nodes)
        .def_readwrite("num_decode_nodes", &sim::ClusterShape::num_decode_nodes)
        .def_readwrite("engines_per_node", &sim::ClusterShape::engines_per_node)
        .def_readwrite("prefill_group_nodes", &sim::ClusterShape::prefill_group_nodes)
        .def_readwrite("decode_group_nodes", &sim::ClusterShape::decode_group_nodes)
        .def_readwrite("storage_bytes_per_s", &sim::ClusterShape::storage_bytes_per_s)
        .def_readwrite("engine_nic_bytes_per_s", &sim::ClusterShape::engine_nic_bytes_per_s)
        .def_readwrite("staging_bytes", &sim::ClusterShape::staging_bytes);
    py::class_<sim::Switches>(module, "SimSwitches")
        .def_readwrite("oracle", &sim::Switches::oracle)
        .def_readwrite("layerwise", &sim::Switches::layerwise)
        .def_readwrite("prefill_stages_all", &sim::Switches::prefill_stages_all)
        .def_readwrite("persist", &sim::Switches::persist);
}

}  // namespace

void bind_sim(py::module_& module) {
    bind_costs(module);
    bind_shape(module);
    py::class_<sim::Settings>(module, "SimSettings")
        .def(py::init<>())
        .def_readonly("shape", &sim::Settings::shape)
        .def_readonly("prefill", &sim::Settings::prefill)
        .def_readonly("decode", &sim::Settings::decode)
        .def_readonly("switches", &sim::Settings::switches)
        .def_readwrite("kv_bytes_per_token", &sim::Settings::kv_bytes_per_token)
        .def_readwrite("block_tokens", &sim::Settings::block_tokens)
        .def_readwrite("quota_s", &sim::Settings::quota_s)
        .def_readwrite("tool_time_s", &sim::Settings::tool_time_s)
        .def_readwrite("window_s", &sim::Settings::window_s)
        .def_readwrite("report_every_s", &sim::Settings::report_every_s)
        .def_readwrite("stop_s", &sim::Settings::stop_s)
        .def_readwrite("measure_from_s", &sim::Settings::measure_from_s)
        .def_readwrite("measure_until_s", &sim::Settings::measure_until_s)
        .def_readwrite("seed", &sim::Settings::seed)
        .def_readwrite("policy", &sim::Settings::policy)
        .def("set_curve",
             [](sim::Settings& settings, double tokens_per_s, double s_per_token_pair) {
                 settings.curve = {tokens_per_s, s_per_token_pair};
             })
        .def("add_fault", &add_fault, py::arg("kind"), py::arg("node"), py::arg("at_s"),
             py::arg("factor"), py::arg("until_s"));
    module.def("simulate", &simulate);
}

}  // namespace dualpath
