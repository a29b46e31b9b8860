// What is asked of NVIDIA's driver, with a driver of our own that keeps streams and events in order
// on the host. Real ones are tried by tests/connector/test_layouts.py where there is a GPU.
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "check.hpp"
#include "copy/cuda_copies.hpp"

using namespace dualpath;
using std::chrono::seconds;

namespace {

// A stream runs nothing until somebody waits for an event: then everything that the event stands
// behind is carried out, and nothing else. A copy that no event orders is never seen.
struct FakeCuda {
    struct Operation {
        enum Kind { kCopy, kWait, kRecord } kind;
        CudaAddress to, from;
        std::size_t num_bytes;
        CudaEvent event;
    };
    std::mutex mutex;
    int version = 13000;
    int copy_result = 0;
    std::map<CudaStream, std::deque<Operation>> streams;
    std::map<CudaEvent, CudaStream> recorded;  // events with a record that has not run
    std::vector<std::string> calls;
    std::uintptr_t next_handle = 16;
    int num_events = 0, num_streams = 0, num_contexts = 0;

    void reach(CudaEvent event) {
        const auto found = recorded.find(event);
        if (found == recorded.end()) return;
        auto& stream = streams[found->second];
        while (!stream.empty() && recorded.contains(event)) {
            const Operation operation = stream.front();
            stream.pop_front();
            if (operation.kind == Operation::kWait) reach(operation.event);
            if (operation.kind == Operation::kRecord) recorded.erase(operation.event);
            if (operation.kind == Operation::kCopy) {
                std::memcpy(reinterpret_cast<void*>(operation.to),
                            reinterpret_cast<const void*>(operation.from), operation.num_bytes);
            }
        }
    }
};

FakeCuda* cuda = nullptr;

int version(int* value) {
    return *value = cuda->version, 0;
}
int error_string(int, const char** text) {
    return *text = "a fake reason", 0;
}
int init(unsigned) {
    return 0;
}
int retain(CudaContext* context, int) {
    return ++cuda->num_contexts, *context = reinterpret_cast<CudaContext>(8), 0;
}
int release(int) {
    return --cuda->num_contexts, 0;
}
int set_current(CudaContext context) {
    return context == nullptr;
}
int stream_create(CudaStream* stream, unsigned) {
    const std::lock_guard lock(cuda->mutex);
    ++cuda->num_streams;
    return *stream = reinterpret_cast<CudaStream>(cuda->next_handle += 16), 0;
}
int stream_destroy(CudaStream) {
    return --cuda->num_streams, 0;
}
int stream_wait(CudaStream stream, CudaEvent event, unsigned) {
    const std::lock_guard lock(cuda->mutex);
    // As the real one: an event that is not recorded holds nobody.
    if (cuda->recorded.contains(event)) {
        cuda->streams[stream].push_back({FakeCuda::Operation::kWait, 0, 0, 0, event});
    }
    return 0;
}
int stream_synchronize(CudaStream) {
    return 0;
}
int event_create(CudaEvent* event, unsigned) {
    const std::lock_guard lock(cuda->mutex);
    ++cuda->num_events;
    return *event = reinterpret_cast<CudaEvent>(cuda->next_handle += 16), 0;
}
int event_destroy(CudaEvent) {
    const std::lock_guard lock(cuda->mutex);
    return --cuda->num_events, 0;
}
int event_record(CudaEvent event, CudaStream stream) {
    const std::lock_guard lock(cuda->mutex);
    cuda->recorded[event] = stream;
    cuda->streams[stream].push_back({FakeCuda::Operation::kRecord, 0, 0, 0, event});
    return 0;
}
int event_synchronize(CudaEvent event) {
    const std::lock_guard lock(cuda->mutex);
    return cuda->reach(event), 0;
}
int push_copy(CudaAddress to, CudaAddress from, std::size_t num_bytes, CudaStream stream) {
    cuda->streams[stream].push_back({FakeCuda::Operation::kCopy, to, from, num_bytes, nullptr});
    return cuda->copy_result;
}
int copy_one(CudaAddress to, CudaAddress from, std::size_t num_bytes, CudaStream stream) {
    const std::lock_guard lock(cuda->mutex);
    cuda->calls.push_back("one");
    return push_copy(to, from, num_bytes, stream);
}
int batch_13000(CudaAddress* to, CudaAddress* from, std::size_t* sizes, std::size_t count,
                CudaCopyAttributes* attributes, std::size_t* firsts, std::size_t num_attributes,
                CudaStream stream) {
    const std::lock_guard lock(cuda->mutex);
    if (num_attributes != 1 || firsts[0] != 0 || attributes->source_access_order != 1) return 1;
    cuda->calls.push_back("13000 of " + std::to_string(count));
    for (std::size_t i = 0; i < count; ++i) push_copy(to[i], from[i], sizes[i], stream);
    return cuda->copy_result;
}
int batch_12080(CudaAddress* to, CudaAddress* from, std::size_t* sizes, std::size_t count,
                CudaCopyAttributes* attributes, std::size_t* firsts, std::size_t num_attributes,
                std::size_t* failed, CudaStream stream) {
    if (failed == nullptr) return 1;
    *failed = 0;
    const int result =
        batch_13000(to, from, sizes, count, attributes, firsts, num_attributes, stream);
    const std::lock_guard lock(cuda->mutex);
    cuda->calls.back().replace(0, 5, "12080");
    return result;
}
int get_proc_address(const char* name, void** function, int form, std::uint64_t, int*) {
    if (std::string(name) != "cuMemcpyBatchAsync") return 1;
    *function =
        form == 13000 ? reinterpret_cast<void*>(batch_13000) : reinterpret_cast<void*>(batch_12080);
    return 0;
}

const std::map<std::string, void*> kFunctions = {
    {"cuDriverGetVersion", reinterpret_cast<void*>(version)},
    {"cuGetErrorString", reinterpret_cast<void*>(error_string)},
    {"cuInit", reinterpret_cast<void*>(init)},
    {"cuDevicePrimaryCtxRetain", reinterpret_cast<void*>(retain)},
    {"cuDevicePrimaryCtxRelease_v2", reinterpret_cast<void*>(release)},
    {"cuCtxSetCurrent", reinterpret_cast<void*>(set_current)},
    {"cuStreamCreate", reinterpret_cast<void*>(stream_create)},
    {"cuStreamDestroy_v2", reinterpret_cast<void*>(stream_destroy)},
    {"cuStreamWaitEvent", reinterpret_cast<void*>(stream_wait)},
    {"cuStreamSynchronize", reinterpret_cast<void*>(stream_synchronize)},
    {"cuEventCreate", reinterpret_cast<void*>(event_create)},
    {"cuEventDestroy_v2", reinterpret_cast<void*>(event_destroy)},
    {"cuEventRecord", reinterpret_cast<void*>(event_record)},
    {"cuEventSynchronize", reinterpret_cast<void*>(event_synchronize)},
    {"cuMemcpyAsync", reinterpret_cast<void*>(copy_one)},
    {"cuGetProcAddress_v2", reinterpret_cast<void*>(get_proc_address)},
};

std::shared_ptr<const CudaDriver> fake_driver(const std::string& without = "") {
    return std::make_shared<CudaDriver>([&](const char* name) -> void* {
        const auto found = kFunctions.find(name);
        return found == kFunctions.end() || name == without ? nullptr : found->second;
    });
}

// Two layers of pages in two pieces, and slots of two pages.
struct Rig {
    static constexpr std::size_t kRun = 32, kPage = 64, kBlocks = 4;
    FakeCuda fake;
    std::vector<char> cache = std::vector<char>(2 * kBlocks * 2 * kPage);
    std::vector<char> staging = std::vector<char>(4 * 4 * kPage);
    std::shared_ptr<const PageMap> map;
    CudaStream forward = reinterpret_cast<CudaStream>(4);

