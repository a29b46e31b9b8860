// Our end of a connection to one peer: its queue of batches, sent one after the other.
#pragma once

#include <chrono>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>

#include "core/event_fd.hpp"
#include "core/event_queue.hpp"
#include "core/piece_check.hpp"
#include "core/put_batch.hpp"
#include "tcp/region_table.hpp"
#include "tcp/tcp_frame.hpp"
#include "tcp/tcp_socket.hpp"

namespace dualpath {

struct SendOptions {
    Token token{};
    int traffic_class = -1;  // see TcpSocket::prepare_for_data
    // Only to a peer of another kernel: within one, a socket's receive queue would hold our own
    // pages, and a batch that we gave up could arrive later with what was written there since.
    bool by_reference = false;
};

// A thread of its own connects and sends, and sleeps while there is nothing to do. A batch ends
// when the peer acknowledged it, or with the connection; then kPeerClosed follows, as the last
// event.
//
// Small pieces are gathered, a thousand a call. Large pieces of a shared file go to the socket by
// reference (sendfile): the kernel does not copy them here.
class TcpSender {
  public:
    TcpSender(std::uint64_t peer_id, const SocketAddress& address, const SendOptions& options,
              std::shared_ptr<const RegionTable> regions, EventQueue& events);
    // Ends without waiting for the peer.
    ~TcpSender();
    TcpSender(const TcpSender&) = delete;
    TcpSender& operator=(const TcpSender&) = delete;

    // Throws PeerClosedError when the connection has ended or is being closed.
    void put(std::unique_ptr<PutBatch> batch);
    // Begins no more batches, waits a second for those begun, then closes. Does not block.
    void disconnect();
    // Closes at once. Does not block.
    void abort(const std::string& why);

  private:
    using Clock = std::chrono::steady_clock;
    // How far sending has come.
    struct Outgoing {
        PutBatch* batch = nullptr;
        std::string head;           // header, descriptors, notice
        std::size_t head_sent = 0;  // bytes
        std::size_t next = 0;       // piece
        std::uint64_t piece_sent = 0;
        bool done() const { return head_sent == head.size() && next == batch->puts.size(); }
    };
    // Why serve() ended.
    struct Stopped {
        std::string why;
    };

    void run();
    void connect();
    void greet();
    [[noreturn]] void serve();
    void take_orders();
    bool begin_next();
    bool send_some();
    std::ptrdiff_t send_gathered();
    std::ptrdiff_t send_file(int file, std::uint64_t file_offset, std::uint64_t num_bytes);
    std::ptrdiff_t send_piece_or_gather();
    void advance(std::size_t num_bytes);
    int file_of(const Put& put);
    void read_acknowledgements();
    std::string receive_acknowledgements();
    void retire(std::uint64_t batch_id);
    void sleep(short events, int timeout_ms);
    int milliseconds_left() const;
    void finish(const std::string& why);

    const std::uint64_t peer_id_;
    const SocketAddress address_;
    const SendOptions options_;
    const std::shared_ptr<const RegionTable> regions_;
    EventQueue& events_;
    EventFd wake_;

    // Both threads.
    mutable std::mutex mutex_;
    std::deque<std::unique_ptr<PutBatch>> submitted_;
    bool closed_ = false;      // refuses puts
    bool disconnect_ = false;  // asked for
    std::string abort_;        // asked for, and why

    // The connection's thread.
    std::optional<TcpSocket> socket_;
    std::deque<std::unique_ptr<PutBatch>> batches_;  // not ended, in order
    std::size_t num_begun_ = 0;                      // of them
    Outgoing out_;
    TcpRegion region_;                           // of the last piece
    std::string acknowledged_;                   // batch ids, the last perhaps in part
    std::optional<Clock::time_point> deadline_;  // of a disconnect

    std::thread thread_;
};

}  // namespace dualpath
