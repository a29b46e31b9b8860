// What one prefill engine's own prefix cache holds, as far as that can be told from outside.
#pragma once

#include <cstdint>
#include <list>
#include <unordered_map>

namespace dualpath::policy {

// The engine frees a prompt's blocks when it has computed it, and gives the longest free ones to
// others first. So it still holds a prompt while all that it got or finished since fits beside it.
// Errs on one side only: what it says is held may be gone only if the engine was asked for more
// than this model was told of.
class PrefixCacheModel {
  public:
    using Key = std::uint64_t;
    static constexpr Key kNothing = 0;

    // `room_tokens`: what the engine's KV cache takes.
    explicit PrefixCacheModel(std::int64_t room_tokens)
        : full_room_tokens_(room_tokens), room_tokens_(room_tokens) {}

    // A prompt goes to the engine; it continues `extended`, whose blocks are its own from now on.
    void begin(Key key, std::int64_t num_tokens, Key extended = kNothing);
    // It left the engine, computed or not. Does nothing for a key that is not there.
    void end(Key key, bool computed);
    // Whether the engine has computed the prompt and still holds it.
    bool holds(Key key) const;
    // Whether the prompts that were sent do not fit at once: then the engine evicts what a waiting
    // one counts on.
    bool is_overcommitted() const { return open_tokens_ > room_tokens_; }
    // Something was not held: believe in half as much room, and in more with each prompt computed.
    void missed();

  private:
    struct Entry {
        std::int64_t num_tokens = 0;
        std::uint32_t num_open = 0;
        bool computed = false;
        std::list<Key>::iterator place;  // in idle_, unless open
    };
    using Entries = std::unordered_map<Key, Entry>;

    void drop(Entries::iterator entry);
    void trim();

    std::int64_t full_room_tokens_;
    std::int64_t room_tokens_;
    std::int64_t num_tokens_ = 0;   // of all entries
    std::int64_t open_tokens_ = 0;  // of those in the engine
    Entries entries_;
    std::list<Key> idle_;  // least recently used first
};

}  // namespace dualpath::policy
