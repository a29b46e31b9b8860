// The waiting line against a list of lengths.
#include <cstdint>
#include <deque>
#include <random>
#include <utility>

#include "check.hpp"
#include "policy/waiting_line.hpp"

namespace {

using dualpath::policy::WaitingLine;

struct Model {
    std::deque<std::pair<WaitingLine::Ticket, std::int64_t>> waiting;

    std::int64_t fitting(std::int64_t room) const {
        std::int64_t sum = 0;
        for (const auto& [ticket, length] : waiting) {
            if (sum + length > room) break;
            sum += length;
        }
        return sum;
    }
};

}  // namespace

TEST(policy_line_answers_as_a_list_of_lengths_does) {
    std::mt19937_64 random(7);
    WaitingLine line;
    Model model;
    for (int step = 0; step < 20000; ++step) {
        const auto action = random() % 8;
        // Grows and shrinks in turns, so that the line moves its memory, too.
        const bool grow = (step / 3000) % 2 == 0;
        if (action < (grow ? 5U : 2U)) {
            const auto length = static_cast<std::int64_t>(random() % 100);
            model.waiting.emplace_back(line.push(length), length);
        } else if (action < 7 && !model.waiting.empty()) {
            CHECK(line.head() == model.waiting.front().first);
            line.pop();
            model.waiting.pop_front();
        } else if (!model.waiting.empty()) {
            const auto index = random() % model.waiting.size();
            const auto ticket = model.waiting[index].first;
            CHECK(line.cancel(ticket));
            CHECK(!line.cancel(ticket));
            model.waiting.erase(model.waiting.begin() + static_cast<std::ptrdiff_t>(index));
        }
        const auto room = static_cast<std::int64_t>(random() % 5000);
        CHECK(line.size() == model.waiting.size());
        CHECK(line.tokens_fitting(room) == model.fitting(room));
        CHECK(line.num_tokens() == model.fitting(INT64_MAX));
    }
}

TEST(policy_line_refuses_what_is_not_there) {
    WaitingLine line;
    CHECK_THROWS(line.pop(), std::out_of_range);
    CHECK_THROWS(line.head(), std::out_of_range);
    CHECK_THROWS(line.push(-1), std::invalid_argument);
    CHECK(!line.cancel(0));
    const auto ticket = line.push(5);
    line.pop();
    CHECK(!line.cancel(ticket));
    CHECK(line.tokens_fitting(100) == 0);
}
