// What every policy keeps to, over many drawn clusters, and the parts that have closed forms.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <random>
#include <stdexcept>
#include <vector>

#include "check.hpp"
#include "policy/policy.hpp"
#include "policy/read_rate.hpp"
#include "policy/water_fill.hpp"

namespace {

using namespace dualpath::policy;

using Random = std::mt19937_64;

std::int64_t draw(Random& random, std::int64_t below) {
    return static_cast<std::int64_t>(random() % static_cast<std::uint64_t>(below));
}

ClusterView draw_view(Random& random) {
    ClusterView view;
    view.nominal_read_rate = draw(random, 2) == 0 ? 0 : 1000;
    for (std::int64_t n = 1 + draw(random, 8); n > 0; --n) {
        NodeState node;
        node.read_queue_tokens = draw(random, 4) == 0 ? 0 : draw(random, 100000);
        node.read_rate = draw(random, 3) == 0 ? 0 : static_cast<double>(1 + draw(random, 2000));
        node.push_rate = draw(random, 2) == 0 ? 0 : static_cast<double>(1 + draw(random, 5000));
        node.push_queue_tokens = draw(random, 2) == 0 ? 0 : draw(random, 100000);
        view.nodes.push_back(node);
    }
    for (std::int64_t e = draw(random, 20); e > 0; --e) {
        EngineState engine;
        engine.role = draw(random, 2) == 0 ? Role::kPrefill : Role::kDecode;
        engine.usable = draw(random, 8) != 0;
        engine.donates = draw(random, 8) != 0;
        engine.node =
            static_cast<std::uint32_t>(draw(random, static_cast<std::int64_t>(view.nodes.size())));
        engine.group = static_cast<std::uint32_t>(draw(random, 3));
        engine.num_requests = draw(random, 4);
        engine.num_tokens = draw(random, 4) * 5000;
        engine.num_compute_tokens = engine.num_tokens / 10;
        engine.free_kv_tokens = draw(random, 3) == 0 ? draw(random, 20000) : kNoLimit;
        engine.max_request_tokens = draw(random, 6) == 0 ? draw(random, 20000) : kNoLimit;
        view.engines.push_back(engine);
    }
    for (EngineState& engine : view.engines) {
        engine.group = std::min(engine.group, static_cast<std::uint32_t>(view.engines.size()));
    }
    view.prefill = {static_cast<double>(1 + draw(random, 5000)), 1e-9};
    check(view);
    return view;
}

Parameters draw_parameters(Random& random) {
    Parameters parameters;
    parameters.placement = static_cast<Placement>(draw(random, 4));
    parameters.read_path = static_cast<ReadPath>(draw(random, 5));
    if (draw(random, 2) == 0) parameters.alpha_s = 3;
    parameters.beta_tokens = draw(random, 2) == 0 ? kNoLimit : 7000;
    parameters.min_segment_blocks = static_cast<std::uint32_t>(1 + draw(random, 20));
    parameters.max_readers = static_cast<std::uint32_t>(1 + draw(random, kMaxReaders));
    parameters.read_past_cache = draw(random, 2) == 0;
    parameters.recompute = draw(random, 2) == 0;
    return parameters;
}

void check_placed(const ClusterView& view, const Parameters& parameters, const Request& request,
                  const Decision& decision) {
    CHECK(view.engines[decision.prefill].role == Role::kPrefill);
    CHECK(view.engines[decision.decode].role == Role::kDecode);
    const bool is_plain = parameters.read_path != ReadPath::kPool;
    for (const std::uint32_t engine : {decision.prefill, decision.decode}) {
        CHECK(view.engines[engine].usable);
        CHECK(view.engines[engine].max_request_tokens >= request.num_tokens);
    }
    const bool weighs_load =
        parameters.placement == Placement::kPaper || parameters.placement == Placement::kBalanced;
    if (weighs_load && !request.ignore_load) {
        CHECK(view.engines[decision.prefill].num_tokens <= parameters.beta_tokens);
        CHECK(view.engines[decision.decode].free_kv_tokens >= request.room_tokens());
    }
    std::uint32_t next = decision.num_cached_blocks;
    std::vector<std::uint32_t> nodes;
    for (const ReadSegment& segment : decision.segments()) {
        CHECK(segment.first_block == next && segment.last_block > next);
        next = segment.last_block;
        CHECK(view.engines[segment.engine].usable);
        CHECK(view.engines[segment.engine].node == segment.node);
        CHECK(view.engines[segment.engine].donates || segment.engine == decision.prefill ||
              segment.engine == decision.decode);
        CHECK(!is_plain || segment.engine == decision.prefill || segment.engine == decision.decode);
        nodes.push_back(segment.node);
    }
    CHECK(next + decision.num_recompute_blocks == request.num_hit_blocks);
    CHECK(parameters.recompute || decision.num_recompute_blocks == 0);
    std::ranges::sort(nodes);
    CHECK(std::ranges::adjacent_find(nodes) == nodes.end());
    CHECK(nodes.size() <= (is_plain ? 2 : parameters.max_readers));
    for (const ReadSegment& segment : decision.segments()) {
        CHECK(nodes.size() == 1 || segment.num_blocks() >= parameters.min_segment_blocks);
    }
}

std::int64_t total_queue(const ClusterView& view) {
    std::int64_t total = 0;
    for (const NodeState& node : view.nodes) total += node.read_queue_tokens;
    return total;
}

bool same(const Decision& left, const Decision& right) {
    return left.verdict == right.verdict && left.prefill == right.prefill &&
           left.decode == right.decode && left.num_cached_blocks == right.num_cached_blocks &&
           left.num_recompute_blocks == right.num_recompute_blocks &&
           std::ranges::equal(left.segments(), right.segments()) && left.read_s == right.read_s;
}

WaterReader reader(std::uint32_t rank, double start_s, double blocks_per_s) {
    return {rank, rank, start_s, blocks_per_s, rank};
}

double last_end(const std::vector<WaterReader>& readers) {
    double end_s = 0;
    for (const WaterReader& one : readers) {
        if (one.num_blocks > 0) end_s = std::max(end_s, one.end_s());
    }
    return end_s;
}

}  // namespace

