// One agent and its turn under way: an agent has at most one, so no request is stored elsewhere.
#pragma once

#include <cstdint>

#include "policy/decision.hpp"

namespace dualpath::sim {

enum class Stage : std::uint8_t {
    kAway,            // between turns, before the first or after the last
    kWaiting,         // for the policy
    kDecodeStaging,   // for staging memory of the decode node
    kPrefillStaging,  // and then of the prefill node
    kReading,
    kPrefill,
    kCacheRoom,  // for KV cache of the decode engine
    kLoading,    // into it
    kDecode,
    kDone,
};

// The last prompt that an agent's prefill engine has computed.
struct EarlierPrompt {
    std::uint64_t stay = 0;  // there
    policy::CachedPrefix cached{policy::kNone, 0};
};

struct Agent {
    std::uint32_t trajectory = 0;
    std::int32_t turn = 0;      // of the trajectory; -1: the random first one
    std::uint32_t attempt = 0;  // grows with every turn and repetition: what is older is void
    Stage stage = Stage::kAway;
    bool prefill_open = false;  // weighs on the view's prefill engine still
    std::uint16_t unread = 0;   // bit i: segment i of the decision is not read yet

    std::int64_t context = 0;  // tokens of all earlier turns
    std::int64_t stored = 0;   // of those, in the store
    std::int64_t prompt = 0;
    std::int64_t generated = 0;
    std::int64_t prefill_staging = 0;  // bytes held
    std::int64_t decode_staging = 0;
    std::uint64_t stay = 0;  // of this turn's prompt in its prefill engine: a number of its own
    EarlierPrompt earlier;
    double context_s = 0;  // what it adds to its decode group's step

    double ready_s = 0;
    double placed_s = 0;
    double staged_s = 0;
    double first_token_s = 0;
    double second_token_s = 0;
    policy::Decision decision;

    std::int64_t room() const { return prompt + generated; }
};

}  // namespace dualpath::sim
