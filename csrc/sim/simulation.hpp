// The life of every agent's turns on a cluster, event by event. Deterministic: equal arguments,
// equal results. One thread.
#pragma once

#include <cstdint>
#include <vector>

#include "sim/agent.hpp"
#include "sim/calendar.hpp"
#include "sim/cluster.hpp"
#include "sim/dispatcher.hpp"
#include "sim/recorder.hpp"
#include "sim/settings.hpp"

namespace dualpath::sim {

class Simulation {
  public:
    // The workload's arrays must outlive it. Throws std::invalid_argument for what cannot work.
    Simulation(const Settings& settings, const Workload& workload);

    // To the end of all agents, or to the settings' stop. Throws std::runtime_error when agents
    // are left that nothing will ever wake.
    void run();

    const Recorder& recorder() const { return recorder_; }
    const Cluster& cluster() const { return cluster_; }
    double end_s() const { return calendar_.now(); }
    // Whether nothing weighs on any engine, queue or memory any more, as after the last agent.
    bool is_settled() const;

  private:
    // Events, in simulation.cpp.
    void handle(const Event& event);
    void end_storage_read(const Event& event);
    void begin_prefill_step(std::uint32_t group);
    void end_prefill_step(std::uint32_t group);
    void end_cache_load(const Event& event);
    void end_decode_step(const Event& event);
    void report_rates();
    void schedule_read_end(std::uint32_t node);
    void schedule_decode_end(std::uint32_t group);

    // Steps of a turn, in turns.cpp.
    void begin_turn(std::uint32_t agent);
    policy::Request request_of(const Agent& agent) const;
    void place_waiting();
    void start(std::uint32_t agent, const policy::Decision& decision);
    void reserve_prefill(std::uint32_t agent);
    void divide_reads(Agent& agent);
    void read(std::uint32_t agent);
    void prefill(std::uint32_t agent);
    void end_prefill(std::uint32_t agent);
    void load(std::uint32_t agent);
    void decode(std::uint32_t agent);
    void end_turn(std::uint32_t agent);
    void end_agent(std::uint32_t agent);
    void close_prefill(std::uint32_t agent, bool is_done);
    void close_decode(Agent& agent);
    void release_staging(std::int64_t& held, std::uint32_t node);
    void grant_staging(std::uint32_t node);
    void grant_cache(std::uint32_t engine);
    bool is_live(std::uint32_t agent, std::uint32_t attempt) const {
        return agents_[agent].attempt == attempt;
    }

    // Faults, in faults.cpp.
    void begin_fault(std::uint32_t fault);
    void set_storage_rate(std::uint32_t node, double factor);
    void kill_node(std::uint32_t node);
    bool touches(const Agent& agent, std::uint32_t node) const;
    void repeat_turn(std::uint32_t agent);

    double now() const { return calendar_.now(); }
    double bytes(std::int64_t tokens) const {
        return static_cast<double>(tokens * settings_.kv_bytes_per_token);
    }
    std::int64_t hit_tokens(const Agent& agent) const {
        return agent.stored / settings_.block_tokens * settings_.block_tokens;
    }
    std::int64_t prefill_read_tokens(const Agent& agent) const;
    double pause_s(std::uint32_t agent) const;

    Settings settings_;
    Workload workload_;
    Calendar calendar_;
    Cluster cluster_;
    Dispatcher dispatcher_;
    Recorder recorder_;
    std::vector<Agent> agents_;
    std::vector<PrefillGroup::Prompt> done_prompts_;  // scratch
    std::vector<DecodeGroup::Sequence> done_sequences_;
    std::size_t num_open_ = 0;  // agents that did not end
};

}  // namespace dualpath::sim
