// The FIFO of requests that no engine could take yet, as far as a policy has to know it: lengths.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace dualpath::policy {

// Running sums instead of lengths: how many tokens of the line fit some room is one binary search.
class WaitingLine {
  public:
    using Ticket = std::uint64_t;

    // Adds a request at the end. Throws std::invalid_argument for a negative length.
    Ticket push(std::int64_t num_tokens);
    // Takes the head off. Throws std::out_of_range when the line is empty.
    void pop();
    // Takes out a request anywhere in the line; false when it is not in it. Costs O(line), cheaply.
    bool cancel(Ticket ticket);

    std::size_t size() const { return num_waiting_; }
    bool empty() const { return num_waiting_ == 0; }
    std::int64_t num_tokens() const;
    // The ticket of the head. Throws std::out_of_range when the line is empty.
    Ticket head() const;
    // Tokens of the longest part of the line, from its head on, that fits `room` tokens.
    std::int64_t tokens_fitting(std::int64_t room) const;

  private:
    void leave();  // the entry at begin_
    void compact();

    // One entry a ticket from first_ticket_ on; those before begin_ have left. A cancelled one
    // stays as an entry that adds nothing.
    std::vector<std::int64_t> sums_;
    std::vector<bool> cancelled_;
    std::int64_t sum_before_ = 0;  // up to begin_
    std::size_t begin_ = 0;
    std::size_t num_waiting_ = 0;
    Ticket first_ticket_ = 0;
};

}  // namespace dualpath::policy
