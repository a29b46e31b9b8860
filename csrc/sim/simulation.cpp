#include "sim/simulation.hpp"

#include <stdexcept>
#include <string>

namespace dualpath::sim {
namespace {

const Settings& checked(const Settings& settings) {
    check(settings);
    return settings;
}

const Workload& checked(const Workload& workload) {
    check(workload);
    return workload;
}

}  // namespace

Simulation::Simulation(const Settings& settings, const Workload& workload)
    : settings_(checked(settings)),
      workload_(checked(workload)),
      cluster_(settings),
      dispatcher_(settings),
      recorder_(settings, workload.num_agents()),
      agents_(workload.num_agents()),
      num_open_(workload.num_agents()) {
    for (std::uint32_t i = 0; i < agents_.size(); ++i) {
        agents_[i].trajectory = static_cast<std::uint32_t>(workload_.trajectory[i]);
        agents_[i].turn = workload_.first_tokens[i] > 0 ? -1 : 0;
        calendar_.add(workload_.arrival_s[i], EventKind::kAgentArrives, i);
    }
    for (std::uint32_t i = 0; i < settings_.faults.size(); ++i)
        calendar_.add(settings_.faults[i].at_s, EventKind::kFault, i);
    if (!settings_.switches.oracle) calendar_.add(settings_.report_every_s, EventKind::kReport, 0);
}

void Simulation::run() {
    Counts& counts = recorder_.counts();
    while (num_open_ > 0 && !calendar_.empty()) {
        const Event event = calendar_.next();
        if (event.at_s > settings_.stop_s) break;
        ++counts.events;
        handle(event);
        place_waiting();
    }
    counts.decisions = dispatcher_.num_decisions();
    for (StorageNode& node : cluster_.nodes()) node.settle(now());
    if (num_open_ > 0 && now() < settings_.stop_s)
        throw std::runtime_error("simulation: " + std::to_string(num_open_) +
                                 " agents are left and nothing will wake them at " +
                                 std::to_string(now()) + " s: no usable engine is left for them");
}

bool Simulation::is_settled() const {
    const policy::ClusterView& view = dispatcher_.view();
    for (const policy::EngineState& engine : view.engines)
        if (engine.num_requests != 0 || engine.num_tokens != 0 || engine.num_compute_tokens != 0 ||
            (engine.role == policy::Role::kDecode &&
             engine.free_kv_tokens != settings_.decode.cache_tokens))
            return false;
    for (const policy::NodeState& node : view.nodes)
        if (node.read_queue_tokens != 0 || node.push_queue_tokens != 0) return false;
    for (const StorageNode& node : cluster_.nodes())
        if (node.staging().used() != 0) return false;
    return cluster_.is_cache_free() && dispatcher_.is_cache_settled();
}

void Simulation::handle(const Event& event) {
    switch (event.kind) {
        case EventKind::kAgentArrives:
        case EventKind::kTurnBegins:
            return begin_turn(event.index);
        case EventKind::kStorageRead:
            return end_storage_read(event);
        case EventKind::kPrefillStep:
            return end_prefill_step(event.index);
        case EventKind::kCacheLoaded:
            return end_cache_load(event);
        case EventKind::kDecodeStep:
            return end_decode_step(event);
        case EventKind::kReport:
            return report_rates();
        case EventKind::kFault:
            return begin_fault(event.index);
        case EventKind::kFaultEnds:
            return set_storage_rate(settings_.faults[event.index].node, 1.0);
    }
}

void Simulation::schedule_read_end(std::uint32_t node) {
    FifoServer& reads = cluster_.node(node).reads();
    if (const auto end = reads.end_s())
        calendar_.add(*end, EventKind::kStorageRead, node, reads.version());
}

void Simulation::end_storage_read(const Event& event) {
    StorageNode& node = cluster_.node(event.index);
    if (event.version != node.reads().version()) return;
    const FifoServer::Transfer transfer = node.end_read(now());
    schedule_read_end(event.index);
    if (!is_live(transfer.agent, transfer.attempt)) return;
    Agent& agent = agents_[transfer.agent];
    dispatcher_.end_read(agent.decision, transfer.part);
    agent.unread &= static_cast<std::uint16_t>(~(1U << transfer.part));
    if (agent.unread == 0) prefill(transfer.agent);
}

void Simulation::begin_prefill_step(std::uint32_t group) {
    const PrefillGroup::Step step = cluster_.prefill_group(group).begin_step();
    recorder_.begin_step(step);
    calendar_.add(now() + step.duration_s, EventKind::kPrefillStep, group);
}

void Simulation::end_prefill_step(std::uint32_t index) {
    PrefillGroup& group = cluster_.prefill_group(index);
    done_prompts_.clear();
    group.end_step(done_prompts_);
    if (group.has_work()) begin_prefill_step(index);
    for (const PrefillGroup::Prompt& prompt : done_prompts_)
        if (is_live(prompt.agent, prompt.attempt)) end_prefill(prompt.agent);
}

void Simulation::end_cache_load(const Event& event) {
    FifoServer& loads = cluster_.decode_engine(event.index).loads;
    if (event.version != loads.version()) return;
    const FifoServer::Transfer transfer = loads.pop(now());
    if (const auto end = loads.end_s())
        calendar_.add(*end, EventKind::kCacheLoaded, event.index, loads.version());
    if (is_live(transfer.agent, transfer.attempt)) decode(transfer.agent);
}

void Simulation::schedule_decode_end(std::uint32_t index) {
    const DecodeGroup& group = cluster_.decode_group(index);
    if (const auto end = group.end_s())
        calendar_.add(*end, EventKind::kDecodeStep, index, group.version());
}

void Simulation::end_decode_step(const Event& event) {
    DecodeGroup& group = cluster_.decode_group(event.index);
    if (event.version != group.version()) return;
    done_sequences_.clear();
    group.finish(now(), done_sequences_, [this](const DecodeGroup::Sequence& sequence) {
        return is_live(sequence.agent, sequence.attempt);
    });
    schedule_decode_end(event.index);
    for (const DecodeGroup::Sequence& sequence : done_sequences_) end_turn(sequence.agent);
}

void Simulation::report_rates() {
    const auto bytes_per_token = static_cast<double>(settings_.kv_bytes_per_token);
    for (std::uint32_t i = 0; i < cluster_.nodes().size(); ++i) {
        StorageNode& node = cluster_.node(i);
        if (!node.is_alive()) continue;
        dispatcher_.forget_reads(i, settings_.report_every_s);
        dispatcher_.set_read_rate(
            i, node.measured_rate(now(), settings_.report_every_s, bytes_per_token));
    }
    // Alone on the calendar it would go on for ever although nothing can happen any more.
    if (!calendar_.empty()) calendar_.add(now() + settings_.report_every_s, EventKind::kReport, 0);
}

}  // namespace dualpath::sim
