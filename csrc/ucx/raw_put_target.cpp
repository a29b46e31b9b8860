#include "ucx/raw_put_target.hpp"

#include <utility>

namespace dualpath {

RawPutTarget::RawPutTarget(std::shared_ptr<const UcxLibrary> library, std::uintptr_t address,
                           std::size_t num_bytes)
    : worker_(std::move(library), address, num_bytes),
      worker_address_(worker_.worker_address()),
      packed_key_(worker_.packed_key()),
      thread_([this](const std::stop_token& stop) {
          while (!stop.stop_requested()) worker_.progress();
      }) {}

}  // namespace dualpath
