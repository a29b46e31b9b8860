#include "ucx/peer_memory.hpp"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <stdexcept>
#include <string>
#include <system_error>

#include "core/stream_copy.hpp"

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23  // Linux 5.14
#endif

namespace dualpath {
namespace {

// Page tables are filled this much at a time: one fault a page would halve the first write's speed,
// the whole region at once would take a second for each 20 GiB.
constexpr std::size_t kChunkBytes = std::size_t{2} << 20;

class Descriptor {
  public:
    explicit Descriptor(const std::string& path) : fd_(::open(path.c_str(), O_RDWR | O_CLOEXEC)) {
        if (fd_ < 0) throw std::system_error(errno, std::generic_category(), path);
    }
    ~Descriptor() { ::close(fd_); }
    Descriptor(const Descriptor&) = delete;
    Descriptor& operator=(const Descriptor&) = delete;
    int get() const { return fd_; }

  private:
    int fd_;
};

void check_is(int fd, const std::string& path, const SharedFile& file, std::size_t num_bytes) {
    struct stat found{};
    if (::fstat(fd, &found) != 0) throw std::system_error(errno, std::generic_category(), path);
    if (found.st_dev != file.device || found.st_ino != file.inode) {
        throw std::runtime_error(path + " is not the peer's memory: did the peer restart?");
    }
    if (static_cast<std::uint64_t>(found.st_size) < num_bytes) {
        throw std::runtime_error(path + " has " + std::to_string(found.st_size) +
                                 " bytes, expected at least " + std::to_string(num_bytes));
    }
    // A file that shrank under us would end this process with a bus error.
    const int seals = ::fcntl(fd, F_GET_SEALS);
    if (seals < 0 || (seals & F_SEAL_SHRINK) == 0) {
        throw std::runtime_error(path + " may shrink: expected a memfd with F_SEAL_SHRINK");
    }
}

}  // namespace

PeerMemory::PeerMemory(const SharedFile& file, std::uint64_t remote_address, std::size_t num_bytes)
    : span_{remote_address, num_bytes} {
    const std::string path = "/proc/" + std::to_string(file.pid) + "/fd/" + std::to_string(file.fd);
    const Descriptor descriptor(path);
    check_is(descriptor.get(), path, file, num_bytes);
    void* mapped =
        ::mmap(nullptr, num_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, descriptor.get(), 0);
    if (mapped == MAP_FAILED) throw std::system_error(errno, std::generic_category(), path);
    mapped_ = static_cast<char*>(mapped);
    populated_.resize((num_bytes + kChunkBytes - 1) / kChunkBytes);
}

PeerMemory::~PeerMemory() { ::munmap(mapped_, span_.num_bytes); }

void PeerMemory::write(std::uint64_t remote, const void* local, std::size_t num_bytes) {
    const std::size_t offset = remote - span_.address;
    populate(offset, offset + num_bytes);
    stream_copy(mapped_ + offset, local, num_bytes);
}

void PeerMemory::populate(std::size_t first, std::size_t last) {
    for (std::size_t chunk = first / kChunkBytes; chunk * kChunkBytes < last; ++chunk) {
        if (populated_[chunk]) continue;
        populated_[chunk] = true;
        const std::size_t begin = chunk * kChunkBytes;
        // Refused by an older kernel: then each page is mapped when it is first written.
        ::madvise(mapped_ + begin, std::min<std::size_t>(kChunkBytes, span_.num_bytes - begin),
                  MADV_POPULATE_WRITE);
    }
}

}  // namespace dualpath
