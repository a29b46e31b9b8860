// The model of an engine's prefix cache against an engine that evicts as vLLM does.
#include <algorithm>
#include <array>
#include <cstdint>
#include <deque>
#include <map>
#include <random>
#include <vector>

#include "check.hpp"
#include "policy/prefix_cache.hpp"

namespace {

using dualpath::policy::PrefixCacheModel;

constexpr std::int64_t kRoom = 100;

// Blocks of one token. Free ones stay what they are until the queue of free ones comes to them.
class Cache {
  public:
    explicit Cache(std::int64_t room) {
        for (std::int64_t block = 0; block < room; ++block) free_.push_back({0, block});
    }

    // Whether the engine has all of a prompt's first tokens, free or not.
    bool holds(std::uint64_t prompt, std::int64_t num_tokens) const {
        return std::count_if(free_.begin(), free_.end(), [&](const Block& block) {
                   return block.prompt == prompt && block.token < num_tokens;
               }) == num_tokens;
    }
    bool has_room(std::int64_t num_tokens) const {
        return static_cast<std::int64_t>(free_.size()) >= num_tokens;
    }
    // A conversation goes on: what is held of it is its own again, the rest is taken anew.
    void take(std::uint64_t prompt, std::int64_t num_held, std::int64_t num_tokens) {
        std::vector<Block>& blocks = used_[prompt];
        if (holds(prompt, num_held)) {
            const auto first_kept = std::stable_partition(
                free_.begin(), free_.end(),
                [&](const Block& block) { return block.prompt != prompt; });
            blocks.assign(first_kept, free_.end());
            free_.erase(first_kept, free_.end());
            std::sort(blocks.begin(), blocks.end(), [](const Block& left, const Block& right) {
                return left.token < right.token;
            });
        }
        for (Block& block : free_)
            if (block.prompt == prompt) block.prompt = 0;  // nobody finds it any more
        while (static_cast<std::int64_t>(blocks.size()) < num_tokens) {
            free_.pop_front();
            blocks.push_back({prompt, static_cast<std::int64_t>(blocks.size())});
        }
    }
    void give_back(std::uint64_t prompt) {
        std::vector<Block>& blocks = used_[prompt];
        for (auto block = blocks.rbegin(); block != blocks.rend(); ++block) free_.push_back(*block);
        used_.erase(prompt);
    }

  private:
    struct Block {
        std::uint64_t prompt;
        std::int64_t token;
    };
    std::deque<Block> free_;
    std::map<std::uint64_t, std::vector<Block>> used_;
};

}  // namespace

TEST(policy_prefix_cache_is_never_too_sure) {
    std::mt19937_64 random(11);
    struct Conversation {
        std::uint64_t key = 0;
        std::int64_t num_tokens = 0;
        bool open = false;
    };
    PrefixCacheModel model(kRoom);
    Cache cache(kRoom);
    std::array<Conversation, 8> conversations;
    std::uint64_t next_key = 1;
    int num_open = 0, num_sure = 0;
    for (int step = 0; step < 20000; ++step) {
        Conversation& one = conversations[random() % conversations.size()];
        if (one.open) {
            cache.give_back(one.key);
            model.end(one.key, true);
            one.open = false;
            --num_open;
            continue;
        }
        if (num_open == 3) continue;
        if (one.key == 0 || one.num_tokens > 40) one = {next_key++};
        if (model.holds(one.key)) {
            CHECK(cache.holds(one.key, one.num_tokens));
            ++num_sure;
        }
        const std::int64_t longer = one.num_tokens + 1 + static_cast<std::int64_t>(random() % 9);
        if (!cache.has_room(longer)) continue;
        model.begin(one.key, longer);
        cache.take(one.key, one.num_tokens, longer);
        one.num_tokens = longer;
        one.open = true;
        ++num_open;
    }
    CHECK(num_sure > 1000);
}

TEST(policy_prefix_cache_forgets_in_order) {
    PrefixCacheModel model(kRoom);
    for (const PrefixCacheModel::Key key : {1, 2, 3}) {
        model.begin(key, 40);
        CHECK(!model.holds(key));
        model.end(key, true);
        CHECK(model.holds(key));
    }
    CHECK(!model.holds(1) && model.holds(2));
    model.begin(4, 50, 2);  // goes on where 2 ended: its blocks are not counted twice
    CHECK(!model.holds(2) && model.holds(3));
    model.end(4, false);
    CHECK(!model.holds(4) && model.holds(3));
    model.end(4, true);  // it is not open
    model.end(9, true);  // never was there
    CHECK(!model.holds(4) && !model.holds(9));
}

TEST(policy_prefix_cache_doubts_what_does_not_fit_at_once) {
    PrefixCacheModel model(kRoom);
    model.begin(1, 30);
    model.end(1, true);
    model.begin(2, 60);
    model.begin(2, 60);  // twice at once, and counted once
    CHECK(!model.is_overcommitted() && model.holds(1));
    model.begin(3, 41);
    CHECK(model.is_overcommitted() && !model.holds(1));
    model.end(2, true);
    CHECK(model.is_overcommitted());
    model.end(2, true);
    CHECK(!model.is_overcommitted() && model.holds(2));
}

TEST(policy_prefix_cache_believes_in_less_after_a_miss) {
    PrefixCacheModel model(kRoom);
    for (const PrefixCacheModel::Key key : {1, 2}) {
        model.begin(key, 30);
        model.end(key, true);
    }
    model.missed();
    CHECK(!model.holds(1) && !model.holds(2));
    model.begin(1, 20);
    model.end(1, true);  // 50 and 20
    model.begin(2, 51);
    CHECK(!model.is_overcommitted() && !model.holds(1));
    model.end(2, true);  // and 51: all of it again
    model.begin(1, 40);
    model.end(1, true);
    CHECK(model.holds(1) && model.holds(2));
}
