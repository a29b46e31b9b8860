// The router's part: requests in order, the policy's view of the cluster, and its decisions.
#pragma once

#include <cstdint>
#include <deque>
#include <optional>
#include <vector>

#include "policy/policy.hpp"
#include "policy/prefix_cache.hpp"
#include "sim/agent.hpp"
#include "sim/settings.hpp"

namespace dualpath::sim {

class Dispatcher {
  public:
    struct Waiting {
        std::uint32_t agent;
        std::uint64_t stay;  // in the prefill engine that it will get
        policy::Request request;
        EarlierPrompt earlier;
    };
    struct Answer {
        Waiting waiting;
        policy::Decision decision;  // placed or impossible
    };

    explicit Dispatcher(const Settings& settings);

    void enqueue(const Waiting& waiting);
    // The head of the line, if it is placed (and charged to the view) or can never be.
    std::optional<Answer> next();

    // Whether a placed request's reads are divided, and weigh on the view, only when it gets
    // memory.
    bool divides_late() const { return policy_.divides_late(); }
    void divide_reads(const policy::Request& request, policy::Decision& decision);

    // A placed request's hits are staged: whether its engine still holds what was not read.
    bool arrive(const policy::Decision& decision, std::uint64_t stay) {
        return prefix_caches_[decision.prefill].arrive(stay);
    }

    // What a placed request weighs is taken back part by part as its work ends.
    void end_read(const policy::Decision& decision, std::size_t segment);
    // `is_done`: the engine has computed the prompt, and did not lose it.
    void end_prefill(const policy::Decision& decision, std::uint64_t stay, std::int64_t prompt,
                     std::int64_t computed, bool is_done);
    void end_decode(const policy::Decision& decision, std::int64_t prompt, std::int64_t room);
    void lose_node(std::uint32_t node);
    void set_read_rate(std::uint32_t node, double tokens_per_s);
    void forget_reads(std::uint32_t node, double elapsed_s) { view_.forget_reads(node, elapsed_s); }

    // Engine numbers: neighbours are on different nodes, so that ties do not pile up on one.
    std::uint32_t node_of(std::uint32_t engine) const { return view_.engines[engine].node; }
    // Whether no prefill engine is believed to have a prompt.
    bool is_cache_settled() const;
    bool is_usable(std::uint32_t engine) const { return view_.engines[engine].usable; }
    std::uint32_t num_prefill_engines() const { return num_prefill_engines_; }
    std::size_t num_waiting() const { return waiting_.size(); }
    std::uint64_t num_decisions() const { return num_decisions_; }
    const policy::ClusterView& view() const { return view_; }

  private:
    void add_engines(const Settings& settings, policy::Role role);

    policy::ClusterView view_;
    policy::Policy policy_;
    policy::WaitingLine line_;
    std::vector<policy::PrefixCacheModel> prefix_caches_;  // of prefill engines
    std::deque<Waiting> waiting_;
    std::uint32_t num_prefill_engines_;
    std::uint32_t block_tokens_;
    std::uint64_t num_placed_ = 0;
    std::uint64_t num_decisions_ = 0;
    bool blocked_ = false;  // the head was refused, and nothing has changed since
};

}  // namespace dualpath::sim
