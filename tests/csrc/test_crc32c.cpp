#include "core/crc32c.hpp"

#include <random>
#include <vector>

#include "check.hpp"

using namespace dualpath;

namespace {

std::vector<unsigned char> random_bytes(std::size_t size) {
    std::mt19937 generator(7);
    std::vector<unsigned char> bytes(size);
    for (auto& byte : bytes) byte = static_cast<unsigned char>(generator());
    return bytes;
}

}  // namespace

// The check value of the Rocksoft catalogue for CRC-32C.
TEST(crc32c_of_the_check_string) {
    CHECK(crc32c("123456789", 9, 0) == 0xE3069283U);
}

TEST(crc32c_equals_the_table_at_every_length_and_alignment) {
    const auto bytes = random_bytes(20000);
    for (std::size_t size : {0,    1,   7,   8,   9,   255, 256,  383,  384,   385,  6143,
                             6144, 511, 512, 513, 767, 768, 1030, 6145, 12288, 19000}) {
        for (std::size_t offset : {0, 1, 3, 8, 13}) {
            CHECK(crc32c(bytes.data() + offset, size, 0) ==
                  crc32c_portable(bytes.data() + offset, size, 0));
        }
    }
}

TEST(crc32c_continues_from_an_earlier_checksum) {
    const auto bytes = random_bytes(10000);
    const std::uint32_t whole = crc32c(bytes.data(), bytes.size(), 0);
    for (std::size_t cut : {1, 100, 4096, 9999}) {
        const std::uint32_t first = crc32c(bytes.data(), cut, 0);
        CHECK(crc32c(bytes.data() + cut, bytes.size() - cut, first) == whole);
    }
}
