#include "core/affinity.hpp"

#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <cstddef>

namespace dualpath {

void leave_compute_cores() {
    cpu_set_t bound, others;
    if (sched_getaffinity(0, sizeof bound, &bound) != 0) return;
    CPU_ZERO(&others);
    const long num_cpus = std::min<long>(sysconf(_SC_NPROCESSORS_CONF), CPU_SETSIZE);
    for (std::size_t cpu = 0; cpu < static_cast<std::size_t>(num_cpus); ++cpu) {
        if (!CPU_ISSET(cpu, &bound)) CPU_SET(cpu, &others);
    }
    (void)sched_setaffinity(0, sizeof others, &others);  // refused where there are none
}

}  // namespace dualpath
