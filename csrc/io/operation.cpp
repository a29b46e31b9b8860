#include "io/operation.hpp"

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>

namespace dualpath {
namespace {

std::int64_t call(const Operation& operation) {
    const auto num_parts = static_cast<int>(operation.num_parts);
    const auto offset = static_cast<off_t>(operation.offset);
    switch (operation.step) {
        case Step::kLookUp:
            return ::statx(AT_FDCWD, operation.path, 0, kStatMask, operation.stat);
        case Step::kStat:
            return ::statx(operation.fd, "", AT_EMPTY_PATH, kStatMask, operation.stat);
        case Step::kOpen:
            return ::openat(AT_FDCWD, operation.path, operation.flags, kFileMode);
        case Step::kAllocate:
            return ::fallocate(operation.fd, 0, 0, static_cast<off_t>(operation.num_bytes));
        case Step::kRead:
            return ::preadv(operation.fd, operation.parts.data(), num_parts, offset);
        case Step::kWrite:
            return ::pwritev(operation.fd, operation.parts.data(), num_parts, offset);
        case Step::kClose:
            return ::close(operation.fd);
        case Step::kRename:
            return ::rename(operation.path, operation.target);
        case Step::kMakeDirectory:
            return ::mkdir(operation.path, kDirectoryMode);
        case Step::kUnlink:
            return ::unlink(operation.path);
    }
    errno = EINVAL;
    return -1;
}

}  // namespace

std::int64_t run_blocking(const Operation& operation) {
    const std::int64_t result = call(operation);
    return result < 0 ? -errno : result;
}

}  // namespace dualpath
