#include "sim/settings.hpp"

#include <algorithm>
#include <functional>
#include <stdexcept>
#include <string>

namespace dualpath::sim {
namespace {

void require(bool condition, const std::string& what) {
    if (!condition) throw std::invalid_argument("simulation: " + what);
}

bool divides(std::uint32_t part, std::uint32_t whole) { return part > 0 && whole % part == 0; }

void check_fault(const Fault& fault, std::uint32_t num_nodes) {
    require(fault.node < num_nodes, "a fault names node " + std::to_string(fault.node) +
                                        ", expected less than " + std::to_string(num_nodes));
    require(fault.at_s >= 0 && fault.until_s > fault.at_s, "a fault must end after it began");
    require(fault.kind == FaultKind::kNodeDies || fault.factor > 0,
            "a slow storage NIC's factor must be above 0; a node that stops is a dead one");
}

}  // namespace

void check(const Settings& settings) {
    const ClusterShape& shape = settings.shape;
    require(shape.num_prefill_nodes > 0 && shape.num_decode_nodes > 0 && shape.engines_per_node > 0,
            "expected at least one prefill node, decode node and engine a node");
    require(divides(shape.prefill_group_nodes, shape.num_prefill_nodes),
            "prefill nodes must be a multiple of a group's");
    require(divides(shape.decode_group_nodes, shape.num_decode_nodes),
            "decode nodes must be a multiple of a group's");
    require(shape.storage_bytes_per_s > 0 && shape.engine_nic_bytes_per_s > 0,
            "rates of NICs must be above 0");
    require(shape.staging_bytes > 0, "staging must be above 0 bytes");
    require(settings.kv_bytes_per_token > 0 && settings.block_tokens > 0,
            "bytes a token and tokens a block must be above 0");
    require(settings.quota_s > 0 && settings.window_s > 0 && settings.report_every_s > 0,
            "quota, window and report interval must be above 0 seconds");
    require(settings.tool_time_s >= 0, "tool time must not be negative");
    require(settings.prefill.token_s >= 0 && settings.prefill.step_s >= 0,
            "prefill costs must not be negative");
    require(settings.decode.step_s > 0, "a decode step must take time");
    for (const Fault& fault : settings.faults) check_fault(fault, shape.num_nodes());
    policy::check(settings.policy);
}

void check(const Workload& workload) {
    const auto& offsets = workload.offsets;
    require(offsets.size() >= 2 && offsets.front() == 0, "expected at least one trajectory");
    // Adjacent and not increasing: a trajectory without turns.
    require(
        std::adjacent_find(offsets.begin(), offsets.end(), std::greater_equal<>()) == offsets.end(),
        "expected at least one turn in every trajectory");
    const auto num_turns = static_cast<std::size_t>(offsets.back());
    require(
        workload.append_tokens.size() == num_turns && workload.generated_tokens.size() == num_turns,
        "expected one append and one answer a turn");
    require(workload.first_tokens.size() == workload.num_agents() &&
                workload.arrival_s.size() == workload.num_agents() && workload.num_agents() > 0,
            "expected a trajectory, a first turn and an arrival for each agent");
    const auto num_trajectories = static_cast<std::int32_t>(offsets.size() - 1);
    for (const std::int32_t trajectory : workload.trajectory)
        require(trajectory >= 0 && trajectory < num_trajectories,
                "an agent names a trajectory that is not there");
}

}  // namespace dualpath::sim
