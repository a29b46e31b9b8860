// The staging memory of another process on this host, mapped into this one.
#pragma once

#include <sys/types.h>

#include <cstddef>
#include <cstdint>
#include <vector>

#include "core/span.hpp"

namespace dualpath {

// Where a process keeps a shared file (a memfd) and how to tell it from any other: pids and
// descriptors are reused, inodes of living files are not.
struct SharedFile {
    pid_t pid = 0;
    int fd = -1;
    std::uint64_t device = 0;
    std::uint64_t inode = 0;
};

// Writes are plain stores into the peer's own pages: one copy, no system call, nothing in flight
// when write() returns. The mapping outlives the peer: late writes go to memory that nobody reads.
// One thread at a time.
class PeerMemory {
  public:
    // Maps the first `num_bytes` of `file`, which the peer has at `remote_address`. Throws
    // std::system_error when the kernel refuses (another user, a container's rules), and
    // std::runtime_error when the file is another one, too short, or not sealed against shrinking.
    PeerMemory(const SharedFile& file, std::uint64_t remote_address, std::size_t num_bytes);
    ~PeerMemory();
    PeerMemory(const PeerMemory&) = delete;
    PeerMemory& operator=(const PeerMemory&) = delete;

    // What it covers, in the peer's addresses.
    const Span& span() const { return span_; }
    // Within span(), which the caller has checked. `local` is readable.
    void write(std::uint64_t remote, const void* local, std::size_t num_bytes);

  private:
    void populate(std::size_t first, std::size_t last);

    Span span_;
    char* mapped_ = nullptr;
    std::vector<bool> populated_;  // by chunk
};

}  // namespace dualpath
