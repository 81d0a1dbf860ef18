// How a call is run: by which instructions, and in which segments for threads.

#pragma once

#include "job.h"

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
#include "kernels.h"
#undef NAMESPACE
#undef BYTES
END_TARGET
BEGIN_TARGET(AVX2)
#define NAMESPACE avx2
#define BYTES 32
#include "kernels.h"
#undef NAMESPACE
#undef BYTES
END_TARGET
#endif
#define NAMESPACE baseline
#define BYTES 16
#include "kernels.h"

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

void run(int64_t segments, int64_t grain, Body body, Job &job) {
    if (segments <= grain || !parallel_for) body(0, segments, &job);
    else parallel_for(0, segments, grain, body, &job);
}

int64_t divided_up(int64_t number, int64_t by) { return (number + by - 1) / by; }

// Sums the weights that the mean divides by, of `segment` samples or elements at a time.
template <class F> void sum_weights(int64_t begin, int64_t end, void *context) {
    Job &job = *(Job *)context;
    const F *sample_weight = (const F *)job.sample_weight;
    const F *weight = (const F *)job.weight;
    const int64_t count = job.weighs_elements ? job.elements : job.samples;
    constexpr int64_t BLOCK = 1024;
    int64_t labels[BLOCK];
    for (int64_t segment = begin; segment < end; segment++) {
        int64_t first = segment * job.segment, last = first + job.segment;
        if (last > count) last = count;
        double total = 0;
        bool &has_weight = job.has_weight[segment] = false;
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
                has_weight |= w != 0;
                total += w;
            }
        }
        job.sums[segment] = total;
    }
}

void find_divisor(Job &job) {
    job.divisor = job.lift = 1;
    if (job.reduction == BATCHMEAN) job.divisor = double(job.batch);
    if (job.reduction != MEAN) return;
    const double each = job.per_element() && !job.weighs_elements ? double(job.classes) : 1;
    if (!job.is_index && !job.sample_weight) {
        job.divisor = each * double(job.samples);
        return;
    }
    const int64_t count = job.weighs_elements ? job.elements : job.samples;
    job.segment = divided_up(count, MAX_SEGMENTS);
    if (job.segment < MIN_SEGMENT) job.segment = MIN_SEGMENT;
    const int64_t segments = divided_up(count, job.segment);
    run(segments, 4, job.is_double ? sum_weights<double> : sum_weights<float>, job);
    double total = 0;
    bool has_weight = false;
    for (int64_t k = 0; k < segments; k++) {
        has_weight |= job.has_weight[k];
        total += job.sums[k];
    }
    job.divisor = has_weight ? total * each : 1;
    if (std::abs(job.divisor) < LEAST_DIVISOR) job.lift = LIFT;
    job.divisor *= job.lift;
}

void compute(Job &job) {
    if (job.per_element()) {  // Class weights and smoothing have no meaning for it.
        job.weight = nullptr;
        job.smoothing = 0;
    }
    job.samples = job.outer * job.inner;
    job.elements = job.samples * job.classes;
    job.has_upstreams = job.upstream && job.reduction == NONE;
    job.uniform = job.smoothing / double(job.classes);
    job.is_guarded = job.delta != 0;
    job.is_smooth = job.smoothing != 0;
    job.only_target_class = job.is_index && !job.per_element() && job.smoothing == 0;
    job.is_flat = !job.is_index && !COUPLES_CLASSES[job.kind] && !job.weight &&
                         (!job.sample_weight || job.weighs_elements) &&
                         (job.per_element() || job.reduction != NONE);
    find_divisor(job);
    TARGETS[target].plan(job);
    job.streams = job.grad_input && job.elements * SIZES[job.input_storage] >= STREAMED;
    const int64_t work = job.reads_one() && !job.grad_input ? 16 : job.classes;
    job.segment = divided_up(MIN_SEGMENT, work);
    if (job.segment < divided_up(job.samples, MAX_SEGMENTS))
        job.segment = divided_up(job.samples, MAX_SEGMENTS);
    if (job.samples_in_lanes) job.segment = divided_up(job.segment, job.group) * job.group;
    const int64_t segments = divided_up(job.samples, job.segment);
    run(segments, divided_up(MIN_PER_THREAD, job.segment * work), job.run, job);
    if (job.reduction == NONE || job.bad == NO_MEMORY) return;
    double total = 0;
    for (int64_t k = 0; k < segments; k++) total += job.sums[k];
    total /= job.divisor;
    if (job.is_double) *(double *)job.losses = total;
    else *(float *)job.losses = float(total);
}

}  // namespace
