#include "launcher.hpp"

#include <dlfcn.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <new>
#include <shared_mutex>
#include <utility>

// the part of the CUDA driver's interface that a launch needs, as cuda.h declares it
using CUresult = int;
using CUdevice = int;
using CUcontext = struct CUctx_st *;
using CUmodule = struct CUmod_st *;
using CUfunction = struct CUfunc_st *;
using CUstream = struct CUstream_st *;

namespace pythia {
namespace {

enum : CUresult {
    SUCCESS = 0,
    ERROR_OUT_OF_MEMORY = 2,
    ERROR_NOT_INITIALIZED = 3,
    ERROR_STUB_LIBRARY = 34,
    ERROR_NO_DEVICE = 100,
    ERROR_INVALID_CONTEXT = 201,
    ERROR_NO_BINARY_FOR_GPU = 209,
    ERROR_SYSTEM_DRIVER_MISMATCH = 803,
};
enum {
    MULTIPROCESSOR_COUNT = 16,
    COMPUTE_CAPABILITY_MAJOR = 75,
    COMPUTE_CAPABILITY_MINOR = 76,
    MAX_SHARED_MEMORY_PER_BLOCK_OPTIN = 97,
    FUNC_MAX_DYNAMIC_SHARED_SIZE_BYTES = 8,
};
constexpr std::uint32_t SHARED_WITHOUT_ASKING = 48 * 1024;
constexpr std::int64_t MAX_GRID[3] = {2147483647, 65535, 65535};
constexpr std::int64_t MAX_COUNT = std::int64_t{1} << 60;  // so that no sum of two overflows
constexpr std::size_t MAX_PARAMETERS = 64;

thread_local CUresult last_error = SUCCESS;

pythia_status status_of(CUresult result) noexcept {
    if (result != SUCCESS) last_error = result;
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

    template <typename F>
    static bool find(void *library, const char *name, F &function) noexcept {
        function = reinterpret_cast<F>(dlsym(library, name));
        return function != nullptr;
    }

    bool open(const char *path) noexcept {
        void *library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
        if (library == nullptr) return false;
        const bool whole = find(library, "cuInit", init) &&
                           find(library, "cuCtxGetCurrent", ctx_get_current) &&
                           find(library, "cuCtxGetDevice", ctx_get_device) &&
                           find(library, "cuDeviceGetAttribute", device_get_attribute) &&
                           find(library, "cuModuleLoadData", module_load_data) &&
                           find(library, "cuModuleUnload", module_unload) &&
                           find(library, "cuModuleGetFunction", module_get_function) &&
                           find(library, "cuFuncSetAttribute", func_set_attribute) &&
                           find(library, "cuLaunchKernel", launch_kernel);
        find(library, "cuCtxGetId", ctx_get_id);
        if (whole && status_of(init(0)) == PYTHIA_OK) return true;
        dlclose(library);
        return false;
    }
};

// Null until a driver was opened; then the same for good. A failure is tried again at the next call.
const Driver *driver() noexcept {
    static std::atomic<const Driver *> opened{nullptr};
    static Driver only;
    static std::mutex mutex;
    if (const Driver *found = opened.load(std::memory_order_acquire)) return found;
    const std::lock_guard lock(mutex);
    if (const Driver *found = opened.load(std::memory_order_relaxed)) return found;
    const char *named = std::getenv("PYTHIA_KERNELS_LIBCUDA");
    if (!only.open(named != nullptr ? named : "libcuda.so.1")) return nullptr;
    opened.store(&only, std::memory_order_release);
    return &only;
}

struct Device {
    int major, minor, sms, shared;
};

// Modules of each context: by its id, as its address may come back after it was destroyed.
class Contexts {
public:
    pythia_status device(const Driver &d, unsigned long long id, Device &out) {
        {
            const std::shared_lock lock(mutex_);
            if (const auto found = devices_.find(id); found != devices_.end()) {
                out = found->second;
                return PYTHIA_OK;
            }
        }
        CUdevice number;
        CUresult result = d.ctx_get_device(&number);
        const auto read = [&](int attribute, int &value) {
            if (result == SUCCESS) result = d.device_get_attribute(&value, attribute, number);
        };
        read(COMPUTE_CAPABILITY_MAJOR, out.major);
        read(COMPUTE_CAPABILITY_MINOR, out.minor);
        read(MULTIPROCESSOR_COUNT, out.sms);
        read(MAX_SHARED_MEMORY_PER_BLOCK_OPTIN, out.shared);
        if (result != SUCCESS) return status_of(result);
        const std::unique_lock lock(mutex_);
        devices_.emplace(id, out);
        return PYTHIA_OK;
    }

