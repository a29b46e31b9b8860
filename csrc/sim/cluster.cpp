#include "sim/cluster.hpp"

#include <algorithm>

namespace dualpath::sim {
namespace {

Cluster::Seat seat(std::uint32_t index, std::uint32_t num_nodes, std::uint32_t group_nodes) {
    const std::uint32_t node = index % num_nodes, k = index / num_nodes;
    return {node / group_nodes, k * group_nodes + node % group_nodes};
}

}  // namespace

Cluster::Cluster(const Settings& settings) : shape_(settings.shape) {
    for (std::uint32_t i = 0; i < shape_.num_nodes(); ++i)
        nodes_.emplace_back(shape_.storage_bytes_per_s, shape_.staging_bytes, settings.window_s);
    const std::uint32_t per_node = shape_.engines_per_node;
    for (std::uint32_t i = 0; i < shape_.num_prefill_nodes; i += shape_.prefill_group_nodes)
        prefill_groups_.emplace_back(settings, shape_.prefill_group_nodes * per_node);
    for (std::uint32_t i = 0; i < shape_.num_decode_nodes; i += shape_.decode_group_nodes)
        decode_groups_.emplace_back(settings.decode, shape_.decode_group_nodes * per_node);
    for (std::uint32_t i = 0; i < shape_.num_decode_nodes * per_node; ++i)
        decode_engines_.push_back(
            {FifoServer(shape_.engine_nic_bytes_per_s), MemoryPool(settings.decode.cache_tokens)});
}

bool Cluster::is_cache_free() const {
    return std::all_of(decode_engines_.begin(), decode_engines_.end(),
                       [](const DecodeEngine& engine) { return engine.cache.used() == 0; });
}

Cluster::Seat Cluster::prefill_seat(std::uint32_t engine) const {
    return seat(engine, shape_.num_prefill_nodes, shape_.prefill_group_nodes);
}

Cluster::Seat Cluster::decode_seat(std::uint32_t engine) const {
    return seat(engine - num_prefill_engines(), shape_.num_decode_nodes, shape_.decode_group_nodes);
}

}  // namespace dualpath::sim
