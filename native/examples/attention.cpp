// One causal attention on the GPU, compared with a plain loop: exits 0 where they agree, 1 where they
// do not, 77 where there is no GPU.
//
// The CUDA driver allocates and copies; an application would do that with what it has.
#include <dlfcn.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <utility>
#include <vector>

#include "pythia_kernels.h"

namespace {

constexpr int NO_GPU = 77;
constexpr int B = 2, T = 192, H = 3, D = 64;
using Device = std::uint64_t;  // CUdeviceptr

template <typename F>
F driver(const char *name) {
    static void *const library = dlopen("libcuda.so.1", RTLD_NOW);
    return library == nullptr ? nullptr : reinterpret_cast<F>(dlsym(library, name));
}

std::uint16_t to_bf16(float x) {  // to the nearest, ties to even
    std::uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return static_cast<std::uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

float to_float(std::uint16_t x) {
    const std::uint32_t bits = std::uint32_t{x} << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

// Query t of head h: softmax(q kᵀ/√D) v over the keys up to t, then log₂ of the softmax's sum.
std::vector<double> attend(const std::vector<std::uint16_t> &qkv, int b, int t, int h) {
    const auto at = [&](int position, int part, int d) {
        return double{to_float(qkv[((std::size_t(b) * T + position) * H + h) * 3 * D + part * D + d])};
    };
    std::vector<double> scores(t + 1), out(D + 1);
    for (int key = 0; key <= t; ++key) {
        for (int d = 0; d < D; ++d) scores[key] += at(t, 0, d) * at(key, 1, d);
        scores[key] /= std::sqrt(double{D});
    }
    const double largest = *std::max_element(scores.begin(), scores.end());
    double sum = 0;
    for (double &score : scores) sum += score = std::exp(score - largest);
    for (int key = 0; key <= t; ++key) {
        for (int d = 0; d < D; ++d) out[d] += scores[key] / sum * at(key, 2, d);
    }
    out[D] = (largest + std::log(sum)) / std::log(2.0);
    return out;
}

struct Comparison {
    const char *what;
    double bound;
    double worst = 0;
    bool holds = true;

    void add(double got, double expected) {
        const double difference = std::abs(got - expected);
        worst = std::max(worst, difference);
        if (!(difference <= bound)) holds = false;  // a NaN is not within any bound
    }
    bool say() const {
        std::printf("%s: largest difference from a plain loop in fp64 %.2e, bound %.2e: %s\n", what,
                    worst, bound, holds ? "holds" : "WRONG");
        return holds;
    }
};

int failed(const char *what, int code) {
    std::fprintf(stderr, "%s: %d\n", what, code);
    return 1;
}

}  // namespace

int main() {
    const auto init = driver<int (*)(unsigned)>("cuInit");
    if (init == nullptr || init(0) != 0) return std::puts("no GPU here"), NO_GPU;
    const auto get = driver<int (*)(int *, int)>("cuDeviceGet");
    const auto retain = driver<int (*)(void **, int)>("cuDevicePrimaryCtxRetain");
    const auto current = driver<int (*)(void *)>("cuCtxSetCurrent");
    const auto allocate = driver<int (*)(Device *, std::size_t)>("cuMemAlloc_v2");
    const auto upload = driver<int (*)(Device, const void *, std::size_t)>("cuMemcpyHtoD_v2");
    const auto download = driver<int (*)(void *, Device, std::size_t)>("cuMemcpyDtoH_v2");
    int device;
    void *context;
    if (get(&device, 0) != 0) return std::puts("no GPU here"), NO_GPU;
    if (int e = retain(&context, device)) return failed("cuDevicePrimaryCtxRetain", e);
    if (int e = current(context)) return failed("cuCtxSetCurrent", e);

    std::mt19937 random(1);
    std::normal_distribution<float> normal;
    const std::uint16_t nan = 0x7fc0;  // what is not written is seen
    std::vector<std::uint16_t> qkv(std::size_t{B} * T * H * 3 * D), ctx(std::size_t{B} * T * H * D, nan);
    std::vector<float> lse(std::size_t{B} * H * T, std::numeric_limits<float>::quiet_NaN());
    for (auto &x : qkv) x = to_bf16(normal(random));
    Device d_qkv, d_ctx, d_lse;
    for (auto [address, bytes] : {std::pair{&d_qkv, 2 * qkv.size()}, {&d_ctx, 2 * ctx.size()},
                                  {&d_lse, 4 * lse.size()}}) {
        if (int e = allocate(address, bytes)) return failed("cuMemAlloc", e);
    }
    if (int e = upload(d_qkv, qkv.data(), 2 * qkv.size())) return failed("cuMemcpyHtoD", e);
    if (int e = upload(d_ctx, ctx.data(), 2 * ctx.size())) return failed("cuMemcpyHtoD", e);
    if (int e = upload(d_lse, lse.data(), 4 * lse.size())) return failed("cuMemcpyHtoD", e);

    pythia_attention_d64_forward_bf16_args args{};
    args.qkv = reinterpret_cast<void *>(d_qkv);
    args.ctx = reinterpret_cast<void *>(d_ctx);
    args.lse = reinterpret_cast<void *>(d_lse);
    args.T = T;
    args.heads = B * H;
    args.stride_b = T * H * 3 * D;
    args.stride_t = H * 3 * D;
    args.stride_ob = T * H * D;
    args.stride_ot = H * D;
    args.scale_log2 = static_cast<float>(1.4426950408889634 / std::sqrt(double{D}));
    args.H = H;
    args.GROUP = 8;
    const pythia_status status = pythia_attention_d64_forward_bf16(&args, nullptr);
    if (status == PYTHIA_UNSUPPORTED_GPU) {
        return std::puts(pythia_kernels_status(status)), NO_GPU;
    }
    if (status != PYTHIA_OK) return failed(pythia_kernels_status(status), status);
    if (int e = download(ctx.data(), d_ctx, 2 * ctx.size())) return failed("cuMemcpyDtoH", e);

    if (int e = download(lse.data(), d_lse, 4 * lse.size())) return failed("cuMemcpyDtoH", e);

    Comparison of_ctx{"ctx", 4 * 0x1p-8};  // P and ctx are rounded to bf16, 2⁻⁹ of values up to about 4
    Comparison of_lse{"lse", 1e-4};        // fp32, of scores up to about 10
    for (int b = 0; b < B; ++b) {
        for (int t = 0; t < T; ++t) {
            for (int h = 0; h < H; ++h) {
                const auto expected = attend(qkv, b, t, h);
                const auto *got = &ctx[((std::size_t(b) * T + t) * H + h) * D];
                for (int d = 0; d < D; ++d) of_ctx.add(to_float(got[d]), expected[d]);
                of_lse.add(lse[(std::size_t(b) * H + h) * T + t], expected[D]);
            }
        }
    }
    return of_ctx.say() & of_lse.say() ? 0 : 1;
}
