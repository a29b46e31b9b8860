// Two engines of one process: every thread and lock of the TCP transport, under the sanitizers.
#include "tcp/tcp_engine.hpp"

#include <netinet/in.h>
#include <poll.h>
#include <sys/socket.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <numeric>
#include <random>

#include "check.hpp"
#include "shared_file.hpp"

using namespace dualpath;
using dualpath::test::Staging;

namespace {

using Kind = TransportEvent::Kind;

constexpr std::size_t kBytes = 8 << 20;
constexpr Token kToken{1, 2, 3};

struct Side {
    explicit Side(bool by_file = true)
        : staging(kBytes), engine({"127.0.0.1", 0, kToken, 1 << 30}) {
        engine.register_region(staging.address(), kBytes, by_file ? staging.file().fd : -1);
    }
    // The first `count` events, or those that came within ten seconds.
    std::vector<TransportEvent> events(std::size_t count) {
        std::vector<TransportEvent> all;
        const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(10);
        while (all.size() < count && std::chrono::steady_clock::now() < deadline) {
            pollfd waiting{engine.event_fd(), POLLIN, 0};
            ::poll(&waiting, 1, 100);
            for (auto& event : engine.poll()) all.push_back(std::move(event));
        }
        return all;
    }
    std::uint64_t connect(Side& to, const Token& token = kToken) {
        return engine.connect(SocketAddress::parse("127.0.0.1", to.engine.listen_port()), token,
                              {to.staging.address(), kBytes}, true);
    }

    Staging staging;
    TcpEngine engine;
};

std::vector<Piece> scattered(Side& from, Side& to, std::size_t piece_bytes) {
    std::vector<std::size_t> order(kBytes / piece_bytes);
    std::iota(order.begin(), order.end(), 0);
    std::shuffle(order.begin(), order.end(), std::mt19937(5));
    std::vector<Piece> pieces;
    for (std::size_t i = 0; i < order.size(); ++i) {
        pieces.push_back({from.staging.address() + i * piece_bytes,
                          to.staging.address() + order[i] * piece_bytes, piece_bytes});
    }
    return pieces;
}

void check_scattered_put(std::size_t piece_bytes, bool by_file) {
    Side from(by_file);
    Side to;
    std::mt19937 generator(1);
    for (std::size_t i = 0; i < kBytes; i += 4) {
        const std::uint32_t word = generator();
        std::memcpy(from.staging.data() + i, &word, sizeof word);
    }
    const std::uint64_t peer = from.connect(to);
    const auto pieces = scattered(from, to, piece_bytes);
    const std::uint64_t put = from.engine.put(peer, pieces.data(), pieces.size(), "done");
    const auto arrived = to.events(1);
    CHECK(arrived.size() == 1 && arrived[0].kind == Kind::kNotice && arrived[0].text == "done");
    for (const auto& [local, remote, num_bytes] : pieces) {
        CHECK(std::memcmp(reinterpret_cast<void*>(local), reinterpret_cast<void*>(remote),
                          num_bytes) == 0);
    }
    const auto ended = from.events(1);
    CHECK(ended.size() == 1 && ended[0].kind == Kind::kPutDone && ended[0].ok);
    CHECK(ended[0].id == put);
    from.engine.disconnect(peer);
    const auto closed = from.events(1);
    CHECK(closed.size() == 1 && closed[0].kind == Kind::kPeerClosed && closed[0].id == peer);
}

}  // namespace

TEST(tcp_engine_put_gathered) {
    check_scattered_put(4096, true);
}
TEST(tcp_engine_put_by_file) {
    check_scattered_put(32768, true);
}
TEST(tcp_engine_put_without_file) {
    check_scattered_put(32768, false);
}

