// One call to the kernel that a block's state machine asks for.
#pragma once

#include <sys/stat.h>
#include <sys/uio.h>

#include <array>
#include <cstddef>
#include <cstdint>

namespace dualpath {

// What an operation does; also names the step that failed. The numbers cross to Python.
enum class Step : std::uint8_t {
    kLookUp = 0,
    kOpen = 1,
    kStat = 2,
    kAllocate = 3,
    kRead = 4,
    kWrite = 5,
    kClose = 6,
    kRename = 7,
    kMakeDirectory = 8,
    kUnlink = 9,
};

// Plain data. What it points to belongs to the job that made it and outlives the call; the
// operation itself must stay where it is until the call has ended, as the kernel reads `parts`.
struct Operation {
    Step step = Step::kOpen;
    int fd = -1;                   // kStat, kAllocate, kRead, kWrite, kClose
    int flags = 0;                 // kOpen
    const char* path = nullptr;    // kLookUp, kOpen, kRename (from), kMakeDirectory, kUnlink
    const char* target = nullptr;  // kRename
    struct statx* stat = nullptr;  // kLookUp, kStat: filled by the call
    std::array<iovec, 2> parts{};  // kRead, kWrite
    unsigned num_parts = 0;        // of `parts` in use
    std::uint64_t offset = 0;      // in the file
    std::uint64_t num_bytes = 0;   // to move or to allocate
    std::size_t piece = 0;         // for the job's own use
};

// Performs the call and waits for it. Returns its result, or -errno.
std::int64_t run_blocking(const Operation& operation);

inline constexpr unsigned kStatMask = STATX_TYPE | STATX_SIZE | STATX_MTIME;
inline constexpr mode_t kFileMode = 0644;
inline constexpr mode_t kDirectoryMode = 0777;  // less the process's umask

}  // namespace dualpath