    pythia_status function(const Driver &d, unsigned long long id, const Image &image,
                           CUfunction &out) {
        const std::pair key(id, &image);
        {
            const std::shared_lock lock(mutex_);
            if (const auto found = functions_.find(key); found != functions_.end()) {
                out = found->second;
                return PYTHIA_OK;
            }
        }
        const std::unique_lock lock(mutex_);
        const auto [place, fresh] = functions_.try_emplace(key, nullptr);
        if (fresh) {
            const CUresult result = load(d, image, place->second);
            if (result != SUCCESS) {
                functions_.erase(place);
                return status_of(result);
            }
        }
        out = place->second;
        return PYTHIA_OK;
    }

private:
    static CUresult load(const Driver &d, const Image &image, CUfunction &out) {
        CUmodule module;
        CUresult result = d.module_load_data(&module, image.cubin);
        if (result != SUCCESS) return result;
        result = d.module_get_function(&out, module, image.symbol);
        if (result == SUCCESS && image.shared > SHARED_WITHOUT_ASKING) {
            result = d.func_set_attribute(out, FUNC_MAX_DYNAMIC_SHARED_SIZE_BYTES,
                                          static_cast<int>(image.shared));
        }
        if (result != SUCCESS) d.module_unload(module);
        return result;
    }

    std::shared_mutex mutex_;
    std::map<unsigned long long, Device> devices_;
    std::map<std::pair<unsigned long long, const Image *>, CUfunction> functions_;
};

Contexts &contexts() {
    static Contexts *const all = new Contexts;  // outlives every static that may launch at exit
    return *all;
}

// Where this thread launches: driver, context and device.
struct Place {
    const Driver *driver;
    unsigned long long context;
    Device device;

    pythia_status find() {
        driver = pythia::driver();
        if (driver == nullptr) return PYTHIA_NO_DRIVER;
        CUcontext current = nullptr;
        if (const CUresult r = driver->ctx_get_current(&current); r != SUCCESS) return status_of(r);
        if (current == nullptr) return PYTHIA_NO_CONTEXT;
        context = reinterpret_cast<std::uintptr_t>(current);
        if (driver->ctx_get_id != nullptr) {
            if (const CUresult r = driver->ctx_get_id(current, &context); r != SUCCESS) {
                return status_of(r);
            }
        }
        return contexts().device(*driver, context, device);
    }
};

const Image *image_for(const Kernel &kernel, const Device &device) noexcept {
    const Image *best = nullptr;
    for (std::size_t i = 0; i < kernel.image_count; ++i) {
        const Image &image = kernel.images[i];
        const bool runs = image.major == device.major && (image.exact ? image.minor == device.minor
                                                                      : image.minor <= device.minor);
        if (runs && (best == nullptr || image.minor > best->minor)) best = &image;
    }
    const bool fits = best != nullptr && static_cast<int>(best->shared) <= device.shared;
    return fits ? best : nullptr;
}

// A member of an argument struct; pointers by their address.
std::int64_t value_of(const pythia_argument &argument, const void *args) noexcept {
    const char *from = static_cast<const char *>(args) + argument.offset;
    std::int64_t wide = 0;
    std::int32_t narrow = 0;
    switch (argument.type) {
        case PYTHIA_I32: std::memcpy(&narrow, from, sizeof narrow); return narrow;
        case PYTHIA_F32: return 0;
        default: std::memcpy(&wide, from, sizeof wide); return wide;
    }
}

pythia_status check(const Kernel &kernel, const void *args) noexcept {
    if (args == nullptr) return PYTHIA_BAD_ARGUMENT;
    for (std::size_t i = 0; i < kernel.argument_count; ++i) {
        const pythia_argument &argument = kernel.arguments[i];
        const std::int64_t value = value_of(argument, args);
        if (argument.type == PYTHIA_POINTER && value == 0) return PYTHIA_BAD_ARGUMENT;
        if (kernel.counts[i] && (value < 0 || value > MAX_COUNT)) return PYTHIA_BAD_ARGUMENT;
        if (value % static_cast<std::int64_t>(argument.multiple_of) != 0) {
            return PYTHIA_BAD_ALIGNMENT;
        }
    }
    return PYTHIA_OK;
}

pythia_status geometry(const Image &image, const Device &device, const void *args,
                       pythia_geometry &out) noexcept {
    std::int64_t grid[3] = {1, 1, 1};
    image.grid(args, device.sms, grid);
    for (int axis = 0; axis < 3; ++axis) {
        if (grid[axis] < 0 || grid[axis] > MAX_GRID[axis]) return PYTHIA_BAD_ARGUMENT;
        out.grid[axis] = static_cast<std::uint32_t>(grid[axis]);
    }
    out.threads = image.threads;
    out.shared_bytes = image.shared;
    return PYTHIA_OK;
}

// Nothing that a call throws, such as bad_alloc of a map, leaves the library.
template <typename F>
pythia_status guarded(F &&call) noexcept {
    try {
        return call();
    } catch (const std::bad_alloc &) {
        return PYTHIA_OUT_OF_MEMORY;
    } catch (...) {
        return PYTHIA_DRIVER_ERROR;
    }
}

const Kernel *own(const pythia_kernel *kernel) noexcept {
    const auto *found = static_cast<const Kernel *>(kernel);
    const std::less<const Kernel *> before;
    return before(found, kernels) || !before(found, kernels + kernel_count) ? nullptr : found;
}

}  // namespace

pythia_status launch(const Kernel &kernel, const void *args, void *stream) noexcept {
    return guarded([&] {
        Place place;
        pythia_geometry g;
        CUfunction function = nullptr;
        if (const auto s = check(kernel, args)) return s;
        if (const auto s = place.find()) return s;
        const Image *image = image_for(kernel, place.device);
        if (image == nullptr) return PYTHIA_UNSUPPORTED_GPU;
        if (const auto s = geometry(*image, place.device, args, g)) return s;
        if (g.grid[0] == 0 || g.grid[1] == 0 || g.grid[2] == 0) return PYTHIA_OK;
        if (const auto s = contexts().function(*place.driver, place.context, *image, function)) {
            return s;
        }
        void *scratch = nullptr;
        std::array<void *, MAX_PARAMETERS> parameters{};
        std::size_t count = 0;
        for (std::size_t i = 0; i < kernel.argument_count; ++i) {
            if (!kernel.arguments[i].passed) continue;
            if (count + image->hidden >= MAX_PARAMETERS) return PYTHIA_BAD_ARGUMENT;
            parameters[count++] =
                const_cast<char *>(static_cast<const char *>(args)) + kernel.arguments[i].offset;
        }
        for (std::uint32_t i = 0; i < image->hidden; ++i) parameters[count++] = &scratch;
        return status_of(place.driver->launch_kernel(
            function, g.grid[0], g.grid[1], g.grid[2], g.threads, 1, 1, g.shared_bytes,
            static_cast<CUstream>(stream), parameters.data(), nullptr));
    });
}

}  // namespace pythia

