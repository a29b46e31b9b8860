// A sealed memfd with a mapping, as a mover's staging memory is.
#pragma once

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstdint>
#include <stdexcept>

#include "ucx/peer_memory.hpp"

namespace dualpath::test {

class Staging {
  public:
    explicit Staging(std::size_t num_bytes, bool sealed = true)
        : num_bytes_(num_bytes), fd_(::memfd_create("test", MFD_CLOEXEC | MFD_ALLOW_SEALING)) {
        if (fd_ < 0 || ::ftruncate(fd_, static_cast<off_t>(num_bytes)) != 0) throw_errno();
        if (sealed && ::fcntl(fd_, F_ADD_SEALS, F_SEAL_SHRINK) != 0) throw_errno();
        void* mapped = ::mmap(nullptr, num_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd_, 0);
        if (mapped == MAP_FAILED) throw_errno();
        data_ = static_cast<unsigned char*>(mapped);
    }
    ~Staging() {
        ::munmap(data_, num_bytes_);
        ::close(fd_);
    }
    Staging(const Staging&) = delete;
    Staging& operator=(const Staging&) = delete;

    unsigned char* data() { return data_; }
    std::uint64_t address() const { return reinterpret_cast<std::uint64_t>(data_); }
    std::size_t num_bytes() const { return num_bytes_; }
    SharedFile file() const {
        struct stat found{};
        if (::fstat(fd_, &found) != 0) throw_errno();
        return {::getpid(), fd_, found.st_dev, found.st_ino};
    }

  private:
    [[noreturn]] static void throw_errno() { throw std::runtime_error("test memory"); }

    std::size_t num_bytes_;
    int fd_;
    unsigned char* data_ = nullptr;
};

}  // namespace dualpath::test
