#include "tcp/tcp_sender.hpp"

#include <poll.h>
#include <pthread.h>
#include <sys/sendfile.h>
#include <sys/socket.h>
#include <sys/uio.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <csignal>
#include <cstring>
#include <utility>

namespace dualpath {
namespace {

constexpr std::chrono::seconds kConnectTimeout(10);
constexpr std::chrono::seconds kDrainTimeout(1);
// From here on a system call a piece costs less than copying it into the socket.
constexpr std::uint64_t kFileBytes = 16 << 10;
// Sent before acknowledgements and orders are looked at.
constexpr std::uint64_t kBytesPerTurn = 1 << 20;
constexpr std::size_t kMaxParts = 1024;  // UIO_MAXIOV

std::string head_of(const PutBatch& batch) {
    const FrameHeader header{batch.id, static_cast<std::uint32_t>(batch.puts.size()),
                             static_cast<std::uint32_t>(batch.notice.size())};
    std::string head(reinterpret_cast<const char*>(&header), sizeof header);
    head.reserve(head.size() + batch.puts.size() * sizeof(WirePiece) + batch.notice.size());
    for (const Put& put : batch.puts) {
        const WirePiece piece{put.remote, put.num_bytes};
        head.append(reinterpret_cast<const char*>(&piece), sizeof piece);
    }
    return head += batch.notice;
}

}  // namespace

TcpSender::TcpSender(std::uint64_t peer_id, const SocketAddress& address,
                     const SendOptions& options, std::shared_ptr<const RegionTable> regions,
                     EventQueue& events)
    : peer_id_(peer_id),
      address_(address),
      options_(options),
      regions_(std::move(regions)),
      events_(events),
      thread_([this] { run(); }) {
    pthread_setname_np(thread_.native_handle(), "dualpath-tcp-tx");
}

TcpSender::~TcpSender() {
    abort("the transport was closed");
    thread_.join();
}

void TcpSender::put(std::unique_ptr<PutBatch> batch) {
    if (batch->puts.size() > FrameHeader::kMaxPieces) {
        throw std::invalid_argument("a batch has at most 4194304 pieces");
    }
    const std::lock_guard lock(mutex_);
    if (closed_) throw PeerClosedError("peer " + std::to_string(peer_id_) + " is closed");
    submitted_.push_back(std::move(batch));
    wake_.signal();
}

void TcpSender::disconnect() {
    const std::lock_guard lock(mutex_);
    closed_ = true;
    disconnect_ = true;
    wake_.signal();
}

void TcpSender::abort(const std::string& why) {
    const std::lock_guard lock(mutex_);
    closed_ = true;
    if (abort_.empty()) abort_ = why;
    wake_.signal();
}

void TcpSender::run() {
    // sendfile has no flag that keeps a lost peer from killing the process.
    sigset_t pipe_signal;
    sigemptyset(&pipe_signal);
    sigaddset(&pipe_signal, SIGPIPE);
    pthread_sigmask(SIG_BLOCK, &pipe_signal, nullptr);
    std::string why;
    try {
        connect();
        greet();
        serve();
    } catch (const Stopped& stopped) {
        why = stopped.why;
    } catch (const std::exception& error) {
        why = error.what();
    }
    finish(why);
}

void TcpSender::connect() {
    socket_.emplace(TcpSocket::connecting_to(address_));
    const Clock::time_point deadline = Clock::now() + kConnectTimeout;
    while (true) {
        pollfd waiting{socket_->fd(), POLLOUT, 0};
        take_orders();
        if (::poll(&waiting, 1, 0) == 1) break;
        if (Clock::now() >= deadline) throw TcpError("connecting: the peer does not answer");
        sleep(POLLOUT, static_cast<int>(std::chrono::milliseconds(kConnectTimeout).count()));
    }
    socket_->check_connected();
    socket_->prepare_for_data(options_.traffic_class);
}

void TcpSender::greet() {
    Greeting greeting;
    greeting.token = options_.token;
    // The first bytes of a connection always fit.
    if (::send(socket_->fd(), &greeting, sizeof greeting, MSG_NOSIGNAL) != sizeof greeting) {
        throw_tcp_error("greeting", errno);
    }
}

void TcpSender::serve() {
    while (true) {
        read_acknowledgements();
        take_orders();
        // What comes from here on has signalled the descriptors that sleep() looks at.
        const bool busy = begin_next();
        const bool blocked = busy && !send_some();
        if (blocked) {
            sleep(POLLIN | POLLOUT, milliseconds_left());
        } else if (!busy) {
            sleep(POLLIN, milliseconds_left());
        }
    }
}

// Throws Stopped when there is nothing more to do.
void TcpSender::take_orders() {
    const std::lock_guard lock(mutex_);
    wake_.clear();
    if (!abort_.empty()) throw Stopped{abort_};
    for (auto& batch : submitted_) batches_.push_back(std::move(batch));
    submitted_.clear();
    if (disconnect_ && !deadline_) deadline_ = Clock::now() + kDrainTimeout;
    if (deadline_ && (num_begun_ == 0 || Clock::now() >= *deadline_)) {
        throw Stopped{"disconnected"};
    }
}

// Whether there is something to send.
bool TcpSender::begin_next() {
    if (out_.batch != nullptr) return true;
    if (deadline_ || num_begun_ == batches_.size()) return false;
    PutBatch& batch = *batches_[num_begun_++];
    out_ = Outgoing{&batch, head_of(batch)};
    return true;
}

// False when the socket takes no more.
bool TcpSender::send_some() {
    std::uint64_t left = kBytesPerTurn;
    while (out_.batch != nullptr && left > 0) {
        const std::ptrdiff_t sent = send_piece_or_gather();
        if (sent < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) return false;
        if (sent < 0 && errno == EINTR) continue;
        if (sent < 0) throw_tcp_error("sending", errno);
        advance(static_cast<std::size_t>(sent));
        left -= std::min<std::uint64_t>(left, static_cast<std::uint64_t>(sent));
    }
    return true;
}

std::ptrdiff_t TcpSender::send_piece_or_gather() {
    if (out_.head_sent < out_.head.size()) return send_gathered();
    const Put& put = out_.batch->puts[out_.next];
    const std::uint64_t rest = put.num_bytes - out_.piece_sent;
    const int file = rest < kFileBytes ? -1 : file_of(put);
    if (file < 0) return send_gathered();
    return send_file(file, put.local + out_.piece_sent - region_.span.address, rest);
}

std::ptrdiff_t TcpSender::send_file(int file, std::uint64_t file_offset, std::uint64_t num_bytes) {
    auto offset = static_cast<off_t>(file_offset);
    const ssize_t sent = ::sendfile(socket_->fd(), file, &offset, num_bytes);
    if (sent == 0) throw TcpError("sending: our shared memory is shorter than it was");
    return sent;
}

std::ptrdiff_t TcpSender::send_gathered() {
    std::array<iovec, kMaxParts> parts;
    std::size_t count = 0;
    if (out_.head_sent < out_.head.size()) {
        parts[count++] = {out_.head.data() + out_.head_sent, out_.head.size() - out_.head_sent};
    }
    std::uint64_t total = 0;
    std::uint64_t skipped = out_.piece_sent;
    const std::vector<Put>& puts = out_.batch->puts;
    for (std::size_t i = out_.next; i < puts.size() && count < kMaxParts; ++i) {
        const std::uint64_t rest = puts[i].num_bytes - skipped;
        const bool by_file = rest >= kFileBytes && file_of(puts[i]) >= 0;
        if (by_file || total >= kBytesPerTurn) break;
        parts[count++] = {reinterpret_cast<void*>(puts[i].local + skipped), rest};
        total += rest;
        skipped = 0;
    }
    msghdr message{};
    message.msg_iov = parts.data();
    message.msg_iovlen = count;
    return ::sendmsg(socket_->fd(), &message, MSG_NOSIGNAL);
}

void TcpSender::advance(std::size_t num_bytes) {
    const std::size_t head = std::min(num_bytes, out_.head.size() - out_.head_sent);
    out_.head_sent += head;
    num_bytes -= head;
    const std::vector<Put>& puts = out_.batch->puts;
    while (num_bytes > 0) {
        const std::uint64_t rest = puts[out_.next].num_bytes - out_.piece_sent;
        const std::uint64_t taken = std::min<std::uint64_t>(rest, num_bytes);
        out_.piece_sent += taken;
        num_bytes -= taken;
        if (taken == rest) {
            ++out_.next;
            out_.piece_sent = 0;
        }
    }
    if (out_.done()) out_ = Outgoing{};
}

// The shared file a piece lies in, or -1.
int TcpSender::file_of(const Put& put) {
    if (!options_.by_reference) return -1;
    if (!region_.span.contains(put.local, put.num_bytes)) {
        region_ = regions_->find(put.local, put.num_bytes).value_or(TcpRegion{});
    }
    return region_.file;
}

// What was acknowledged counts also when the connection ended right behind it.
void TcpSender::read_acknowledgements() {
    const std::string end = receive_acknowledgements();
    std::size_t used = 0;
    std::uint64_t batch_id = 0;
    for (; acknowledged_.size() - used >= sizeof batch_id; used += sizeof batch_id) {
        std::memcpy(&batch_id, acknowledged_.data() + used, sizeof batch_id);
        retire(batch_id);
    }
    acknowledged_.erase(0, used);
    if (!end.empty()) throw TcpError(end);
}

// Why the connection ended, if it did.
std::string TcpSender::receive_acknowledgements() {
    std::array<char, 4096> bytes;
    while (true) {
        const ssize_t got = ::recv(socket_->fd(), bytes.data(), bytes.size(), MSG_DONTWAIT);
        if (got < 0 && errno == EINTR) continue;
        if (got < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) return {};
        if (got < 0) return std::string("peer lost: ") + std::strerror(errno);
        if (got == 0) return "the peer closed the connection";
        acknowledged_.append(bytes.data(), static_cast<std::size_t>(got));
    }
}

void TcpSender::retire(std::uint64_t batch_id) {
    const bool expected =
        num_begun_ > 0 && batches_.front()->id == batch_id && batches_.front().get() != out_.batch;
    if (!expected) throw TcpError("the peer acknowledged what was not sent");
    batches_.pop_front();
    --num_begun_;
    events_.push({TransportEvent::Kind::kPutDone, batch_id, true, {}});
}

void TcpSender::sleep(short events, int timeout_ms) {
    pollfd waiting[] = {{wake_.fd(), POLLIN, 0}, {socket_->fd(), events, 0}};
    ::poll(waiting, 2, timeout_ms);
}

int TcpSender::milliseconds_left() const {
    if (!deadline_) return -1;
    const auto left = std::chrono::ceil<std::chrono::milliseconds>(*deadline_ - Clock::now());
    return static_cast<int>(std::max<std::int64_t>(left.count(), 0));
}

void TcpSender::finish(const std::string& why) {
    {
        const std::lock_guard lock(mutex_);
        closed_ = true;
        for (auto& batch : submitted_) batches_.push_back(std::move(batch));
        submitted_.clear();
    }
    if (socket_ && num_begun_ > 0) socket_->drop_unsent();
    socket_.reset();
    for (std::size_t i = 0; i < batches_.size(); ++i) {
        const bool untouched = i >= num_begun_;
        events_.push({TransportEvent::Kind::kPutDone, batches_[i]->id, false, why, untouched});
    }
    events_.push({TransportEvent::Kind::kPeerClosed, peer_id_, false, why});
}

}  // namespace dualpath
