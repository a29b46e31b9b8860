// What breaks, and how turns go on after it.
#include "sim/simulation.hpp"

namespace dualpath::sim {

void Simulation::begin_fault(std::uint32_t index) {
    const Fault& fault = settings_.faults[index];
    if (fault.kind == FaultKind::kNodeDies) return kill_node(fault.node);
    set_storage_rate(fault.node, fault.factor);
    if (fault.until_s < settings_.stop_s)
        calendar_.add(fault.until_s, EventKind::kFaultEnds, index);
}

void Simulation::set_storage_rate(std::uint32_t index, double factor) {
    StorageNode& node = cluster_.node(index);
    if (!node.is_alive()) return;
    node.slow_down(now(), factor);
    schedule_read_end(index);
}

// Turns that the node took part in begin anew on others: what was stored is still there.
void Simulation::kill_node(std::uint32_t index) {
    if (!cluster_.node(index).is_alive()) return;
    cluster_.node(index).die(now());
    dispatcher_.lose_node(index);
    for (std::uint32_t engine = 0; engine < cluster_.num_prefill_engines(); ++engine) {
        if (dispatcher_.node_of(engine) != index) continue;
        const Cluster::Seat seat = cluster_.prefill_seat(engine);
        cluster_.prefill_group(seat.group).drop(seat.engine);
    }
    std::vector<std::uint32_t> repeated;
    for (std::uint32_t i = 0; i < agents_.size(); ++i)
        if (touches(agents_[i], index)) repeated.push_back(i);
    for (const std::uint32_t agent : repeated) {
        // Room that one gives back may have let another find that its hits are gone.
        if (!touches(agents_[agent], index)) continue;
        ++recorder_.counts().repeated_turns;
        repeat_turn(agent);
    }
}

bool Simulation::touches(const Agent& agent, std::uint32_t node) const {
    if (agent.stage == Stage::kAway || agent.stage == Stage::kWaiting ||
        agent.stage == Stage::kDone)
        return false;
    if (dispatcher_.node_of(agent.decision.decode) == node) return true;
    if (agent.prefill_open && dispatcher_.node_of(agent.decision.prefill) == node) return true;
    const auto segments = agent.decision.segments();
    for (std::size_t i = 0; i < segments.size(); ++i)
        if ((agent.unread >> i & 1) != 0 && segments[i].node == node) return true;
    return false;
}

void Simulation::repeat_turn(std::uint32_t index) {
    Agent& agent = agents_[index];
    ++agent.attempt;  // voids its transfers, prompts and sequences before anything is given back
    for (std::size_t i = 0; i < agent.decision.segments().size(); ++i)
        if ((agent.unread >> i & 1) != 0) dispatcher_.end_read(agent.decision, i);
    agent.unread = 0;
    if (agent.stage == Stage::kDecode) {
        const Cluster::Seat seat = cluster_.decode_seat(agent.decision.decode);
        cluster_.decode_group(seat.group).leave(now(), seat.engine, agent.context_s);
        schedule_decode_end(seat.group);
    }
    if (agent.prefill_open) close_prefill(index, false);
    close_decode(agent);
    begin_turn(index);
}

}  // namespace dualpath::sim
