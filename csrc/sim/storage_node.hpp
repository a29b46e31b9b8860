// One node: its storage NIC in both directions, its staging memory, and what they did over time.
#pragma once

#include <cstdint>
#include <vector>

#include "policy/read_rate.hpp"
#include "sim/fifo_server.hpp"
#include "sim/memory_pool.hpp"

namespace dualpath::sim {

class StorageNode {
  public:
    StorageNode(double bytes_per_s, std::int64_t staging_bytes, double window_s)
        : reads_(bytes_per_s),
          staging_(staging_bytes),
          nominal_(bytes_per_s),
          window_s_(window_s) {}

    FifoServer& reads() { return reads_; }
    MemoryPool& staging() { return staging_; }
    const MemoryPool& staging() const { return staging_; }

    // Ends the transfer in service and accounts for it.
    FifoServer::Transfer end_read(double now_s);
    // Blocks on their way out; they do not disturb reads: the NIC is full duplex.
    void write(double bytes) { written_bytes_ += bytes; }
    void slow_down(double now_s, double factor);
    void die(double now_s);
    bool is_alive() const { return alive_; }

    // Tokens a second as an engine would report it, after `elapsed_s` more seconds.
    double measured_rate(double now_s, double elapsed_s, double bytes_per_token);

    // Bytes read in each window from time 0 on.
    const std::vector<float>& window_bytes() const { return windows_; }
    double read_bytes() const { return read_bytes_; }
    double written_bytes() const { return written_bytes_; }
    double busy_s() const { return busy_s_; }
    double write_busy_s() const { return written_bytes_ / nominal_; }
    double peak_staging_bytes() const { return static_cast<double>(peak_staging_); }
    void note_staging();
    // Accounts for what was served until now.
    void settle(double now_s);

  private:
    FifoServer reads_;
    MemoryPool staging_;
    policy::ReadRate rate_;
    double nominal_;
    double window_s_;
    std::vector<float> windows_;
    double read_bytes_ = 0;
    double written_bytes_ = 0;
    double busy_s_ = 0;
    double reported_bytes_ = 0;
    double reported_busy_s_ = 0;
    std::int64_t peak_staging_ = 0;
    bool alive_ = true;
};

}  // namespace dualpath::sim
