// The policy core. A decision takes microseconds: the GIL is kept.
#include <pybind11/stl.h>

#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "bindings/bindings.hpp"
#include "policy/policy.hpp"
#include "policy/prefix_cache.hpp"
#include "policy/read_rate.hpp"

namespace py = pybind11;

namespace dualpath {
namespace {

using namespace policy;

template <typename T>
T& at(std::vector<T>& items, std::size_t index, const char* what) {
    if (index < items.size()) return items[index];
    throw py::index_error(std::string(what) + " " + std::to_string(index) + " is not one of " +
                          std::to_string(items.size()));
}

void bind_state(py::module_& module) {
    py::enum_<Role>(module, "Role").value("PREFILL", Role::kPrefill).value("DECODE", Role::kDecode);
    py::class_<NodeState>(module, "NodeState")
        .def(py::init<>())
        .def_readwrite("read_queue_tokens", &NodeState::read_queue_tokens)
        .def_readwrite("push_queue_tokens", &NodeState::push_queue_tokens)
        .def_readwrite("recent_read_tokens", &NodeState::recent_read_tokens)
        .def_readwrite("read_rate", &NodeState::read_rate)
        .def_readwrite("push_rate", &NodeState::push_rate);
    py::class_<EngineState>(module, "EngineState")
        .def(py::init<>())
        .def_readwrite("role", &EngineState::role)
        .def_readwrite("usable", &EngineState::usable)
        .def_readwrite("donates", &EngineState::donates)
        .def_readwrite("node", &EngineState::node)
        .def_readwrite("group", &EngineState::group)
        .def_readwrite("num_requests", &EngineState::num_requests)
        .def_readwrite("num_tokens", &EngineState::num_tokens)
        .def_readwrite("num_compute_tokens", &EngineState::num_compute_tokens)
        .def_readwrite("free_kv_tokens", &EngineState::free_kv_tokens)
        .def_readwrite("free_staging_tokens", &EngineState::free_staging_tokens)
        .def_readwrite("max_request_tokens", &EngineState::max_request_tokens);
}

void add_reads(ClusterView& view, std::uint32_t node, std::int64_t num_tokens) {
    at(view.nodes, node, "node");
    view.add_reads(node, num_tokens);
}

void forget_reads(ClusterView& view, std::uint32_t node, double elapsed_s) {
    at(view.nodes, node, "node");
    view.forget_reads(node, elapsed_s);
}

void add_load(ClusterView& view, std::size_t index, std::int64_t num_requests,
              std::int64_t num_tokens, std::int64_t num_compute_tokens, std::int64_t room_tokens) {
    EngineState& engine = at(view.engines, index, "engine");
    engine.num_requests += num_requests;
    engine.num_tokens += num_tokens;
    engine.num_compute_tokens += num_compute_tokens;
    if (engine.free_kv_tokens != kNoLimit) engine.free_kv_tokens -= room_tokens;
}

PrefillCurve make_curve(double tokens_per_s, double s_per_token_pair) {
    if (!(tokens_per_s > 0) || !(s_per_token_pair >= 0)) {
        throw std::invalid_argument(
            "a prefill curve: expected tokens_per_s > 0 and s_per_token_pair >= 0, found " +
            std::to_string(tokens_per_s) + " and " + std::to_string(s_per_token_pair));
    }
    return {tokens_per_s, s_per_token_pair};
}

void bind_view(py::module_& module) {
    py::class_<PrefillCurve>(module, "PrefillCurve")
        .def(py::init(&make_curve), py::arg("tokens_per_s"), py::arg("s_per_token_pair"))
        .def("seconds", &PrefillCurve::seconds, py::arg("cached_tokens"), py::arg("new_tokens"));
    py::class_<ClusterView>(module, "ClusterView")
        .def(py::init([](std::vector<NodeState> nodes, std::vector<EngineState> engines) {
                 auto view = std::make_unique<ClusterView>();
                 view->nodes = std::move(nodes);
                 view->engines = std::move(engines);
                 check(*view);
                 return view;
             }),
             py::arg("nodes"), py::arg("engines"))
        .def(
            "node",
            [](ClusterView& view, std::size_t index) -> NodeState& {
                return at(view.nodes, index, "node");
            },
            py::arg("index"), py::return_value_policy::reference_internal)
        .def(
            "engine",
            [](ClusterView& view, std::size_t index) -> EngineState& {
                return at(view.engines, index, "engine");
            },
            py::arg("index"), py::return_value_policy::reference_internal)
        .def("add_reads", &add_reads, py::arg("node"), py::arg("num_tokens"))
        .def("forget_reads", &forget_reads, py::arg("node"), py::arg("elapsed_s"))
        .def("add_load", &add_load, py::arg("engine"), py::arg("num_requests"),
             py::arg("num_tokens"), py::arg("num_compute_tokens"), py::arg("room_tokens"))
        .def(
            "set_prefill_curve",
            [](ClusterView& view, double tokens_per_s, double s_per_token_pair) {
                view.prefill = {tokens_per_s, s_per_token_pair};
                check(view);
            },
            py::arg("tokens_per_s"), py::arg("s_per_token_pair"))
        .def("check", [](const ClusterView& view) { check(view); })
        .def_readwrite("nominal_read_rate", &ClusterView::nominal_read_rate);
    py::class_<WaitingLine>(module, "WaitingLine")
        .def(py::init<>())
        .def("push", &WaitingLine::push, py::arg("num_tokens"))
        .def("pop", &WaitingLine::pop)
        .def("cancel", &WaitingLine::cancel, py::arg("ticket"))
        .def("head", &WaitingLine::head)
        .def("tokens_fitting", &WaitingLine::tokens_fitting, py::arg("room"))
        .def_property_readonly("num_tokens", &WaitingLine::num_tokens)
        .def("__len__", &WaitingLine::size);
    py::class_<ReadRate>(module, "ReadRate")
        .def(py::init<>())
        .def("add", &ReadRate::add, py::arg("num_tokens"), py::arg("busy_s"), py::arg("elapsed_s"),
             py::arg("nominal"))
        .def_property_readonly("rate", &ReadRate::rate);
}

void bind_parameters(py::module_& module) {
    py::enum_<Placement>(module, "Placement")
        .value("ROUND_ROBIN", Placement::kRoundRobin)
        .value("FEWEST_TOKENS", Placement::kFewestTokens)
        .value("PAPER", Placement::kPaper)
        .value("BALANCED", Placement::kBalanced);
    py::enum_<ReadPath>(module, "ReadPath")
        .value("PREFILL", ReadPath::kPrefill)
        .value("ALTERNATE", ReadPath::kAlternate)
        .value("SHORTER_QUEUE", ReadPath::kShorterQueue)
        .value("SPLIT", ReadPath::kSplit)
        .value("POOL", ReadPath::kPool);
    py::class_<Parameters>(module, "PolicyParameters")
        .def(py::init(&parameters_of), py::arg("mode"))
        .def_readwrite("placement", &Parameters::placement)
        .def_readwrite("read_path", &Parameters::read_path)
        .def_readwrite("alpha_s", &Parameters::alpha_s)
        .def_readwrite("beta_tokens", &Parameters::beta_tokens)
        .def_readwrite("z_slack", &Parameters::z_slack)
        .def_readwrite("min_segment_blocks", &Parameters::min_segment_blocks)
        .def_readwrite("max_readers", &Parameters::max_readers)
        .def_readwrite("evenness", &Parameters::evenness)
        .def_readwrite("evenness_wait", &Parameters::evenness_wait)
        .def_readwrite("split_fraction", &Parameters::split_fraction)
        .def_readwrite("near_tie", &Parameters::near_tie)
        .def_readwrite("prompt_token_work", &Parameters::prompt_token_work)
        .def_readwrite("read_past_cache", &Parameters::read_past_cache)
        .def_readwrite("cached_token_work", &Parameters::cached_token_work)
        .def_readwrite("recompute", &Parameters::recompute)
        .def_readwrite("recompute_price", &Parameters::recompute_price);
}

void bind_prefix_cache(py::module_& module) {
    using Model = PrefixCacheModel;
    py::class_<Model>(module, "PrefixCacheModel")
        .def(py::init<std::int64_t>(), py::arg("room_tokens"))
        .def_static("room_of", &Model::room_of, py::arg("cache_tokens"))
        .def("holds", &Model::holds, py::arg("earlier"), py::arg("shared_tokens"),
             py::arg("num_tokens"))
        .def("begin", &Model::begin, py::arg("key"), py::arg("num_tokens"),
             py::arg("earlier") = Model::kNothing, py::arg("shared_tokens") = 0)
        .def("arrive", &Model::arrive, py::arg("key"))
        .def("end", &Model::end, py::arg("key"), py::arg("computed"))
        .def("missed", &Model::missed, py::arg("key"))
        .def_property_readonly("open_tokens", &Model::open_tokens);
}

// (engine, first block, last block) of each segment.
py::tuple to_tuples(std::span<const ReadSegment> segments) {
    py::tuple tuples(segments.size());
    for (std::size_t i = 0; i < segments.size(); ++i) {
        tuples[i] =
            py::make_tuple(segments[i].engine, segments[i].first_block, segments[i].last_block);
    }
    return tuples;
}

// The segments of blocks [first_block, last_block) of a request that has its engines.
py::tuple divide(Policy& policy, const ClusterView& view, std::uint32_t prefill,
                 std::uint32_t decode, std::uint32_t first_block, std::uint32_t last_block,
                 std::uint32_t block_tokens) {
    if (prefill >= view.engines.size() || decode >= view.engines.size())
        throw py::index_error("an engine that the view does not have");
    if (first_block > last_block || block_tokens == 0)
        throw std::invalid_argument("blocks to read: expected first <= last and block_tokens > 0");
    Request request;
    request.num_hit_blocks = last_block;
    request.block_tokens = block_tokens;
    Decision decision;
    decision.verdict = Verdict::kPlaced;
    decision.prefill = prefill;
    decision.decode = decode;
    decision.num_cached_blocks = first_block;
    policy.divide(view, request, decision);
    return to_tuples(decision.segments());
}

// (verdict, prefill, decode, cached blocks, recomputed blocks, segments, seconds)
py::tuple decide(Policy& policy, const ClusterView& view, std::int64_t num_tokens,
                 std::uint32_t num_hit_blocks, std::uint32_t block_tokens,
                 std::int64_t reserve_tokens, const WaitingLine* line, bool ignore_load,
                 std::uint64_t turn,
                 const std::vector<std::pair<std::uint32_t, std::uint32_t>>& cached) {
    if (num_tokens < 0 || block_tokens == 0) {
        throw std::invalid_argument("a request: expected num_tokens >= 0 and block_tokens > 0");
    }
    std::vector<CachedPrefix> prefixes;
    for (const auto& [engine, num_blocks] : cached) prefixes.push_back({engine, num_blocks});
    Request request;
    request.num_tokens = num_tokens;
    request.reserve_tokens = reserve_tokens;
    request.num_hit_blocks = num_hit_blocks;
    request.block_tokens = block_tokens;
    request.cached = prefixes;
    request.line = line;
    request.ignore_load = ignore_load;
    request.turn = turn;
    const Decision decision = policy.decide(view, request);
    return py::make_tuple(static_cast<int>(decision.verdict), decision.prefill, decision.decode,
                          decision.num_cached_blocks, decision.num_recompute_blocks,
                          to_tuples(decision.segments()), decision.read_s);
}

}  // namespace

void bind_policy(py::module_& module) {
    bind_state(module);
    bind_view(module);
    bind_parameters(module);
    bind_prefix_cache(module);
    py::class_<Policy>(module, "PolicyCore")
        .def(py::init<const Parameters&>(), py::arg("parameters"))
        .def("decide", &decide, py::arg("view"), py::arg("num_tokens"), py::arg("num_hit_blocks"),
             py::arg("block_tokens"), py::arg("reserve_tokens") = 0,
             py::arg("line").none(true) = nullptr, py::arg("ignore_load") = false,
             py::arg("turn") = 0,
             py::arg("cached") = std::vector<std::pair<std::uint32_t, std::uint32_t>>{})
        .def("divide", &divide, py::arg("view"), py::arg("prefill"), py::arg("decode"),
             py::arg("first_block"), py::arg("last_block"), py::arg("block_tokens"))
        .def_property_readonly("divides_late", &Policy::divides_late);
    module.attr("NO_LIMIT") = kNoLimit;
}

}  // namespace dualpath