TEST(policy_decisions_cover_the_hit_keep_limits_and_repeat) {
    Random random(11);
    int num_placed = 0;
    for (int round = 0; round < 20000; ++round) {
        const ClusterView view = draw_view(random);
        const Parameters parameters = draw_parameters(random);
        const std::vector<CachedPrefix> cached{{static_cast<std::uint32_t>(draw(random, 20)),
                                                static_cast<std::uint32_t>(draw(random, 300))}};
        Request request;
        request.num_tokens = 64 + draw(random, 16000);
        request.block_tokens = 64;
        request.num_hit_blocks = static_cast<std::uint32_t>(
            draw(random, 2) == 0 ? draw(random, 4) : (request.num_tokens - 1) / 64);
        request.num_hit_blocks = std::min<std::uint32_t>(
            request.num_hit_blocks, static_cast<std::uint32_t>((request.num_tokens - 1) / 64));
        request.cached = cached;
        request.turn = random();
        request.ignore_load = draw(random, 8) == 0;
        Policy policy(parameters);
        const Decision decision = policy.decide(view, request);
        // Of another instance, and of one with scratch from another decision.
        CHECK(same(decision, Policy(parameters).decide(view, request)));
        policy.decide(draw_view(random), request);
        CHECK(same(decision, policy.decide(view, request)));
        if (!decision.placed()) continue;
        Decision again = decision;
        policy.divide(view, request, again);
        CHECK(same(decision, again));
        ++num_placed;
        check_placed(view, parameters, request, decision);
        ClusterView after = view;
        charge(after, request, decision);
        CHECK(total_queue(after) == total_queue(view));
        charge_reads(after, request.block_tokens, decision);
        const std::int64_t read_blocks = static_cast<std::int64_t>(request.num_hit_blocks) -
                                         decision.num_cached_blocks - decision.num_recompute_blocks;
        CHECK(total_queue(after) == total_queue(view) + read_blocks * 64);
    }
    CHECK(num_placed > 5000);
}

