#include "copy/page_rows.hpp"

#include <stdexcept>
#include <utility>

namespace dualpath {

PageRows::PageRows(std::shared_ptr<const PageMap> map, std::vector<PageRow> rows)
    : map_(std::move(map)), rows_(std::move(rows)) {
    if (map_ == nullptr) throw std::invalid_argument("rows need a map");
    map_->check(rows_);
}

}  // namespace dualpath
