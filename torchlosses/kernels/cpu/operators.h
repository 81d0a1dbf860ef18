// The native operators of ops.py, by torch's stable C interface: an operator takes its arguments from
// a stack of 64-bit values, owns them, and leaves its results there.

#pragma once

#include <locale.h>
#include <sched.h>
#ifdef __APPLE__
#include <xlocale.h>
#endif
#ifdef __linux__
#include <sys/mman.h>
#endif

#include <utility>

#include "run.h"

namespace {

// The C library maps fresh memory for every tensor of so many bytes, and the kernel enters each
// page of it at first touch. In pages of 4 kB that takes longer than all arithmetic here, so Linux
// is asked for huge ones. It may not grant them; no value changes. PyTorch's own allocator asks for
// them too, for all tensors, under THP_MEM_ALLOC_ENABLE=1.
constexpr size_t FRESH = 1 << 25, HUGE_PAGE = 1 << 21;

void advise(void *address, size_t bytes) {
#ifdef MADV_HUGEPAGE
    const size_t begin = (size_t)address, end = begin + bytes;
    const size_t first = (begin + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE;
    const size_t last = end / HUGE_PAGE * HUGE_PAGE;
    if (first < last) madvise((void *)first, last - first, MADV_HUGEPAGE);
#endif
}

// ---- torch

using Value = uint64_t;
using Tensor = struct TensorOpaque *;
using String = struct StringOpaque *;
using Kernel = void (*)(Value *stack, uint64_t inputs, uint64_t outputs);

// Functions of torch, whose addresses `connect` is given. They return 0, or an error.
#define TORCH_FUNCTIONS(X)                                                                       \
    X(aoti_torch_delete_tensor_object, Tensor)                                                   \
    X(aoti_torch_new_tensor_handle, Tensor, Tensor *)                                            \
    X(aoti_torch_get_data_ptr, Tensor, void **)                                                  \
    X(aoti_torch_get_dim, Tensor, int64_t *)                                                     \
    X(aoti_torch_get_sizes, Tensor, int64_t **)                                                  \
    X(aoti_torch_get_dtype, Tensor, int32_t *)                                                   \
    X(aoti_torch_is_contiguous, Tensor, bool *)                                                  \
    X(aoti_torch_empty_strided, int64_t dims, const int64_t *sizes, const int64_t *strides,      \
      int32_t dtype, int32_t device_type, int32_t device_index, Tensor *)                        \
    X(aoti_torch_library_init_impl, const char *name, const char *dispatch_key,                  \
      const char *file, uint32_t line, void **library)                                           \
    X(torch_library_impl, void *library, const char *name, Kernel, uint64_t version)             \
    X(torch_call_dispatcher, const char *name, const char *overload, Value *stack,               \
      uint64_t version)                                                                          \
    X(torch_from_blob, void *data, int64_t dims, const int64_t *sizes, const int64_t *strides,   \
      int64_t storage_offset, int32_t dtype, int32_t device_type, int32_t device_index, Tensor *, \
      int32_t layout, const uint8_t *metadata, int64_t metadata_size,                            \
      void (*deleter)(void *data, void *context), void *context)                                 \
    X(torch_string_c_str, String, const char **)                                                 \
    X(torch_delete_string, String)                                                               \
    X(torch_parallel_for, int64_t begin, int64_t end, int64_t grain, Body, void *context)
#define DECLARE(name, ...) int32_t (*name)(__VA_ARGS__);
TORCH_FUNCTIONS(DECLARE)
#undef DECLARE
// Throws a RuntimeError if the condition does not hold.
void (*aoti_torch_check)(bool, const char *function, const char *file, uint32_t line,
                         const char *message);
#define NAME(name, ...) #name,
constexpr const char *TORCH_NAMES[] = {TORCH_FUNCTIONS(NAME) "aoti_torch_check"};
#undef NAME

constexpr uint64_t VERSION = uint64_t(2) << 56 | uint64_t(11) << 48;  // Of the interface: 2.11.
constexpr int32_t CPU = 0, STRIDED = 0, CONTIGUOUS = 0;
constexpr int32_t DTYPES[] = {6, 7, 15, 5, 0, 1, 2, 3, 4, 27, 28, 29, 11};  // By Storage.

void check(bool is_right, const char *message) {
    if (!is_right) aoti_torch_check(false, "torchlosses", __FILE__, __LINE__, message);
}
#define TORCH(function, ...) check(function(__VA_ARGS__) == 0, #function " failed")

void *data_of(Tensor tensor) {
    void *data;
    TORCH(aoti_torch_get_data_ptr, tensor, &data);
    return data;
}

void release(Tensor tensor) {
    if (tensor) aoti_torch_delete_tensor_object(tensor);
}

Tensor copy_reference(Tensor tensor) {
    Tensor copy;
    TORCH(aoti_torch_new_tensor_handle, tensor, &copy);
    return copy;
}

// Releases the tensor, unless it is contiguous.
Tensor contiguous(Tensor tensor) {
    bool is_contiguous;
    TORCH(aoti_torch_is_contiguous, tensor, &is_contiguous);
    if (is_contiguous) return tensor;
    Value stack[] = {Value(tensor), CONTIGUOUS};
    TORCH(torch_call_dispatcher, "aten::contiguous", "", stack, VERSION);
    return Tensor(stack[0]);
}

constexpr int64_t MAX_DIMS = 64;  // As in torch's own kernels.

struct Shape {
    int64_t dims, sizes[MAX_DIMS];

    Shape() : dims(0) {}
    explicit Shape(Tensor tensor) {
        int64_t *from;
        TORCH(aoti_torch_get_dim, tensor, &dims);
        check(dims <= MAX_DIMS, "a tensor of more than 64 dimensions");
        TORCH(aoti_torch_get_sizes, tensor, &from);
        std::memcpy(sizes, from, size_t(dims) * sizeof(int64_t));
    }
    int64_t count(int64_t begin, int64_t end) const {
        int64_t product = 1;
        for (int64_t d = begin; d < end; d++) product *= sizes[d];
        return product;
    }
    int64_t count() const { return count(0, dims); }
    Shape without(int64_t dim) const {
        Shape shape;
        for (int64_t d = 0; d < dims; d++)
            if (d != dim) shape.sizes[shape.dims++] = sizes[d];
        return shape;
    }
};

Tensor empty(const Shape &shape, Storage storage) {
    int64_t strides[MAX_DIMS], stride = 1;
    for (int64_t d = shape.dims - 1; d >= 0; d--) {
        strides[d] = stride;
        stride *= shape.sizes[d] > 1 ? shape.sizes[d] : 1;
    }
    Tensor tensor;
    TORCH(aoti_torch_empty_strided, shape.dims, shape.sizes, strides, DTYPES[storage], CPU, 0,
          &tensor);
    const size_t bytes = size_t(shape.count() * SIZES[storage]);
    if (bytes >= FRESH) advise(data_of(tensor), bytes);
    return tensor;
}

Storage storage_of(Tensor tensor) {
    int32_t dtype;
    TORCH(aoti_torch_get_dtype, tensor, &dtype);
    int storage = 0;
    while (storage <= BOOL && DTYPES[storage] != dtype) storage++;
    check(storage <= BOOL, "a dtype that no kernel reads");
    return Storage(storage);
}

// Reads a word from a text of words, and moves on to the next one.
template <size_t COUNT> int read(const char *&text, const char *const (&words)[COUNT]) {
    for (size_t k = 0; k < COUNT; k++) {
        const size_t length = std::strlen(words[k]);
        if (std::strncmp(text, words[k], length) || text[length] != ' ') continue;
        text += length + 1;
        return int(k);
    }
    check(false, "a call that no kernel knows");
    return 0;
}

int64_t read_integer(const char *&text) {
    char *end;
    const int64_t number = std::strtoll(text, &end, 10);
    text = end + 1;
    return number;
}

locale_t c_locale;  // Where a point separates decimals.

double read_float(const char *&text) {
    char *end;
    const double number = strtod_l(text, &end, c_locale);
    text = end + 1;
    return number;
}

// ---- Handles; see `hold` in ops.py

// A handle is a tensor of one byte in a Holder. Those alive are in a list, in which a handle is found
// by the byte's address, so a copy of a handle holds nothing.
struct Holder {
    Tensor gradient;
    Holder *next, *previous;
    uint8_t byte;
};
Holder holders = {nullptr, &holders, &holders, 0};

struct Lock {
    static inline std::atomic_flag flag = ATOMIC_FLAG_INIT;
    Lock() {
        while (flag.test_and_set(std::memory_order_acquire)) sched_yield();
    }
    ~Lock() { flag.clear(std::memory_order_release); }
};

void free_holder(void *, void *context) {
    const auto holder = (Holder *)context;
    {
        const Lock lock;
        holder->next->previous = holder->previous;
        holder->previous->next = holder->next;
    }
    release(holder->gradient);
    std::free(holder);
}

Tensor hold(Tensor gradient) {
    const auto holder = (Holder *)std::malloc(sizeof(Holder));
    check(holder, "out of memory");
    {
        const Lock lock;
        *holder = {gradient, holders.next, &holders, 0};
        holders.next = holder->next->previous = holder;
    }
    const int64_t one = 1;
    Tensor handle;
    TORCH(torch_from_blob, &holder->byte, 1, &one, &one, 0, DTYPES[UINT8], CPU, -1, &handle,
          STRIDED, nullptr, 0, free_holder, holder);
    return handle;
}

// What the handle holds, or null.
Tensor take(Tensor handle) {
    const void *byte = data_of(handle);
    Tensor gradient = nullptr;
    const Lock lock;
    for (Holder *holder = holders.next; holder != &holders; holder = holder->next)
        if (&holder->byte == byte) std::swap(gradient, holder->gradient);
    return gradient;
}

// ---- The operators

// The arguments of all operators.
struct Arguments {
    enum { INPUT, TARGET, CALL, UPSTREAM, HANDLE };
    Tensor input, target;
    Shape shape;  // Of the input.
    int64_t dim;
    Call call;

    explicit Arguments(const Value *stack)
        : input(contiguous(Tensor(stack[INPUT]))), target(contiguous(Tensor(stack[TARGET]))),
          shape(input) {
        const char *text;  // See `pack` in ops.py.
        TORCH(torch_string_c_str, String(stack[CALL]), &text);
        call.kind = Kind(read(text, KINDS));
        call.is_index = read(text, {"dense", "index"});
        dim = read_integer(text);
        call.reduction = Reduction(read(text, REDUCTIONS));
        call.ignore_index = read_integer(text);
        call.is_double = read(text, {"float32", "float64"});
        call.delta = read_float(text);
        call.smoothing = read_float(text);
        torch_delete_string(String(stack[CALL]));
        call.weighs_elements = false;
        call.input_storage = storage_of(input);
        call.target_storage = storage_of(target);
        call.outer = shape.count(0, dim);
        call.classes = shape.dims ? shape.sizes[dim] : 1;
        call.inner = shape.count(dim + 1, shape.dims);
        call.batch = shape.dims > 1 ? shape.sizes[0] : 1;
    }
    ~Arguments() {
        release(input);
        release(target);
    }

    Tensor empty_gradient() const { return empty(shape, call.input_storage); }

    // The loss, and the input's gradient unless it is null.
    Tensor run(Tensor gradient, const void *upstream) const {
        Shape losses;
        if (call.reduction == NONE) losses = PER_ELEMENT[call.kind] ? shape : shape.without(dim);
        const Storage storage = call.is_double ? FLOAT64 : FLOAT32;
        const Tensor loss = empty(losses, storage);
        Job job(call);
        job.input = data_of(input);
        job.target = data_of(target);
        job.weight = job.sample_weight = nullptr;
        job.upstream = upstream;
        job.losses = data_of(loss);
        job.grad_input = gradient ? data_of(gradient) : nullptr;
        job.grad_target = nullptr;
        if (shape.count()) compute(job);
        else std::memset(job.losses, 0, size_t(losses.count() * SIZES[storage]));
        check(job.bad != NO_MEMORY, "out of memory");
        return loss;
    }
};

void loss(Value *stack, uint64_t, uint64_t) {
    const Arguments arguments(stack);
    stack[0] = Value(arguments.run(nullptr, nullptr));
}

void loss_and_gradient(Value *stack, uint64_t, uint64_t) {
    const Arguments arguments(stack);
    const Tensor gradient = arguments.empty_gradient();
    stack[0] = Value(arguments.run(gradient, nullptr));
    stack[1] = Value(hold(gradient));
}

void scale(Tensor gradient, Tensor factor) {
    Value stack[] = {Value(copy_reference(gradient)), Value(copy_reference(factor))};
    TORCH(torch_call_dispatcher, "aten::mul_", "Tensor", stack, VERSION);
    release(Tensor(stack[0]));
}

void loss_gradient(Value *stack, uint64_t, uint64_t) {
    const Arguments arguments(stack);
    const Tensor upstream = contiguous(Tensor(stack[Arguments::UPSTREAM]));
    const auto handle = Tensor(stack[Arguments::HANDLE]);
    Tensor gradient = take(handle);
    release(handle);
    const void *data = data_of(upstream);
    if (gradient) {
        const double factor = arguments.call.is_double ? *(double *)data : *(float *)data;
        if (!std::isfinite(factor)) {  // Its product with the 0 of an ignored sample is NaN.
            release(gradient);
            gradient = nullptr;
        } else if (factor != 1) {
            scale(gradient, upstream);
        }
    }
    if (!gradient) {
        gradient = arguments.empty_gradient();
        release(arguments.run(gradient, data));
    }
    release(upstream);
    stack[0] = Value(gradient);
}

void register_operators() {
    c_locale = newlocale(LC_ALL_MASK, "C", nullptr);
    void *library;
    TORCH(aoti_torch_library_init_impl, "torchlosses", "CPU", __FILE__, __LINE__, &library);
    TORCH(torch_library_impl, library, "native_loss", loss, VERSION);
    TORCH(torch_library_impl, library, "native_loss_and_gradient", loss_and_gradient, VERSION);
    TORCH(torch_library_impl, library, "native_loss_gradient", loss_gradient, VERSION);
}

}  // namespace
