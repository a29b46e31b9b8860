// The pages that one step, or one load, moves: the same for each layer.
#pragma once

#include <memory>
#include <vector>

#include "copy/page_map.hpp"

namespace dualpath {

// Immutable, shared by all copies of a step.
class PageRows {
  public:
    // Throws std::invalid_argument for a row outside the map.
    PageRows(std::shared_ptr<const PageMap> map, std::vector<PageRow> rows);

    const PageMap& map() const { return *map_; }
    const std::vector<PageRow>& rows() const { return rows_; }

  private:
    std::shared_ptr<const PageMap> map_;
    std::vector<PageRow> rows_;
};

}  // namespace dualpath
