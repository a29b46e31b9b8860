// What a simulation is given: the cluster, the model's costs, faults, and the agents. Plain data.
#pragma once

#include <cstdint>
#include <limits>
#include <span>
#include <vector>

#include "policy/parameters.hpp"

namespace dualpath::sim {

// Seconds of one prefill engine. The parts are sums over layers.
struct PrefillCost {
    double step_s = 0;           // a forward pass of whatever size: launches, collectives
    double token_s = 0;          // each new token: projections, feed-forward
    double pair_s = 0;           // each (new token, earlier token) that attention or indexer see
    double selected_pair_s = 0;  // the same over at most `selected` earlier tokens
    std::int64_t selected = 0;   // sparse attention's top-k; 0: attention is dense
    std::int64_t cache_tokens = std::numeric_limits<std::int64_t>::max();  // KV room in HBM
};

// Seconds of a decode step, in which every request of a group gets one token.
struct DecodeCost {
    double step_s = 0;            // of whatever size: weights, launches, collectives
    double request_s = 0;         // each request of a mean engine
    double token_s = 0;           // each token of context on the fullest engine
    double selected_token_s = 0;  // the same for at most `selected` tokens of each request
    std::int64_t selected = 0;
    std::int64_t cache_tokens = std::numeric_limits<std::int64_t>::max();  // KV room of an engine
};

struct ClusterShape {
    std::uint32_t num_prefill_nodes = 1;
    std::uint32_t num_decode_nodes = 1;
    std::uint32_t engines_per_node = 1;
    // Engines of one role that step together, in nodes: expert parallelism spans them.
    std::uint32_t prefill_group_nodes = 1;
    std::uint32_t decode_group_nodes = 1;
    double storage_bytes_per_s = 1;     // a node's storage NIC, each direction
    double engine_nic_bytes_per_s = 1;  // an engine's compute NICs, each direction
    std::int64_t staging_bytes = std::numeric_limits<std::int64_t>::max();  // a node's

    std::uint32_t num_nodes() const { return num_prefill_nodes + num_decode_nodes; }
    std::uint32_t num_engines() const { return num_nodes() * engines_per_node; }
};

struct Switches {
    bool oracle = false;              // nothing is read, copied or sent
    bool layerwise = true;            // copies overlap compute, layer by layer
    bool prefill_stages_all = false;  // our design: prefill slots for the whole prompt, any reader
    bool persist = true;
};

enum class FaultKind : std::uint8_t { kNodeDies, kStorageSlows };

struct Fault {
    FaultKind kind;
    std::uint32_t node;
    double at_s;
    double factor = 0;  // of the storage NIC's rate
    double until_s = std::numeric_limits<double>::infinity();
};

struct Settings {
    ClusterShape shape;
    PrefillCost prefill;
    DecodeCost decode;
    Switches switches;
    policy::Parameters policy;
    policy::PrefillCurve curve;  // what the policy believes of prefill engines
    std::int64_t kv_bytes_per_token = 1;
    std::uint32_t block_tokens = 64;
    double quota_s = 0.3;       // of attention in one engine's prefill step
    double tool_time_s = 0;     // mean between an answer and the next turn, exponential
    double window_s = 1;        // of the storage NICs' time line
    double report_every_s = 1;  // engines report measured read rates
    double stop_s = std::numeric_limits<double>::infinity();  // what runs then is cut off
    double measure_from_s = 0;                                // turns that begin earlier or
    double measure_until_s = std::numeric_limits<double>::infinity();  // later are not measured
    std::uint64_t seed = 0;
    std::vector<Fault> faults;
};

// Trajectories and agents, shared and not owned: see vllm_dualpath/workload.
struct Workload {
    std::span<const std::int64_t> offsets;
    std::span<const std::int32_t> append_tokens;
    std::span<const std::int32_t> generated_tokens;
    std::span<const std::int32_t> trajectory;
    std::span<const std::int32_t> first_tokens;
    std::span<const double> arrival_s;

    std::size_t num_agents() const { return trajectory.size(); }
};

// Throws std::invalid_argument, naming what is wrong.
void check(const Settings& settings);
void check(const Workload& workload);

}  // namespace dualpath::sim
