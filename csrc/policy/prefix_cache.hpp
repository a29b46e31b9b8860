// What one prefill engine's own prefix cache holds, as far as that can be told from outside.
#pragma once

#include <cstdint>
#include <list>
#include <unordered_map>
#include <vector>

namespace dualpath::policy {

// The engine takes a prompt's blocks when the prompt reaches it, frees them when it has computed
// it, and gives those that are free longest to others first. So it still holds a prompt while all
// that reached or left it since fits beside it. Errs on one side: what is said to be held may be
// gone only if the engine was asked for more than this model was told of.
class PrefixCacheModel {
  public:
    using Key = std::uint64_t;  // of one stay of a prompt in the engine, never used again
    static constexpr Key kNothing = 0;

    // Of what an engine's KV cache takes, what may be counted on. The rest is for what nobody
    // tells: prompts that end in one step are freed in an order of their own.
    static std::int64_t room_of(std::int64_t cache_tokens) {
        return static_cast<std::int64_t>(0.9 * static_cast<double>(cache_tokens));
    }

    explicit PrefixCacheModel(std::int64_t room_tokens)
        : full_room_tokens_(room_tokens), room_tokens_(room_tokens) {}

    // Whether the engine holds the first `shared_tokens` of an earlier prompt, and a prompt of
    // `num_tokens` fits beside all that are on their way or there.
    bool holds(Key earlier, std::int64_t shared_tokens, std::int64_t num_tokens) const;
    // A prompt is on its way. With an `earlier` one it counts on that one's first `shared_tokens`.
    void begin(Key key, std::int64_t num_tokens, Key earlier = kNothing,
               std::int64_t shared_tokens = 0);
    // It is sent to the engine, if that still holds what the prompt counts on. False: it is not.
    bool arrive(Key key);
    // It left the engine, computed or not, or never reached it.
    void end(Key key, bool computed);
    // The engine did not hold what `key` counted on: believe in nothing, and in half as much room,
    // which grows with each prompt computed. Once for all prompts that counted on it by then.
    void missed(Key key);

    std::int64_t open_tokens() const { return open_tokens_; }

  private:
    struct Entry {
        std::int64_t num_tokens = 0;  // of the prompt
        std::int64_t counted = 0;     // of those: not part of another entry
        std::int64_t held = 0;        // leading ones that are there and complete
        Key earlier = kNothing;       // what it counts on, until it arrives
        std::int64_t shared = 0;
        std::uint64_t epoch = 0;  // misses before it arrived
        bool open = true;
        bool arrived = false;
        std::list<Key>::iterator place;  // in idle_, if not open
        std::vector<Key> absorbed;       // earlier ones that are part of it, the latest last
    };
    using Entries = std::unordered_map<Key, Entry>;
    // An earlier prompt of which another one has the leading tokens.
    struct Part {
        Key of;
        std::int64_t num_tokens;
    };
    struct Found {
        Entry* entry = nullptr;
        std::int64_t held = 0;
    };

    Found find(Key key) const;
    void count(Entry& entry, std::int64_t tokens);
    void absorb(Key key, Entry& entry, Entry& earlier);
    void drop(Key key);
    void trim();

    std::int64_t full_room_tokens_;
    std::int64_t room_tokens_;
    std::int64_t num_tokens_ = 0;   // of all entries
    std::int64_t open_tokens_ = 0;  // of those that are open
    std::uint64_t num_misses_ = 0;
    mutable Entries entries_;  // find() gives them to those who change them, too
    std::unordered_map<Key, Part> parts_;
    std::list<Key> idle_;  // least recently used first
};

}  // namespace dualpath::policy
