// The UCX transport: what Python owns. One progress thread, one worker, one listener.
#pragma once

#include <sys/epoll.h>

#include <atomic>
#include <cstdint>
#include <list>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <unordered_map>
#include <variant>
#include <vector>

#include "core/event_fd.hpp"
#include "core/event_queue.hpp"
#include "core/piece_check.hpp"
#include "ucx/ucx_endpoint.hpp"
#include "ucx/ucx_listener.hpp"
#include "ucx/ucx_region.hpp"

namespace dualpath {

struct EngineOptions {
    std::string listen_host;
    std::uint16_t listen_port = 0;
    std::uint64_t max_inflight_bytes = 0;
    std::uint64_t max_put_bytes = 0;
};

// Public methods from one owner thread. They check, queue a command and return; UCX's worker is
// driven by the progress thread alone, which sleeps while nothing moves and never enters Python.
class UcxEngine {
  public:
    UcxEngine(std::shared_ptr<const UcxLibrary> library, EngineOptions options);
    // Closes.
    ~UcxEngine();
    UcxEngine(const UcxEngine&) = delete;
    UcxEngine& operator=(const UcxEngine&) = delete;

    const std::string& worker_address() const { return worker_address_; }
    std::uint16_t listen_port() const { return listen_port_; }
    std::string context_info() const { return context_->info(); }
    int event_fd() const { return events_.fd(); }

    // Returns the packed key.
    std::string register_region(std::uintptr_t address, std::size_t num_bytes);
    // Returns a peer id; a failure arrives as kPeerClosed.
    std::uint64_t connect(PeerTarget target, std::uint64_t remote_address,
                          std::uint64_t remote_bytes);
    // Returns a put id. Throws PeerClosedError, or std::invalid_argument for a piece outside.
    std::uint64_t put(std::uint64_t peer_id, const Piece* pieces, std::size_t num_pieces,
                      std::string notice);
    void disconnect(std::uint64_t peer_id);
    std::vector<TransportEvent> poll();
    // Ends what is under way within about kCloseTimeout; poll() still returns what it led to.
    void close();

  private:
    // What the owner thread knows of a peer.
    struct Peer {
        explicit Peer(const Span& remote) : remote(remote) {}
        const Span remote;
        std::atomic<bool> closed{false};
    };
    struct ConnectCommand {
        std::uint64_t peer_id;
        std::shared_ptr<Peer> peer;
        PeerTarget target;
    };
    struct PutCommand {
        std::uint64_t peer_id;
        std::unique_ptr<PutBatch> batch;
    };
    struct DisconnectCommand {
        std::uint64_t peer_id;
    };
    using Command = std::variant<ConnectCommand, PutCommand, DisconnectCommand>;
    struct Connection {
        std::shared_ptr<Peer> peer;
        std::shared_ptr<UcxEndpoint> endpoint;
    };

    Peer& open_peer(std::uint64_t peer_id);
    void submit(Command command);

    // The rest runs on the progress thread.
    void run();
    bool turn();
    bool run_commands();
    void execute(ConnectCommand& command);
    void execute(PutCommand& command);
    void execute(DisconnectCommand& command);
    UcxEndpoint* find_endpoint(std::uint64_t peer_id);
    bool advance_endpoints();
    void report_finished();
    void sleep();
    int milliseconds_to_deadline() const;
    void shut_down(const std::string& why);

    std::shared_ptr<UcxContext> context_;
    EngineOptions options_;
    std::string worker_address_;
    std::uint16_t listen_port_ = 0;
    EventQueue events_;

    // Owner thread.
    std::vector<std::unique_ptr<UcxRegion>> regions_;
    std::vector<Span> spans_;  // of the regions
    std::unordered_map<std::uint64_t, std::shared_ptr<Peer>> peers_;
    std::uint64_t next_id_ = 1;

    // Both threads.
    std::mutex mutex_;
    std::vector<Command> commands_;
    bool accepts_commands_ = true;
    std::atomic<bool> stopping_{false};
    EventFd wake_;

    // Progress thread.
    std::shared_ptr<UcxWorker> worker_;
    std::unique_ptr<UcxListener> listener_;
    std::shared_ptr<PutBudget> budget_;
    std::list<Connection> connections_;
    std::vector<std::pair<std::uint64_t, std::string>> finished_;  // peer id, error
    int epoll_fd_ = -1;

    std::thread thread_;
};

}  // namespace dualpath
