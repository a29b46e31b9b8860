// Who reads which blocks of a hit, once its two engines are known.
#pragma once

#include <cstdint>
#include <vector>

#include "policy/decision.hpp"
#include "policy/parameters.hpp"
#include "policy/water_fill.hpp"

namespace dualpath::policy {

// Blocks [first, last) of a request's hit.
struct BlockRange {
    std::uint32_t first;
    std::uint32_t last;

    std::uint32_t size() const { return last - first; }
};

// Has scratch memory, no state.
class ReadPlanner {
  public:
    explicit ReadPlanner(const Parameters& parameters) : parameters_(parameters) {}

    // Writes segments and read_s of `decision`, whose engines are chosen.
    void plan(const ClusterView& view, const Request& request, BlockRange blocks,
              Decision& decision);

  private:
    void split(const ClusterView& view, const Request& request, BlockRange blocks,
               Decision& decision) const;
    void pool(const ClusterView& view, const Request& request, BlockRange blocks,
              Decision& decision);
    void find_readers(const ClusterView& view, const Decision& decision);
    // The max_readers that would end an even share first, in readers_.
    void rank_readers(const ClusterView& view, const Request& request, std::uint32_t num_blocks,
                      const Decision& decision);
    // When the blocks could have come in at an engine's node, however soon they are read.
    double arrival_s(const ClusterView& view, const Request& request, BlockRange blocks,
                     std::uint32_t engine) const;

    Parameters parameters_;
    std::vector<std::uint32_t> reader_of_node_;
    std::vector<WaterReader> readers_;
};

}  // namespace dualpath::policy
