// Transport events on their way from the progress thread to Python.
#pragma once

#include <cstdint>
#include <mutex>
#include <string>
#include <vector>

#include "core/event_fd.hpp"

namespace dualpath {

struct TransportEvent {
    enum class Kind { kPutDone, kNotice, kPeerClosed };
    Kind kind;
    std::uint64_t id;  // put id or peer id; 0 for a notice
    bool ok;           // of kPutDone
    std::string text;  // the notice's bytes, or an error
};

// push() from the progress thread, drain() from the owner thread.
// Invariant: fd() is readable exactly while events wait.
class EventQueue {
  public:
    void push(TransportEvent event);
    std::vector<TransportEvent> drain();
    int fd() const { return readable_.fd(); }

  private:
    std::mutex mutex_;
    std::vector<TransportEvent> events_;
    EventFd readable_;
};

}  // namespace dualpath
