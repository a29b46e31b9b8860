#include "policy/prefix_cache.hpp"

#include <algorithm>

namespace dualpath::policy {

void PrefixCacheModel::begin(Key key, std::int64_t num_tokens, Key extended) {
    if (extended != key) {
        const auto old = entries_.find(extended);
        if (old != entries_.end() && old->second.num_open == 0) drop(old);
    }
    const auto [found, is_new] = entries_.try_emplace(key);
    Entry& entry = found->second;
    if (entry.num_open > 0) {
        open_tokens_ -= entry.num_tokens;
    } else if (!is_new) {
        idle_.erase(entry.place);
    }
    num_tokens_ += num_tokens - entry.num_tokens;
    open_tokens_ += num_tokens;
    entry.num_tokens = num_tokens;
    ++entry.num_open;
    trim();
}

void PrefixCacheModel::end(Key key, bool computed) {
    const auto found = entries_.find(key);
    if (found == entries_.end() || found->second.num_open == 0) return;
    Entry& entry = found->second;
    entry.computed |= computed;
    if (computed) room_tokens_ = std::min(full_room_tokens_, room_tokens_ + entry.num_tokens);
    if (--entry.num_open > 0) return;
    open_tokens_ -= entry.num_tokens;
    // What was not computed lies there too, and is in the way of others.
    entry.place = idle_.insert(idle_.end(), key);
    trim();
}

bool PrefixCacheModel::holds(Key key) const {
    if (is_overcommitted()) return false;
    const auto found = entries_.find(key);
    return found != entries_.end() && found->second.computed;
}

void PrefixCacheModel::missed() {
    room_tokens_ /= 2;
    while (!idle_.empty()) drop(entries_.find(idle_.front()));
    for (auto& [key, entry] : entries_) entry.computed = false;
}

void PrefixCacheModel::drop(Entries::iterator entry) {
    num_tokens_ -= entry->second.num_tokens;
    idle_.erase(entry->second.place);
    entries_.erase(entry);
}

void PrefixCacheModel::trim() {
    while (num_tokens_ > room_tokens_ && !idle_.empty()) drop(entries_.find(idle_.front()));
}

}  // namespace dualpath::policy
