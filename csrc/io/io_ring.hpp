// An io_uring by raw system calls: one build serves hosts with any kernel and needs no liburing.
#pragma once

#include <linux/io_uring.h>

#include <cstddef>
#include <cstdint>

#include "io/operation.hpp"

namespace dualpath {

// One thread makes it and uses it: with DEFER_TASKRUN the kernel completes requests only there.
class IoRing {
  public:
    struct Completion {
        std::uint64_t tag;
        std::int64_t result;  // as of run_blocking()
    };

    // `num_entries`: requests that can be in flight. Throws std::system_error where the kernel, a
    // seccomp filter or a sysctl refuses, or where an operation we need is missing.
    explicit IoRing(unsigned num_entries);
    ~IoRing();
    IoRing(const IoRing&) = delete;
    IoRing& operator=(const IoRing&) = delete;

    // Prepare a request; submit() hands it over. The operation stays where it is until the
    // completion with `tag` was seen. `punt`: do not try it on this thread first, as an open
    // may wait for a server even where its name is cached.
    void prepare(const Operation& operation, std::uint64_t tag, bool punt);
    void prepare_poll(int fd, std::uint64_t tag);
    // Hand over what was prepared, then wait for `min_completions`.
    void submit(unsigned min_completions);
    // False: none waits.
    bool next_completion(Completion& completion);

  private:
    struct Mapping {
        void* address = nullptr;
        std::size_t num_bytes = 0;
    };

    io_uring_params set_up(unsigned num_entries);
    void map_memory(const io_uring_params& params);
    void require_operations();
    void allow_workers(unsigned num_workers);
    Mapping map(std::size_t num_bytes, std::uint64_t offset);
    io_uring_sqe& next_entry(std::uint64_t tag);
    void release();

    int fd_ = -1;
    Mapping submissions_;
    Mapping completions_;
    Mapping entries_;
    unsigned* sq_head_ = nullptr;
    unsigned* sq_tail_ = nullptr;
    unsigned sq_mask_ = 0;
    unsigned* sq_array_ = nullptr;
    unsigned* cq_head_ = nullptr;
    unsigned* cq_tail_ = nullptr;
    unsigned cq_mask_ = 0;
    io_uring_cqe* cqes_ = nullptr;
    unsigned num_prepared_ = 0;
};

}  // namespace dualpath
