// The library against a driver that records (fake_cuda.hpp): test_launcher NAME runs one test.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "fake_cuda.hpp"
#include "pythia_kernels.h"

#define CHECK(condition)                                                                      \
    do {                                                                                      \
        if (!(condition)) {                                                                   \
            std::fprintf(stderr, "%s:%d: %s (%s)\n", __FILE__, __LINE__, #condition, subject); \
            std::exit(1);                                                                     \
        }                                                                                     \
    } while (0)

namespace {

const char *subject = "";  // the kernel at hand
struct Gpu {
    int major, minor, sms, shared;
};
const Gpu GPUS[] = {{8, 0, 108, 163 * 1024}, {8, 6, 84, 99 * 1024}, {9, 0, 132, 227 * 1024},
                    {10, 0, 148, 227 * 1024}};
const std::uintptr_t CONTEXT = 0x1000;

void use(const Gpu &gpu) {
    auto &s = fake::settings();
    s.major = gpu.major, s.minor = gpu.minor, s.sms = gpu.sms, s.shared = gpu.shared;
    ++s.generation;  // a device is asked once in a context
    fake::set_context(CONTEXT);
    fake::take_counts();
    fake::take_launches();
}

std::vector<const pythia_kernel *> all() {
    std::vector<const pythia_kernel *> found;
    for (size_t i = 0; const pythia_kernel *k = pythia_kernels_at(i); ++i) found.push_back(k);
    return found;
}

// Whether the library holds code for this GPU: a build may leave architectures out.
bool built_for(const pythia_kernel *k) { return pythia_kernels_load(k) == PYTHIA_OK; }

template <typename T>
void put(std::vector<unsigned char> &args, const pythia_argument &a, T value) {
    std::memcpy(args.data() + a.offset, &value, sizeof value);
}

// Arguments that differ from each other and are what is asked of them.
std::vector<unsigned char> arguments(const pythia_kernel *k, unsigned seed = 0) {
    std::vector<unsigned char> args(k->args_bytes);
    for (size_t i = 0; i < k->argument_count; ++i) {
        const pythia_argument &a = k->arguments[i];
        const auto number = static_cast<std::int32_t>(16 * (i + 1 + seed));
        switch (a.type) {
            case PYTHIA_POINTER: put(args, a, std::uint64_t{0x7f0000000000} + number); break;
            case PYTHIA_I32: put(args, a, number); break;
            case PYTHIA_I64: put(args, a, std::int64_t{number}); break;
            case PYTHIA_F32: put(args, a, static_cast<float>(number) + 0.5F); break;
        }
    }
    return args;
}

size_t bytes_of(pythia_type type) { return type == PYTHIA_POINTER || type == PYTHIA_I64 ? 8 : 4; }

// The launch has the arguments in order, as the cubin declares them, and scratch pointers of null.
void check_parameters(const fake::Launch &launch, const pythia_kernel *k,
                      const std::vector<unsigned char> &args) {
    size_t ordinal = 0;
    for (size_t i = 0; i < k->argument_count; ++i) {
        const pythia_argument &a = k->arguments[i];
        if (!a.passed) continue;
        CHECK(ordinal < launch.parameters.size());
        const auto &got = launch.parameters[ordinal++];
        CHECK(got.size() == bytes_of(a.type));
        CHECK(std::memcmp(got.data(), args.data() + a.offset, got.size()) == 0);
    }
    for (; ordinal < launch.parameters.size(); ++ordinal) {
        CHECK(launch.parameters[ordinal] == std::vector<unsigned char>(8));
    }
    CHECK(launch.ended);
}

void every_kernel() {
    CHECK(!all().empty());
    std::set<std::string> names;
    int launched = 0;
    for (const Gpu &gpu : GPUS) {
        use(gpu);
        for (const pythia_kernel *k : all()) {
            subject = k->name;
            names.insert(k->name);
            CHECK(pythia_kernels_find(k->name) == k);
            const auto args = arguments(k);
            pythia_geometry g;
            const auto status = pythia_kernels_geometry(k, args.data(), &g);
            if (status == PYTHIA_UNSUPPORTED_GPU) continue;
            CHECK(status == PYTHIA_OK);
            void *stream = reinterpret_cast<void *>(0x77);
            CHECK(pythia_kernels_launch(k, args.data(), stream) == PYTHIA_OK);
            const auto launches = fake::take_launches();
            CHECK(launches.size() == 1);
            const fake::Launch &l = launches[0];
            check_parameters(l, k, args);
            CHECK(l.code.capability == 10 * gpu.major + (gpu.major == 8 ? 0 : gpu.minor));
            CHECK(l.block[0] == l.code.threads && l.block[1] == 1 && l.block[2] == 1);
            CHECK(l.block[0] == g.threads && l.shared == g.shared_bytes);
            CHECK(std::memcmp(l.grid, g.grid, sizeof l.grid) == 0);
            CHECK(l.stream == stream && l.context == CONTEXT);
            // what a chip has for a block: CUDA C++ Programming Guide, compute capabilities
            CHECK(l.code.registers > 0 && l.code.registers * l.block[0] <= 65536);
            CHECK(static_cast<int>(l.shared) <= gpu.shared);
            CHECK(l.shared_allowed == (l.shared > 48 * 1024 ? static_cast<int>(l.shared) : 0));
            ++launched;
        }
    }
    CHECK(names.size() == all().size() && launched > 0);
    CHECK(pythia_kernels_find("no_such_kernel") == nullptr);
    CHECK(pythia_kernels_find(nullptr) == nullptr);
}

const pythia_kernel *first() {
    const pythia_kernel *k = pythia_kernels_at(0);
    CHECK(k != nullptr);
    subject = k->name;
    return k;
}

// The first kernel of the first GPU that this library was built for.
const pythia_kernel *first_built() {
    for (const Gpu &gpu : GPUS) {
        use(gpu);
        for (const pythia_kernel *k : all()) {
            subject = k->name;
            if (built_for(k)) return use(gpu), k;
        }
    }
    CHECK(!"built for some GPU");
    return nullptr;
}

void without_driver() {
    const pythia_kernel *k = first();
    const auto args = arguments(k);
    pythia_geometry g;
    setenv("PYTHIA_KERNELS_LIBCUDA", "/nowhere/libcuda.so.1", 1);
    CHECK(pythia_kernels_launch(k, args.data(), nullptr) == PYTHIA_NO_DRIVER);
    CHECK(pythia_kernels_geometry(k, args.data(), &g) == PYTHIA_NO_DRIVER);
    CHECK(pythia_kernels_load(nullptr) == PYTHIA_NO_DRIVER);
    setenv("PYTHIA_KERNELS_LIBCUDA", WITHOUT_SYMBOLS, 1);  // a library, but no driver
    CHECK(pythia_kernels_launch(k, args.data(), nullptr) == PYTHIA_NO_DRIVER);
    setenv("PYTHIA_KERNELS_LIBCUDA", FAKE_CUDA, 1);
    fake::settings().init = 100;  // CUDA_ERROR_NO_DEVICE
    CHECK(pythia_kernels_launch(k, args.data(), nullptr) == PYTHIA_NO_DRIVER);
    CHECK(pythia_kernels_driver_error() == 100);
    fake::settings().init = 0;
    CHECK(pythia_kernels_launch(k, args.data(), nullptr) == PYTHIA_NO_CONTEXT);
    CHECK(pythia_kernels_load(nullptr) == PYTHIA_NO_CONTEXT);
    k = first_built();
    CHECK(pythia_kernels_launch(k, arguments(k).data(), nullptr) == PYTHIA_OK);
    CHECK(fake::take_counts().inits == 0);  // once
}

void other_gpus() {
    for (const Gpu &gpu : {Gpu{7, 5, 40, 64 * 1024}, Gpu{9, 1, 132, 227 * 1024},
                           Gpu{10, 3, 148, 227 * 1024}, Gpu{12, 0, 170, 99 * 1024}}) {
        use(gpu);
        for (const pythia_kernel *k : all()) {
            subject = k->name;
            const auto args = arguments(k);
            CHECK(pythia_kernels_launch(k, args.data(), nullptr) == PYTHIA_UNSUPPORTED_GPU);
            CHECK(pythia_kernels_load(k) == PYTHIA_UNSUPPORTED_GPU);
        }
    }
    CHECK(fake::take_launches().empty() && fake::take_counts().loads == 0);
    for (const Gpu &gpu : GPUS) {  // a chip with too little shared memory
        use({gpu.major, gpu.minor, gpu.sms, 0});
        for (const pythia_kernel *k : all()) {
            const auto status = pythia_kernels_launch(k, arguments(k).data(), nullptr);
            CHECK(status == PYTHIA_OK || status == PYTHIA_UNSUPPORTED_GPU);
            for (const auto &l : fake::take_launches()) CHECK(l.shared == 0);
        }
    }
}

void bad_arguments() {
    first_built();
    CHECK(pythia_kernels_launch(nullptr, "", nullptr) == PYTHIA_BAD_ARGUMENT);
    const pythia_kernel stranger{};
    CHECK(pythia_kernels_launch(&stranger, "", nullptr) == PYTHIA_BAD_ARGUMENT);
    CHECK(pythia_kernels_load(&stranger) == PYTHIA_BAD_ARGUMENT);
    int empty = 0, refused = 0;
    for (const pythia_kernel *k : all()) {
        subject = k->name;
        if (!built_for(k)) continue;
        pythia_geometry g;
        CHECK(pythia_kernels_launch(k, nullptr, nullptr) == PYTHIA_BAD_ARGUMENT);
        CHECK(pythia_kernels_geometry(k, nullptr, &g) == PYTHIA_BAD_ARGUMENT);
        CHECK(pythia_kernels_geometry(k, arguments(k).data(), nullptr) == PYTHIA_BAD_ARGUMENT);
        for (size_t i = 0; i < k->argument_count; ++i) {
            const pythia_argument &a = k->arguments[i];
            auto args = arguments(k);
            const auto launched = [&](auto value) {
                put(args, a, value);
                return pythia_kernels_launch(k, args.data(), nullptr);
            };
            if (a.type == PYTHIA_POINTER) {
                CHECK(launched(std::uint64_t{0}) == PYTHIA_BAD_ARGUMENT);
                CHECK(launched(std::uint64_t{0x7f0000000008}) ==
                      (a.multiple_of == 16 ? PYTHIA_BAD_ALIGNMENT : PYTHIA_OK));
            } else if (a.type == PYTHIA_I32) {
                CHECK(a.multiple_of == 1 || launched(std::int32_t{24}) == PYTHIA_BAD_ALIGNMENT);
                fake::take_launches();
                const auto status = launched(std::int32_t{-16});
                CHECK(status == PYTHIA_OK || status == PYTHIA_BAD_ARGUMENT);
                refused += status == PYTHIA_BAD_ARGUMENT;
                fake::take_launches();
                const auto of_none = launched(std::int32_t{0});
                CHECK(of_none == PYTHIA_OK || of_none == PYTHIA_BAD_ARGUMENT);
                empty += of_none == PYTHIA_OK && fake::take_launches().empty();
                launched(std::int32_t{2147483632});  // no grid of this may pass CUDA's limits
                for (const auto &l : fake::take_launches()) CHECK(l.grid[1] < 65536 && l.grid[2] < 65536);
            } else if (a.type == PYTHIA_I64) {
                CHECK(a.multiple_of == 1 || launched(std::int64_t{24}) == PYTHIA_BAD_ALIGNMENT);
                launched(std::int64_t{0x7ffffffffffffff0});
                launched(std::int64_t{-0x7ffffffffffffff0});
            }
        }
    }
    CHECK(empty > 0 && refused > 0);
}

void driver_errors() {
    const pythia_kernel *k = first_built();
    const auto args = arguments(k);
    const auto launch = [&] { return pythia_kernels_launch(k, args.data(), nullptr); };
    auto &s = fake::settings();
    s.load = 2;  // CUDA_ERROR_OUT_OF_MEMORY
    CHECK(launch() == PYTHIA_OUT_OF_MEMORY && pythia_kernels_driver_error() == 2);
    s.load = 209;  // CUDA_ERROR_NO_BINARY_FOR_GPU
    CHECK(launch() == PYTHIA_UNSUPPORTED_GPU);
    s.load = 0, s.function = 500;
    CHECK(launch() == PYTHIA_DRIVER_ERROR && pythia_kernels_driver_error() == 500);
    CHECK(fake::take_counts().unloads == 1);
    s.function = 0, s.launch = 719;  // CUDA_ERROR_LAUNCH_FAILED
    CHECK(launch() == PYTHIA_DRIVER_ERROR && pythia_kernels_driver_error() == 719);
    s.launch = 0;
    CHECK(launch() == PYTHIA_OK);  // a failure is not kept
    CHECK(fake::take_counts().loads == 1);
    CHECK(launch() == PYTHIA_OK && fake::take_counts().loads == 0);
    ++s.generation;  // another context, at the address of one that is gone
    CHECK(launch() == PYTHIA_OK && fake::take_counts().loads == 1);
    std::set<std::string> said;
    for (int i = 0; i <= PYTHIA_DRIVER_ERROR; ++i) {
        said.insert(pythia_kernels_status(static_cast<pythia_status>(i)));
    }
    CHECK(said.size() == PYTHIA_DRIVER_ERROR + 1 && !said.count(""));
}

void threads() {
    first_built();
    std::vector<const pythia_kernel *> kernels;
    for (const pythia_kernel *k : all()) {
        if (pythia_geometry g; pythia_kernels_geometry(k, arguments(k).data(), &g) == PYTHIA_OK) {
            kernels.push_back(k);
        }
        if (kernels.size() == 16) break;
    }
    ++fake::settings().generation;
    fake::take_counts();
    constexpr unsigned THREADS = 8, ROUNDS = 20;
    std::vector<std::thread> running;
    for (unsigned t = 0; t < THREADS; ++t) {
        running.emplace_back([&kernels, t] {
            fake::set_context(CONTEXT + t % 2);
            for (unsigned round = 0; round < ROUNDS; ++round) {
                for (const pythia_kernel *k : kernels) {
                    const auto args = arguments(k, t);
                    auto *stream = reinterpret_cast<void *>(std::uintptr_t{t} + 1);
                    CHECK(pythia_kernels_launch(k, args.data(), stream) == PYTHIA_OK);
                }
            }
        });
    }
    for (auto &thread : running) thread.join();
    // every thread's launches are in its own order and have its own arguments
    std::map<void *, unsigned> next;
    const auto launches = fake::take_launches();
    CHECK(launches.size() == THREADS * ROUNDS * kernels.size());
    for (const fake::Launch &l : launches) {
        const auto t = static_cast<unsigned>(reinterpret_cast<std::uintptr_t>(l.stream)) - 1;
        const pythia_kernel *k = kernels[next[l.stream]++ % kernels.size()];
        subject = k->name;
        CHECK(l.context == CONTEXT + t % 2);
        check_parameters(l, k, arguments(k, t));
    }
    CHECK(fake::take_counts().loads == static_cast<int>(2 * kernels.size()));
}

void load_all() {
    first_built();
    int built = 0;
    for (const pythia_kernel *k : all()) built += built_for(k);
    CHECK(fake::take_counts().loads == built);
    const auto expected =
        built == static_cast<int>(all().size()) ? PYTHIA_OK : PYTHIA_UNSUPPORTED_GPU;
    CHECK(pythia_kernels_load(nullptr) == expected);
    CHECK(fake::take_counts().loads == 0);
}

}  // namespace

int main(int argc, char **argv) {
    const std::map<std::string, void (*)()> tests = {
        {"every_kernel", every_kernel}, {"without_driver", without_driver},
        {"other_gpus", other_gpus},     {"bad_arguments", bad_arguments},
        {"driver_errors", driver_errors}, {"threads", threads}, {"load_all", load_all},
    };
    setenv("PYTHIA_KERNELS_LIBCUDA", FAKE_CUDA, 1);
    for (const auto &[name, run] : tests) {
        if (argc == 2 && name == argv[1]) return run(), 0;
    }
    for (const auto &[name, run] : tests) std::puts(name.c_str());
    return 2;
}
