// Drivers, contexts, threads: what a launch depends on beside its kernel.
#include <atomic>
#include <chrono>
#include <map>
#include <set>
#include <string>
#include <thread>
#include <utility>

#include "test_launcher.hpp"

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
    setenv("PYTHIA_KERNELS_LIBCUDA", fake::path(), 1);
    for (const auto &[error, status] : {
             std::pair{100, PYTHIA_NO_DRIVER},  // CUDA_ERROR_NO_DEVICE
             {999, PYTHIA_DRIVER_ERROR}, {802, PYTHIA_DRIVER_ERROR}, {803, PYTHIA_NO_DRIVER}}) {
        fake::settings().init = error;
        CHECK(pythia_kernels_launch(k, args.data(), nullptr) == status);
        CHECK(pythia_kernels_driver_error() == error);
        // what was found stays open: cuInit alone is tried again
        setenv("PYTHIA_KERNELS_LIBCUDA", "/nowhere/libcuda.so.1", 1);
    }
    fake::settings().init = 0;
    CHECK(pythia_kernels_launch(k, args.data(), nullptr) == PYTHIA_NO_CONTEXT);
    CHECK(pythia_kernels_load(nullptr) == PYTHIA_NO_CONTEXT);
    k = first_built();
    CHECK(pythia_kernels_launch(k, arguments(k).data(), nullptr) == PYTHIA_OK);
    CHECK(fake::take_counts().inits == 0);  // once
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
    s.launch = 400;  // CUDA_ERROR_INVALID_HANDLE, of a stream: no module more than before
    CHECK(launch() == PYTHIA_DRIVER_ERROR && pythia_kernels_driver_error() == 400);
    const auto after = fake::take_counts();
    CHECK(after.loads == after.unloads);
    s.launch = 0;
    CHECK(launch() == PYTHIA_OK && fake::take_counts().loads == 0);
    std::set<std::string> said;
    for (int i = 0; i <= PYTHIA_DRIVER_ERROR; ++i) {
        said.insert(pythia_kernels_status(static_cast<pythia_status>(i)));
    }
    CHECK(said.size() == PYTHIA_DRIVER_ERROR + 1 && !said.count(""));
}

// Another context at the address of one that is gone, and one that was reset under its id.
void dead_contexts() {
    const pythia_kernel *k = first_built();
    const auto args = arguments(k);
    const auto launch = [&] { return pythia_kernels_launch(k, args.data(), nullptr); };
    CHECK(launch() == PYTHIA_OK);
    for (const bool id_is_kept : {false, true}) {
        fake::take_counts();
        ++fake::settings().generation;
        fake::settings().id_is_kept = id_is_kept;
        CHECK(launch() == PYTHIA_OK);
        const auto counts = fake::take_counts();
        CHECK(counts.loads == 1 && counts.unloads == 0);
        // an id says so beforehand; without one, or with the same, the launch that fails does
        CHECK(counts.stale == (fake::has_ids() && !id_is_kept ? 0 : 1));
        CHECK(launch() == PYTHIA_OK && fake::take_counts().loads == 0);
    }
    fake::take_launches();
}

// While one kernel loads, others are launched and loaded.
void loading() {
    first_built();
    std::vector<const pythia_kernel *> kernels;
    for (const pythia_kernel *k : all()) {
        if (pythia_geometry g; pythia_kernels_geometry(k, arguments(k).data(), &g) == PYTHIA_OK) {
            kernels.push_back(k);
        }
    }
    CHECK(kernels.size() >= 3);
    const auto launch = [&](size_t i) {
        fake::set_context(CONTEXT);
        const auto args = arguments(kernels[i]);
        CHECK(pythia_kernels_launch(kernels[i], args.data(), nullptr) == PYTHIA_OK);
    };
    ++fake::settings().generation;
    launch(0);
    static std::atomic<int> loads;
    static std::atomic<bool> others_done;
    loads = 0, others_done = false;
    fake::settings().loading = [] {
        if (loads++ != 0) return;  // the first load waits for those after it
        for (int i = 0; i < 2000 && !others_done; ++i) {
            std::this_thread::sleep_for(std::chrono::milliseconds(10));
        }
        CHECK(others_done);
    };
    std::thread slow([&] { launch(1); });
    while (loads == 0) std::this_thread::yield();
    launch(0);
    launch(2);
    others_done = true;
    slow.join();
    fake::settings().loading = nullptr;
    CHECK(loads == 2);
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
    ++fake::settings().generation;
    CHECK(pythia_kernels_load(nullptr) == expected);
    CHECK(fake::take_counts().loads == built);
    // what does not fit a chip keeps nothing else from being loaded
    for (const Gpu &gpu : GPUS) {
        for (const int shared : {gpu.shared, 32 * 1024, 0}) {
            use({gpu.major, gpu.minor, gpu.sms, shared});
            int fit = 0;
            for (const pythia_kernel *k : all()) {
                pythia_geometry g;
                fit += pythia_kernels_geometry(k, arguments(k).data(), &g) != PYTHIA_UNSUPPORTED_GPU;
            }
            const auto status = pythia_kernels_load(nullptr);
            CHECK((status == PYTHIA_OK) == (fit == static_cast<int>(all().size())));
            CHECK(fake::take_counts().loads == fit);
        }
    }
}
