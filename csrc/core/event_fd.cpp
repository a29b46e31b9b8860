#include "core/event_fd.hpp"

#include <sys/eventfd.h>
#include <unistd.h>

#include <cerrno>
#include <cstdint>
#include <system_error>

namespace dualpath {

EventFd::EventFd() : fd_(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)) {
    if (fd_ < 0) throw std::system_error(errno, std::generic_category(), "eventfd");
}

EventFd::~EventFd() { ::close(fd_); }

void EventFd::signal() {
    const std::uint64_t one = 1;
    // EAGAIN means the counter is full: it is readable already.
    [[maybe_unused]] const ssize_t written = ::write(fd_, &one, sizeof one);
}

void EventFd::clear() {
    std::uint64_t count;
    // EAGAIN means that nothing was signalled: clear all the same.
    [[maybe_unused]] const ssize_t got = ::read(fd_, &count, sizeof count);
}

}  // namespace dualpath
