// A loss of tensors that lie in order, and its gradients: what a call is, how it is cut into stretches
// for threads, and which instructions it is computed by.

#pragma once

#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#ifdef __x86_64__
#include <immintrin.h>
#endif

#define INLINE inline __attribute__((always_inline))
#define INLINED __attribute__((always_inline))  // Of a lambda.

namespace {

// ---- What a call is

enum Kind { SQUARES, PROBABILITIES, LOGITS };
enum Reduction { SUM, MEAN, BATCHMEAN, NONE };
enum Storage {
    FLOAT32, FLOAT64, BFLOAT16, FLOAT16,
    UINT8, INT8, INT16, INT32, INT64, UINT16, UINT32, UINT64, BOOL,
};
constexpr int64_t SIZES[] = {4, 8, 2, 2, 1, 1, 2, 4, 8, 2, 4, 8, 1};
constexpr const char *KINDS[] = {"squares", "probabilities", "logits"};
constexpr const char *REDUCTIONS[] = {"sum", "mean", "batchmean", "none"};

// The stretches of a job are the same for any number of threads, and so is each one's sum.
constexpr int64_t STRETCHES = 2048;   // At most.
constexpr int64_t STRETCH = 16384;    // Elements in one, at least;
constexpr int64_t GRAIN = 32768;      // and of what a thread is given.
constexpr int64_t WITH_GIL = 16384;   // Elements that are done before another thread would wake.
constexpr int64_t LEAST_ROW = 32;     // Classes from which a row fills vectors by itself.
constexpr int64_t STREAMED = 1 << 25;  // Bytes of a gradient that leave the cache anyway.
constexpr int64_t NO_MEMORY = -1;     // As a bad position.
// Where weights add up to less, the inverse of their sum may overflow; see `lifted` in formulas.py.
constexpr double LEAST_DIVISOR = 0x1p-120, LIFT = 0x1p64;

struct Job {
    Kind kind;
    Reduction reduction;
    bool is_index, is_double;
    bool is_of_class;       // One entry of a row counts.
    bool is_elementwise;    // Nothing depends on where in a row an element stands.
    bool is_side_by_side;   // Samples are the lanes of vectors, not classes.
    bool weighs_elements;   // By `sample_weight`.
    bool has_upstreams;     // One per loss.
    bool is_guarded, is_smooth;
    bool streams = false;   // Gradients go to memory past the cache.
    Storage input_storage, target_storage;
    const void *input, *target;
    const void *weight, *sample_weight, *upstream;  // Like losses in the dtype of computation.
    void *losses, *grad_input, *grad_target;
    int64_t classes, inner, samples, elements;  // samples = outer · inner
    int64_t ignore_index;
    double delta, smoothing, uniform, divisor;  // uniform = smoothing / classes
    double lift;  // A factor of the weights, and within the divisor.
    int64_t group, stretch;  // Samples in each.
    void (*run)(int64_t, int64_t, void *);
    double sums[STRETCHES];
    std::atomic<int64_t> bad{INT64_MAX};  // The first sample whose class is none.

    // The element of a class of a sample.
    int64_t place(int64_t sample, int64_t c) const {
        return inner == 1 ? sample * classes + c
                          : (sample / inner * classes + c) * inner + sample % inner;
    }
    void note_bad(int64_t sample) {
        int64_t known = bad.load(std::memory_order_relaxed);
        while (sample < known && !bad.compare_exchange_weak(known, sample)) {
        }
    }
};

// Class indices as int64; for those beyond it, `none`.
template <class T>
void labels_as(const void *from, int64_t start, int64_t n, int64_t *to, int64_t none = 0) {
    const T *values = (const T *)from + start;
    for (int64_t i = 0; i < n; i++)
        to[i] = sizeof(T) == 8 && T(-1) > T(0) && int64_t(values[i]) < 0 ? none
                                                                         : int64_t(values[i]);
}
void load_labels(const Job &job, int64_t start, int64_t n, int64_t *to) {
    switch (job.target_storage) {
        case INT64: return labels_as<int64_t>(job.target, start, n, to);
        case INT32: return labels_as<int32_t>(job.target, start, n, to);
        case INT16: return labels_as<int16_t>(job.target, start, n, to);
        case INT8: return labels_as<int8_t>(job.target, start, n, to);
        case UINT8: return labels_as<uint8_t>(job.target, start, n, to);
        case UINT16: return labels_as<uint16_t>(job.target, start, n, to);
        case UINT32: return labels_as<uint32_t>(job.target, start, n, to);
        default: break;
    }
    const int64_t none = job.ignore_index == INT64_MAX ? -1 : INT64_MAX;  // Not ignored either.
    labels_as<uint64_t>(job.target, start, n, to, none);
}

}  // namespace

// ---- The kernels, for each instruction set

#ifdef __x86_64__
#define AVX2 "avx2,fma,bmi,bmi2"
#define AVX512 AVX2 ",avx512f,avx512bw,avx512cd,avx512dq,avx512vl"
#define DO(pragma) _Pragma(#pragma)
#ifdef __clang__
#define BEGIN_TARGET(features) \
    DO(clang attribute push(__attribute__((target(features))), apply_to = function))
#define END_TARGET DO(clang attribute pop)
#else
#define BEGIN_TARGET(features) DO(GCC push_options) DO(GCC target(features))
#define END_TARGET DO(GCC pop_options)
#endif

BEGIN_TARGET(AVX512)
#define NAMESPACE avx512
#define BYTES 64
#include "cpu.h"
#undef NAMESPACE
#undef BYTES
END_TARGET
BEGIN_TARGET(AVX2)
#define NAMESPACE avx2
#define BYTES 32
#include "cpu.h"
#undef NAMESPACE
#undef BYTES
END_TARGET
#endif
#define NAMESPACE baseline
#define BYTES 16
#include "cpu.h"

