#include "io/io_ring.hpp"

#include <fcntl.h>
#include <poll.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <bit>
#include <cerrno>
#include <cstring>
#include <stdexcept>
#include <system_error>
#include <vector>

namespace dualpath {
namespace {

// By number where the build's headers may be older than the running kernel.
constexpr unsigned kCoopTaskrun = 1U << 8;     // Linux 5.19
constexpr unsigned kSingleIssuer = 1U << 12;   // Linux 6.0
constexpr unsigned kDeferTaskrun = 1U << 13;   // Linux 6.1
constexpr unsigned kRegisterWorkers = 19;      // Linux 5.15
constexpr std::uint8_t kOpRename = 35;         // Linux 5.11
constexpr std::uint8_t kOpUnlink = 36;         // Linux 5.11
constexpr std::uint8_t kOpMakeDirectory = 37;  // Linux 5.15

// Best first. Without these the kernel interrupts the thread for each completion.
constexpr std::array kSetupFlags{kSingleIssuer | kDeferTaskrun, kSingleIssuer | kCoopTaskrun,
                                 kCoopTaskrun, 0U};

constexpr std::array<std::uint8_t, 10> kNeeded{
    IORING_OP_READV, IORING_OP_WRITEV,    IORING_OP_POLL_ADD, IORING_OP_OPENAT, IORING_OP_CLOSE,
    IORING_OP_STATX, IORING_OP_FALLOCATE, kOpRename,          kOpUnlink,        kOpMakeDirectory};

[[noreturn]] void throw_errno(const char* what) {
    throw std::system_error(errno, std::generic_category(), what);
}

int ring_register(int fd, unsigned code, void* argument, unsigned count) {
    return static_cast<int>(::syscall(SYS_io_uring_register, fd, code, argument, count));
}

template <typename T>
T* at(void* base, unsigned offset) {
    return reinterpret_cast<T*>(static_cast<char*>(base) + offset);
}

std::uint64_t pointer(const void* address) { return reinterpret_cast<std::uintptr_t>(address); }

}  // namespace

IoRing::IoRing(unsigned num_entries) {
    const io_uring_params params = set_up(std::bit_ceil(num_entries));
    try {
        require_operations();
        map_memory(params);
    } catch (...) {
        release();
        throw;
    }
    allow_workers(num_entries);
}

IoRing::~IoRing() { release(); }

void IoRing::release() {
    for (const Mapping& mapping : {entries_, completions_, submissions_}) {
        if (mapping.address != nullptr) ::munmap(mapping.address, mapping.num_bytes);
    }
    ::close(fd_);
}

io_uring_params IoRing::set_up(unsigned num_entries) {
    for (const unsigned flags : kSetupFlags) {
        io_uring_params params{};
        params.flags = flags;
        fd_ = static_cast<int>(::syscall(SYS_io_uring_setup, num_entries, &params));
        if (fd_ >= 0) return params;
        if (errno != EINVAL) break;  // EINVAL: a flag that this kernel does not know
    }
    throw_errno("io_uring_setup");
}

void IoRing::require_operations() {
    std::vector<std::byte> memory(sizeof(io_uring_probe) + 256 * sizeof(io_uring_probe_op));
    auto* probe = reinterpret_cast<io_uring_probe*>(memory.data());
    if (ring_register(fd_, IORING_REGISTER_PROBE, probe, 256) < 0) throw_errno("io_uring probe");
    for (const std::uint8_t code : kNeeded) {
        const bool known = code <= probe->last_op;
        if (!known || (probe->ops[code].flags & IO_URING_OP_SUPPORTED) == 0) {
            errno = ENOSYS;
            throw_errno("io_uring: this kernel lacks an operation of Linux 5.15");
        }
    }
}

void IoRing::map_memory(const io_uring_params& params) {
    submissions_ =
        map(params.sq_off.array + params.sq_entries * sizeof(unsigned), IORING_OFF_SQ_RING);
    completions_ =
        map(params.cq_off.cqes + params.cq_entries * sizeof(io_uring_cqe), IORING_OFF_CQ_RING);
    entries_ = map(params.sq_entries * sizeof(io_uring_sqe), IORING_OFF_SQES);
    sq_head_ = at<unsigned>(submissions_.address, params.sq_off.head);
    sq_tail_ = at<unsigned>(submissions_.address, params.sq_off.tail);
    sq_mask_ = *at<unsigned>(submissions_.address, params.sq_off.ring_mask);
    sq_array_ = at<unsigned>(submissions_.address, params.sq_off.array);
    cq_head_ = at<unsigned>(completions_.address, params.cq_off.head);
    cq_tail_ = at<unsigned>(completions_.address, params.cq_off.tail);
    cq_mask_ = *at<unsigned>(completions_.address, params.cq_off.ring_mask);
    cqes_ = at<io_uring_cqe>(completions_.address, params.cq_off.cqes);
}

IoRing::Mapping IoRing::map(std::size_t num_bytes, std::uint64_t offset) {
    void* address = ::mmap(nullptr, num_bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE,
                           fd_, static_cast<off_t>(offset));
    if (address == MAP_FAILED) throw_errno("mapping an io_uring");
    return {address, num_bytes};
}

// Where a file system cannot start a request without waiting (FUSE, NFS) the kernel uses threads
// of its own, by default four a CPU: a few requests that hang would hold up all others.
void IoRing::allow_workers(unsigned num_workers) {
    unsigned limits[2] = {num_workers, 0};
    // Older kernels keep their default.
    (void)ring_register(fd_, kRegisterWorkers, limits, 2);
}

io_uring_sqe& IoRing::next_entry(std::uint64_t tag) {
    const unsigned tail = *sq_tail_;
    if (tail - std::atomic_ref(*sq_head_).load(std::memory_order_acquire) > sq_mask_) {
        throw std::logic_error("io_uring: more requests prepared than the ring has entries");
    }
    const unsigned idx = tail & sq_mask_;
    io_uring_sqe& entry = static_cast<io_uring_sqe*>(entries_.address)[idx];
    std::memset(&entry, 0, sizeof entry);
    entry.user_data = tag;
    sq_array_[idx] = idx;
    // The kernel looks only during submit(), on this thread.
    std::atomic_ref(*sq_tail_).store(tail + 1, std::memory_order_release);
    ++num_prepared_;
    return entry;
}

void IoRing::prepare(const Operation& operation, std::uint64_t tag, bool punt) {
    io_uring_sqe& entry = next_entry(tag);
    entry.fd = AT_FDCWD;
    if (punt) entry.flags = IOSQE_ASYNC;
    switch (operation.step) {
        case Step::kLookUp:
        case Step::kStat:
            entry.opcode = IORING_OP_STATX;
            entry.addr = pointer(operation.step == Step::kStat ? "" : operation.path);
            entry.len = kStatMask;
            entry.off = pointer(operation.stat);
            if (operation.step == Step::kStat) {
                entry.fd = operation.fd;
                entry.statx_flags = AT_EMPTY_PATH;
            }
            break;
        case Step::kOpen:
            entry.opcode = IORING_OP_OPENAT;
            entry.addr = pointer(operation.path);
            entry.len = kFileMode;
            entry.open_flags = static_cast<unsigned>(operation.flags);
            break;
        case Step::kAllocate:
            entry.opcode = IORING_OP_FALLOCATE;
            entry.fd = operation.fd;
            entry.addr = operation.num_bytes;
            break;
        case Step::kRead:
        case Step::kWrite:
            entry.opcode = operation.step == Step::kRead ? IORING_OP_READV : IORING_OP_WRITEV;
            entry.fd = operation.fd;
            entry.addr = pointer(operation.parts.data());
            entry.len = operation.num_parts;
            entry.off = operation.offset;
            break;
        case Step::kClose:
            entry.opcode = IORING_OP_CLOSE;
            entry.fd = operation.fd;
            break;
        case Step::kRename:
            entry.opcode = kOpRename;
            entry.addr = pointer(operation.path);
            entry.len = static_cast<unsigned>(AT_FDCWD);
            entry.off = pointer(operation.target);
            break;
        case Step::kMakeDirectory:
            entry.opcode = kOpMakeDirectory;
            entry.addr = pointer(operation.path);
            entry.len = kDirectoryMode;
            break;
        case Step::kUnlink:
            entry.opcode = kOpUnlink;
            entry.addr = pointer(operation.path);
            break;
    }
}

void IoRing::prepare_poll(int fd, std::uint64_t tag) {
    io_uring_sqe& entry = next_entry(tag);
    entry.opcode = IORING_OP_POLL_ADD;
    entry.fd = fd;
    entry.poll32_events = POLLIN;
}

void IoRing::submit(unsigned min_completions) {
    const long count = ::syscall(SYS_io_uring_enter, fd_, num_prepared_, min_completions,
                                 IORING_ENTER_GETEVENTS, nullptr, 0);
    if (count >= 0) {
        num_prepared_ -= static_cast<unsigned>(count);
    } else if (errno != EINTR && errno != EAGAIN && errno != EBUSY) {
        throw_errno("io_uring_enter");
    }
    // EINTR, EAGAIN, EBUSY: what was not taken is handed over by the next call.
}

bool IoRing::next_completion(Completion& completion) {
    const unsigned head = *cq_head_;
    if (head == std::atomic_ref(*cq_tail_).load(std::memory_order_acquire)) return false;
    const io_uring_cqe& cqe = cqes_[head & cq_mask_];
    completion = {cqe.user_data, cqe.res};
    std::atomic_ref(*cq_head_).store(head + 1, std::memory_order_release);
    return true;
}

}  // namespace dualpath
