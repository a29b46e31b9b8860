#include "core/event_queue.hpp"

#include <poll.h>

#include <thread>

#include "check.hpp"

using namespace dualpath;

namespace {

bool readable(int fd) {
    pollfd waiting{fd, POLLIN, 0};
    return ::poll(&waiting, 1, 0) == 1;
}

}  // namespace

TEST(event_queue_is_readable_exactly_while_events_wait) {
    EventQueue queue;
    CHECK(!readable(queue.fd()));
    queue.push({TransportEvent::Kind::kNotice, 0, true, "a"});
    queue.push({TransportEvent::Kind::kNotice, 0, true, "b"});
    CHECK(readable(queue.fd()));
    CHECK(queue.drain().size() == 2);
    CHECK(!readable(queue.fd()));
    CHECK(queue.drain().empty());
}

TEST(event_queue_loses_nothing_between_two_threads) {
    constexpr std::uint64_t kEvents = 20000;
    EventQueue queue;
    std::thread pusher([&] {
        for (std::uint64_t id = 0; id < kEvents; ++id) {
            queue.push({TransportEvent::Kind::kPutDone, id, true, {}});
        }
    });
    std::uint64_t next = 0;
    bool in_order = true;
    while (next < kEvents) {
        pollfd waiting{queue.fd(), POLLIN, 0};
        ::poll(&waiting, 1, 1000);
        for (const TransportEvent& event : queue.drain()) in_order &= event.id == next++;
    }
    pusher.join();
    CHECK(in_order && next == kEvents);
}
