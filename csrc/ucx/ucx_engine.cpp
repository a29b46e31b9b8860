#include "ucx/ucx_engine.hpp"

#include <pthread.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <system_error>
#include <utility>

namespace dualpath {
namespace {

constexpr auto kShutDownTimeout = std::chrono::seconds(2);

void watch(int epoll_fd, int fd) {
    epoll_event event{};
    event.events = EPOLLIN;
    event.data.fd = fd;
    if (epoll_ctl(epoll_fd, EPOLL_CTL_ADD, fd, &event) != 0) {
        throw std::system_error(errno, std::generic_category(), "epoll_ctl");
    }
}

}  // namespace

UcxEngine::UcxEngine(std::shared_ptr<const UcxLibrary> library, EngineOptions options)
    : context_(std::make_shared<UcxContext>(std::move(library))),
      options_(std::move(options)),
      budget_(std::make_shared<PutBudget>(options_.max_inflight_bytes)) {
    if (options_.max_inflight_bytes == 0 || options_.max_put_bytes == 0) {
        throw std::invalid_argument("max_inflight_bytes and max_put_bytes must be positive");
    }
    worker_ = std::make_shared<UcxWorker>(context_, [this](std::string_view notice) {
        events_.push({TransportEvent::Kind::kNotice, 0, true, std::string(notice)});
    });
    worker_address_ = worker_->address();
    listener_ = std::make_unique<UcxListener>(
        worker_, SocketAddress::parse(options_.listen_host, options_.listen_port));
    listen_port_ = listener_->port();
    epoll_fd_ = epoll_create1(EPOLL_CLOEXEC);
    if (epoll_fd_ < 0) throw std::system_error(errno, std::generic_category(), "epoll_create1");
    watch(epoll_fd_, wake_.fd());
    watch(epoll_fd_, worker_->event_fd());
    thread_ = std::thread([this] { run(); });
    pthread_setname_np(thread_.native_handle(), "dualpath-ucx");
}

UcxEngine::~UcxEngine() { close(); }

std::string UcxEngine::register_region(std::uintptr_t address, std::size_t num_bytes) {
    regions_.push_back(std::make_unique<UcxRegion>(context_, address, num_bytes));
    spans_.push_back({address, num_bytes});
    return regions_.back()->packed_key();
}

std::uint64_t UcxEngine::connect(PeerTarget target, std::uint64_t remote_address,
                                 std::uint64_t remote_bytes) {
    if (stopping_) throw PeerClosedError("the transport is closed");
    if (target.memory && !target.memory->span().contains(remote_address, remote_bytes)) {
        throw std::invalid_argument("the peer's region is not in its shared memory");
    }
    auto peer = std::make_shared<Peer>(Span{remote_address, remote_bytes});
    const std::uint64_t peer_id = next_id_++;
    peers_.emplace(peer_id, peer);
    submit(ConnectCommand{peer_id, std::move(peer), std::move(target)});
    return peer_id;
}

std::uint64_t UcxEngine::put(std::uint64_t peer_id, const Piece* pieces, std::size_t num_pieces,
                             std::string notice) {
    check_notice(notice.size());
    check_pieces(spans_, open_peer(peer_id).remote, pieces, num_pieces);
    const std::uint64_t put_id = next_id_++;
    auto batch = std::make_unique<PutBatch>(put_id, pieces, num_pieces, std::move(notice),
                                            options_.max_put_bytes);
    submit(PutCommand{peer_id, std::move(batch)});
    return put_id;
}

void UcxEngine::disconnect(std::uint64_t peer_id) {
    const auto found = peers_.find(peer_id);
    if (found == peers_.end() || found->second->closed.exchange(true)) return;
    submit(DisconnectCommand{peer_id});
}

std::vector<TransportEvent> UcxEngine::poll() {
    std::vector<TransportEvent> events = events_.drain();
    for (const TransportEvent& event : events) {
        if (event.kind == TransportEvent::Kind::kPeerClosed) peers_.erase(event.id);
    }
    return events;
}

void UcxEngine::close() {
    if (!thread_.joinable()) return;
    stopping_ = true;
    wake_.signal();
    thread_.join();
    ::close(epoll_fd_);
    regions_.clear();
    for (auto& [peer_id, peer] : peers_) peer->closed = true;
}

UcxEngine::Peer& UcxEngine::open_peer(std::uint64_t peer_id) {
    const auto found = peers_.find(peer_id);
    if (found == peers_.end() || found->second->closed) {
        throw PeerClosedError("peer " + std::to_string(peer_id) + " is closed");
    }
    return *found->second;
}

void UcxEngine::submit(Command command) {
    const std::lock_guard lock(mutex_);
    if (!accepts_commands_) throw PeerClosedError("the transport is closed");
    commands_.push_back(std::move(command));
    wake_.signal();
}

void UcxEngine::run() {
    std::string why = "the transport was closed";
    try {
        while (!stopping_) {
            while (turn() && !stopping_) {
            }
            if (!stopping_ && worker_->arm()) sleep();
        }
    } catch (const std::exception& error) {
        why = std::string("the transport failed: ") + error.what();
        stopping_ = true;
    }
    shut_down(why);
}

// Progress comes first: it may run callbacks and still say that nothing moved, and what they
// changed must be acted on before the thread sleeps.
bool UcxEngine::turn() {
    bool worked = worker_->progress();
    worked |= run_commands();
    report_finished();
    worked |= listener_->advance();
    worked |= advance_endpoints();
    return worked;
}

bool UcxEngine::run_commands() {
    std::vector<Command> commands;
    {
        const std::lock_guard lock(mutex_);
        commands.swap(commands_);
    }
    for (Command& command : commands) {
        std::visit([this](auto& each) { execute(each); }, command);
    }
    return !commands.empty();
}

void UcxEngine::execute(ConnectCommand& command) {
    try {
        auto endpoint =
            std::make_shared<UcxEndpoint>(worker_, budget_, command.peer_id, command.target);
        connections_.push_back({std::move(command.peer), std::move(endpoint)});
    } catch (const UcxError& error) {
        command.peer->closed = true;
        finished_.emplace_back(command.peer_id, error.what());
    }
}

void UcxEngine::execute(PutCommand& command) {
    if (UcxEndpoint* endpoint = find_endpoint(command.peer_id)) {
        endpoint->enqueue(std::move(command.batch));
        return;
    }
    events_.push(
        {TransportEvent::Kind::kPutDone, command.batch->id, false, "the peer is closed", true});
}

void UcxEngine::execute(DisconnectCommand& command) {
    if (UcxEndpoint* endpoint = find_endpoint(command.peer_id)) {
        endpoint->disconnect(Clock::now());
    }
}

UcxEndpoint* UcxEngine::find_endpoint(std::uint64_t peer_id) {
    for (Connection& connection : connections_) {
        if (connection.endpoint->peer_id() == peer_id) return connection.endpoint.get();
    }
    return nullptr;
}

bool UcxEngine::advance_endpoints() {
    bool worked = false;
    const Clock::time_point now = Clock::now();
    // Whoever came first comes last next time: one peer's backlog must not keep the whole budget.
    if (connections_.size() > 1) {
        connections_.splice(connections_.end(), connections_, connections_.begin());
    }
    for (auto next = connections_.begin(); next != connections_.end();) {
        auto current = next++;
        auto& [peer, endpoint] = *current;
        worked |= endpoint->advance(events_, now);
        // From here on put() refuses; puts that it has let through are answered before
        // kPeerClosed, because report_finished() runs after the commands of the next turn.
        if (!endpoint->accepts_puts()) peer->closed = true;
        if (!endpoint->finished()) continue;
        finished_.emplace_back(endpoint->peer_id(), endpoint->error());
        if (endpoint->abandoned()) endpoint->release_worker()->keep(endpoint);
        connections_.erase(current);
        worked = true;
    }
    return worked;
}

void UcxEngine::report_finished() {
    for (auto& [peer_id, error] : std::exchange(finished_, {})) {
        events_.push({TransportEvent::Kind::kPeerClosed, peer_id, false, std::move(error)});
    }
}

int UcxEngine::milliseconds_to_deadline() const {
    int timeout_ms = finished_.empty() ? -1 : 0;
    for (const Connection& connection : connections_) {
        const auto deadline = connection.endpoint->deadline();
        if (!deadline) continue;
        const auto left = std::chrono::ceil<std::chrono::milliseconds>(*deadline - Clock::now());
        const int left_ms = static_cast<int>(std::max<std::int64_t>(left.count(), 0));
        timeout_ms = timeout_ms < 0 ? left_ms : std::min(timeout_ms, left_ms);
    }
    return timeout_ms;
}

// Commands that came after the last turn have signalled wake_, which stays readable until here.
void UcxEngine::sleep() {
    epoll_event event;
    epoll_wait(epoll_fd_, &event, 1, milliseconds_to_deadline());
    wake_.clear();
}

// Whatever a dead peer does, this ends: endpoints abandon after their own deadline, and the worker
// takes with it what has not closed.
void UcxEngine::shut_down(const std::string& why) {
    {
        const std::lock_guard lock(mutex_);
        accepts_commands_ = false;
    }
    run_commands();
    const Clock::time_point deadline = Clock::now() + kShutDownTimeout;
    for (Connection& connection : connections_) connection.endpoint->abort(why, Clock::now());
    listener_->close();
    while ((!connections_.empty() || !listener_->closed()) && Clock::now() < deadline) {
        if (!turn()) usleep(200);
    }
    // Those that could not close in time: UCX may call them back until the worker is gone.
    for (Connection& connection : connections_) {
        connection.endpoint->give_up(events_);
        finished_.emplace_back(connection.endpoint->peer_id(), why);
        connection.endpoint->release_worker()->keep(connection.endpoint);
    }
    report_finished();
    listener_.reset();
    connections_.clear();
    worker_.reset();
}

}  // namespace dualpath