TEST(tcp_engine_many_small_batches_end_in_order) {
    Side from;
    Side to;
    const std::uint64_t peer = from.connect(to);
    std::vector<std::uint64_t> ids;
    for (std::uint64_t i = 0; i < 500; ++i) {
        const Piece piece{from.staging.address() + i, to.staging.address() + i, 1};
        ids.push_back(from.engine.put(peer, &piece, 1, i % 2 == 0 ? "even" : ""));
    }
    const auto events = from.events(ids.size());
    CHECK(events.size() == ids.size());
    for (std::size_t i = 0; i < ids.size(); ++i) CHECK(events[i].id == ids[i] && events[i].ok);
    CHECK(to.events(250).size() == 250);
}

TEST(tcp_engine_disconnect_ends_every_put) {
    Side from;
    Side to;
    const std::uint64_t peer = from.connect(to);
    const auto pieces = scattered(from, to, 4096);
    for (int i = 0; i < 20; ++i) from.engine.put(peer, pieces.data(), pieces.size(), "n");
    from.engine.disconnect(peer);
    CHECK_THROWS(from.engine.put(peer, pieces.data(), 1, ""), PeerClosedError);
    const auto events = from.events(21);
    CHECK(events.size() == 21 && events.back().kind == Kind::kPeerClosed);
}

TEST(tcp_engine_closes_with_puts_under_way) {
    for (int repeat = 0; repeat < 5; ++repeat) {
        Side to;
        Side from;
        const std::uint64_t peer = from.connect(to);
        const auto pieces = scattered(from, to, 16384);
        for (int i = 0; i < 10; ++i) from.engine.put(peer, pieces.data(), pieces.size(), "n");
        (repeat % 2 == 0 ? from : to).engine.close();
        const auto events = from.events(11);
        CHECK(events.size() == 11 && events.back().kind == Kind::kPeerClosed);
    }
}

TEST(tcp_engine_turns_a_stranger_away) {
    Side from;
    Side to;
    const std::uint64_t peer = from.connect(to, Token{});
    const Piece piece{from.staging.address(), to.staging.address(), 64};
    std::memset(from.staging.data(), 1, 64);
    from.engine.put(peer, &piece, 1, "evil");
    const auto events = from.events(2);
    CHECK(events.size() == 2 && !events[0].ok && events[1].kind == Kind::kPeerClosed);
    CHECK(to.staging.data()[0] == 0 && to.engine.poll().empty());
}

TEST(tcp_engine_says_what_was_never_sent) {
    Side from;
    std::uint16_t port = 0;
    {
        Side gone;
        port = gone.engine.listen_port();
    }
    const std::uint64_t peer = from.engine.connect(SocketAddress::parse("127.0.0.1", port), kToken,
                                                   {0x10000, kBytes}, true);
    const Piece piece{from.staging.address(), 0x10000, 64};
    bool refused = false;
    try {
        from.engine.put(peer, &piece, 1, "n");
    } catch (const PeerClosedError&) {
        refused = true;  // the connection had failed already
    }
    const auto events = from.events(refused ? 1 : 2);
    CHECK(events.back().kind == Kind::kPeerClosed);
    CHECK(refused || (!events[0].ok && events[0].untouched));
}

TEST(tcp_socket_puts_its_data_in_a_traffic_class) {
    const TcpSocket listener = TcpSocket::listening_on(SocketAddress::parse("127.0.0.1", 0));
    const TcpSocket socket = TcpSocket::connecting_to(listener.local_address());
    socket.prepare_for_data(0x20);
    int found = 0;
    socklen_t size = sizeof found;
    CHECK(::getsockopt(socket.fd(), IPPROTO_IP, IP_TOS, &found, &size) == 0 && found == 0x20);
}

TEST(tcp_engine_refuses_pieces_outside) {
    Side from;
    Side to;
    const std::uint64_t peer = from.connect(to);
    const Piece local{from.staging.address() + kBytes - 1, to.staging.address(), 2};
    const Piece remote{from.staging.address(), to.staging.address() - 1, 2};
    const Piece empty{from.staging.address(), to.staging.address(), 0};
    for (const Piece& piece : {local, remote, empty}) {
        CHECK_THROWS(from.engine.put(peer, &piece, 1, ""), std::invalid_argument);
    }
    CHECK_THROWS(from.engine.put(999, nullptr, 0, ""), PeerClosedError);
}
