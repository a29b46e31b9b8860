// The simulator's machines, one by one, against what can be worked out by hand.
#include <cmath>
#include <stdexcept>
#include <vector>

#include "check.hpp"
#include "sim/calendar.hpp"
#include "sim/costs.hpp"
#include "sim/decode_group.hpp"
#include "sim/fifo_server.hpp"
#include "sim/memory_pool.hpp"
#include "sim/prefill_group.hpp"
#include "sim/storage_node.hpp"

using namespace dualpath::sim;

namespace {

bool near(double found, double expected, double slack = 1e-9) {
    return std::abs(found - expected) <= slack * std::max(1.0, std::abs(expected));
}

Settings prefill_settings() {
    Settings settings;
    settings.prefill = {0.1, 0.001, 0, 0, 0, 1 << 30};
    settings.shape.engine_nic_bytes_per_s = 1000;
    return settings;
}

DecodeGroup::Sequence sequence(std::uint32_t agent, std::uint32_t engine) {
    return {0, agent, 0, engine, 0};
}

const auto everyone = [](const DecodeGroup::Sequence&) { return true; };

}  // namespace

// Equal times come in the order in which they were asked for, and never before now.
TEST(sim_calendar_keeps_the_order_of_equals) {
    Calendar calendar;
    calendar.add(2, EventKind::kReport, 0);
    calendar.add(1, EventKind::kReport, 1);
    calendar.add(1, EventKind::kReport, 2);
    CHECK(calendar.next().index == 1);
    calendar.add(0.5, EventKind::kReport, 3);
    CHECK(calendar.next().index == 2);
    CHECK(calendar.next().index == 3);
    CHECK(near(calendar.now(), 1));
    CHECK(calendar.next().index == 0);
    CHECK(calendar.empty());
}

// Transfers are served one by one; a new rate counts from its time on and voids earlier ends.
TEST(sim_fifo_server_changes_its_rate_in_mid_transfer) {
    FifoServer server(10);
    CHECK(near(server.push(0, {1, 0, 0, 100}).value(), 10));
    CHECK(!server.push(1, {2, 0, 0, 50}));
    const auto version = server.version();
    server.set_rate(5, 5);  // 50 bytes are left
    CHECK(server.version() != version);
    CHECK(near(server.end_s().value(), 15));
    CHECK(server.pop(15).agent == 1);
    CHECK(near(server.end_s().value(), 25));
    CHECK(server.pop(25).agent == 2);
    CHECK(!server.end_s());
}

// Each window of the time line has the bytes that were read in it, and their sum is what was read.
TEST(sim_storage_node_spreads_reads_over_windows) {
    StorageNode node(10, 1000, 1.0);
    node.reads().push(0.5, {1, 0, 0, 20});
    node.end_read(2.5);
    CHECK(node.window_bytes().size() == 3);
    CHECK(near(node.window_bytes()[0], 5));
    CHECK(near(node.window_bytes()[1], 10));
    CHECK(near(node.window_bytes()[2], 5));
    CHECK(near(node.busy_s(), 2));
    node.slow_down(2.5, 0.5);
    node.reads().push(3, {1, 0, 0, 10});
    CHECK(near(node.reads().end_s().value(), 5));
}

// Who came first is served first, even if a later one would fit.
TEST(sim_memory_pool_is_first_come_first_served) {
    MemoryPool pool(10);
    CHECK(pool.take({1, 0, 8}));
    CHECK(!pool.take({2, 0, 5}));
    CHECK(!pool.take({3, 0, 1}));
    pool.give_back(2);
    CHECK(!pool.can_grant());
    pool.give_back(1);
    CHECK(pool.can_grant());
    CHECK(pool.grant(true).agent == 2);
    CHECK(pool.used() == 10);
    CHECK(pool.grant(false).agent == 3);
    CHECK(pool.used() == 10);
}

// Attention is the sum over pairs, and sparse attention sees no more than its top-k.
TEST(sim_attention_counts_pairs) {
    const PrefillCost dense{0, 0, 1, 0, 0, 0};
    CHECK(near(attention_s(dense, 10, 3), 11 + 12 + 13));
    const PrefillCost sparse{0, 0, 0, 1, 12, 0};
    CHECK(near(attention_s(sparse, 10, 3), 11 + 12 + 12));
    CHECK(near(attention_s(sparse, 100, 2), 24));
    CHECK(fitting_tokens(dense, 10, 3, 23) == 2);
    CHECK(fitting_tokens(dense, 10, 3, 22.5) == 1);
    CHECK(fitting_tokens(dense, 10, 3, 36) == 3);
    CHECK(fitting_tokens(dense, 10, 3, 1) == 0);
}

