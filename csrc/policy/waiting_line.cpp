#include "policy/waiting_line.hpp"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace dualpath::policy {

namespace {
constexpr std::size_t kCompactFrom = 1024;  // entries that have left, before memory is moved
}

WaitingLine::Ticket WaitingLine::push(std::int64_t num_tokens) {
    if (num_tokens < 0) {
        throw std::invalid_argument(
            "a waiting request's length: expected 0 or more tokens, found " +
            std::to_string(num_tokens));
    }
    const std::int64_t before = sums_.empty() ? sum_before_ : sums_.back();
    sums_.push_back(before + num_tokens);
    cancelled_.push_back(false);
    ++num_waiting_;
    return first_ticket_ + sums_.size() - 1;
}

void WaitingLine::pop() {
    if (empty()) throw std::out_of_range("the waiting line is empty");
    --num_waiting_;
    leave();
    while (begin_ < sums_.size() && cancelled_[begin_]) leave();
    if (begin_ >= kCompactFrom && 2 * begin_ > sums_.size()) compact();
}

bool WaitingLine::cancel(Ticket ticket) {
    if (ticket < first_ticket_ + begin_ || ticket >= first_ticket_ + sums_.size()) return false;
    const std::size_t index = ticket - first_ticket_;
    if (cancelled_[index]) return false;
    if (index == begin_) {
        pop();
        return true;
    }
    const std::int64_t length = sums_[index] - sums_[index - 1];
    for (std::size_t i = index; i < sums_.size(); ++i) sums_[i] -= length;
    cancelled_[index] = true;
    --num_waiting_;
    return true;
}

std::int64_t WaitingLine::num_tokens() const { return empty() ? 0 : sums_.back() - sum_before_; }

WaitingLine::Ticket WaitingLine::head() const {
    if (empty()) throw std::out_of_range("the waiting line is empty");
    return first_ticket_ + begin_;
}

std::int64_t WaitingLine::tokens_fitting(std::int64_t room) const {
    const std::int64_t all = num_tokens();
    if (all <= room) return all;
    const auto first = sums_.begin() + static_cast<std::ptrdiff_t>(begin_);
    const auto end = std::upper_bound(first, sums_.end(), sum_before_ + room);
    return end == first ? 0 : *(end - 1) - sum_before_;
}

void WaitingLine::leave() {
    sum_before_ = sums_[begin_];
    ++begin_;
}

void WaitingLine::compact() {
    const auto gone = static_cast<std::ptrdiff_t>(begin_);
    sums_.erase(sums_.begin(), sums_.begin() + gone);
    cancelled_.erase(cancelled_.begin(), cancelled_.begin() + gone);
    first_ticket_ += begin_;
    begin_ = 0;
}

}  // namespace dualpath::policy
