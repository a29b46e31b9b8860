#include "policy/parameters.hpp"

#include <cmath>
#include <stdexcept>
#include <string>

#include "policy/decision.hpp"

namespace dualpath::policy {
namespace {

void require(bool good, const char* name, const char* expected, double found) {
    if (good) return;
    throw std::invalid_argument(std::string(name) + ": expected " + expected + ", found " +
                                std::to_string(found));
}

}  // namespace

Parameters parameters_of(std::string_view mode) {
    Parameters parameters;
    if (mode == "prefill_only") {
        parameters.placement = Placement::kFewestTokens;
        parameters.read_path = ReadPath::kPrefill;
    } else if (mode == "dual") {
        parameters.placement = Placement::kPaper;
        parameters.read_path = ReadPath::kShorterQueue;
    } else if (mode == "split" || mode == "pool") {
        parameters.placement = Placement::kBalanced;
        parameters.read_path = mode == "split" ? ReadPath::kSplit : ReadPath::kPool;
    } else {
        throw std::invalid_argument("mode: expected prefill_only, dual, split or pool, found '" +
                                    std::string(mode) + "'");
    }
    return parameters;
}

void check(const Parameters& parameters) {
    require(parameters.alpha_s >= 0, "alpha_s", "0 or more", parameters.alpha_s);
    require(parameters.beta_tokens >= 0, "beta_tokens", "0 or more",
            static_cast<double>(parameters.beta_tokens));
    require(std::isfinite(parameters.z_slack) && parameters.z_slack >= 1, "z_slack", "1 or more",
            parameters.z_slack);
    require(parameters.min_segment_blocks >= 1, "min_segment_blocks", "1 or more",
            parameters.min_segment_blocks);
    require(parameters.max_readers >= 1 && parameters.max_readers <= kMaxReaders, "max_readers",
            "1 to 16", parameters.max_readers);
    require(parameters.split_fraction <= 1, "split_fraction", "0 to 1, or a negative number",
            parameters.split_fraction);
    require(std::isfinite(parameters.evenness) && parameters.evenness >= 0, "evenness", "0 or more",
            parameters.evenness);
    require(std::isfinite(parameters.evenness_wait) && parameters.evenness_wait >= 0,
            "evenness_wait", "0 or more", parameters.evenness_wait);
    require(parameters.near_tie >= 0 && parameters.near_tie <= 1, "near_tie", "0 to 1",
            parameters.near_tie);
    require(parameters.prompt_token_work >= 0 && parameters.prompt_token_work <= 1,
            "prompt_token_work", "0 to 1", parameters.prompt_token_work);
    require(parameters.cached_token_work >= 0 && parameters.cached_token_work <= 1,
            "cached_token_work", "0 to 1", parameters.cached_token_work);
    require(std::isfinite(parameters.recompute_price) && parameters.recompute_price >= 0,
            "recompute_price", "0 or more", parameters.recompute_price);
}

}  // namespace dualpath::policy
