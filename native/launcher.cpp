#include "launcher.hpp"

#include <algorithm>
#include <array>
#include <atomic>
#include <cstring>
#include <functional>
#include <map>
#include <mutex>
#include <new>
#include <shared_mutex>
#include <utility>

#include "driver.hpp"

namespace pythia {
namespace {

constexpr std::uint32_t SHARED_WITHOUT_ASKING = 48 * 1024;
constexpr std::int64_t MAX_GRID[3] = {2147483647, 65535, 65535};
constexpr std::int64_t MAX_COUNT = std::int64_t{1} << 60;  // so that no sum of two overflows
constexpr std::size_t MAX_PARAMETERS = 64;

// One image in one context. Its lock is held while it loads, so that other kernels are launched.
class Entry {
public:
    CUresult function(const Driver &d, const Image &image, CUfunction &out) {
        if ((out = function_.load(std::memory_order_acquire)) != nullptr) return SUCCESS;
        const std::lock_guard lock(mutex_);
        if ((out = function_.load(std::memory_order_relaxed)) != nullptr) return SUCCESS;
        CUmodule module;
        const CUresult result = load(d, image, module, out);
        if (result == SUCCESS) function_.store(out, std::memory_order_release);
        return result;
    }

    // A launch that failed as it does where a context was reset, or came back at the address of one
    // that is gone (without cuCtxGetId): once more with a module loaded now, kept if that was it.
    template <typename Launch>
    CUresult relaunch(const Driver &d, const Image &image, CUfunction failed, Launch &&launch) {
        const std::lock_guard lock(mutex_);
        const CUfunction other = function_.load(std::memory_order_relaxed);
        if (other != failed) return launch(other);
        CUmodule module;
        CUfunction fresh;
        if (const CUresult r = load(d, image, module, fresh); r != SUCCESS) return r;
        const CUresult result = launch(fresh);
        if (result == SUCCESS) {
            function_.store(fresh, std::memory_order_release);
        } else {
            d.module_unload(module);
        }
        return result;
    }

private:
    static CUresult load(const Driver &d, const Image &image, CUmodule &module, CUfunction &out) {
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

    std::mutex mutex_;
    std::atomic<CUfunction> function_{nullptr};
};

// Of every context, by its id; an entry stays at its address for good, some bytes for a dead context.
class Entries {
public:
    Entry &at(unsigned long long context, const Image &image) {
        const std::pair key(context, &image);
        {
            const std::shared_lock lock(mutex_);
            if (const auto found = all_.find(key); found != all_.end()) return found->second;
        }
        const std::unique_lock lock(mutex_);
        return all_[key];
    }

private:
    std::shared_mutex mutex_;
    std::map<std::pair<unsigned long long, const Image *>, Entry> all_;
};

Entry &entry(unsigned long long context, const Image &image) {
    static Entries &entries = *new Entries;  // outlives every static that may launch at exit
    return entries.at(context, image);
}

struct Device {
    int major, minor, sms, shared;
};

pythia_status describe(const Driver &d, CUdevice number, Device &out) {
    CUresult result = SUCCESS;
    const auto read = [&](int attribute, int &value) {
        if (result == SUCCESS) result = d.device_get_attribute(&value, attribute, number);
    };
    read(COMPUTE_CAPABILITY_MAJOR, out.major);
    read(COMPUTE_CAPABILITY_MINOR, out.minor);
    read(MULTIPROCESSOR_COUNT, out.sms);
    read(MAX_SHARED_MEMORY_PER_BLOCK_OPTIN, out.shared);
    return status_of(result);
}

// Where this thread launches: driver, context (its id, or before CUDA 12 its address) and device.
struct Place {
    const Driver *driver;
    unsigned long long context;
    Device device;

    pythia_status find() {
        if (const auto s = open_driver(driver)) return s;
        CUcontext current = nullptr;
        if (const CUresult r = driver->ctx_get_current(&current); r != SUCCESS) return status_of(r);
        if (current == nullptr) return PYTHIA_NO_CONTEXT;
        context = reinterpret_cast<std::uintptr_t>(current);
        if (driver->ctx_get_id != nullptr) {
            if (const CUresult r = driver->ctx_get_id(current, &context); r != SUCCESS) {
                return status_of(r);
            }
        }
        CUdevice number;
        if (const CUresult r = driver->ctx_get_device(&number); r != SUCCESS) return status_of(r);
        thread_local CUdevice known = -1;
        thread_local Device description;
        if (number != known) {
            if (const auto s = describe(*driver, number, description)) return s;
            known = number;
        }
        device = description;
        return PYTHIA_OK;
    }
};

pythia_status load(const Place &place, const Image &image) {
    CUfunction function;
    return status_of(entry(place.context, image).function(*place.driver, image, function));
}

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
        if (const auto s = check(kernel, args)) return s;
        if (const auto s = place.find()) return s;
        const Image *image = image_for(kernel, place.device);
        if (image == nullptr) return PYTHIA_UNSUPPORTED_GPU;
        if (const auto s = geometry(*image, place.device, args, g)) return s;
        if (g.grid[0] == 0 || g.grid[1] == 0 || g.grid[2] == 0) return PYTHIA_OK;
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
        const auto launch = [&](CUfunction function) {
            return place.driver->launch_kernel(function, g.grid[0], g.grid[1], g.grid[2], g.threads, 1,
                                               1, g.shared_bytes, static_cast<CUstream>(stream),
                                               parameters.data(), nullptr);
        };
        Entry &loaded = entry(place.context, *image);
        CUfunction function = nullptr;
        CUresult result = loaded.function(*place.driver, *image, function);
        if (result != SUCCESS) return status_of(result);
        result = launch(function);
        if (result == ERROR_INVALID_CONTEXT || result == ERROR_INVALID_HANDLE ||
            result == ERROR_CONTEXT_IS_DESTROYED) {
            result = loaded.relaunch(*place.driver, *image, function, launch);
        }
        return status_of(result);
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

int pythia_kernels_driver_error(void) { return pythia::last_error(); }

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
        pythia_status status = PYTHIA_OK;  // of the first kernel that is not loaded
        for (const auto *k = first; k != end; ++k) {
            const pythia::Image *image = pythia::image_for(*k, place.device);
            const auto s = image == nullptr ? PYTHIA_UNSUPPORTED_GPU : pythia::load(place, *image);
            if (status == PYTHIA_OK) status = s;
        }
        return status;
    });
}
