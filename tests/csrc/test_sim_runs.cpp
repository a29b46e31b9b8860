// Whole simulations: what is conserved, one request by hand, faults.
#include <cmath>
#include <stdexcept>
#include <vector>

#include "check.hpp"
#include "sim/simulation.hpp"

using namespace dualpath::sim;

namespace {

// Trajectories of equal turns, and agents that replay them from time 0.
struct Load {
    std::vector<std::int64_t> offsets{0};
    std::vector<std::int32_t> append, generated, trajectory, first;
    std::vector<double> arrival;

    Load(std::uint32_t num_agents, std::int32_t num_turns, std::int32_t appended,
         std::int32_t answer) {
        offsets.push_back(num_turns);
        append.assign(num_turns, appended);
        generated.assign(num_turns, answer);
        trajectory.assign(num_agents, 0);
        first.assign(num_agents, 0);
        arrival.assign(num_agents, 0.0);
    }
    Workload workload() const { return {offsets, append, generated, trajectory, first, arrival}; }
};

Settings settings_of(const char* mode) {
    Settings settings;
    settings.shape = {1, 1, 2, 1, 1, 1e6, 1e6, 1 << 30};
    settings.prefill = {0.01, 1e-4, 1e-8, 0, 0, 1 << 30};
    settings.decode = {0.01, 1e-4, 1e-7, 0, 0, 100'000};
    settings.policy = dualpath::policy::parameters_of(mode);
    settings.kv_bytes_per_token = 100;
    settings.block_tokens = 16;
    return settings;
}

std::uint64_t hits_of(std::int32_t num_turns, std::int32_t appended, std::int32_t answer) {
    std::uint64_t hits = 0, context = 0;
    for (std::int32_t turn = 0; turn < num_turns; ++turn) {
        hits += context / 16 * 16;
        context += static_cast<std::uint64_t>(appended + answer);
    }
    return hits;
}

std::uint64_t prompts_of(std::int32_t num_turns, std::int32_t appended, std::int32_t answer) {
    std::uint64_t prompts = 0, context = 0;
    for (std::int32_t turn = 0; turn < num_turns; ++turn) {
        prompts += context + static_cast<std::uint64_t>(appended);
        context += static_cast<std::uint64_t>(appended + answer);
    }
    return prompts;
}

}  // namespace

// Every hit token is read once, every other one computed once, in every mode.
TEST(sim_conserves_tokens) {
    for (const char* mode : {"prefill_only", "dual", "split", "pool"}) {
        for (const bool stage_all : {false, true}) {
            Settings settings = settings_of(mode);
            settings.switches.prefill_stages_all = stage_all;
            settings.shape.staging_bytes = 1'000'000;  // requests wait for it
            const Load load(30, 8, 100, 37);
            Simulation simulation(settings, load.workload());
            simulation.run();
            const Counts& counts = simulation.recorder().counts();
            CHECK(counts.turns == 30 * 8 && counts.finished_agents == 30);
            CHECK(counts.read_tokens == 30 * hits_of(8, 100, 37));
            CHECK(counts.computed_tokens == 30 * (prompts_of(8, 100, 37) - hits_of(8, 100, 37)));
            CHECK(counts.generated_tokens == 30 * 8 * 37);
            CHECK(counts.persisted_tokens == 30 * (8 * 137 / 16 * 16));
            double bytes = 0;
            for (const StorageNode& node : simulation.cluster().nodes()) bytes += node.read_bytes();
            CHECK(simulation.is_settled());
            CHECK(std::abs(bytes / 100 - static_cast<double>(counts.read_tokens)) < 1);
        }
    }
}

// One agent alone: both turns' TTFT, the second token and the end are what one works out by hand.
TEST(sim_one_request_alone) {
    const Load load(1, 2, 160, 17);
    Simulation simulation(settings_of("prefill_only"), load.workload());
    simulation.run();
    const TurnTimes& times = simulation.recorder().times();
    const auto near = [](double found, double expected) {
        return std::abs(found - expected) < 1e-6;
    };
    // Two engines share the group's feed-forward: 160 tokens cost as much as 80.
    const double first = 0.01 + 80 * 1e-4 + 1e-8 * (160.0 * 161 / 2);
    CHECK(near(times.first_token[0], std::max(first, 160 * 1e-4)));
    CHECK(std::isnan(times.staged[0]));
    // The prompt goes into the cache (160 x 100 bytes at 1 MB/s), then one step.
    const double step = 0.01 + 1e-4 / 2 + 1e-7 * (160 + 8);
    CHECK(near(times.second_token[0], 0.016 + step));
    CHECK(near(times.per_token[0], step));
    // 177 tokens of context: 11 blocks are read in 17.6 ms, then 161 tokens are computed behind
    // them while the 176 are loaded and all 337 are sent to the decode node, which takes longest.
    CHECK(near(times.staged[1], 0.0176));
    CHECK(near(times.first_token[1], 0.0176 + (176 + 161) * 1e-4));
}

// With compute that costs nothing, two storage NICs take half the time of one.
TEST(sim_two_paths_read_twice_as_fast) {
    double job_s[2];
    for (const bool both : {false, true}) {
        Settings settings = settings_of(both ? "split" : "prefill_only");
        settings.prefill = {1e-9, 0, 0, 0, 0, 1 << 30};
        settings.decode.step_s = 1e-9;
        settings.decode.request_s = settings.decode.token_s = 0;
        settings.decode.cache_tokens = 1 << 30;
        settings.shape.engine_nic_bytes_per_s = 1e15;
        const Load load(100, 20, 320, 2);
        Simulation simulation(settings, load.workload());
        simulation.run();
        job_s[both] = simulation.recorder().last_end_s();
    }
    CHECK(std::abs(job_s[0] / job_s[1] - 2.0) < 0.01);
}

// The oracle reads nothing, and is never slower.
TEST(sim_oracle_reads_nothing) {
    const Load load(20, 6, 100, 20);
    Settings settings = settings_of("dual");
    Simulation dual(settings, load.workload());
    dual.run();
    settings.switches.oracle = true;
    Simulation oracle(settings, load.workload());
    oracle.run();
    CHECK(oracle.recorder().counts().read_tokens == 0);
    CHECK(oracle.recorder().counts().computed_tokens == dual.recorder().counts().computed_tokens);
    CHECK(oracle.recorder().last_end_s() < dual.recorder().last_end_s());
}

// A node that dies takes its turns with it; they are repeated on others and all agents end.
TEST(sim_turns_are_repeated_when_a_node_dies) {
    for (const char* mode : {"prefill_only", "dual", "split", "pool"}) {
        for (const std::uint32_t node : {0U, 3U}) {
            Settings settings = settings_of(mode);
            settings.shape.num_prefill_nodes = settings.shape.num_decode_nodes = 2;
            settings.shape.staging_bytes = 1'000'000;
            settings.decode.cache_tokens = 5'000;
            settings.switches.prefill_stages_all = node == 0;
            const Load load(40, 8, 100, 37);
            settings.faults.push_back({FaultKind::kNodeDies, node, 1.0});
            Simulation simulation(settings, load.workload());
            simulation.run();
            const Counts& counts = simulation.recorder().counts();
            CHECK(counts.repeated_turns > 0);
            CHECK(counts.finished_agents == 40 && counts.turns == 40 * 8);
            CHECK(simulation.is_settled());
        }
    }
}

// Without any engine of a role left the run ends with an error, not in a hang.
TEST(sim_says_when_nothing_can_go_on) {
    Settings settings = settings_of("dual");
    settings.faults.push_back({FaultKind::kNodeDies, 1, 0.5});
    const Load load(10, 8, 100, 37);
    Simulation simulation(settings, load.workload());
    simulation.run();
    CHECK(simulation.recorder().counts().impossible_turns == 10);
    CHECK(simulation.recorder().counts().finished_agents == 0);
}

// A prompt fits, its answer does not: that is no reason to wait.
TEST(sim_says_when_an_answer_fits_no_engine) {
    Settings settings = settings_of("dual");
    settings.decode.cache_tokens = 150;
    const Load load(1, 1, 120, 50);
    Simulation simulation(settings, load.workload());
    simulation.run();
    CHECK(simulation.recorder().counts().impossible_turns == 1);
}

// What is wrong with the settings or the workload is refused before anything runs.
TEST(sim_refuses_what_cannot_work) {
    const Load load(1, 1, 10, 1);
    Settings settings = settings_of("dual");
    settings.shape.prefill_group_nodes = 2;
    CHECK_THROWS(Simulation(settings, load.workload()), std::invalid_argument);
    settings = settings_of("dual");
    settings.faults.push_back({FaultKind::kStorageSlows, 0, 1.0, 0.0, 2.0});
    CHECK_THROWS(Simulation(settings, load.workload()), std::invalid_argument);
    Load empty(1, 1, 10, 1);
    empty.trajectory[0] = 1;
    CHECK_THROWS(Simulation(settings_of("dual"), empty.workload()), std::invalid_argument);
}
