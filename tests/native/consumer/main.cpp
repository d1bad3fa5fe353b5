// A program of somebody else, built against the install tree alone, on a machine without a driver.
#include <cstdio>

#include "pythia_kernels.h"

int main() {
    const pythia_kernel *kernel = pythia_kernels_at(0);
    if (kernel == nullptr) return 1;
    const pythia_status status = pythia_kernels_load(kernel);
    std::printf("%s: %s\n", kernel->name, pythia_kernels_status(status));
    return status == PYTHIA_OK || status == PYTHIA_NO_DRIVER || status == PYTHIA_NO_CONTEXT ? 0 : 1;
}