const char *pythia_kernels_status(pythia_status status) {
    switch (status) {
        case PYTHIA_OK: return "success";
        case PYTHIA_NO_DRIVER: return "no CUDA driver, or one without a device";
        case PYTHIA_NO_CONTEXT: return "no CUDA context is current in this thread";
        case PYTHIA_UNSUPPORTED_GPU: return "no code for this GPU in the library";
        case PYTHIA_BAD_ARGUMENT: return "a null pointer, a negative count or a grid out of range";
        case PYTHIA_BAD_ALIGNMENT: return "an address or an integer that is no multiple of 16";
        case PYTHIA_OUT_OF_MEMORY: return "out of memory";
        case PYTHIA_DRIVER_ERROR: return "the CUDA driver refused";
    }
    return "no status of this library";
}

int pythia_kernels_driver_error(void) { return pythia::last_error; }

const pythia_kernel *pythia_kernels_at(size_t index) {
    return index < pythia::kernel_count ? &pythia::kernels[index] : nullptr;
}

const pythia_kernel *pythia_kernels_find(const char *name) {
    if (name == nullptr) return nullptr;
    const auto *end = pythia::kernels + pythia::kernel_count;
    const auto *found = std::lower_bound(
        pythia::kernels, end, name,
        [](const pythia::Kernel &k, const char *n) { return std::strcmp(k.name, n) < 0; });
    return found != end && std::strcmp(found->name, name) == 0 ? found : nullptr;
}

pythia_status pythia_kernels_launch(const pythia_kernel *kernel, const void *args, void *stream) {
    const pythia::Kernel *known = pythia::own(kernel);
    return known == nullptr ? PYTHIA_BAD_ARGUMENT : pythia::launch(*known, args, stream);
}

pythia_status pythia_kernels_geometry(const pythia_kernel *kernel, const void *args,
                                      pythia_geometry *out) {
    return pythia::guarded([&] {
        const pythia::Kernel *known = pythia::own(kernel);
        if (known == nullptr || args == nullptr || out == nullptr) return PYTHIA_BAD_ARGUMENT;
        for (std::size_t i = 0; i < known->argument_count; ++i) {
            if (!known->counts[i]) continue;
            const std::int64_t value = pythia::value_of(known->arguments[i], args);
            if (value < 0 || value > pythia::MAX_COUNT) return PYTHIA_BAD_ARGUMENT;
        }
        pythia::Place place;
        if (const auto s = place.find()) return s;
        const pythia::Image *image = pythia::image_for(*known, place.device);
        if (image == nullptr) return PYTHIA_UNSUPPORTED_GPU;
        return pythia::geometry(*image, place.device, args, *out);
    });
}

pythia_status pythia_kernels_load(const pythia_kernel *kernel) {
    return pythia::guarded([&] {
        const pythia::Kernel *known = pythia::own(kernel);
        if (kernel != nullptr && known == nullptr) return PYTHIA_BAD_ARGUMENT;
        pythia::Place place;
        if (const auto s = place.find()) return s;
        const auto *first = kernel == nullptr ? pythia::kernels : known;
        const auto *end = kernel == nullptr ? first + pythia::kernel_count : first + 1;
        for (const auto *k = first; k != end; ++k) {
            const pythia::Image *image = pythia::image_for(*k, place.device);
            if (image == nullptr) return PYTHIA_UNSUPPORTED_GPU;
            CUfunction function = nullptr;
            if (const auto s = pythia::contexts().function(*place.driver, place.context, *image,
                                                           function)) {
                return s;
            }
        }
        return PYTHIA_OK;
    });
}