// A batch takes prompts in order until the quota of attention; the last is cut, none is lost.
TEST(sim_prefill_batches_fill_the_quota) {
    Settings settings = prefill_settings();
    settings.prefill.pair_s = 0.001;
    settings.quota_s = 0.3;
    settings.switches.oracle = true;
    PrefillGroup group(settings, 1);
    for (std::uint32_t agent = 0; agent < 3; ++agent) group.add(0, {agent, 0, 99, 2, 0, 0});
    // 100 + 101 pairs, then 100 of the second prompt's 201 do not fit any more: 99 are left.
    PrefillGroup::Step step = group.begin_step();
    CHECK(step.num_tokens == 2);
    CHECK(near(step.slowest_attention_s, 0.201));
    CHECK(near(step.duration_s, 0.1 + 0.201 + 0.002));
    std::vector<PrefillGroup::Prompt> done;
    group.end_step(done);
    CHECK(done.size() == 1 && done[0].agent == 0);
    std::int64_t num_tokens = step.num_tokens;
    while (group.has_work()) {
        num_tokens += group.begin_step().num_tokens;
        group.end_step(done);
    }
    CHECK(num_tokens == 6);
    CHECK(done.size() == 3 && done[2].agent == 2);
}

// A prompt whose first token exceeds the quota still gets on.
TEST(sim_prefill_always_takes_a_token) {
    Settings settings = prefill_settings();
    settings.prefill.pair_s = 1;
    PrefillGroup group(settings, 1);
    group.add(0, {0, 0, 1000, 1, 0, 0});
    CHECK(group.begin_step().num_tokens == 1);
}

// Layer by layer a step takes the longer of compute and copies, otherwise their sum.
TEST(sim_prefill_overlaps_copies_layer_by_layer) {
    Settings settings = prefill_settings();
    settings.kv_bytes_per_token = 10;  // 0.01 s a token
    for (const bool layerwise : {true, false}) {
        settings.switches.layerwise = layerwise;
        PrefillGroup group(settings, 2);
        group.add(0, {0, 0, 100, 10, 100, 0});
        // In 1.0 s, out 1.1 s; compute 0.1 + the mean of 10 and 0 tokens.
        const double expected = layerwise ? 1.1 : 1.0 + 1.1 + 0.1 + 0.005;
        CHECK(near(group.begin_step().duration_s, expected));
    }
}

// Counting steps gives the same times as taking them one by one.
TEST(sim_decode_counts_steps_as_if_it_took_them) {
    DecodeGroup group({1.0, 0.5, 0, 0, 0, 0}, 1);  // 1 s and 0.5 s a request
    group.join(0, sequence(1, 0), 10, 0);          // steps of 1.5 s
    CHECK(near(group.end_s().value(), 15));
    // In the middle of the third step; takes part from the fourth on, all steps of 2 s from now.
    const auto joined = group.join(3.75, sequence(2, 0), 2, 0);
    CHECK(near(joined.second_token_s, 3.75 + 1 + 2));
    CHECK(near(group.end_s().value(), 3.75 + 1 + 4));
    std::vector<DecodeGroup::Sequence> done;
    group.finish(8.75, done, everyone);
    CHECK(done.size() == 1 && done[0].agent == 2);
    CHECK(near(group.end_s().value(), 8.75 + 5 * 1.5));
    group.finish(16.25, done, everyone);
    CHECK(done.size() == 2 && group.num_running() == 0);
    CHECK(!group.end_s());
    // An idle group begins a step at once.
    CHECK(near(group.join(20.2, sequence(3, 0), 1, 0).second_token_s, 21.7));
}

// A group's step is as long as its fullest engine's contexts make it.
TEST(sim_decode_waits_for_the_fullest_engine) {
    DecodeGroup group({1.0, 0, 0.001, 0, 0, 0}, 2);
    group.join(0, sequence(1, 0), 5, 1000);
    CHECK(near(group.step_s(), 2));
    group.join(0, sequence(2, 1), 5, 500);
    CHECK(near(group.step_s(), 2));
    group.leave(0, 0, 1.0);
    CHECK(near(group.step_s(), 1.5));
    std::vector<DecodeGroup::Sequence> done;
    group.finish(group.end_s().value(), done,
                 [](const DecodeGroup::Sequence& s) { return s.agent != 1; });
    CHECK(done.empty() || done[0].agent == 2);
}
