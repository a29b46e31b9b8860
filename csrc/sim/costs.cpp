#include "sim/costs.hpp"

#include <algorithm>

namespace dualpath::sim {
namespace {

// Pairs (new token, earlier token or itself): an arithmetic series.
double num_pairs(double num_cached, double num_new) {
    return num_new * num_cached + num_new * (num_new + 1) / 2;
}

double num_selected_pairs(const PrefillCost& cost, double num_cached, double num_new) {
    const double room = static_cast<double>(cost.selected) - num_cached;
    const double growing = std::clamp(room, 0.0, num_new);  // tokens that see all before them
    return num_pairs(num_cached, growing) +
           (num_new - growing) * static_cast<double>(cost.selected);
}

}  // namespace

double attention_s(const PrefillCost& cost, std::int64_t num_cached, std::int64_t num_new) {
    const auto cached = static_cast<double>(num_cached);
    const auto fresh = static_cast<double>(num_new);
    double seconds = cost.pair_s * num_pairs(cached, fresh);
    if (cost.selected > 0)
        seconds += cost.selected_pair_s * num_selected_pairs(cost, cached, fresh);
    return seconds;
}

std::int64_t fitting_tokens(const PrefillCost& cost, std::int64_t num_cached, std::int64_t num_new,
                            double budget_s) {
    const auto fits = [&](std::int64_t count) {
        return attention_s(cost, num_cached, count) <= budget_s;
    };
    if (fits(num_new)) return num_new;
    std::int64_t low = 0;
    for (std::int64_t high = num_new; high - low > 1;) {
        const std::int64_t middle = low + (high - low) / 2;
        (fits(middle) ? low : high) = middle;
    }
    return low;
}

double context_s(const DecodeCost& cost, std::int64_t context) {
    const double all = cost.token_s * static_cast<double>(context);
    if (cost.selected == 0) return all;
    return all + cost.selected_token_s * static_cast<double>(std::min(context, cost.selected));
}

}  // namespace dualpath::sim
