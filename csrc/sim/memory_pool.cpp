#include "sim/memory_pool.hpp"

namespace dualpath::sim {

bool MemoryPool::take(const Waiting& request) {
    if (line_.empty() && request.amount <= free_) {
        free_ -= request.amount;
        return true;
    }
    line_.push_back(request);
    return false;
}

MemoryPool::Waiting MemoryPool::grant(bool keep) {
    const Waiting request = line_.front();
    line_.pop_front();
    if (keep) free_ -= request.amount;
    return request;
}

}  // namespace dualpath::sim
