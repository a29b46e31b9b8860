// The target of the benchmark's plain loop: a worker that is progressed and nothing more.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <thread>

#include "ucx/raw_worker.hpp"

namespace dualpath {

// Its thread spins, which is the fastest a target can be, and nothing for a process that has other
// work. The memory must outlive it.
class RawPutTarget {
  public:
    // Throws what RawWorker throws.
    RawPutTarget(std::shared_ptr<const UcxLibrary> library, std::uintptr_t address,
                 std::size_t num_bytes);

    const std::string& worker_address() const { return worker_address_; }
    const std::string& packed_key() const { return packed_key_; }

  private:
    RawWorker worker_;
    std::string worker_address_;
    std::string packed_key_;
    // Last: stopped and joined before the worker goes.
    std::jthread thread_;
};

}  // namespace dualpath
