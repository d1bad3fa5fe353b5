// What the generated tables hold of a kernel, and the launch of it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <iterator>

#include "pythia_kernels.h"

namespace pythia {

struct Image {
    int major, minor;
    bool exact;  // code of this compute capability alone, not of later ones of the same major
    const unsigned char *cubin;
    const char *symbol;
    std::uint32_t threads, shared;
    std::uint32_t hidden;  // pointers to scratch memory after the arguments
    void (*grid)(const void *args, std::int64_t sms, std::int64_t *grid);
};

struct Kernel : pythia_kernel {
    const bool *counts;  // by argument: the grid is made of it, so it is not negative
    const Image *images;
    std::size_t image_count;
};

extern const Kernel kernels[];
extern const std::size_t kernel_count;

// -1, which no grid may be, where b is not positive
inline std::int64_t cdiv(std::int64_t a, std::int64_t b) { return b > 0 ? (a + b - 1) / b : -1; }

pythia_status launch(const Kernel &kernel, const void *args, void *stream) noexcept;

}  // namespace pythia
