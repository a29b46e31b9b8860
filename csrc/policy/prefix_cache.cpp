#include "policy/prefix_cache.hpp"

#include <algorithm>

namespace dualpath::policy {
namespace {

constexpr std::size_t kMaxParts = 64;  // one that goes on for ever has no end of them

}  // namespace

bool PrefixCacheModel::holds(Key earlier, std::int64_t shared_tokens,
                             std::int64_t num_tokens) const {
    const Found found = find(earlier);
    if (found.entry == nullptr || found.held < shared_tokens) return false;
    if (open_tokens_ + num_tokens > room_tokens_) return false;
    // The prompt must not push out what it counts on.
    std::int64_t over = num_tokens_ + num_tokens - shared_tokens - room_tokens_;
    for (auto oldest = idle_.begin(); over > 0 && oldest != idle_.end(); ++oldest) {
        const Entry& entry = entries_.at(*oldest);
        if (&entry == found.entry) return false;
        over -= entry.counted;
    }
    return true;
}

void PrefixCacheModel::begin(Key key, std::int64_t num_tokens, Key earlier,
                             std::int64_t shared_tokens) {
    Entry& entry = entries_[key];
    entry.num_tokens = num_tokens;
    if (shared_tokens > 0 && find(earlier).held >= shared_tokens) {
        entry.earlier = earlier;
        entry.shared = shared_tokens;
    }
    // What it shares is counted where it lies: it may be gone when this prompt arrives.
    count(entry, num_tokens - entry.shared);
    trim();
}

bool PrefixCacheModel::arrive(Key key) {
    const auto found = entries_.find(key);
    if (found == entries_.end()) return false;
    Entry& entry = found->second;
    const Found earlier = find(entry.earlier);
    if (entry.shared > 0 && earlier.held < entry.shared) return false;
    entry.arrived = true;
    entry.epoch = num_misses_;
    count(entry, entry.num_tokens);
    if (entry.shared > 0) absorb(key, entry, *earlier.entry);
    trim();
    return true;
}

void PrefixCacheModel::end(Key key, bool computed) {
    const auto found = entries_.find(key);
    if (found == entries_.end() || !found->second.open) return;
    Entry& entry = found->second;
    if (!entry.arrived) return drop(key);
    open_tokens_ -= entry.counted;
    entry.open = false;
    // What was not computed lies there too, and is in the way of others.
    entry.place = idle_.insert(idle_.end(), key);
    if (computed) {
        entry.held = entry.num_tokens;
        room_tokens_ = std::min(full_room_tokens_, room_tokens_ + entry.num_tokens);
    }
    trim();
}

void PrefixCacheModel::missed(Key key) {
    const auto found = entries_.find(key);
    if (found == entries_.end() || found->second.epoch != num_misses_) return;
    ++num_misses_;
    room_tokens_ /= 2;
    while (!idle_.empty()) drop(idle_.front());
    for (auto& [other, entry] : entries_) entry.held = 0;
}

PrefixCacheModel::Found PrefixCacheModel::find(Key key) const {
    const auto part = parts_.find(key);
    const bool is_part = part != parts_.end();
    const auto found = entries_.find(is_part ? part->second.of : key);
    if (found == entries_.end()) return {};
    const std::int64_t held = found->second.held;
    return {&found->second, is_part ? std::min(held, part->second.num_tokens) : held};
}

void PrefixCacheModel::count(Entry& entry, std::int64_t tokens) {
    num_tokens_ += tokens - entry.counted;
    open_tokens_ += tokens - entry.counted;
    entry.counted = tokens;
}

// The blocks that an arriving prompt shares are its own from now on.
void PrefixCacheModel::absorb(Key key, Entry& entry, Entry& earlier) {
    entry.held = entry.shared;
    // Another prompt in the engine has them, too: they count twice.
    if (earlier.open) return;
    const Key earlier_key = *earlier.place;
    entry.absorbed = std::move(earlier.absorbed);
    earlier.absorbed.clear();
    for (const Key each : entry.absorbed) {
        Part& part = parts_.at(each);
        part = {key, std::min(part.num_tokens, entry.shared)};
    }
    entry.absorbed.push_back(earlier_key);
    parts_[earlier_key] = {key, entry.shared};
    if (entry.absorbed.size() > kMaxParts) {
        parts_.erase(entry.absorbed.front());
        entry.absorbed.erase(entry.absorbed.begin());
    }
    // What the earlier one has beyond them stays where it is until it is evicted; nobody asks.
    earlier.held = 0;
    const std::int64_t left = std::max<std::int64_t>(0, earlier.counted - entry.shared);
    num_tokens_ += left - earlier.counted;
    earlier.counted = left;
    if (left == 0) {
        idle_.erase(earlier.place);
        entries_.erase(earlier_key);
    }
}

void PrefixCacheModel::drop(Key key) {
    const auto found = entries_.find(key);
    Entry& entry = found->second;
    num_tokens_ -= entry.counted;
    if (entry.open) {
        open_tokens_ -= entry.counted;
    } else {
        idle_.erase(entry.place);
    }
    for (const Key each : entry.absorbed) parts_.erase(each);
    entries_.erase(found);
}

void PrefixCacheModel::trim() {
    while (num_tokens_ > room_tokens_ && !idle_.empty()) drop(idle_.front());
}

}  // namespace dualpath::policy
