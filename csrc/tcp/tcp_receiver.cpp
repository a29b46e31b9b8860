#include "tcp/tcp_receiver.hpp"

#include <pthread.h>
#include <sys/socket.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <utility>

#include "core/piece_check.hpp"

namespace dualpath {
namespace {

// A stranger that says nothing does not keep a thread.
constexpr std::chrono::seconds kGreetingTimeout(5);

constexpr std::size_t kMaxParts = 1024;  // UIO_MAXIOV

// In time that does not tell how much was right.
bool equal(const Token& left, const Token& right) {
    unsigned char difference = 0;
    for (std::size_t i = 0; i < left.size(); ++i) difference |= left[i] ^ right[i];
    return difference == 0;
}

}  // namespace

TcpReceiver::TcpReceiver(TcpSocket socket, const Token& token,
                         std::shared_ptr<const RegionTable> regions, NoticeHandler on_notice,
                         EventFd& on_end)
    : socket_(std::move(socket)),
      token_(token),
      regions_(std::move(regions)),
      on_notice_(std::move(on_notice)),
      on_end_(on_end),
      thread_([this] { run(); }) {
    pthread_setname_np(thread_.native_handle(), "dualpath-tcp-rx");
}

TcpReceiver::~TcpReceiver() { stop(); }

void TcpReceiver::stop() {
    socket_.shut_down();
    if (thread_.joinable()) thread_.join();
}

void TcpReceiver::run() {
    try {
        if (greet()) {
            while (receive_batch()) {
            }
        }
    } catch (const std::exception&) {
        // Whoever broke the protocol or the connection sees it end: there is nobody else to tell.
    }
    socket_.shut_down();
    ended_ = true;
    on_end_.signal();
}

bool TcpReceiver::greet() {
    socket_.prepare_for_data(-1);  // acknowledgements alone
    socket_.set_timeout(std::chrono::milliseconds(kGreetingTimeout));
    Greeting greeting;
    // One call: the timeout is for all of it, however slowly the bytes come.
    if (::recv(socket_.fd(), &greeting, sizeof greeting, MSG_WAITALL) != sizeof greeting) {
        return false;
    }
    socket_.set_timeout(std::chrono::milliseconds(0));
    return greeting.magic == Greeting::kMagic && equal(greeting.token, token_);
}

// False at the end of the connection.
bool TcpReceiver::receive_batch() {
    FrameHeader header;
    if (!read(&header, sizeof header)) return false;
    if (header.num_pieces > FrameHeader::kMaxPieces || header.notice_bytes > kMaxNoticeBytes) {
        throw TcpError("a batch of impossible size");
    }
    pieces_.resize(header.num_pieces);
    notice_.resize(header.notice_bytes);
    std::array<iovec, 2> description{
        {{pieces_.data(), pieces_.size() * sizeof(WirePiece)}, {notice_.data(), notice_.size()}}};
    if (!read(description.data(), description.size())) return false;
    read_pieces();
    if (!notice_.empty()) on_notice_(notice_);
    acknowledge(header.batch_id);
    return true;
}

// The kernel scatters: one call for a thousand pieces, no copy of ours.
void TcpReceiver::read_pieces() {
    std::array<iovec, kMaxParts> parts;
    for (std::size_t next = 0; next < pieces_.size();) {
        const std::size_t count = std::min(kMaxParts, pieces_.size() - next);
        for (std::size_t i = 0; i < count; ++i) {
            const WirePiece& piece = pieces_[next + i];
            if (!regions_->find(piece.remote, piece.num_bytes)) {
                throw TcpError("a piece outside our regions");
            }
            parts[i] = {reinterpret_cast<void*>(piece.remote), piece.num_bytes};
        }
        if (!read(parts.data(), count)) throw TcpError("a batch was cut short");
        next += count;
    }
}

bool TcpReceiver::read(void* to, std::size_t num_bytes) {
    iovec part{to, num_bytes};
    return read(&part, 1);
}

// False when the connection ended.
bool TcpReceiver::read(iovec* first, std::size_t count) {
    while (true) {
        while (count > 0 && first->iov_len == 0) {
            ++first;
            --count;
        }
        if (count == 0) return true;
        msghdr message{};
        message.msg_iov = first;
        message.msg_iovlen = count;
        const ssize_t got = ::recvmsg(socket_.fd(), &message, MSG_WAITALL);
        if (got < 0 && errno == EINTR) continue;
        if (got < 0) throw_tcp_error("reading", errno);
        if (got == 0) return false;
        auto left = static_cast<std::size_t>(got);
        while (left > 0) {
            const std::size_t taken = std::min(left, first->iov_len);
            first->iov_base = static_cast<char*>(first->iov_base) + taken;
            first->iov_len -= taken;
            left -= taken;
            if (first->iov_len == 0) {
                ++first;
                --count;
            }
        }
    }
}

void TcpReceiver::acknowledge(std::uint64_t batch_id) {
    const auto* bytes = reinterpret_cast<const char*>(&batch_id);
    for (std::size_t sent = 0; sent < sizeof batch_id;) {
        const ssize_t count =
            ::send(socket_.fd(), bytes + sent, sizeof batch_id - sent, MSG_NOSIGNAL);
        if (count < 0 && errno == EINTR) continue;
        if (count < 0) throw_tcp_error("acknowledging", errno);
        sent += static_cast<std::size_t>(count);
    }
}

}  // namespace dualpath
