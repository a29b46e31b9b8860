#include "ucx/peer_memory.hpp"

#include <cstring>
#include <stdexcept>
#include <system_error>
#include <vector>

#include "check.hpp"
#include "shared_file.hpp"

using namespace dualpath;
using dualpath::test::Staging;

constexpr std::size_t kBytes = (5 << 20) + 4096;

TEST(peer_memory_writes_appear_in_the_peers_mapping) {
    Staging peer(kBytes);
    PeerMemory memory(peer.file(), peer.address(), kBytes);
    const std::vector<unsigned char> bytes(3 << 20, 0x5A);
    memory.write(peer.address() + 4000, bytes.data(), bytes.size());
    CHECK(peer.data()[3999] == 0 && peer.data()[4000] == 0x5A);
    CHECK(std::memcmp(peer.data() + 4000, bytes.data(), bytes.size()) == 0);
    CHECK(peer.data()[4000 + bytes.size()] == 0);
    memory.write(peer.address() + kBytes - 10, bytes.data(), 10);
    CHECK(peer.data()[kBytes - 1] == 0x5A);
}

TEST(peer_memory_knows_its_bounds) {
    Staging peer(kBytes);
    const PeerMemory memory(peer.file(), peer.address(), kBytes);
    CHECK(memory.span().contains(peer.address(), kBytes));
    CHECK(memory.span().contains(peer.address() + kBytes - 1, 1));
    CHECK(!memory.span().contains(peer.address() - 1, 2));
    CHECK(!memory.span().contains(peer.address() + kBytes, 1));
    CHECK(!memory.span().contains(peer.address() + 1, kBytes));
    CHECK(!memory.span().contains(peer.address(), ~std::uint64_t{0}));
}

TEST(peer_memory_refuses_what_is_not_the_peers) {
    Staging peer(kBytes);
    Staging open(kBytes, false);
    SharedFile wrong_inode = peer.file();
    ++wrong_inode.inode;
    SharedFile gone = peer.file();
    gone.fd = 1 << 20;
    CHECK_THROWS(PeerMemory(wrong_inode, peer.address(), kBytes), std::runtime_error);
    CHECK_THROWS(PeerMemory(gone, peer.address(), kBytes), std::system_error);
    CHECK_THROWS(PeerMemory(peer.file(), peer.address(), kBytes + 1), std::runtime_error);
    CHECK_THROWS(PeerMemory(open.file(), open.address(), kBytes), std::runtime_error);
}
