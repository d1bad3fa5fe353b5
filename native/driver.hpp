// The CUDA driver, opened by name: nothing of CUDA is linked.
#pragma once

#include "pythia_kernels.h"

// the part of the CUDA driver's interface that a launch needs, as cuda.h declares it
using CUresult = int;
using CUdevice = int;
using CUcontext = struct CUctx_st *;
using CUmodule = struct CUmod_st *;
using CUfunction = struct CUfunc_st *;
using CUstream = struct CUstream_st *;

namespace pythia {

enum : CUresult {
    SUCCESS = 0,
    ERROR_OUT_OF_MEMORY = 2,
    ERROR_NOT_INITIALIZED = 3,
    ERROR_STUB_LIBRARY = 34,
    ERROR_NO_DEVICE = 100,
    ERROR_INVALID_CONTEXT = 201,
    ERROR_NO_BINARY_FOR_GPU = 209,
    ERROR_INVALID_HANDLE = 400,
    ERROR_CONTEXT_IS_DESTROYED = 709,
    ERROR_SYSTEM_DRIVER_MISMATCH = 803,
};
enum {
    MULTIPROCESSOR_COUNT = 16,
    COMPUTE_CAPABILITY_MAJOR = 75,
    COMPUTE_CAPABILITY_MINOR = 76,
    MAX_SHARED_MEMORY_PER_BLOCK_OPTIN = 97,
    FUNC_MAX_DYNAMIC_SHARED_SIZE_BYTES = 8,
};

struct Driver {
    CUresult (*init)(unsigned);
    CUresult (*ctx_get_current)(CUcontext *);
    CUresult (*ctx_get_device)(CUdevice *);
    CUresult (*device_get_attribute)(int *, int, CUdevice);
    CUresult (*module_load_data)(CUmodule *, const void *);
    CUresult (*module_unload)(CUmodule);
    CUresult (*module_get_function)(CUfunction *, CUmodule, const char *);
    CUresult (*func_set_attribute)(CUfunction, int, int);
    CUresult (*launch_kernel)(CUfunction, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned,
                              unsigned, CUstream, void **, void **);
    CUresult (*ctx_get_id)(CUcontext, unsigned long long *);  // null before CUDA 12
};

// PYTHIA_OK and the driver, or why there is none; that is tried again at the next call.
pythia_status open_driver(const Driver *&out);

pythia_status status_of(CUresult result) noexcept;

CUresult last_error() noexcept;  // of this thread, that status_of was told

}  // namespace pythia
