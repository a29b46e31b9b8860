#include "policy/read_path.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <tuple>

namespace dualpath::policy {
namespace {

// A mix of all bits (the finalizer of SplitMix64), so that no rhythm of the load meets another one.
bool coin(std::uint64_t turn) {
    std::uint64_t bits = turn + 0x9E3779B97F4A7C15U;
    bits = (bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9U;
    bits = (bits ^ (bits >> 27)) * 0x94D049BB133111EBU;
    return ((bits ^ (bits >> 31)) & 1) != 0;
}

// The storage NIC of one engine's node, as a queue.
struct Side {
    std::uint32_t engine;
    std::uint32_t node;
    double start_s;
    double level_s;  // what is to be even in the long run: the start, and what was read lately
    double blocks_per_s;

    Side(const ClusterView& view, std::uint32_t engine_index, std::uint32_t block_tokens,
         double evenness = 0)
        : engine(engine_index),
          node(view.engines[engine_index].node),
          start_s(view.read_queue_s(node)),
          level_s(view.read_level_s(node, evenness)),
          blocks_per_s(view.read_rate(node) / block_tokens) {}

    double end_s(std::uint32_t num_blocks) const {
        return num_blocks == 0 ? 0 : start_s + num_blocks / blocks_per_s;
    }
    double end_level_s(std::uint32_t num_blocks) const {
        return num_blocks == 0 ? 0 : level_s + num_blocks / blocks_per_s;
    }
    // The most that it reads until then.
    double blocks_until(double end_s) const { return (end_s - start_s) * blocks_per_s; }
};

void add(Decision& decision, const Side& side, BlockRange blocks) {
    if (blocks.size() == 0) return;
    decision.segment_array[decision.num_segments++] = {side.engine, side.node, blocks.first,
                                                       blocks.last};
    decision.read_s = std::max(decision.read_s, side.end_s(blocks.size()));
}

// The first side's blocks, so that both levels come out even, and yet the later end comes hardly
// later than if one side read all. The more of equals.
std::uint32_t even_share(const Side& first, const Side& second, std::uint32_t num_blocks,
                         const Parameters& parameters) {
    const double latest_s = std::min(first.end_s(num_blocks), second.end_s(num_blocks)) +
                            parameters.evenness_wait * std::min(first.start_s, second.start_s);
    const double exact = (first.blocks_per_s *
                          (num_blocks + (second.level_s - first.level_s) * second.blocks_per_s)) /
                         (first.blocks_per_s + second.blocks_per_s);
    const double most = std::clamp(first.blocks_until(latest_s), 0.0, 1.0 * num_blocks);
    const double least = std::clamp(num_blocks - second.blocks_until(latest_s), 0.0, most);
    const auto below = static_cast<std::uint32_t>(std::floor(std::clamp(exact, least, most)));
    const std::uint32_t least_first = std::min(parameters.min_segment_blocks, num_blocks);
    // Larger shares stand before smaller ones near the exact one: they win ties.
    const std::array candidates{num_blocks,  std::min(below + 1, num_blocks), below,
                                least_first, num_blocks - least_first,        0U};
    std::uint32_t best = num_blocks;
    double best_s = std::numeric_limits<double>::infinity();
    for (const std::uint32_t share : candidates) {
        const std::uint32_t rest = num_blocks - share;
        if ((share > 0 && share < least_first) || (rest > 0 && rest < least_first)) continue;
        if (std::max(first.end_s(share), second.end_s(rest)) > latest_s) continue;
        const double level_s = std::max(first.end_level_s(share), second.end_level_s(rest));
        if (level_s < best_s) {
            best = share;
            best_s = level_s;
        }
    }
    return best;
}

}  // namespace

void ReadPlanner::plan(const ClusterView& view, const Request& request, BlockRange blocks,
                       Decision& decision) {
    decision.num_segments = 0;
    decision.read_s = 0;
    if (blocks.size() == 0) return;
    const Side prefill(view, decision.prefill, request.block_tokens);
    const Side decode(view, decision.decode, request.block_tokens);
    switch (parameters_.read_path) {
        case ReadPath::kPrefill:
            return add(decision, prefill, blocks);
        case ReadPath::kAlternate:
            return add(decision, coin(request.turn) ? prefill : decode, blocks);
        case ReadPath::kShorterQueue: {
            const bool prefill_reads = view.nodes[prefill.node].read_queue_tokens <=
                                       view.nodes[decode.node].read_queue_tokens;
            return add(decision, prefill_reads ? prefill : decode, blocks);
        }
        case ReadPath::kSplit:
            return split(view, request, blocks, decision);
        case ReadPath::kPool:
            return pool(view, request, blocks, decision);
    }
}

void ReadPlanner::split(const ClusterView& view, const Request& request, BlockRange blocks,
                        Decision& decision) const {
    const Side prefill(view, decision.prefill, request.block_tokens, parameters_.evenness);
    const Side decode(view, decision.decode, request.block_tokens, parameters_.evenness);
    std::uint32_t share = blocks.size();
    if (parameters_.split_fraction >= 0) {
        share =
            static_cast<std::uint32_t>(std::nearbyint(parameters_.split_fraction * blocks.size()));
    } else if (prefill.node != decode.node) {
        share = even_share(prefill, decode, blocks.size(), parameters_);
    }
    // The prefill side has the leading blocks: its own computing needs them first.
    add(decision, prefill, {blocks.first, blocks.first + share});
    add(decision, decode, {blocks.first + share, blocks.last});
}

void ReadPlanner::find_readers(const ClusterView& view, const Decision& decision) {
    // A node reads through the chosen engine on it, or the first usable one that reads for others.
    reader_of_node_.assign(view.nodes.size(), kNone);
    reader_of_node_[view.engines[decision.decode].node] = decision.decode;
    reader_of_node_[view.engines[decision.prefill].node] = decision.prefill;
    for (std::uint32_t e = 0; e < view.engines.size(); ++e) {
        const EngineState& engine = view.engines[e];
        std::uint32_t& reader = reader_of_node_[engine.node];
        if (reader == kNone && engine.usable && engine.donates) reader = e;
    }
}

void ReadPlanner::rank_readers(const ClusterView& view, const Request& request,
                               std::uint32_t num_blocks, const Decision& decision) {
    readers_.clear();
    for (std::uint32_t n = 0; n < view.nodes.size(); ++n) {
        const std::uint32_t engine = reader_of_node_[n];
        if (engine == kNone) continue;
        const NodeState& node = view.nodes[n];
        const std::uint32_t rank = engine == decision.prefill  ? 0
                                   : engine == decision.decode ? 1
                                                               : n + 2;
        double start_s = view.read_queue_s(n);
        double rate = view.read_rate(n);
        if (node.push_rate > 0) {
            // A donor pushes every block to both sides, a side only to the other one.
            rate = std::min(rate, node.push_rate / (rank < 2 ? 1 : 2));
            start_s =
                std::max(start_s, static_cast<double>(node.push_queue_tokens) / node.push_rate);
        }
        readers_.push_back({engine, n, start_s, rate / request.block_tokens, rank});
    }
    const double even_blocks =
        static_cast<double>(num_blocks) / static_cast<double>(parameters_.max_readers);
    const auto end_of = [&](const WaterReader& reader) {
        return std::tuple(reader.start_s + even_blocks / reader.blocks_per_s, reader.rank);
    };
    const std::size_t num_kept = std::min<std::size_t>(parameters_.max_readers, readers_.size());
    const auto kept = readers_.begin() + static_cast<std::ptrdiff_t>(num_kept);
    std::ranges::partial_sort(readers_, kept, {}, end_of);
    readers_.erase(kept, readers_.end());
}

void ReadPlanner::pool(const ClusterView& view, const Request& request, BlockRange blocks,
                       Decision& decision) {
    find_readers(view, decision);
    rank_readers(view, request, blocks.size(), decision);
    const double floor_s = std::max(arrival_s(view, request, blocks, decision.prefill),
                                    arrival_s(view, request, blocks, decision.decode));
    water_fill(readers_, blocks.size(), parameters_.min_segment_blocks, floor_s);
    std::ranges::sort(readers_, {}, &WaterReader::rank);
    std::uint32_t next = blocks.first;
    for (const WaterReader& reader : readers_) {
        if (reader.num_blocks == 0) continue;
        decision.segment_array[decision.num_segments++] = {reader.engine, reader.node, next,
                                                           next + reader.num_blocks};
        decision.read_s = std::max(decision.read_s, reader.end_s());
        next += reader.num_blocks;
    }
}

double ReadPlanner::arrival_s(const ClusterView& view, const Request& request, BlockRange blocks,
                              std::uint32_t engine) const {
    const NodeState& node = view.nodes[view.engines[engine].node];
    if (node.push_rate <= 0) return 0;
    const double tokens = static_cast<double>(blocks.size()) * request.block_tokens;
    return (static_cast<double>(node.push_queue_tokens) + tokens) / node.push_rate;
}

}  // namespace dualpath::policy
