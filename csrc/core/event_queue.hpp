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
    // Of a kPutDone that is not ok: not a byte of it was sent, nor will be.
    bool untouched = false;
};

using EventQueue = SignalledQueue<TransportEvent>;

}  // namespace dualpath
