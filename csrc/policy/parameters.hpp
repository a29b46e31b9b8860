// The knobs of a policy, and the modes that are sets of them.
#pragma once

#include <cstdint>
#include <limits>
#include <string_view>

#include "policy/cluster_view.hpp"

namespace dualpath::policy {

// How the two engines are chosen.
enum class Placement : std::uint8_t {
    kRoundRobin,    // by Request::turn, no other look at the load
    kFewestTokens,  // fewest tokens on either side
    kPaper,         // section 6: classes by alpha and beta; decode groups, then Z
    kBalanced,      // the paper's, and near-ties go to cached prefixes and short read queues
};

// Who reads the hit.
enum class ReadPath : std::uint8_t {
    kPrefill,       // the prefill node
    kAlternate,     // one of the two, by Request::turn, evenly and in no pattern
    kShorterQueue,  // of the two, the one with fewer tokens to read; prefill on a tie
    kSplit,         // both, so that they end together
    kPool,          // any nodes, filled up like water
};

struct Parameters {
    Placement placement = Placement::kPaper;
    ReadPath read_path = ReadPath::kShorterQueue;
    // A longer read queue is avoided: tokens readable in so many seconds at the nominal rate. Where
    // that is unknown no queue is too long.
    double alpha_s = std::numeric_limits<double>::infinity();
    std::int64_t beta_tokens = kNoLimit;   // a prefill engine with more tokens takes no request
    double z_slack = 1.05;                 // the paper's factor in Z
    std::uint32_t min_segment_blocks = 1;  // of split and pool, where two readers share a hit
    std::uint32_t max_readers = 4;         // of pool; 1 to kMaxReaders
    // split: so much of what a NIC read lately counts as if it were still to be read.
    double evenness = 1.0;
    // And for that a read may end later than one side alone would end it: by so many times the wait
    // that both sides have in common.
    double evenness_wait = 1.0;
    double split_fraction = -1;  // split: the prefill side's share; < 0: by queues
    double near_tie = 0.05;      // balanced: loads this close to the least count as equal
    // Balanced: what a prompt token costs a prefill engine (attention over it, copies) though it is
    // cached, in tokens to compute. What engines of a group share, experts, is no engine's own
    // cost.
    double prompt_token_work = 0.05;
    bool read_past_cache = false;  // do not read blocks that the prefill engine holds itself
    // Balanced, with read_past_cache: what it is worth not to read a token, in tokens to compute.
    double cached_token_work = 0.05;
    bool recompute = false;  // do not read what can be computed earlier than it can be read
    // Seconds that each second of extra computing must save: it is taken from other requests.
    double recompute_price = 1.0;
};

// The parameters of prefill_only, dual, split or pool. Throws std::invalid_argument for others.
Parameters parameters_of(std::string_view mode);

// Throws std::invalid_argument, naming the parameter, for a value out of range.
void check(const Parameters& parameters);

}  // namespace dualpath::policy
