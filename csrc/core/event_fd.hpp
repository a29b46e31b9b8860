// A Linux eventfd: a wake-up that another thread, or Python's selectors, can wait for.
#pragma once

namespace dualpath {

// Owns the descriptor. signal() may be called from any thread.
class EventFd {
  public:
    // Throws std::system_error when the process is out of descriptors.
    EventFd();
    ~EventFd();
    EventFd(const EventFd&) = delete;
    EventFd& operator=(const EventFd&) = delete;

    int fd() const { return fd_; }
    // Makes the descriptor readable until clear().
    void signal();
    void clear();

  private:
    int fd_;
};

}  // namespace dualpath
