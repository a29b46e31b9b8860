// The measured rate of one node's storage NIC: an exponentially weighted mean that recovers.
#pragma once

#include <cstdint>

namespace dualpath::policy {

// Samples come while the NIC reads. A node whose rate fell gets less to read, so samples become
// rare just when one wants to know whether it is well again: while nothing is read the estimate
// drifts back to nominal, so the node is given something and measured anew.
class ReadRate {
  public:
    struct Constants {
        double memory_s = 2;    // of reading, that the mean remembers
        double recover_s = 30;  // without reading, until most of a deficit is forgotten
        std::int64_t full_sample_tokens = 4096;  // shorter queues do not show what a NIC can do
    };

    ReadRate() : ReadRate(Constants{}) {}
    explicit ReadRate(const Constants& constants) : constants_(constants) {}

    // `num_tokens` were read in `busy_s` seconds with at least one read under way, of `elapsed_s`
    // seconds since the last call. A small sample can raise the mean, not lower it.
    void add(std::int64_t num_tokens, double busy_s, double elapsed_s, double nominal);
    // Tokens a second; 0 until something was measured.
    double rate() const { return rate_; }

  private:
    static constexpr double kLeastRate = 1e-3;

    Constants constants_;
    double rate_ = 0;
};

}  // namespace dualpath::policy
