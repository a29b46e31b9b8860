#include "ucx/ucx_library.hpp"

#include <dlfcn.h>

namespace dualpath {
namespace {

void* find_function(void* handle, const char* name, const std::string& path) {
    void* function = dlsym(handle, name);
    if (function == nullptr) throw UcxError(path + " has no function " + name);
    return function;
}

}  // namespace

UcxLibrary::UcxLibrary(const std::string& path) : path_(path) {
    // Local: another UCX in this process must not see our symbols.
    void* handle = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (handle == nullptr) throw UcxError(dlerror());
#define DUALPATH_FIND(function) \
    function = reinterpret_cast<decltype(function)>(find_function(handle, #function, path));
    DUALPATH_UCX_FUNCTIONS(DUALPATH_FIND)
#undef DUALPATH_FIND
    check_version();
}

std::string UcxLibrary::version() const { return ucp_get_version_string(); }

void UcxLibrary::check_version() const {
    unsigned major = 0;
    unsigned minor = 0;
    unsigned release = 0;
    ucp_get_version(&major, &minor, &release);
    // Another major version may change the layout of every structure we pass.
    if (major != kOldestMajor || minor < kOldestMinor) {
        throw UcxError(path_ + " is UCX " + version() + ", need 1.13 or a later 1.x");
    }
}

void UcxLibrary::check(ucs_status_t status, const char* what) const {
    if (status != UCS_OK) throw UcxError(std::string(what) + ": " + ucs_status_string(status));
}

}  // namespace dualpath
