// A CUDA driver that computes one kernel, the attention of the example, on the host: FAKE_GPU says how.
//
// right; nothing: memory stays as it was; one: a value of ctx is off by 2⁻⁴; nan: one is NaN; lse: one
// is off by 2⁻¹⁰. A GPU of compute capability CAPABILITY. It shares no code with the example.
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <string>

namespace {

float widen(std::uint16_t x) {
    const std::uint32_t bits = std::uint32_t{x} << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

std::uint16_t narrow(float x) {
    std::uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return static_cast<std::uint16_t>((bits + 0x8000) >> 16);
}

template <typename V>
V parameter(void **parameters, int i) {
    V value;
    std::memcpy(&value, parameters[i], sizeof value);
    return value;
}

constexpr int D = 64;

// kernels/attention.py, _attention_fwd_kernel: qkv, ctx, lse, T, heads, four strides, log₂e/√D, H
void attention(void **p, const std::string &how) {
    if (how == "nothing") return;
    const auto *qkv = parameter<const std::uint16_t *>(p, 0);
    auto *ctx = parameter<std::uint16_t *>(p, 1);
    auto *lse = parameter<float *>(p, 2);
    const int T = parameter<int>(p, 3), heads = parameter<int>(p, 4), H = parameter<int>(p, 10);
    const int in_b = parameter<int>(p, 5), in_t = parameter<int>(p, 6);
    const int out_b = parameter<int>(p, 7), out_t = parameter<int>(p, 8);
    const float scale = parameter<float>(p, 9);
    for (int head = 0; head < heads; ++head) {
        const auto *own = qkv + head / H * in_b + head % H * 3 * D;
        for (int t = 0; t < T; ++t) {
            float sums[D] = {}, total = 0, peak = -INFINITY;
            for (int key = 0; key <= t; ++key) {  // the softmax as it runs, in base 2
                const auto *k = own + key * in_t + D, *v = k + D, *q = own + t * in_t;
                float score = 0;
                for (int d = 0; d < D; ++d) score += widen(q[d]) * widen(k[d]);
                score *= scale;
                const float top = std::fmax(peak, score);
                const float keep = std::exp2(peak - top), add = std::exp2(score - top);
                for (int d = 0; d < D; ++d) sums[d] = sums[d] * keep + add * widen(v[d]);
                total = total * keep + add, peak = top;
            }
            auto *out = ctx + head / H * out_b + t * out_t + head % H * D;
            for (int d = 0; d < D; ++d) out[d] = narrow(sums[d] / total);
            lse[head * T + t] = peak + std::log2(total);
            if (head != heads - 1 || t != T - 1) continue;
            if (how == "one") out[D - 1] = narrow(sums[D - 1] / total + 0x1p-4F);
            if (how == "nan") out[D - 1] = 0x7fc0;
            if (how == "lse") lse[head * T + t] += 0x1p-10F;
        }
    }
}

int somewhere;  // what handles point to

}  // namespace

extern "C" {

int cuInit(unsigned) { return 0; }
int cuDeviceGet(int *device, int) { return *device = 0; }
int cuDevicePrimaryCtxRetain(void **context, int) { return *context = &somewhere, 0; }
int cuCtxSetCurrent(void *) { return 0; }
int cuCtxGetCurrent(void **context) { return *context = &somewhere, 0; }
int cuCtxGetDevice(int *device) { return *device = 0; }
int cuModuleLoadData(void **module, const void *) { return *module = &somewhere, 0; }
int cuModuleUnload(void *) { return 0; }
int cuModuleGetFunction(void **function, void *, const char *) { return *function = &somewhere, 0; }
int cuFuncSetAttribute(void *, int, int) { return 0; }

int cuDeviceGetAttribute(int *value, int attribute, int) {
    *value = attribute == 75 ? CAPABILITY / 10 : attribute == 76 ? CAPABILITY % 10
             : attribute == 16                 ? 132
                                               : 160 * 1024;
    return 0;
}

int cuMemAlloc_v2(std::uint64_t *address, std::size_t bytes) {
    *address = reinterpret_cast<std::uint64_t>(std::aligned_alloc(256, (bytes + 255) / 256 * 256));
    return 0;
}

int cuMemcpyHtoD_v2(std::uint64_t to, const void *from, std::size_t bytes) {
    return std::memcpy(reinterpret_cast<void *>(to), from, bytes), 0;
}

int cuMemcpyDtoH_v2(void *to, std::uint64_t from, std::size_t bytes) {
    return std::memcpy(to, reinterpret_cast<const void *>(from), bytes), 0;
}

int cuLaunchKernel(void *, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void *,
                   void **parameters, void **) {
    const char *how = std::getenv("FAKE_GPU");
    return attention(parameters, how != nullptr ? how : "nothing"), 0;
}
}