    Rig() {
        cuda = &fake;
        for (std::size_t i = 0; i < cache.size(); ++i) cache[i] = static_cast<char>(i * 7 + 1);
        const auto base = reinterpret_cast<std::uintptr_t>(cache.data());
        const auto slots = reinterpret_cast<std::uintptr_t>(staging.data());
        map = std::make_shared<PageMap>(
            std::vector<LayerPages>{{base, 2 * kPage, 2, kPage, kRun, 0},
                                    {base + kBlocks * 2 * kPage, 2 * kPage, 2, kPage, kRun, 128}},
            kBlocks, StagingSlots{slots, 4 * kPage, 4, 2});
    }
    ~Rig() {
        CHECK(fake.num_events == 0 && fake.num_streams == 0 && fake.num_contexts == 0);
        cuda = nullptr;
    }
    std::shared_ptr<const PageRows> rows(std::vector<PageRow> rows) const {
        return std::make_shared<PageRows>(map, std::move(rows));
    }
    const char* run(std::size_t layer, std::size_t block, std::size_t run) const {
        return cache.data() + (layer * kBlocks + block) * 2 * kPage + run * kPage;
    }
    bool staged(std::size_t layer, std::size_t block, std::size_t slot, std::size_t page) const {
        const char* at = staging.data() + slot * 4 * kPage + layer * 128 + page * kPage;
        return std::memcmp(at, run(layer, block, 0), kRun) == 0 &&
               std::memcmp(at + kRun, run(layer, block, 1), kRun) == 0;
    }
};

void check_save(int version, CudaMethod method, const std::vector<std::string>& calls) {
    Rig rig;
    rig.fake.version = version;
    CudaCopies copies(fake_driver(), 0, method);
    const CudaMark mark = copies.submit(rig.rows({{3, 1, 1}, {0, 2, 0}}), CopyDirection::kSave, 0,
                                        1, CopyLane::kUrgent, copies.now(rig.forward));
    CHECK(copies.wait(mark, seconds(30)));
    CHECK(rig.staged(0, 3, 1, 1) && rig.staged(0, 0, 2, 0) && !rig.staged(1, 3, 1, 1));
    CHECK(rig.fake.calls == calls);
    CHECK(copies.close(seconds(30)));
}

}  // namespace

