#include "sim/calendar.hpp"

#include <algorithm>

namespace dualpath::sim {

void Calendar::add(double at_s, EventKind kind, std::uint32_t index, std::uint32_t version) {
    events_.push({std::max(at_s, now_s_), next_order_++, index, version, kind});
}

Event Calendar::next() {
    const Event event = events_.top();
    events_.pop();
    now_s_ = event.at_s;
    return event;
}

}  // namespace dualpath::sim
