// A NIC that serves transfers one after the other, in the order in which they were asked for.
#pragma once

#include <cstdint>
#include <deque>
#include <optional>

namespace dualpath::sim {

// First in, first out and not shared: the mover's storage queue reads in order, and of two
// disciplines with equal throughput the fair share would let every transfer end late.
class FifoServer {
  public:
    struct Transfer {
        std::uint32_t agent;
        std::uint32_t attempt;
        std::uint32_t part;  // of what the agent has under way
        double bytes;
    };
    // Part of a transfer's service, for the time line.
    struct Served {
        double from_s;
        double until_s;
        double bytes;
    };

    explicit FifoServer(double bytes_per_s) : bytes_per_s_(bytes_per_s) {}

    // The end of the transfer's service, if it begins at once; its end must then be asked for.
    std::optional<double> push(double now_s, const Transfer& transfer);
    // Takes out the transfer in service, whose end is now.
    Transfer pop(double now_s);
    // When the transfer in service will end. None if there is none.
    std::optional<double> end_s() const;
    // Ends asked for earlier are void when this has changed.
    std::uint32_t version() const { return version_; }
    // What was served since the last call.
    Served take_served(double now_s);

    void set_rate(double now_s, double bytes_per_s);
    // Forgets all transfers: the node died.
    void clear(double now_s);
    double rate() const { return bytes_per_s_; }
    std::size_t size() const { return queue_.size(); }

  private:
    void begin(double now_s);

    std::deque<Transfer> queue_;
    double bytes_per_s_;
    double begun_s_ = 0;     // of the part of the head's service that has not been taken
    double left_bytes_ = 0;  // of the head, from begun_s_ on
    std::uint32_t version_ = 0;
};

}  // namespace dualpath::sim