TEST(cuda_batch_in_the_form_of_13) {
    check_save(13000, CudaMethod::kBatch, {"13000 of 4"});
}
TEST(cuda_batch_in_the_form_of_12_8) {
    check_save(12090, CudaMethod::kBatch, {"12080 of 4"});
}
TEST(cuda_one_call_a_piece) {
    check_save(12000, CudaMethod::kSingle, {"one", "one", "one", "one"});
}

TEST(cuda_without_batches_is_refused) {
    Rig rig;
    rig.fake.version = 12040;
    CHECK_THROWS(CudaCopies(fake_driver(), 0, CudaMethod::kBatch), CudaError);
    CHECK_THROWS(fake_driver("cuMemcpyAsync"), CudaError);
    rig.fake.version = 13000;
    CHECK_THROWS(CudaCopies(fake_driver("cuGetProcAddress_v2"), 0, CudaMethod::kBatch), CudaError);
}

TEST(cuda_kernels_and_copies_keep_their_order) {
    // A kernel writes a page, a save reads it, a later kernel overwrites it; each behind the other.
    Rig rig;
    CudaCopies copies(fake_driver(), 0, CudaMethod::kBatch);
    std::vector<char> first(Rig::kRun, 'a'), second(Rig::kRun, 'b');
    const auto launch = [&](const std::vector<char>& values) {
        const std::lock_guard lock(rig.fake.mutex);
        push_copy(reinterpret_cast<CudaAddress>(rig.run(0, 1, 0)),
                  reinterpret_cast<CudaAddress>(values.data()), Rig::kRun, rig.forward);
    };
    launch(first);
    const CudaMark save = copies.submit(rig.rows({{1, 0, 0}}), CopyDirection::kSave, 0, 1,
                                        CopyLane::kUrgent, copies.now(rig.forward));
    CHECK(copies.hold(rig.forward, save, seconds(30)));
    launch(second);
    const CudaMark end = copies.now(rig.forward);
    CHECK(copies.wait(end, seconds(30)));
    CHECK(std::memcmp(rig.staging.data(), first.data(), Rig::kRun) == 0);
    CHECK(std::memcmp(rig.run(0, 1, 0), second.data(), Rig::kRun) == 0);
    CHECK(copies.close(seconds(30)));
}

TEST(cuda_background_comes_behind_earlier_urgent_copies) {
    // A page is saved and then loaded anew: the load must not overtake the save.
    Rig rig;
    CudaCopies copies(fake_driver(), 0, CudaMethod::kBatch);
    const std::vector<char> before(rig.run(1, 2, 0), rig.run(1, 2, 0) + Rig::kRun);
    std::memset(rig.staging.data() + 3 * 4 * Rig::kPage, 'x', 4 * Rig::kPage);
    copies.submit(rig.rows({{2, 0, 0}}), CopyDirection::kSave, 0, 2, CopyLane::kUrgent,
                  copies.now(rig.forward));
    const CudaMark load = copies.submit(rig.rows({{2, 3, 0}}), CopyDirection::kLoad, 0, 2,
                                        CopyLane::kBackground, copies.now(rig.forward));
    CHECK(copies.wait(load, seconds(30)));
    CHECK(rig.run(1, 2, 0)[0] == 'x');
    CHECK(std::memcmp(rig.staging.data() + 128, before.data(), Rig::kRun) == 0);
    CHECK(copies.close(seconds(30)));
}

TEST(cuda_barrier_is_reported_behind_copies_that_are_not) {
    Rig rig;
    CudaCopies copies(fake_driver(), 0, CudaMethod::kBatch);
    std::memset(rig.staging.data() + 3 * 4 * Rig::kPage, 'x', 4 * Rig::kPage);
    copies.submit(rig.rows({{2, 3, 0}}), CopyDirection::kLoad, 0, 2, CopyLane::kUrgent,
                  copies.now(rig.forward));
    copies.submit_barrier();
    while (copies.wait_reports(0, seconds(30)) == 0) {
    }
    CHECK(rig.run(1, 2, 0)[0] == 'x');
    CHECK(copies.error().empty() && copies.close(seconds(30)));
}

TEST(cuda_refused_copy_is_told_with_its_reason) {
    Rig rig;
    rig.fake.copy_result = 719;
    CudaCopies copies(fake_driver(), 0, CudaMethod::kSingle);
    const CudaMark mark = copies.submit(rig.rows({{1, 0, 0}}), CopyDirection::kSave, 0, 1,
                                        CopyLane::kUrgent, copies.now(rig.forward));
    try {
        copies.wait(mark, seconds(30));
        CHECK(false);
    } catch (const std::runtime_error& failure) {
        CHECK(std::string(failure.what()).find("719 (a fake reason)") != std::string::npos);
    }
    CHECK(copies.close(seconds(30)));
}
