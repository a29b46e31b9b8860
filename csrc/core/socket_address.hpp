// An IP address and port.
#pragma once

#include <sys/socket.h>

#include <cstdint>
#include <string>

namespace dualpath {

struct SocketAddress {
    sockaddr_storage storage{};
    socklen_t size = 0;

    // `host` is a numeric IPv4 or IPv6 address: no name service is asked.
    // Throws std::invalid_argument for anything else.
    static SocketAddress parse(const std::string& host, std::uint16_t port);
    std::uint16_t port() const;
    const sockaddr* get() const { return reinterpret_cast<const sockaddr*>(&storage); }
};

}  // namespace dualpath
