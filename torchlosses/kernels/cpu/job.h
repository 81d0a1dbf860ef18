// A call: a loss of contiguous tensors, and its gradients.

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

#include "losses.h"  // LOSSES

#define INLINE inline __attribute__((always_inline))
#define INLINED __attribute__((always_inline))  // Of a lambda.

namespace {

#define KIND_OF(kind, name, per_element, couples_classes) kind,
#define NAME_OF(kind, name, per_element, couples_classes) name,
#define PER_ELEMENT_OF(kind, name, per_element, couples_classes) per_element,
#define COUPLES_CLASSES_OF(kind, name, per_element, couples_classes) couples_classes,
enum Kind { LOSSES(KIND_OF) };
constexpr const char *KINDS[] = {LOSSES(NAME_OF)};
constexpr bool PER_ELEMENT[] = {LOSSES(PER_ELEMENT_OF)};
constexpr bool COUPLES_CLASSES[] = {LOSSES(COUPLES_CLASSES_OF)};
enum Reduction { SUM, MEAN, BATCHMEAN, NONE };
constexpr const char *REDUCTIONS[] = {"sum", "mean", "batchmean", "none"};
enum Storage {  // Numbered as in __init__.py.
    FLOAT32, FLOAT64, BFLOAT16, FLOAT16,
    UINT8, INT8, INT16, INT32, INT64, UINT16, UINT32, UINT64, BOOL,
};
constexpr int64_t SIZES[] = {4, 8, 2, 2, 1, 1, 2, 4, 8, 2, 4, 8, 1};

// The segments of a job are the same for any number of threads, and so is each one's sum.
constexpr int64_t MAX_SEGMENTS = 2048;
constexpr int64_t MIN_SEGMENT = 16384;     // Elements.
constexpr int64_t MIN_PER_THREAD = 32768;  // Elements.
constexpr int64_t WITH_GIL = 16384;        // Up to this many elements keep the GIL.
constexpr int64_t LEAST_ROW = 32;          // Classes from which a row fills vectors by itself.
constexpr int64_t STREAMED = 1 << 25;      // Gradients of this many bytes bypass the cache.
constexpr int64_t NO_MEMORY = -1;          // In `bad`: malloc has failed.
// Where weights add up to less, the inverse of their sum may overflow; see `lifted` in formulas.py.
constexpr double LEAST_DIVISOR = 0x1p-120, LIFT = 0x1p64;

// What calls with the same layout share.
struct Call {
    Kind kind;
    Reduction reduction;
    bool is_index, is_double;
    bool weighs_elements;  // By `sample_weight`.
    Storage input_storage, target_storage;
    int64_t outer, classes, inner;
    int64_t batch;  // What 'batchmean' divides by.
    int64_t ignore_index;
    double delta, smoothing;
};

struct Job : Call {
    bool only_target_class;  // One entry of a row counts.
    bool is_flat;            // Nothing depends on where in a row an element stands.
    bool samples_in_lanes;  // Samples are the lanes of vectors, not classes.
    bool has_upstreams;     // One per loss.
    bool is_guarded, is_smooth;
    bool streams = false;   // Gradients go to memory past the cache.
    const void *input, *target;
    const void *weight, *sample_weight, *upstream;  // Like losses in the dtype of computation.
    void *losses, *grad_input, *grad_target;
    int64_t samples, elements;  // samples = outer · inner
    double uniform, divisor;  // uniform = smoothing / classes
    double lift;  // A factor of the weights, and within the divisor.
    int64_t group, segment;  // Samples in each.
    void (*run)(int64_t, int64_t, void *);
    double sums[MAX_SEGMENTS];
    bool has_weight[MAX_SEGMENTS];  // Whether any that was summed is not 0.
    std::atomic<int64_t> bad{INT64_MAX};  // The first sample whose class is none.

    explicit Job(const Call &call) : Call(call) {}
    bool per_element() const { return PER_ELEMENT[kind]; }
    // Whether only the entry of a sample's class is read, and all others have a slope of 0.
    bool reads_one() const { return only_target_class && !COUPLES_CLASSES[kind]; }
    // Of the element of a class of a sample.
    int64_t offset(int64_t sample, int64_t c) const {
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
