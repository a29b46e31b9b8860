#include "tcp/tcp_socket.hpp"

#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <string>
#include <utility>

namespace dualpath {
namespace {

// A peer that vanished without a word is noticed within this: by probes while nothing is sent, by
// unanswered bytes while something is.
constexpr int kIdleSeconds = 10;
constexpr int kProbeSeconds = 5;
constexpr int kProbes = 4;
constexpr int kUnansweredMilliseconds = 30'000;

constexpr int kBacklog = 128;

void set_option(int fd, int level, int name, int value) {
    if (::setsockopt(fd, level, name, &value, sizeof value) != 0) {
        throw_tcp_error("setting a socket's options", errno);
    }
}

// BBR spreads what it sends by timers. Over the round trips of a data centre that costs a third of
// the rate and finds nothing that loss would not tell; any other default is the operator's choice.
void avoid_pacing(int fd) {
    char name[16] = {};
    socklen_t size = sizeof name;
    if (::getsockopt(fd, IPPROTO_TCP, TCP_CONGESTION, name, &size) != 0) return;
    if (std::strncmp(name, "bbr", 3) != 0) return;
    constexpr char kCubic[] = "cubic";
    // Where there is no cubic it stays as it is: slower, and as right.
    [[maybe_unused]] const int result =
        ::setsockopt(fd, IPPROTO_TCP, TCP_CONGESTION, kCubic, sizeof kCubic - 1);
}

int open_socket(const SocketAddress& address, int flags) {
    const int fd = ::socket(address.get()->sa_family, SOCK_STREAM | SOCK_CLOEXEC | flags, 0);
    if (fd < 0) throw_tcp_error("making a socket (`ulimit -n`?)", errno);
    return fd;
}

}  // namespace

void throw_tcp_error(const char* what, int error) {
    throw TcpError(std::string(what) + ": " + std::strerror(error));
}

TcpSocket TcpSocket::connecting_to(const SocketAddress& address) {
    TcpSocket socket(open_socket(address, SOCK_NONBLOCK));
    if (::connect(socket.fd_, address.get(), address.size) != 0 && errno != EINPROGRESS) {
        throw_tcp_error("connecting", errno);
    }
    return socket;
}

TcpSocket TcpSocket::listening_on(const SocketAddress& address) {
    TcpSocket socket(open_socket(address, SOCK_NONBLOCK));
    set_option(socket.fd_, SOL_SOCKET, SO_REUSEADDR, 1);
    if (::bind(socket.fd_, address.get(), address.size) != 0 ||
        ::listen(socket.fd_, kBacklog) != 0) {
        throw_tcp_error("listening for peers (is the address this host's, the port free?)", errno);
    }
    return socket;
}

TcpSocket::~TcpSocket() {
    if (fd_ >= 0) ::close(fd_);
}

TcpSocket::TcpSocket(TcpSocket&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}

SocketAddress TcpSocket::local_address() const {
    SocketAddress address;
    address.size = sizeof address.storage;
    auto* storage = reinterpret_cast<sockaddr*>(&address.storage);
    if (::getsockname(fd_, storage, &address.size) != 0)
        throw_tcp_error("asking for the port", errno);
    return address;
}

void TcpSocket::check_connected() const {
    int error = 0;
    socklen_t size = sizeof error;
    if (::getsockopt(fd_, SOL_SOCKET, SO_ERROR, &error, &size) != 0) error = errno;
    if (error != 0) throw_tcp_error("connecting", error);
}

void TcpSocket::prepare_for_data(int traffic_class) const {
    set_option(fd_, IPPROTO_TCP, TCP_NODELAY, 1);
    set_option(fd_, SOL_SOCKET, SO_KEEPALIVE, 1);
    set_option(fd_, IPPROTO_TCP, TCP_KEEPIDLE, kIdleSeconds);
    set_option(fd_, IPPROTO_TCP, TCP_KEEPINTVL, kProbeSeconds);
    set_option(fd_, IPPROTO_TCP, TCP_KEEPCNT, kProbes);
    set_option(fd_, IPPROTO_TCP, TCP_USER_TIMEOUT, kUnansweredMilliseconds);
    avoid_pacing(fd_);
    if (traffic_class < 0) return;
    const bool is_v6 = local_address().get()->sa_family == AF_INET6;
    set_option(fd_, is_v6 ? IPPROTO_IPV6 : IPPROTO_IP, is_v6 ? IPV6_TCLASS : IP_TOS, traffic_class);
}

void TcpSocket::set_timeout(std::chrono::milliseconds timeout) const {
    const timeval value{timeout.count() / 1000, timeout.count() % 1000 * 1000};
    for (const int name : {SO_RCVTIMEO, SO_SNDTIMEO}) {
        if (::setsockopt(fd_, SOL_SOCKET, name, &value, sizeof value) != 0) {
            throw_tcp_error("setting a socket's timeout", errno);
        }
    }
}

void TcpSocket::drop_unsent() const {
    const linger now{1, 0};
    // Only a hint to the kernel: what it still sends is not noticed as good by the peer.
    [[maybe_unused]] const int result = ::setsockopt(fd_, SOL_SOCKET, SO_LINGER, &now, sizeof now);
}

void TcpSocket::shut_down() const { ::shutdown(fd_, SHUT_RDWR); }

}  // namespace dualpath
