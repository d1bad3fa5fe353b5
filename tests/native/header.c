/* The header is C11, alone, and its functions have these types. */
#include "pythia_kernels.h"

int main(void) {
    const char *(*status)(pythia_status) = pythia_kernels_status;
    const pythia_kernel *first = pythia_kernels_at(0);
    return first == NULL || first != pythia_kernels_find(first->name) || status(PYTHIA_OK) == NULL;
}
