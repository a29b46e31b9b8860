#include "sim/staging_pool.hpp"

namespace dualpath::sim {

bool StagingPool::take(const Waiting& request) {
    if (line_.empty() && request.bytes <= free_bytes_) {
        free_bytes_ -= request.bytes;
        return true;
    }
    line_.push_back(request);
    return false;
}

StagingPool::Waiting StagingPool::grant(bool keep) {
    const Waiting request = line_.front();
    line_.pop_front();
    if (keep) free_bytes_ -= request.bytes;
    return request;
}

}  // namespace dualpath::sim
