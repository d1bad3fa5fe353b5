// The library against a driver that records (fake_cuda.hpp): test_launcher NAME runs one test.
#include <fstream>
#include <map>
#include <set>
#include <sstream>
#include <string>

#include "test_launcher.hpp"

namespace {

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

// Against grids.txt: of a kernel, a GPU and integers, the grid that Python makes of the formula.
void grids() {
    std::ifstream file(GRIDS);
    std::set<std::string> kernels;
    std::string line;
    while (std::getline(file, line)) {
        std::istringstream words(line);
        std::string name, word;
        Gpu gpu{};
        std::uint32_t expected[3];
        words >> name >> gpu.major >> gpu.minor >> gpu.sms >> expected[0] >> expected[1] >> expected[2];
        gpu.shared = 227 * 1024;
        use(gpu);
        const pythia_kernel *k = pythia_kernels_find(name.c_str());
        subject = line.c_str();
        CHECK(k != nullptr && words);
        auto args = arguments(k);
        while (words >> word) {
            const auto equals = word.find('=');
            for (size_t i = 0; i < k->argument_count; ++i) {
                const pythia_argument &a = k->arguments[i];
                if (word.substr(0, equals) != a.name) continue;
                const long long value = std::stoll(word.substr(equals + 1));
                a.type == PYTHIA_I64 ? put(args, a, std::int64_t{value})
                                     : put(args, a, static_cast<std::int32_t>(value));
            }
        }
        pythia_geometry g;
        CHECK(pythia_kernels_geometry(k, args.data(), &g) == PYTHIA_OK);
        CHECK(std::memcmp(g.grid, expected, sizeof expected) == 0);
        kernels.insert(name);
    }
    CHECK(kernels.size() == all().size());
}

}  // namespace

int main(int argc, char **argv) {
    const std::map<std::string, void (*)()> tests = {
        {"every_kernel", every_kernel},   {"grids", grids},
        {"without_driver", without_driver}, {"other_gpus", other_gpus},
        {"bad_arguments", bad_arguments}, {"driver_errors", driver_errors},
        {"dead_contexts", dead_contexts}, {"threads", threads},
        {"loading", loading},             {"load_all", load_all},
    };
    setenv("PYTHIA_KERNELS_LIBCUDA", fake::path(), 1);
    for (const auto &[name, run] : tests) {
        if (argc == 2 && name == argv[1]) return run(), 0;
    }
    for (const auto &[name, run] : tests) std::puts(name.c_str());
    return 2;
}
