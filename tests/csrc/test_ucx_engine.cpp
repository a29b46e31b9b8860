// Two engines of one process: every thread and lock of the transport, under the sanitizers.
#include "ucx/ucx_engine.hpp"

#include <poll.h>

#include <cstdlib>
#include <cstring>
#include <numeric>
#include <random>

#include "check.hpp"
#include "shared_file.hpp"

using namespace dualpath;
using dualpath::test::Staging;

namespace {

using Kind = TransportEvent::Kind;

constexpr std::size_t kPieceBytes = 4096;
constexpr std::size_t kPieces = 512;
constexpr std::size_t kBytes = kPieces * kPieceBytes;

// DUALPATH_TEST_UCX_LIBRARY: set by the Makefile.
std::shared_ptr<const UcxLibrary> ucx() {
    static const auto library = [] {
        const char* path = std::getenv("DUALPATH_TEST_UCX_LIBRARY");
        return std::make_shared<const UcxLibrary>(path != nullptr ? path : "libucp.so.0");
    }();
    return library;
}

struct Side {
    Side() : staging(kBytes), engine(ucx(), {"127.0.0.1", 0, 64 << 20, 1 << 20}) {
        key = engine.register_region(staging.address(), kBytes);
    }
    // The first `count` events, or those that came within ten seconds.
    std::vector<TransportEvent> events(std::size_t count) {
        std::vector<TransportEvent> all;
        const auto deadline = Clock::now() + std::chrono::seconds(10);
        while (all.size() < count && Clock::now() < deadline) {
            pollfd waiting{engine.event_fd(), POLLIN, 0};
            ::poll(&waiting, 1, 100);
            for (auto& event : engine.poll()) all.push_back(std::move(event));
        }
        return all;
    }

    Staging staging;
    UcxEngine engine;
    std::string key;
};

enum class Way { kStores, kWorkerAddress, kListener };

std::uint64_t connect(Side& from, Side& to, Way way) {
    PeerTarget target{std::nullopt, to.engine.worker_address(), to.key, nullptr};
    if (way == Way::kListener) {
        target.listener = SocketAddress::parse("127.0.0.1", to.engine.listen_port());
    }
    if (way == Way::kStores) {
        target.memory =
            std::make_shared<PeerMemory>(to.staging.file(), to.staging.address(), kBytes);
    }
    return from.engine.connect(std::move(target), to.staging.address(), kBytes);
}

std::vector<std::size_t> shuffled() {
    std::vector<std::size_t> order(kPieces);
    std::iota(order.begin(), order.end(), 0);
    std::shuffle(order.begin(), order.end(), std::mt19937(5));
    return order;
}

std::vector<Piece> scattered(Side& from, Side& to, const std::vector<std::size_t>& order) {
    std::vector<Piece> pieces;
    for (std::size_t i = 0; i < kPieces; ++i) {
        pieces.push_back({from.staging.address() + i * kPieceBytes,
                          to.staging.address() + order[i] * kPieceBytes, kPieceBytes});
    }
    return pieces;
}

void check_scattered_put(Way way) {
    Side from;
    Side to;
    for (std::size_t i = 0; i < kBytes; ++i) {
        from.staging.data()[i] = static_cast<unsigned char>(i / kPieceBytes * 7 + i);
    }
    const std::uint64_t peer = connect(from, to, way);
    const auto order = shuffled();
    const auto pieces = scattered(from, to, order);
    const std::uint64_t put = from.engine.put(peer, pieces.data(), pieces.size(), "done");
    const auto arrived = to.events(1);
    CHECK(arrived.size() == 1 && arrived[0].kind == Kind::kNotice && arrived[0].text == "done");
    for (std::size_t i = 0; i < kPieces; ++i) {
        CHECK(std::memcmp(from.staging.data() + i * kPieceBytes,
                          to.staging.data() + order[i] * kPieceBytes, kPieceBytes) == 0);
    }
    const auto ended = from.events(1);
    CHECK(ended.size() == 1 && ended[0].kind == Kind::kPutDone && ended[0].ok);
    CHECK(ended[0].id == put);
    from.engine.disconnect(peer);
    const auto closed = from.events(1);
    CHECK(closed.size() == 1 && closed[0].kind == Kind::kPeerClosed && closed[0].id == peer);
}

void check_ends_while_putting(Way way) {
    Side from;
    Side to;
    const std::uint64_t peer = connect(from, to, way);
    const auto pieces = scattered(from, to, shuffled());
    for (int i = 0; i < 20; ++i) from.engine.put(peer, pieces.data(), pieces.size(), "n");
    from.engine.disconnect(peer);
    CHECK_THROWS(from.engine.put(peer, pieces.data(), 1, ""), PeerClosedError);
    const auto events = from.events(21);
    CHECK(events.size() == 21 && events.back().kind == Kind::kPeerClosed);
}

}  // namespace

TEST(ucx_engine_put_by_stores) {
    check_scattered_put(Way::kStores);
}
TEST(ucx_engine_put_by_worker_address) {
    check_scattered_put(Way::kWorkerAddress);
}
TEST(ucx_engine_put_by_listener) {
    check_scattered_put(Way::kListener);
}
TEST(ucx_engine_disconnect_ends_every_put_by_stores) {
    check_ends_while_putting(Way::kStores);
}
TEST(ucx_engine_disconnect_ends_every_put_by_listener) {
    check_ends_while_putting(Way::kListener);
}

TEST(ucx_engine_closes_with_puts_under_way) {
    for (const Way way : {Way::kStores, Way::kListener}) {
        Side to;
        Side from;
        const std::uint64_t peer = connect(from, to, way);
        const auto pieces = scattered(from, to, shuffled());
        for (int i = 0; i < 20; ++i) from.engine.put(peer, pieces.data(), pieces.size(), "n");
        from.engine.close();
        std::size_t num_ended = 0;
        for (const auto& event : from.engine.poll()) num_ended += event.kind == Kind::kPutDone;
        CHECK(num_ended == 20);
        CHECK_THROWS(from.engine.put(peer, pieces.data(), 1, ""), PeerClosedError);
    }
}

TEST(ucx_engine_refuses_pieces_outside) {
    Side from;
    Side to;
    const std::uint64_t peer = connect(from, to, Way::kStores);
    const Piece local{from.staging.address() + kBytes - 1, to.staging.address(), 2};
    const Piece remote{from.staging.address(), to.staging.address() - 1, 2};
    const Piece empty{from.staging.address(), to.staging.address(), 0};
    for (const Piece& piece : {local, remote, empty}) {
        CHECK_THROWS(from.engine.put(peer, &piece, 1, ""), std::invalid_argument);
    }
    CHECK_THROWS(from.engine.put(peer, nullptr, 0, std::string(5000, 'x')), std::invalid_argument);
}
