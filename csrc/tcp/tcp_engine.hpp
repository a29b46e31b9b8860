// The TCP transport: what Python owns. A listener, and a sender to each peer.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "tcp/tcp_listener.hpp"
#include "tcp/tcp_sender.hpp"

namespace dualpath {

struct TcpOptions {
    std::string listen_host;
    std::uint16_t listen_port = 0;
    Token token{};
    std::uint64_t max_put_bytes = 0;
    std::uint64_t first_id = 1;  // of peers and puts
    int traffic_class = -1;      // of what is sent: see TcpSocket::prepare_for_data
};

// All methods from one owner thread; none blocks but close().
class TcpEngine {
  public:
    // Throws TcpError when it cannot listen there.
    explicit TcpEngine(const TcpOptions& options);
    // Closes.
    ~TcpEngine();
    TcpEngine(const TcpEngine&) = delete;
    TcpEngine& operator=(const TcpEngine&) = delete;

    std::uint16_t listen_port() const { return listen_port_; }
    int event_fd() const { return events_.fd(); }

    // `file`: the shared file mapped at `address` from its start, open until close(); or -1.
    void register_region(std::uintptr_t address, std::size_t num_bytes, int file);
    // Returns a peer id; a failure arrives as kPeerClosed. `by_reference`: see SendOptions.
    std::uint64_t connect(const SocketAddress& address, const Token& token, const Span& remote,
                          bool by_reference);
    // Returns a put id. Throws PeerClosedError, or std::invalid_argument for a piece outside.
    std::uint64_t put(std::uint64_t peer_id, const Piece* pieces, std::size_t num_pieces,
                      std::string notice);
    void disconnect(std::uint64_t peer_id);
    std::vector<TransportEvent> poll();
    // Ends what is under way; poll() still returns what it led to. No peer writes here afterwards.
    void close();

  private:
    struct Peer {
        Span remote;
        std::unique_ptr<TcpSender> sender;
    };

    const std::uint64_t max_put_bytes_;
    const int traffic_class_;
    const std::shared_ptr<RegionTable> regions_ = std::make_shared<RegionTable>();
    std::vector<Span> spans_;  // of the regions
    EventQueue events_;
    std::unique_ptr<TcpListener> listener_;
    std::uint16_t listen_port_;
    std::unordered_map<std::uint64_t, Peer> peers_;
    std::uint64_t next_id_;
};

}  // namespace dualpath