namespace {

struct Target {
    void (*plan)(Job &);
    void (*apply)(bool, bool, const void *, void *, int64_t);
};
#ifdef __x86_64__
constexpr Target TARGETS[] = {{baseline::plan, baseline::apply},
                              {avx2::plan, avx2::apply},
                              {avx512::plan, avx512::apply}};
#else
constexpr Target TARGETS[] = {{baseline::plan, baseline::apply}};
#endif

// The best of TARGETS that the processor has.
int find_target() {
#ifdef __x86_64__
    __builtin_cpu_init();
    const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                          __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
    const bool has_avx512 = __builtin_cpu_supports("avx512f") &&
                            __builtin_cpu_supports("avx512bw") &&
                            __builtin_cpu_supports("avx512cd") &&
                            __builtin_cpu_supports("avx512dq") &&
                            __builtin_cpu_supports("avx512vl");
    return has_avx2 ? 1 + has_avx512 : 0;
#else
    return 0;
#endif
}
int target = find_target();

// ---- Threads

using Body = void (*)(int64_t begin, int64_t end, void *context);
int32_t (*parallel_for)(int64_t begin, int64_t end, int64_t grain, Body, void *context);

void run(int64_t stretches, int64_t grain, Body body, Job &job) {
    if (stretches <= grain || !parallel_for) body(0, stretches, &job);
    else parallel_for(0, stretches, grain, body, &job);
}

int64_t divided_up(int64_t number, int64_t by) { return (number + by - 1) / by; }

// Sums the weights that the mean divides by, of `stretch` samples or elements at a time.
template <class F> void sum_weights(int64_t begin, int64_t end, void *context) {
    Job &job = *(Job *)context;
    const F *sample_weight = (const F *)job.sample_weight;
    const F *weight = job.kind == SQUARES ? nullptr : (const F *)job.weight;
    const int64_t count = job.weighs_elements ? job.elements : job.samples;
    constexpr int64_t BLOCK = 1024;
    int64_t labels[BLOCK];
    for (int64_t stretch = begin; stretch < end; stretch++) {
        int64_t first = stretch * job.stretch, last = first + job.stretch;
        if (last > count) last = count;
        double total = 0;
        bool is_nothing = true;
        for (int64_t block = first; block < last; block += BLOCK) {
            int64_t n = last - block < BLOCK ? last - block : BLOCK;
            if (job.is_index) load_labels(job, block, n, labels);
            for (int64_t j = 0; j < n; j++) {
                double w = sample_weight ? sample_weight[block + j] : 1;
                if (job.is_index) {
                    int64_t c = labels[j];
                    if (c == job.ignore_index) continue;
                    if (c < 0 || c >= job.classes) {
                        job.note_bad(block + j);
                        c = 0;  // It counts, as in the formula.
                    }
                    if (weight) w *= weight[c];
                }
                is_nothing &= w == 0;
                total += w;
            }
        }
        // −0 says that there was a weight, though the sum is 0.
        job.sums[stretch] = total == 0 ? (is_nothing ? 0.0 : -0.0) : total;
    }
}

void find_divisor(Job &job, int64_t outer) {
    job.divisor = job.lift = 1;
    if (job.reduction == BATCHMEAN) job.divisor = double(outer);
    if (job.reduction != MEAN) return;
    const double each = job.kind == SQUARES && !job.weighs_elements ? double(job.classes) : 1;
    if (!job.is_index && !job.sample_weight) {
        job.divisor = each * double(job.samples);
        return;
    }
    const int64_t count = job.weighs_elements ? job.elements : job.samples;
    job.stretch = divided_up(count, STRETCHES);
    if (job.stretch < STRETCH) job.stretch = STRETCH;
    const int64_t stretches = divided_up(count, job.stretch);
    run(stretches, 4, job.is_double ? sum_weights<double> : sum_weights<float>, job);
    double total = 0;
    bool is_nothing = true;
    for (int64_t k = 0; k < stretches; k++) {
        is_nothing &= job.sums[k] == 0 && !std::signbit(job.sums[k]);
        total += job.sums[k];
    }
    job.divisor = is_nothing ? 1 : total * each;
    if (std::abs(job.divisor) < LEAST_DIVISOR) job.lift = LIFT;
    job.divisor *= job.lift;
}

void compute(Job &job, int64_t outer) {
    find_divisor(job, outer);
    TARGETS[target].plan(job);
    job.streams = job.grad_input && job.elements * SIZES[job.input_storage] >= STREAMED;
    // Of probabilities only the class's is read, and all of a gradient are written.
    const bool reads_one = job.is_of_class && job.kind == PROBABILITIES && !job.grad_input;
    const int64_t work = reads_one ? 16 : job.classes;
    job.stretch = divided_up(STRETCH, work);
    if (job.stretch < divided_up(job.samples, STRETCHES))
        job.stretch = divided_up(job.samples, STRETCHES);
    if (job.is_side_by_side) job.stretch = divided_up(job.stretch, job.group) * job.group;
    const int64_t stretches = divided_up(job.samples, job.stretch);
    run(stretches, divided_up(GRAIN, job.stretch * work), job.run, job);
    if (job.reduction == NONE || job.bad == NO_MEMORY) return;
    double total = 0;
    for (int64_t k = 0; k < stretches; k++) total += job.sums[k];
    total /= job.divisor;
    if (job.is_double) *(double *)job.losses = total;
    else *(float *)job.losses = float(total);
}

}  // namespace
