// Seconds of prefill and decode work, from the shapes' coefficients. Pure functions.
#pragma once

#include <cstdint>

#include "sim/settings.hpp"

namespace dualpath::sim {

// Attention (and indexer) of `num_new` tokens behind `num_cached` ones.
double attention_s(const PrefillCost& cost, std::int64_t num_cached, std::int64_t num_new);

// The most new tokens whose attention fits `budget_s`; at most `num_new`.
std::int64_t fitting_tokens(const PrefillCost& cost, std::int64_t num_cached, std::int64_t num_new,
                            double budget_s);

// What one request with `context` tokens adds to its engine's decode step.
double context_s(const DecodeCost& cost, std::int64_t context);

}  // namespace dualpath::sim
