// A NIC that slows and recovers, seen by the policy only as its owner measures it.
#include <algorithm>
#include <array>
#include <cstdint>

#include "check.hpp"
#include "policy/policy.hpp"
#include "policy/read_rate.hpp"

namespace {

using namespace dualpath::policy;

constexpr double kNominal = 1e6;    // tokens a second
constexpr double kTick = 0.01;      // seconds between requests
constexpr int kTicksASecond = 100;  // rates are measured every second
constexpr std::uint32_t kBlockTokens = 64;

// One prefill and one decode node; what they have read is told to the view as a router does it.
class TwoNics {
  public:
    explicit TwoNics(std::uint32_t hit_blocks) : hit_blocks_(hit_blocks) {
        view_.nodes.resize(2);
        view_.engines.resize(2);
        view_.engines[1].role = Role::kDecode;
        view_.engines[1].node = 1;
        view_.nominal_read_rate = kNominal;
    }

    // Share of the tokens that the decode side's NIC was given, whose speed is `speed` x nominal.
    double run(double seconds, double speed) {
        std::array<std::int64_t, 2> given{};
        for (int tick = 0; tick < seconds * kTicksASecond; ++tick) {
            place(given);
            read(0, kNominal);
            read(1, kNominal * speed);
            if (++ticks_ % kTicksASecond == 0) measure();
        }
        return static_cast<double>(given[1]) / static_cast<double>(given[0] + given[1]);
    }

    std::int64_t queue(std::uint32_t node) const { return view_.nodes[node].read_queue_tokens; }

  private:
    void place(std::array<std::int64_t, 2>& given) {
        Request request;
        request.num_tokens = hit_blocks_ * kBlockTokens + 1;
        request.num_hit_blocks = hit_blocks_;
        request.block_tokens = kBlockTokens;
        const Decision decision = policy_.decide(view_, request);
        CHECK(decision.placed());
        for (const ReadSegment& segment : decision.segments()) {
            const std::int64_t tokens = segment.num_blocks() * kBlockTokens;
            view_.nodes[segment.node].read_queue_tokens += tokens;
            given[segment.node] += tokens;
        }
    }

    void read(std::uint32_t node, double rate) {
        std::int64_t& queue = view_.nodes[node].read_queue_tokens;
        const auto tokens = std::min(queue, static_cast<std::int64_t>(rate * kTick));
        queue -= tokens;
        done_[node] += tokens;
        busy_s_[node] += static_cast<double>(tokens) / rate;
    }

    void measure() {
        for (std::uint32_t n = 0; n < 2; ++n) {
            rates_[n].add(done_[n], busy_s_[n], 1, kNominal);
            view_.nodes[n].read_rate = rates_[n].rate();
            done_[n] = 0;
            busy_s_[n] = 0;
        }
    }

    const std::uint32_t hit_blocks_;
    ClusterView view_;
    Policy policy_{parameters_of("split")};
    std::array<ReadRate, 2> rates_;
    std::array<std::int64_t, 2> done_{};
    std::array<double, 2> busy_s_{};
    int ticks_ = 0;
};

}  // namespace

TEST(policy_slow_nic_gets_less_and_then_its_share_again) {
    // Half of what both NICs read at their best, and nearly all that one reads.
    TwoNics pair(150);
    CHECK(std::abs(pair.run(20, 1) - 0.5) < 0.02);
    pair.run(10, 0.1);
    CHECK(pair.run(30, 0.1) < 0.2);
    // Nothing piles up in front of it.
    CHECK(pair.queue(1) < 100000);
    pair.run(60, 1);
    CHECK(std::abs(pair.run(20, 1) - 0.5) < 0.05);
}

TEST(policy_slow_nic_that_stands_still_is_left_alone_and_asked_again) {
    TwoNics pair(75);
    pair.run(20, 1);
    pair.run(20, 1e-9);
    // What lies in front of it is not read, so nothing is added while its queue is believed long.
    const std::int64_t stuck = pair.queue(1);
    pair.run(30, 1e-9);
    CHECK(pair.queue(1) < stuck + 10 * 75 * 64);
    pair.run(60, 1);
    CHECK(std::abs(pair.run(20, 1) - 0.5) < 0.05);
}
