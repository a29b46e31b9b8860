// The machines of a simulation: nodes, the engines on them, and the groups that step together.
#pragma once

#include <cstdint>
#include <vector>

#include "sim/decode_group.hpp"
#include "sim/fifo_server.hpp"
#include "sim/memory_pool.hpp"
#include "sim/prefill_group.hpp"
#include "sim/settings.hpp"
#include "sim/storage_node.hpp"

namespace dualpath::sim {

struct DecodeEngine {
    FifoServer loads;  // staging to KV cache, over its compute NICs
    MemoryPool cache;  // tokens
};

// Engine numbers as in the policy's view: prefill engines first, then decode engines; in each the
// neighbours are on different nodes.
class Cluster {
  public:
    // Where an engine is: which group, and which of its engines.
    struct Seat {
        std::uint32_t group;
        std::uint32_t engine;
    };

    explicit Cluster(const Settings& settings);

    std::vector<StorageNode>& nodes() { return nodes_; }
    const std::vector<StorageNode>& nodes() const { return nodes_; }
    std::vector<PrefillGroup>& prefill_groups() { return prefill_groups_; }
    std::vector<DecodeGroup>& decode_groups() { return decode_groups_; }
    StorageNode& node(std::uint32_t node) { return nodes_[node]; }
    PrefillGroup& prefill_group(std::uint32_t group) { return prefill_groups_[group]; }
    DecodeGroup& decode_group(std::uint32_t group) { return decode_groups_[group]; }

    std::uint32_t num_prefill_engines() const {
        return shape_.num_prefill_nodes * shape_.engines_per_node;
    }
    Seat prefill_seat(std::uint32_t engine) const;
    Seat decode_seat(std::uint32_t engine) const;
    DecodeEngine& decode_engine(std::uint32_t engine) {
        return decode_engines_[engine - num_prefill_engines()];
    }
    // Whether no decode engine's KV cache is taken.
    bool is_cache_free() const;

  private:
    ClusterShape shape_;
    std::vector<StorageNode> nodes_;
    std::vector<PrefillGroup> prefill_groups_;
    std::vector<DecodeGroup> decode_groups_;
    std::vector<DecodeEngine> decode_engines_;
};

}  // namespace dualpath::sim
