// Runs the C++ tests: all of them, or those whose name contains an argument.
#include <cstdio>
#include <cstring>

#include "check.hpp"

namespace dualpath::test {

std::vector<Test>& all_tests() {
    static std::vector<Test> tests;
    return tests;
}

namespace {

bool is_wanted(const Test& test, int num_patterns, char** patterns) {
    for (int i = 0; i < num_patterns; ++i) {
        if (std::strstr(test.name, patterns[i]) != nullptr) return true;
    }
    return num_patterns == 0;
}

bool passes(const Test& test) {
    try {
        test.run();
        return true;
    } catch (const std::exception& error) {
        std::printf("FAILED  %s\n        %s\n", test.name, error.what());
        return false;
    }
}

}  // namespace
}  // namespace dualpath::test

int main(int argc, char** argv) {
    using namespace dualpath::test;
    int num_run = 0;
    int num_failed = 0;
    for (const Test& test : all_tests()) {
        if (!is_wanted(test, argc - 1, argv + 1)) continue;
        ++num_run;
        if (!passes(test)) ++num_failed;
    }
    std::printf("%d C++ tests, %d failed\n", num_run, num_failed);
    // No test at all is a mistake too.
    return num_failed == 0 && num_run > 0 ? 0 : 1;
}
