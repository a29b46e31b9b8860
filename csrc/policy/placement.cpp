#include "policy/placement.hpp"

#include <algorithm>
#include <tuple>
#include <utility>

namespace dualpath::policy {
namespace {

bool could_take(const EngineState& engine, Role role, const Request& request) {
    const std::int64_t needed = role == Role::kDecode ? request.room_tokens() : request.num_tokens;
    return engine.usable && engine.role == role && engine.max_request_tokens >= needed;
}

bool has_room(const EngineState& engine, const Request& request) {
    if (request.ignore_load) return true;
    const bool kv = engine.role == Role::kPrefill || engine.free_kv_tokens >= request.room_tokens();
    return kv && engine.free_staging_tokens >= request.num_tokens;
}

std::int64_t add_saturated(std::int64_t left, std::int64_t right) {
    return left > kNoLimit - right ? kNoLimit : left + right;
}

// The index of the least key among engines that are `able`; among equal keys the first stays.
template <typename Able, typename KeyOf>
std::uint32_t least(const ClusterView& view, const Able& able, const KeyOf& key_of) {
    std::uint32_t best = kNone;
    decltype(key_of(std::uint32_t{})) best_key{};
    const auto num_engines = static_cast<std::uint32_t>(view.engines.size());
    for (std::uint32_t e = 0; e < num_engines; ++e) {
        if (!able(view.engines[e])) continue;
        const auto key = key_of(e);
        if (best != kNone && !(key < best_key)) continue;
        best = e;
        best_key = key;
    }
    return best;
}

// Most cached blocks first, as a key of `least`.
std::int64_t not_cached(const Request& request, std::uint32_t engine) {
    return -static_cast<std::int64_t>(request.cached_blocks(engine));
}

std::uint32_t by_turn(const ClusterView& view, const Request& request, Role role) {
    std::uint64_t num_able = 0;
    for (const EngineState& engine : view.engines) num_able += could_take(engine, role, request);
    if (num_able == 0) return kNone;
    std::uint64_t left = request.turn % num_able;
    for (std::uint32_t e = 0; e < view.engines.size(); ++e) {
        if (could_take(view.engines[e], role, request) && left-- == 0) return e;
    }
    return kNone;
}

std::uint32_t fewest_tokens(const ClusterView& view, const Request& request, Role role) {
    return least(
        view,
        [&](const EngineState& engine) {
            return could_take(engine, role, request) && has_room(engine, request);
        },
        [&](std::uint32_t e) { return view.engines[e].num_tokens; });
}

bool any_could_take(const ClusterView& view, const Request& request, Role role) {
    return std::any_of(view.engines.begin(), view.engines.end(), [&](const EngineState& engine) {
        return could_take(engine, role, request);
    });
}

}  // namespace

Pair Placer::choose(const ClusterView& view, const Request& request) {
    Pair pair{Verdict::kPlaced};
    switch (parameters_.placement) {
        case Placement::kRoundRobin:
            pair.prefill = by_turn(view, request, Role::kPrefill);
            pair.decode = by_turn(view, request, Role::kDecode);
            break;
        case Placement::kFewestTokens:
            pair.prefill = fewest_tokens(view, request, Role::kPrefill);
            pair.decode = fewest_tokens(view, request, Role::kDecode);
            break;
        case Placement::kPaper:
        case Placement::kBalanced:
            pair.prefill = choose_prefill(view, request);
            pair.decode = choose_decode(view, request);
            break;
    }
    if (pair.prefill != kNone && pair.decode != kNone) return pair;
    // Told apart only here: it costs another look at all engines.
    const bool possible = any_could_take(view, request, Role::kPrefill) &&
                          any_could_take(view, request, Role::kDecode);
    if (!possible) return {Verdict::kImpossible};
    return {pair.prefill == kNone ? Verdict::kWaitPrefill : Verdict::kWaitDecode};
}

bool Placer::has_short_queue(const ClusterView& view, std::uint32_t node) const {
    if (view.nominal_read_rate <= 0) return true;
    // A slow NIC counts as such only where balance is sought: the paper's alpha is one for all.
    const double rate = is_balanced() ? view.read_rate(node) : view.nominal_read_rate;
    return static_cast<double>(view.nodes[node].read_queue_tokens) <= parameters_.alpha_s * rate;
}

std::uint32_t Placer::choose_prefill(const ClusterView& view, const Request& request) {
    const std::int64_t beta = request.ignore_load ? kNoLimit : parameters_.beta_tokens;
    const auto able = [&](const EngineState& engine) {
        return could_take(engine, Role::kPrefill, request) && engine.num_tokens <= beta &&
               has_room(engine, request);
    };
    using Key = std::pair<bool, double>;
    const auto load_of = [&](std::uint32_t e) {
        return prefill_load(view.engines[e]) - saved_work(request, e);
    };
    const auto key_of = [&](std::uint32_t e) {
        return Key{!has_short_queue(view, view.engines[e].node), load_of(e)};
    };
    const std::uint32_t best = least(view, able, key_of);
    if (best == kNone || !is_balanced()) return best;
    const auto [is_long, lightest] = key_of(best);
    const double own = work(request.num_tokens - request.hit_tokens(), request.num_tokens);
    const auto is_near = [&, most = lightest + parameters_.near_tie * std::max(lightest, own),
                          only_long = is_long](const EngineState& engine) {
        const auto e = static_cast<std::uint32_t>(&engine - view.engines.data());
        return load_of(e) <= most && able(engine) &&
               (only_long || has_short_queue(view, engine.node));
    };
    // Nearly alike: most cached blocks first; then an idle group, since engines that step together
    // are as busy as all of them; then whose node reads soonest and has read least lately.
    sum_prefill_requests(view);
    return least(view, is_near, [&](std::uint32_t e) {
        const EngineState& engine = view.engines[e];
        return std::tuple(not_cached(request, e), prefill_requests_[engine.group],
                          view.read_level_s(engine.node, parameters_.evenness), engine.num_requests,
                          engine.num_tokens);
    });
}

void Placer::sum_prefill_requests(const ClusterView& view) {
    prefill_requests_.assign(view.engines.size() + 1, 0);
    for (const EngineState& engine : view.engines) {
        if (engine.role == Role::kPrefill) prefill_requests_[engine.group] += engine.num_requests;
    }
}

double Placer::work(std::int64_t compute_tokens, std::int64_t num_tokens) const {
    return static_cast<double>(compute_tokens) +
           parameters_.prompt_token_work * static_cast<double>(num_tokens);
}

double Placer::prefill_load(const EngineState& engine) const {
    if (!is_balanced()) return static_cast<double>(engine.num_tokens);
    return work(engine.num_compute_tokens, engine.num_tokens);
}

// What an engine saves that need not be read for it.
double Placer::saved_work(const Request& request, std::uint32_t engine) const {
    if (!is_balanced() || !parameters_.read_past_cache) return 0;
    return parameters_.cached_token_work * request.cached_hit_blocks(engine) * request.block_tokens;
}

std::uint32_t Placer::choose_decode(const ClusterView& view, const Request& request) {
    sum_groups(view, request);
    const std::uint32_t group = lightest_group();
    if (group == kNone) return kNone;
    const auto able = [&](const EngineState& engine) {
        return engine.group == group && could_take(engine, Role::kDecode, request) &&
               has_room(engine, request);
    };
    const double level_tokens = level(groups_[group], request);
    // Under the level by requests, over it by tokens, and never over it while one is under.
    using Key = std::pair<bool, std::int64_t>;
    const auto key_of = [&](const EngineState& engine) {
        const bool is_over =
            static_cast<double>(engine.num_tokens + request.num_tokens) > level_tokens;
        return Key{is_over, is_over ? engine.num_tokens : engine.num_requests};
    };
    const std::uint32_t best =
        least(view, able, [&](std::uint32_t e) { return key_of(view.engines[e]); });
    if (best == kNone || !is_balanced()) return best;
    const Key least_key = key_of(view.engines[best]);
    const double most = static_cast<double>(least_key.second) * (1 + parameters_.near_tie);
    const auto is_near = [&](const EngineState& engine) {
        if (!able(engine)) return false;
        const Key key = key_of(engine);
        return key.first == least_key.first && static_cast<double>(key.second) <= most;
    };
    // Reads wait for slots of a busy decode node: what it read lately says little of the next.
    return least(view, is_near, [&](std::uint32_t e) {
        const EngineState& engine = view.engines[e];
        return std::tuple(not_cached(request, e), view.read_queue_s(engine.node),
                          engine.num_requests, engine.num_tokens);
    });
}

void Placer::sum_groups(const ClusterView& view, const Request& request) {
    groups_.assign(groups_.size(), Group{});
    for (const EngineState& engine : view.engines) {
        if (!engine.usable || engine.role != Role::kDecode) continue;
        if (engine.group >= groups_.size()) groups_.resize(engine.group + 1);
        Group& group = groups_[engine.group];
        group.num_tokens += engine.num_tokens;
        group.free_tokens =
            add_saturated(group.free_tokens, std::max<std::int64_t>(engine.free_kv_tokens, 0));
        ++group.num_engines;
        // The paper's request waits for its group; a balanced one goes where there is room.
        group.is_candidate |= could_take(engine, Role::kDecode, request) &&
                              (!is_balanced() || has_room(engine, request));
    }
}

std::uint32_t Placer::lightest_group() const {
    std::uint32_t best = kNone;
    for (std::uint32_t g = 0; g < groups_.size(); ++g) {
        if (!groups_[g].is_candidate) continue;
        if (best == kNone || groups_[g].num_tokens < groups_[best].num_tokens) best = g;
    }
    return best;
}

double Placer::level(const Group& group, const Request& request) const {
    const bool alone = request.line == nullptr || request.line->empty();
    const std::int64_t waiting =
        alone ? request.num_tokens : request.line->tokens_fitting(group.free_tokens);
    return parameters_.z_slack *
           (static_cast<double>(waiting) + static_cast<double>(group.num_tokens)) /
           static_cast<double>(group.num_engines);
}

}  // namespace dualpath::policy
