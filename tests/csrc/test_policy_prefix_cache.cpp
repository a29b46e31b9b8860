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
            const auto first_kept =
                std::stable_partition(free_.begin(), free_.end(),
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
    enum class Stage { kAway, kComing, kThere };
    struct Conversation {
        std::uint64_t name = 0;
        std::uint64_t stay = 0, last_stay = 0;
        std::int64_t num_tokens = 0, longer = 0, shared = 0;
        Stage stage = Stage::kAway;
    };
    std::mt19937_64 random(11);
    PrefixCacheModel model(kRoom);
    Cache cache(kRoom);
    std::array<Conversation, 8> conversations;
    std::uint64_t next = 1;
    int num_sure = 0, num_broken = 0;
    for (int step = 0; step < 60000; ++step) {
        Conversation& one = conversations[random() % conversations.size()];
        if (one.stage == Stage::kThere) {
            cache.give_back(one.name);
            model.end(one.stay, true);
            one.last_stay = one.stay;
            one.num_tokens = one.longer;
            one.stage = Stage::kAway;
        } else if (one.stage == Stage::kComing) {
            if (!cache.has_room(one.longer)) continue;
            if (!model.arrive(one.stay)) {
                ++num_broken;
                model.end(one.stay, false);
                one.stage = Stage::kAway;
                continue;
            }
            if (one.shared > 0) {
                ++num_sure;
                CHECK(cache.holds(one.name, one.shared));
            }
            cache.take(one.name, one.num_tokens, one.longer);
            one.stage = Stage::kThere;
        } else {
            if (one.name == 0 || one.num_tokens > 40) one = {next++};
            one.longer = one.num_tokens + 1 + static_cast<std::int64_t>(random() % 9);
            const bool sure = model.holds(one.last_stay, one.num_tokens, one.longer);
            one.shared = sure ? one.num_tokens : 0;
            one.stay = next++;
            model.begin(one.stay, one.longer, one.last_stay, one.shared);
            one.stage = Stage::kComing;
        }
    }
    CHECK(num_sure > 300);
    CHECK(num_broken > 10);
}

namespace {

// A prompt that goes there and leaves again.
bool visit(PrefixCacheModel& model, PrefixCacheModel::Key key, std::int64_t num_tokens,
           PrefixCacheModel::Key earlier = 0, std::int64_t shared = 0) {
    model.begin(key, num_tokens, earlier, shared);
    const bool held = model.arrive(key);
    model.end(key, true);
    return held;
}

}  // namespace

TEST(policy_prefix_cache_forgets_in_order) {
    PrefixCacheModel model(kRoom);
    for (const PrefixCacheModel::Key key : {1, 2, 3}) {
        CHECK(!model.holds(key, 40, 0));
        CHECK(visit(model, key, 40));
        CHECK(model.holds(key, 40, 0) && !model.holds(key, 41, 0));
    }
    CHECK(!model.holds(1, 40, 0) && model.holds(2, 40, 0));
    CHECK(visit(model, 4, 50, 2, 40));  // goes on where 2 ended: its blocks are not counted twice
    CHECK(model.holds(4, 50, 0) && model.holds(3, 40, 0));
    CHECK(model.holds(2, 40, 0));  // as a part of 4
    model.begin(5, 30);
    CHECK(model.arrive(5));
    model.end(5, false);  // not computed, and in the way of 3
    CHECK(!model.holds(5, 30, 0) && !model.holds(3, 40, 0) && model.holds(4, 50, 0));
    model.end(9, true);  // never was there
    model.begin(6, 90);
    model.end(6, false);  // never arrived
    CHECK(model.open_tokens() == 0 && !model.holds(4, 50, 0));
}

TEST(policy_prefix_cache_keeps_what_a_longer_prompt_had_beyond) {
    PrefixCacheModel model(kRoom);
    visit(model, 1, 20);
    visit(model, 2, 50);
    visit(model, 3, 50, 2, 40);  // the last ten of 2 stay, for nobody
    CHECK(model.holds(1, 20, 0) && model.holds(2, 40, 0) && !model.holds(2, 41, 0));
    visit(model, 4, 21);
    CHECK(!model.holds(1, 20, 0) && model.holds(3, 50, 0) && !model.holds(2, 50, 0));
}

TEST(policy_prefix_cache_breaks_promises_before_they_are_relied_on) {
    PrefixCacheModel model(kRoom);
    visit(model, 1, 30);
    model.begin(2, 40, 1, 30);
    CHECK(model.holds(1, 30, 60) && !model.holds(1, 30, 91));
    visit(model, 3, 80);
    CHECK(!model.arrive(2));
    CHECK(model.holds(3, 80, 0));  // nothing has come in its place
    model.end(2, false);
    CHECK(!model.holds(2, 40, 0) && model.open_tokens() == 0);
}

TEST(policy_prefix_cache_of_two_that_go_on_from_one) {
    PrefixCacheModel model(kRoom);
    visit(model, 1, 30);
    for (const PrefixCacheModel::Key key : {2, 3}) model.begin(key, 35, 1, 30);
    CHECK(model.arrive(2) && model.arrive(3));
    CHECK(model.open_tokens() == 70 && model.holds(1, 30, 30));
    model.end(2, true);
    CHECK(model.holds(1, 30, 0));
    model.end(3, true);
    CHECK(model.holds(2, 35, 0) && model.holds(3, 35, 0));
}

TEST(policy_prefix_cache_believes_in_less_after_a_miss) {
    PrefixCacheModel model(kRoom);
    for (const PrefixCacheModel::Key key : {1, 2}) visit(model, key, 30);
    for (const PrefixCacheModel::Key key : {3, 4, 5}) model.begin(key, 31, key == 4 ? 2 : 1, 30);
    CHECK(model.arrive(3) && model.arrive(4));
    model.missed(3);
    model.missed(4);  // of the same cause
    CHECK(!model.arrive(5));
    model.end(5, false);
    for (const PrefixCacheModel::Key key : {3, 4}) model.end(key, true);
    CHECK(model.holds(1, 30, 0) && model.holds(4, 31, 31));     // 1 again, as a part of 3
    CHECK(model.holds(4, 31, 69) && !model.holds(4, 31, 101));  // 50, and grown again
}

TEST(policy_prefix_cache_promises_nothing_that_its_prompt_would_push_out) {
    PrefixCacheModel model(kRoom);
    visit(model, 1, 30);
    visit(model, 2, 60);
    CHECK(model.holds(1, 30, 40) && !model.holds(1, 30, 45));
    CHECK(model.holds(2, 60, 80));  // 1 goes first
}

TEST(policy_prefix_cache_of_one_that_goes_on_for_ever) {
    PrefixCacheModel model(kRoom);
    visit(model, 1, 20);
    for (PrefixCacheModel::Key key = 2; key < 1000; ++key)
        CHECK(visit(model, key, 20, key - 1, 20));
    CHECK(model.holds(999, 20, 0) && model.holds(950, 20, 0) && !model.holds(1, 20, 0));
}
