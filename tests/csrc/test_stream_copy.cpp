#include "core/stream_copy.hpp"

#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "check.hpp"

using namespace dualpath;

TEST(stream_copy_at_every_alignment_and_length_writes_exactly_its_bytes) {
    constexpr std::size_t kMargin = 200;
    std::mt19937 generator(3);
    for (std::size_t size : {1, 63, 64, 1023, 1024, 1025, 1087, 4096, 10007, 65536}) {
        for (std::size_t to_offset : {0, 1, 17, 63}) {
            for (std::size_t from_offset : {0, 5, 64}) {
                // Exactly as large as needed: AddressSanitizer then sees a read or write outside.
                std::vector<char> from(from_offset + size);
                for (auto& byte : from) byte = static_cast<char>(generator());
                std::vector<char> to(kMargin + to_offset + size, 'x');
                std::vector<char> expected = to;
                std::memcpy(expected.data() + kMargin + to_offset, from.data() + from_offset, size);
                stream_copy(to.data() + kMargin + to_offset, from.data() + from_offset, size);
                CHECK(to == expected);
            }
        }
    }
}

TEST(stream_copy_of_nothing_touches_nothing) {
    stream_copy(nullptr, nullptr, 0);
}

TEST(stream_copy_to_the_end_of_a_page_stays_inside) {
    auto to = std::make_unique<char[]>(8192);
    auto from = std::make_unique<char[]>(8192);
    std::memset(from.get(), 7, 8192);
    stream_copy(to.get() + 1, from.get() + 1, 8191);
    CHECK(to[0] == 0 && to[1] == 7 && to[8191] == 7);
}
