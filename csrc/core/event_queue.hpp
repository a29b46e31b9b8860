// Transport events on their way from the progress thread to Python.
#pragma once

#include <cstdint>
#include <string>

#include "core/signalled_queue.hpp"

namespace dualpath {

struct TransportEvent {
    enum class Kind { kPutDone, kNotice, kPeerClosed };
    Kind kind;
    std::uint64_t id;  // put id or peer id; 0 for a notice
    bool ok;           // of kPutDone
    std::string text;  // the notice's bytes, or an error
};

using EventQueue = SignalledQueue<TransportEvent>;

}  // namespace dualpath
