#include "fake_cuda.hpp"

#include <dlfcn.h>
#include <elf.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <mutex>
#include <utility>

namespace fake {
namespace {

std::mutex mutex;
std::vector<Launch> launches;
Counts counts{};
thread_local std::uintptr_t current = 0;

struct Module {
    Code code;
    std::uintptr_t context;
    unsigned long long generation;
    int shared_allowed = 0;
};
std::vector<std::unique_ptr<Module>> modules;

template <typename T>
T read(const unsigned char *from) {
    T value;
    std::memcpy(&value, from, sizeof value);
    return value;
}

// .nv.info and .nv.info.SYMBOL: records of format, attribute and either a value of 16 bits or a length
void read_info(const unsigned char *at, const unsigned char *end, Code &code) {
    constexpr unsigned SIZED = 4, PARAMETER = 0x17, THREADS = 0x10, REGISTERS = 0x2f;
    while (at < end) {
        const unsigned format = at[0], attribute = at[1];
        const auto size = read<std::uint16_t>(at + 2);
        const unsigned char *value = at + 4;
        if (format == SIZED && attribute == PARAMETER) {
            const auto ordinal = read<std::uint16_t>(value + 4);
            if (code.parameters.size() <= ordinal) code.parameters.resize(ordinal + 1u);
            code.parameters[ordinal] = read<std::uint32_t>(value + 8) >> 18;
        } else if (format == SIZED && attribute == THREADS) {
            code.threads = read<std::uint32_t>(value);
        } else if (format == SIZED && attribute == REGISTERS) {
            code.registers = std::max(code.registers, read<std::uint32_t>(value + 4));
        }
        at = value + (format == SIZED ? size : 0);
    }
}

Code read_cubin(const unsigned char *elf) {
    const auto header = read<Elf64_Ehdr>(elf);
    Code code;
    code.capability = static_cast<int>(header.e_ident[EI_ABIVERSION] >= 8 ? header.e_flags >> 8 & 0xff
                                                                         : header.e_flags & 0xff);
    const auto section = [&](unsigned i) {
        return read<Elf64_Shdr>(elf + header.e_shoff + i * header.e_shentsize);
    };
    const auto names = section(header.e_shstrndx);
    const std::string info = ".nv.info", text = ".text.";
    for (unsigned i = 0; i < header.e_shnum; ++i) {
        const auto s = section(i);
        const std::string name = reinterpret_cast<const char *>(elf + names.sh_offset + s.sh_name);
        if (name.rfind(text, 0) == 0) {
            code.symbol = name.substr(text.size());
        } else if (name.rfind(info, 0) == 0) {
            read_info(elf + s.sh_offset, elf + s.sh_offset + s.sh_size, code);
        }
    }
    return code;
}

}  // namespace

Settings &settings() {
    static Settings all;
    return all;
}

bool has_ids() {
#ifdef CUDA_11
    return false;
#else
    return true;
#endif
}

const char *path() {
    Dl_info found{};
    return dladdr(reinterpret_cast<void *>(&settings), &found) != 0 ? found.dli_fname : nullptr;
}

void set_context(std::uintptr_t context) { current = context; }

std::vector<Launch> take_launches() {
    const std::lock_guard lock(mutex);
    return std::exchange(launches, {});
}

Counts take_counts() {
    const std::lock_guard lock(mutex);
    return std::exchange(counts, {});
}

}  // namespace fake

extern "C" {

int cuInit(unsigned) {
    const std::lock_guard lock(fake::mutex);
    ++fake::counts.inits;
    return fake::settings().init;
}

int cuCtxGetCurrent(std::uintptr_t *context) {
    *context = fake::current;
    return 0;
}

#ifndef CUDA_11
int cuCtxGetId(std::uintptr_t context, unsigned long long *id) {
    const fake::Settings &s = fake::settings();
    *id = context + 1000000 * (s.generation - (s.id_is_kept ? 1 : 0));
    return 0;
}
#endif

int cuCtxGetDevice(int *device) {
    *device = fake::settings().device;
    return 0;
}

int cuDeviceGetAttribute(int *value, int attribute, int device) {
    const fake::Settings &s = fake::settings();
    if (device != s.device) return 101;
    switch (attribute) {
        case 16: *value = s.sms; return 0;
        case 75: *value = s.major; return 0;
        case 76: *value = s.minor; return 0;
        case 97: *value = s.shared; return 0;
        default: return 1;
    }
}

int cuModuleLoadData(fake::Module **module, const void *image) {
    if (const auto loading = fake::settings().loading) loading();
    const std::lock_guard lock(fake::mutex);
    if (fake::settings().load != 0) return fake::settings().load;
    auto code = fake::read_cubin(static_cast<const unsigned char *>(image));
    fake::modules.push_back(std::make_unique<fake::Module>());
    fake::modules.back()->code = std::move(code);
    fake::modules.back()->context = fake::current;
    fake::modules.back()->generation = fake::settings().generation;
    *module = fake::modules.back().get();
    ++fake::counts.loads;
    return 0;
}

int cuModuleUnload(fake::Module *) {
    const std::lock_guard lock(fake::mutex);
    ++fake::counts.unloads;
    return 0;
}

int cuModuleGetFunction(fake::Module **function, fake::Module *module, const char *name) {
    *function = module;
    if (fake::settings().function != 0) return fake::settings().function;
    return module->code.symbol == name ? 0 : 500;  // CUDA_ERROR_NOT_FOUND
}

int cuFuncSetAttribute(fake::Module *function, int attribute, int value) {
    if (attribute != 8) return 1;
    if (fake::settings().attribute != 0) return fake::settings().attribute;
    function->shared_allowed = value;
    return 0;
}

int cuLaunchKernel(fake::Module *function, unsigned gx, unsigned gy, unsigned gz, unsigned bx,
                   unsigned by, unsigned bz, unsigned shared, void *stream, void **parameters,
                   void **extra) {
    if (fake::settings().launch != 0) return fake::settings().launch;
    if (extra != nullptr || gx == 0 || gy == 0 || gz == 0) return 1;
    fake::Launch launch{fake::current, function->code, {gx, gy, gz}, {bx, by, bz}, shared,
                        function->shared_allowed, stream, {}, false};
    if (function->context != fake::current) return 201;  // a function of another context
    if (function->generation != fake::settings().generation) {
        const std::lock_guard lock(fake::mutex);
        ++fake::counts.stale;
        return 400;  // CUDA_ERROR_INVALID_HANDLE
    }
    std::size_t ordinal = 0;
    for (const unsigned bytes : function->code.parameters) {
        const auto *from = static_cast<const unsigned char *>(parameters[ordinal++]);
        if (from == nullptr) return 1;
        launch.parameters.emplace_back(from, from + bytes);
    }
    launch.ended = parameters[ordinal] == nullptr;
    const std::lock_guard lock(fake::mutex);
    fake::launches.push_back(std::move(launch));
    return 0;
}
}
