#include "policy/prefix_cache.hpp"

#include <algorithm>

namespace dualpath::policy {

bool PrefixCacheModel::holds(Key earlier, std::int64_t shared_tokens,
                             std::int64_t num_tokens) const {
    const Entry* entry = find(earlier);
    return entry != nullptr && shared_tokens <= entry->held &&
           open_tokens_ + num_tokens <= room_tokens_;
}

void PrefixCacheModel::begin(Key key, std::int64_t num_tokens, Key earlier,
                             std::int64_t shared_tokens) {
    Entry& entry = entries_[key];
    entry.num_tokens = num_tokens;
    if (const Entry* found = find(earlier); found != nullptr && shared_tokens <= found->held) {
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
    entry.arrived = true;
    entry.epoch = num_misses_;
    count(entry, entry.num_tokens);
    const bool counts_on_it = entry.shared > 0;
    if (counts_on_it) absorb(key, entry);
    trim();
    return !counts_on_it || entry.held > 0;
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

const PrefixCacheModel::Entry* PrefixCacheModel::find(Key key) const {
    const auto absorbed = absorbed_by_.find(key);
    const auto found = entries_.find(absorbed == absorbed_by_.end() ? key : absorbed->second);
    return found == entries_.end() ? nullptr : &found->second;
}

void PrefixCacheModel::count(Entry& entry, std::int64_t tokens) {
    num_tokens_ += tokens - entry.counted;
    open_tokens_ += tokens - entry.counted;
    entry.counted = tokens;
}

// The blocks that an arriving prompt shares are its own from now on, if they are there.
void PrefixCacheModel::absorb(Key key, Entry& entry) {
    Entry* const earlier = find(entry.earlier);
    if (earlier == nullptr || earlier->held < entry.shared) return;
    entry.held = entry.shared;
    // Another prompt in the engine has them, too: they count twice.
    if (earlier->open) return;
    const Key earlier_key = *earlier->place;
    entry.absorbed = std::move(earlier->absorbed);
    entry.absorbed.push_back(earlier_key);
    for (const Key each : entry.absorbed) absorbed_by_[each] = key;
    // What the earlier one has beyond them stays where it is until it is evicted; nobody asks.
    earlier->absorbed.clear();
    earlier->held = 0;
    const std::int64_t left = std::max<std::int64_t>(0, earlier->counted - entry.shared);
    num_tokens_ += left - earlier->counted;
    earlier->counted = left;
    if (left == 0) {
        idle_.erase(earlier->place);
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
    for (const Key each : entry.absorbed) absorbed_by_.erase(each);
    entries_.erase(found);
}

void PrefixCacheModel::trim() {
    while (num_tokens_ > room_tokens_ && !idle_.empty()) drop(idle_.front());
}

}  // namespace dualpath::policy
