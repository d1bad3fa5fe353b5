/* A program of somebody else, in C or C++, built against the install tree alone: main STATUS. */
#include <stdio.h>
#include <string.h>

#include "pythia_kernels.h"

int main(int count, char **words) {
    const pythia_kernel *kernel = pythia_kernels_at(0);
    const char *said;
    if (kernel == NULL || count != 2) return 2;
    said = pythia_kernels_status(pythia_kernels_load(kernel));
    printf("%s: %s\n", kernel->name, said);
    return strcmp(said, words[1]) != 0;
}
