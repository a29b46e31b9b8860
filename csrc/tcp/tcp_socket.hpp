// A TCP socket.
#pragma once

#include <chrono>
#include <cstddef>
#include <stdexcept>

#include "core/socket_address.hpp"

namespace dualpath {

// A connection that cannot go on, with the reason.
class TcpError : public std::runtime_error {
  public:
    using std::runtime_error::runtime_error;
};

// `what`: the reason from errno.
[[noreturn]] void throw_tcp_error(const char* what, int error);

// Owns the descriptor. shut_down() may be called from any thread and ends every blocked call.
class TcpSocket {
  public:
    // Waits for nothing: the connection is being made when it returns.
    static TcpSocket connecting_to(const SocketAddress& address);
    // Throws TcpError when the address is not this host's or the port is taken.
    static TcpSocket listening_on(const SocketAddress& address);

    explicit TcpSocket(int fd) : fd_(fd) {}
    ~TcpSocket();
    TcpSocket(TcpSocket&& other) noexcept;
    TcpSocket& operator=(TcpSocket&& other) = delete;

    int fd() const { return fd_; }
    SocketAddress local_address() const;
    // Throws TcpError with the reason if the connection was refused or lost.
    void check_connected() const;
    // No delay, and an end to peers that vanish without a word. `traffic_class`: the byte of IP's
    // header that switches choose a queue by (DSCP in its upper six bits), or -1.
    void prepare_for_data(int traffic_class) const;
    // How long a blocked read or write may take; zero for ever.
    void set_timeout(std::chrono::milliseconds timeout) const;
    // Lets the kernel forget what was sent and not acknowledged, when the socket is destroyed.
    void drop_unsent() const;
    void shut_down() const;

  private:
    int fd_;
};

}  // namespace dualpath
