// Where a hit shall end: what arrives later than it can be computed is not read.
#pragma once

#include "policy/decision.hpp"
#include "policy/parameters.hpp"
#include "policy/read_path.hpp"

namespace dualpath::policy {

// Plans `decision`'s reads from `first_block` on, of all the hit or of the part of it that lets the
// prefill end soonest. A second of extra computing has to save `recompute_price` seconds more.
void plan_load_or_recompute(ReadPlanner& planner, const Parameters& parameters,
                            const ClusterView& view, const Request& request,
                            std::uint32_t first_block, Decision& decision);

}  // namespace dualpath::policy
