#include "tcp/tcp_listener.hpp"

#include <poll.h>
#include <pthread.h>
#include <sys/socket.h>

#include <cerrno>
#include <system_error>
#include <utility>

namespace dualpath {
namespace {

// A connection costs a thread: strangers cannot have them without end.
constexpr std::size_t kMaxConnections = 4096;
// Out of descriptors or threads: wait for some instead of asking again at once.
constexpr int kRetryMilliseconds = 100;

}  // namespace

TcpListener::TcpListener(const SocketAddress& address, const Token& token,
                         std::shared_ptr<const RegionTable> regions,
                         TcpReceiver::NoticeHandler on_notice)
    : socket_(TcpSocket::listening_on(address)),
      token_(token),
      regions_(std::move(regions)),
      on_notice_(std::move(on_notice)),
      thread_([this] { run(); }) {
    pthread_setname_np(thread_.native_handle(), "dualpath-accept");
}

TcpListener::~TcpListener() { close(); }

void TcpListener::close() {
    if (!thread_.joinable()) return;
    stop_.signal();
    thread_.join();
    receivers_.clear();
}

void TcpListener::run() {
    while (true) {
        pollfd waiting[] = {
            {stop_.fd(), POLLIN, 0}, {ended_.fd(), POLLIN, 0}, {socket_.fd(), POLLIN, 0}};
        if (::poll(waiting, 3, -1) < 0) continue;
        if (waiting[0].revents != 0) return;
        // First: what ended gives back the descriptors that accepting needs.
        ended_.clear();
        std::erase_if(receivers_, [](const auto& receiver) { return receiver->ended(); });
        if (waiting[2].revents == 0) continue;
        try {
            accept();
        } catch (const std::exception&) {
            ::poll(waiting, 1, kRetryMilliseconds);
        }
    }
}

void TcpListener::accept() {
    const int fd = ::accept4(socket_.fd(), nullptr, nullptr, SOCK_CLOEXEC);
    if (fd < 0) {
        if (errno == EMFILE || errno == ENFILE || errno == ENOMEM || errno == ENOBUFS) {
            throw_tcp_error("accepting", errno);
        }
        return;  // the peer was gone already
    }
    TcpSocket socket(fd);
    if (receivers_.size() >= kMaxConnections) return;
    receivers_.push_back(
        std::make_unique<TcpReceiver>(std::move(socket), token_, regions_, on_notice_, ended_));
}

}  // namespace dualpath