TEST(policy_water_fill_is_never_later_than_any_other_division) {
    Random random(3);
    for (int round = 0; round < 2000; ++round) {
        std::vector<WaterReader> readers;
        for (std::uint32_t i = 0; i < 3; ++i) {
            readers.push_back(reader(i, static_cast<double>(draw(random, 10)),
                                     static_cast<double>(1 + draw(random, 5))));
        }
        const auto num_blocks = static_cast<std::uint32_t>(draw(random, 12));
        const std::vector<WaterReader> before = readers;
        water_fill(readers, num_blocks, 1, 0);
        double best_s = num_blocks == 0 ? 0 : INFINITY;
        for (std::uint32_t a = 0; a <= num_blocks; ++a) {
            for (std::uint32_t b = 0; a + b <= num_blocks; ++b) {
                std::vector<WaterReader> other = before;
                other[0].num_blocks = a;
                other[1].num_blocks = b;
                other[2].num_blocks = num_blocks - a - b;
                best_s = std::min(best_s, last_end(other));
            }
        }
        CHECK(readers[0].num_blocks + readers[1].num_blocks + readers[2].num_blocks == num_blocks);
        CHECK(last_end(readers) <= best_s + 1e-9);
    }
}

TEST(policy_water_fill_takes_no_more_readers_than_the_floor_asks_for) {
    std::vector<WaterReader> readers{reader(0, 0, 1), reader(1, 0, 1), reader(2, 0, 1)};
    water_fill(readers, 12, 1, 6);
    CHECK(std::ranges::count(readers, 0U, &WaterReader::num_blocks) == 1);
    CHECK(last_end(readers) == 6);
    CHECK_THROWS(water_fill({}, 1, 1, 0), std::invalid_argument);
}

TEST(policy_read_rate_follows_a_slow_nic_and_recovers_when_idle) {
    ReadRate rate;
    for (int i = 0; i < 10; ++i) rate.add(100000, 1, 1, 100000);
    CHECK(rate.rate() == 100000);
    for (int i = 0; i < 20; ++i) rate.add(10000, 1, 1, 100000);
    CHECK(rate.rate() < 11000);
    // Nothing to read: it is believed to be well again bit by bit, and never better than nominal.
    double before = rate.rate();
    for (int i = 0; i < 300; ++i) {
        rate.add(0, 0, 1, 100000);
        CHECK(rate.rate() > before && rate.rate() < 100000);
        before = rate.rate();
    }
    CHECK(rate.rate() > 90000);
}

TEST(policy_read_rate_of_small_reads_says_nothing_of_a_nic) {
    ReadRate rate;
    rate.add(64, 0.01, 1, 0);
    CHECK(rate.rate() == 0);
    rate.add(100000, 1, 1, 0);
    rate.add(64, 0.01, 1, 0);
    CHECK(rate.rate() == 100000);
    // A NIC that reads all the time and gets nowhere is another thing.
    for (int i = 0; i < 100; ++i) rate.add(0, 1, 1, 100000);
    CHECK(rate.rate() > 0 && rate.rate() < 1);
}

TEST(policy_recompute_drops_a_tail_only_where_that_ends_sooner) {
    ClusterView view;
    view.nodes.resize(2);
    view.nominal_read_rate = 1000;
    view.engines.resize(2);
    view.engines[1].role = Role::kDecode;
    view.engines[1].node = 1;
    Request request;
    request.num_tokens = 6500;
    request.num_hit_blocks = 100;
    request.block_tokens = 64;
    Parameters parameters = parameters_of("split");
    parameters.recompute = true;
    // Reading: 3.2 s. Computing all of it: 0.64 s, and the price of as much again.
    view.prefill = {10000, 0};
    CHECK(Policy(parameters).decide(view, request).num_recompute_blocks == 100);
    // As fast as the two NICs: not worth the price.
    view.prefill = {2500, 0};
    CHECK(Policy(parameters).decide(view, request).num_recompute_blocks == 0);
    parameters.recompute_price = 0;
    CHECK(Policy(parameters).decide(view, request).num_recompute_blocks == 100);
    // The engine is busy until the reads end anyway.
    view.engines[0].num_compute_tokens = 100000;
    CHECK(Policy(parameters).decide(view, request).num_recompute_blocks == 0);
    // It is busy for 1.6 s: what is read until then costs nothing, the tail beyond is computed.
    view.prefill = {10000, 0};
    view.engines[0].num_compute_tokens = 16000;
    CHECK(Policy(parameters).decide(view, request).num_recompute_blocks == 50);
    view.prefill = {0, 0};
    CHECK(Policy(parameters).decide(view, request).num_recompute_blocks == 0);
}

