// What the C++ tests need of a test framework: tests that register themselves, and checks.
#pragma once

#include <exception>
#include <stdexcept>
#include <string>
#include <vector>

namespace dualpath::test {

struct Test {
    const char* name;
    void (*run)();
};

std::vector<Test>& all_tests();

struct Registration {
    Registration(const char* name, void (*run)()) { all_tests().push_back({name, run}); }
};

class CheckFailed : public std::runtime_error {
  public:
    using std::runtime_error::runtime_error;
};

[[noreturn]] inline void fail(const char* file, int line, const std::string& what) {
    throw CheckFailed(std::string(file) + ":" + std::to_string(line) + ": " + what);
}

}  // namespace dualpath::test

#define TEST(name)                                                                   \
    static void test_##name();                                                       \
    static const ::dualpath::test::Registration register_##name{#name, test_##name}; \
    static void test_##name()

// Ends the test when false. Any thread may call it, but only the test's own may let it end the
// test.
#define CHECK(...)                                                                    \
    do {                                                                              \
        if (!(__VA_ARGS__)) ::dualpath::test::fail(__FILE__, __LINE__, #__VA_ARGS__); \
    } while (false)

#define CHECK_THROWS(expression, Type)                                                         \
    do {                                                                                       \
        bool thrown = false;                                                                   \
        try {                                                                                  \
            (void)(expression);                                                                \
        } catch (const Type&) {                                                                \
            thrown = true;                                                                     \
        }                                                                                      \
        if (!thrown) ::dualpath::test::fail(__FILE__, __LINE__, #expression " did not throw"); \
    } while (false)
