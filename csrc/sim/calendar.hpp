// What happens next: events by time, and by the order in which they were asked for among equals.
#pragma once

#include <cstdint>
#include <queue>
#include <vector>

namespace dualpath::sim {

enum class EventKind : std::uint8_t {
    kAgentArrives,
    kTurnBegins,
    kStorageRead,
    kPrefillStep,
    kCacheLoaded,
    kDecodeStep,
    kReport,
    kFault,
    kFaultEnds,
};

struct Event {
    double at_s;
    std::uint64_t order;
    std::uint32_t index;    // of the agent, node, group or engine that it is for
    std::uint32_t version;  // of that thing when the event was asked for: a later one voids it
    EventKind kind;
};

class Calendar {
  public:
    // `at_s` must not lie before now: then it counts as now.
    void add(double at_s, EventKind kind, std::uint32_t index, std::uint32_t version = 0);
    bool empty() const { return events_.empty(); }
    // The next event; now moves to its time. There must be one.
    Event next();
    double now() const { return now_s_; }

  private:
    struct Later {
        bool operator()(const Event& a, const Event& b) const {
            return a.at_s != b.at_s ? a.at_s > b.at_s : a.order > b.order;
        }
    };

    std::priority_queue<Event, std::vector<Event>, Later> events_;
    std::uint64_t next_order_ = 0;
    double now_s_ = 0;
};

}  // namespace dualpath::sim
