#include "driver.hpp"

#include <dlfcn.h>

#include <atomic>
#include <cstdlib>
#include <mutex>

namespace pythia {
namespace {

thread_local CUresult failed_last = SUCCESS;

template <typename F>
bool find(void *library, const char *name, F &function) noexcept {
    function = reinterpret_cast<F>(dlsym(library, name));
    return function != nullptr;
}

bool open(Driver &d, const char *path) noexcept {
    void *library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) return false;
    const bool whole = find(library, "cuInit", d.init) &&
                       find(library, "cuCtxGetCurrent", d.ctx_get_current) &&
                       find(library, "cuCtxGetDevice", d.ctx_get_device) &&
                       find(library, "cuDeviceGetAttribute", d.device_get_attribute) &&
                       find(library, "cuModuleLoadData", d.module_load_data) &&
                       find(library, "cuModuleUnload", d.module_unload) &&
                       find(library, "cuModuleGetFunction", d.module_get_function) &&
                       find(library, "cuFuncSetAttribute", d.func_set_attribute) &&
                       find(library, "cuLaunchKernel", d.launch_kernel);
    find(library, "cuCtxGetId", d.ctx_get_id);
    if (!whole) dlclose(library);
    return whole;
}

}  // namespace

pythia_status status_of(CUresult result) noexcept {
    if (result != SUCCESS) failed_last = result;
    switch (result) {
        case SUCCESS: return PYTHIA_OK;
        case ERROR_OUT_OF_MEMORY: return PYTHIA_OUT_OF_MEMORY;
        case ERROR_NOT_INITIALIZED:
        case ERROR_STUB_LIBRARY:
        case ERROR_NO_DEVICE:
        case ERROR_SYSTEM_DRIVER_MISMATCH: return PYTHIA_NO_DRIVER;
        case ERROR_INVALID_CONTEXT: return PYTHIA_NO_CONTEXT;
        case ERROR_NO_BINARY_FOR_GPU: return PYTHIA_UNSUPPORTED_GPU;
        default: return PYTHIA_DRIVER_ERROR;
    }
}

CUresult last_error() noexcept { return failed_last; }

// The driver is opened once and stays; what fails, opening or cuInit, is tried at the next call again.
pythia_status open_driver(const Driver *&out) {
    static std::atomic<const Driver *> ready{nullptr};
    static Driver only;
    static bool opened = false;
    static std::mutex mutex;
    if ((out = ready.load(std::memory_order_acquire)) != nullptr) return PYTHIA_OK;
    const std::lock_guard lock(mutex);
    if ((out = ready.load(std::memory_order_relaxed)) != nullptr) return PYTHIA_OK;
    const char *named = secure_getenv("PYTHIA_KERNELS_LIBCUDA");
    const bool is_named = named != nullptr && *named != '\0';
    if (!opened) opened = open(only, is_named ? named : "libcuda.so.1");
    if (!opened) return PYTHIA_NO_DRIVER;
    if (const auto s = status_of(only.init(0))) return s;
    ready.store(out = &only, std::memory_order_release);
    return PYTHIA_OK;
}

}  // namespace pythia
