#include "io/block_job.hpp"

#include <utility>

#include "io/block_read.hpp"
#include "io/block_write.hpp"

namespace dualpath {

std::unique_ptr<BlockJob> make_job(BlockRequest request, const TransferOptions& options) {
    if (request.kind == BlockRequest::Kind::kRead) {
        return std::make_unique<BlockRead>(std::move(request), options);
    }
    return std::make_unique<BlockWrite>(std::move(request), options);
}

}  // namespace dualpath
