// What the tests of the library share: each is a function that returns, or ends the process with 1.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
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

inline const char *subject = "";  // the kernel at hand
struct Gpu {
    int major, minor, sms, shared;
};
inline const Gpu GPUS[] = {{8, 0, 108, 163 * 1024}, {8, 6, 84, 99 * 1024}, {9, 0, 132, 227 * 1024},
                    {10, 0, 148, 227 * 1024}};
inline const std::uintptr_t CONTEXT = 0x1000;

inline void use(const Gpu &gpu) {
    auto &s = fake::settings();
    s.major = gpu.major, s.minor = gpu.minor, s.sms = gpu.sms, s.shared = gpu.shared;
    ++s.generation, ++s.device;
    fake::set_context(CONTEXT);
    fake::take_counts();
    fake::take_launches();
}

inline std::vector<const pythia_kernel *> all() {
    std::vector<const pythia_kernel *> found;
    for (size_t i = 0; const pythia_kernel *k = pythia_kernels_at(i); ++i) found.push_back(k);
    return found;
}

// Whether the library holds code for this GPU: a build may leave architectures out.
inline bool built_for(const pythia_kernel *k) { return pythia_kernels_load(k) == PYTHIA_OK; }

template <typename T>
void put(std::vector<unsigned char> &args, const pythia_argument &a, T value) {
    std::memcpy(args.data() + a.offset, &value, sizeof value);
}

// Arguments that differ from each other and are what is asked of them.
inline std::vector<unsigned char> arguments(const pythia_kernel *k, unsigned seed = 0) {
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

inline size_t bytes_of(pythia_type type) { return type == PYTHIA_POINTER || type == PYTHIA_I64 ? 8 : 4; }

// The launch has the arguments in order, as the cubin declares them, and scratch pointers of null.
inline void check_parameters(const fake::Launch &launch, const pythia_kernel *k,
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

inline const pythia_kernel *first() {
    const pythia_kernel *k = pythia_kernels_at(0);
    CHECK(k != nullptr);
    subject = k->name;
    return k;
}

// The first kernel of the first GPU that this library was built for.
inline const pythia_kernel *first_built() {
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

// of test_contexts.cpp
void without_driver();
void driver_errors();
void dead_contexts();
void threads();
void loading();
void load_all();
