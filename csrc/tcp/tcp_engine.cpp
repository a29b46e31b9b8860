#include "tcp/tcp_engine.hpp"

#include <utility>

namespace dualpath {

TcpEngine::TcpEngine(const TcpOptions& options)
    : max_put_bytes_(options.max_put_bytes),
      traffic_class_(options.traffic_class),
      next_id_(options.first_id) {
    if (max_put_bytes_ == 0) throw std::invalid_argument("max_put_bytes must be positive");
    listener_ = std::make_unique<TcpListener>(
        SocketAddress::parse(options.listen_host, options.listen_port), options.token, regions_,
        [this](std::string_view notice) {
            events_.push({TransportEvent::Kind::kNotice, 0, true, std::string(notice)});
        });
    listen_port_ = listener_->port();
}

TcpEngine::~TcpEngine() { close(); }

void TcpEngine::register_region(std::uintptr_t address, std::size_t num_bytes, int file) {
    regions_->add({{address, num_bytes}, file});
    spans_.push_back({address, num_bytes});
}

std::uint64_t TcpEngine::connect(const SocketAddress& address, const Token& token,
                                 const Span& remote, bool by_reference) {
    if (!listener_) throw PeerClosedError("the transport is closed");
    const std::uint64_t peer_id = next_id_++;
    const SendOptions options{token, traffic_class_, by_reference};
    auto sender = std::make_unique<TcpSender>(peer_id, address, options, regions_, events_);
    peers_.emplace(peer_id, Peer{remote, std::move(sender)});
    return peer_id;
}

std::uint64_t TcpEngine::put(std::uint64_t peer_id, const Piece* pieces, std::size_t num_pieces,
                             std::string notice) {
    check_notice(notice.size());
    const auto found = peers_.find(peer_id);
    if (found == peers_.end()) {
        throw PeerClosedError("peer " + std::to_string(peer_id) + " is closed");
    }
    check_pieces(spans_, found->second.remote, pieces, num_pieces);
    const std::uint64_t put_id = next_id_++;
    found->second.sender->put(
        std::make_unique<PutBatch>(put_id, pieces, num_pieces, std::move(notice), max_put_bytes_));
    return put_id;
}

void TcpEngine::disconnect(std::uint64_t peer_id) {
    const auto found = peers_.find(peer_id);
    if (found != peers_.end()) found->second.sender->disconnect();
}

std::vector<TransportEvent> TcpEngine::poll() {
    std::vector<TransportEvent> events = events_.drain();
    for (const TransportEvent& event : events) {
        // The sender's last event: its thread ends without waiting for anything.
        if (event.kind == TransportEvent::Kind::kPeerClosed) peers_.erase(event.id);
    }
    return events;
}

void TcpEngine::close() {
    listener_.reset();
    for (auto& [peer_id, peer] : peers_) peer.sender->abort("the transport was closed");
    peers_.clear();
}

}  // namespace dualpath