TEST(policy_charge_puts_a_requests_whole_weight_on_the_view) {
    ClusterView view;
    view.nodes.resize(3);
    view.engines.resize(3);
    view.engines[1].role = Role::kDecode;
    view.engines[1].free_kv_tokens = 1000;
    view.engines[0].free_staging_tokens = 1000;
    for (std::uint32_t e = 0; e < 3; ++e) view.engines[e].node = e;
    Request request;
    request.num_tokens = 700;
    request.reserve_tokens = 800;
    request.num_hit_blocks = 10;
    request.block_tokens = 64;
    Decision decision;
    decision.verdict = Verdict::kPlaced;
    decision.prefill = 0;
    decision.decode = 1;
    decision.num_cached_blocks = 1;
    decision.num_recompute_blocks = 2;
    decision.num_segments = 3;
    decision.segment_array = {{{0, 0, 1, 4}, {1, 1, 4, 6}, {2, 2, 6, 8}}};
    charge(view, request, decision);
    charge_reads(view, request.block_tokens, decision);
    CHECK(view.engines[0].num_requests == 1 && view.engines[1].num_requests == 1);
    CHECK(view.engines[0].num_tokens == 700 && view.engines[1].num_tokens == 700);
    CHECK(view.engines[0].num_compute_tokens == 700 - 8 * 64);
    CHECK(view.engines[1].num_compute_tokens == 0);
    CHECK(view.engines[1].free_kv_tokens == 200 && view.engines[0].free_kv_tokens == kNoLimit);
    CHECK(view.engines[0].free_staging_tokens == 300);
    CHECK(view.engines[1].free_staging_tokens == kNoLimit);
    CHECK(view.nodes[0].read_queue_tokens == 3 * 64);
    CHECK(view.nodes[1].read_queue_tokens == 2 * 64);
    CHECK(view.nodes[2].read_queue_tokens == 2 * 64);
    // Out: 3 read and 1 cached. In: 2 from the decode side, 2 from the donor.
    CHECK(view.nodes[0].push_queue_tokens == 8 * 64);
    // Out: 2. In: 3, 1 and 2.
    CHECK(view.nodes[1].push_queue_tokens == 8 * 64);
    CHECK(view.nodes[2].push_queue_tokens == 4 * 64);
    CHECK(view.engines[2].num_requests == 0);
}

TEST(policy_staged_reads_leave_the_queues_and_are_forgotten_slowly) {
    ClusterView view;
    view.nodes.resize(3);
    view.engines.resize(2);
    view.engines[1].role = Role::kDecode;
    view.engines[1].node = 1;
    Decision decision;
    decision.prefill = 0;
    decision.decode = 1;
    for (const std::uint32_t node : {0U, 2U}) {
        const ReadSegment segment{node, node, 0, 4};
        charge_read(view, decision, segment, 256);
        CHECK(view.nodes[node].push_queue_tokens > 0);
        charge_read(view, decision, segment, -256);
        CHECK(view.nodes[node].recent_read_tokens == 256);
    }
    for (const NodeState& node : view.nodes) {
        CHECK(node.read_queue_tokens == 0 && node.push_queue_tokens == 0);
    }
    view.forget_reads(0, kRecentReadsS);
    CHECK(std::abs(view.nodes[0].recent_read_tokens - 256 / std::exp(1.0)) < 1e-9);
    CHECK(view.nodes[2].recent_read_tokens == 256);
}

TEST(policy_refuses_what_makes_no_sense) {
    ClusterView view;
    view.engines.resize(1);
    CHECK_THROWS(check(view), std::invalid_argument);
    CHECK_THROWS(parameters_of("fastest"), std::invalid_argument);
    Parameters parameters;
    parameters.max_readers = 17;
    CHECK_THROWS(Policy{parameters}, std::invalid_argument);
    parameters = {};
    parameters.split_fraction = std::nan("");
    CHECK_THROWS(Policy{parameters}, std::invalid_argument);
}
