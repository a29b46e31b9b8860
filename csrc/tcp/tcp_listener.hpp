// Accepts the connections of peers.
#pragma once

#include <cstdint>
#include <list>
#include <memory>
#include <thread>

#include "core/event_fd.hpp"
#include "tcp/tcp_receiver.hpp"

namespace dualpath {

// Owner thread: the constructor, port() and close(). A thread of its own accepts.
class TcpListener {
  public:
    // Throws TcpError when it cannot listen there.
    TcpListener(const SocketAddress& address, const Token& token,
                std::shared_ptr<const RegionTable> regions, TcpReceiver::NoticeHandler on_notice);
    // Closes.
    ~TcpListener();
    TcpListener(const TcpListener&) = delete;
    TcpListener& operator=(const TcpListener&) = delete;

    std::uint16_t port() const { return socket_.local_address().port(); }
    // When it returns, no peer writes here any more. Twice is fine.
    void close();

  private:
    void run();
    void accept();

    const TcpSocket socket_;
    const Token token_;
    const std::shared_ptr<const RegionTable> regions_;
    const TcpReceiver::NoticeHandler on_notice_;
    EventFd ended_;                                      // of some receiver; outlives them
    std::list<std::unique_ptr<TcpReceiver>> receivers_;  // of the accepting thread, then of close()
    EventFd stop_;
    std::thread thread_;
};

}  // namespace dualpath
