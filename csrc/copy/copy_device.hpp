// What carries out copies: the host's memory bus, or a GPU.
#pragma once

#include <cstddef>
#include <memory>

#include "copy/page_rows.hpp"

namespace dualpath {

enum class CopyDirection { kLoad, kSave };  // into the cache, out of the cache

// kUrgent: the forward pass waits for these, or will. kBackground: carried out, in order, when
// nothing urgent waits; a long one is interrupted after each slice.
enum class CopyLane { kUrgent, kBackground };

// Orders one copy among a device's other work. Called by the queue's thread only.
class CopyFences {
  public:
    virtual ~CopyFences() = default;
    virtual void before() = 0;  // ahead of the copy's first byte
    virtual void after() = 0;   // behind its last
};

// All pages of `rows` in the layers [first_layer, end_layer).
struct CopyOrder {
    std::shared_ptr<const PageRows> rows;
    CopyDirection direction;
    std::size_t first_layer;
    std::size_t end_layer;
    std::shared_ptr<CopyFences> fences;  // null: none needed
};

// Called by the queue's thread only.
class CopyDevice {
  public:
    virtual ~CopyDevice() = default;
    // About how much one call of copy() gets: what an urgent copy may have to wait for.
    virtual std::size_t slice_bytes() const = 0;
    // Once, on the thread that will copy.
    virtual void enter_thread() {}
    // Copies the rows [first_row, end_row) of one layer, or hands them to the device in order.
    // Throws std::runtime_error if it refuses.
    virtual void copy(const CopyOrder& order, CopyLane lane, std::size_t layer,
                      std::size_t first_row, std::size_t end_row) = 0;
    // After a failure: returns once nothing that was handed over touches memory any more.
    virtual void settle() noexcept {}
};

// Between memories that this process can reach: a copy is done when copy() returns.
class HostDevice final : public CopyDevice {
  public:
    std::size_t slice_bytes() const override;
    void copy(const CopyOrder& order, CopyLane lane, std::size_t layer, std::size_t first_row,
              std::size_t end_row) override;
};

}  // namespace dualpath
