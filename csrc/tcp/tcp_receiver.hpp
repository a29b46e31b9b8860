// One incoming connection: a peer's batches, scattered into our memory.
#pragma once

#include <sys/uio.h>

#include <atomic>
#include <cstddef>
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

#include "core/event_fd.hpp"
#include "tcp/region_table.hpp"
#include "tcp/tcp_frame.hpp"
#include "tcp/tcp_socket.hpp"

namespace dualpath {

// A thread of its own reads the connection; the kernel puts it to sleep while nothing comes. It
// ends with the connection, at the first byte that breaks the protocol, or by stop(). What was
// received of a batch cut short lies in memory, and nothing says that it is good.
class TcpReceiver {
  public:
    using NoticeHandler = std::function<void(std::string_view)>;

    // `on_notice` runs on the connection's thread; `on_end` is signalled when that has ended.
    TcpReceiver(TcpSocket socket, const Token& token, std::shared_ptr<const RegionTable> regions,
                NoticeHandler on_notice, EventFd& on_end);
    // Stops.
    ~TcpReceiver();
    TcpReceiver(const TcpReceiver&) = delete;
    TcpReceiver& operator=(const TcpReceiver&) = delete;

    // When it returns, no byte is written any more.
    void stop();
    bool ended() const { return ended_; }

  private:
    void run();
    bool greet();
    bool receive_batch();
    void read_pieces();
    bool read(void* to, std::size_t num_bytes);
    bool read(iovec* first, std::size_t count);
    void acknowledge(std::uint64_t batch_id);

    const TcpSocket socket_;
    const Token token_;
    const std::shared_ptr<const RegionTable> regions_;
    const NoticeHandler on_notice_;
    EventFd& on_end_;
    std::vector<WirePiece> pieces_;  // of the batch at hand
    std::string notice_;
    std::atomic<bool> ended_{false};
    std::thread thread_;
};

}  // namespace dualpath
