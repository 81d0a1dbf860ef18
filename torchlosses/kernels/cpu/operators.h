// The native operators of ops.py, by torch's stable C interface: an operator takes its arguments
// from a stack of 64-bit values, owns them, and leaves its results there.

#pragma once

#include <locale.h>
#ifdef __APPLE__
#include <xlocale.h>
#endif
#ifdef __linux__
#include <sys/mman.h>
#endif

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

// Null, or what went wrong. Nothing throws while an Owned is alive, as no destructor would run.
using Error = const char *;
#define TRY(error) \
    if (const Error caught = error) return caught
#define TORCH(function, ...) \
    if (function(__VA_ARGS__)) return #function " failed"
constexpr Error NO_MORE_MEMORY = "DefaultCPUAllocator: can't allocate memory";  // torch's words.

// A reference to a tensor, or null.
struct Owned {
    Tensor tensor;

    explicit Owned(Tensor tensor = nullptr) : tensor(tensor) {}
    explicit Owned(Value value) : tensor(Tensor(value)) {}
    Owned(const Owned &) = delete;
    ~Owned() {
        if (tensor) aoti_torch_delete_tensor_object(tensor);
    }
    Tensor give() {
        const Tensor given = tensor;
        tensor = nullptr;
        return given;
    }
    void *data() const {
        void *data = nullptr;
        aoti_torch_get_data_ptr(tensor, &data);
        return data;
    }
    Error make_contiguous() {
        bool is_contiguous;
        TORCH(aoti_torch_is_contiguous, tensor, &is_contiguous);
        if (is_contiguous) return nullptr;
        Value stack[] = {Value(give()), CONTIGUOUS};
        if (torch_call_dispatcher("aten::contiguous", "", stack, VERSION)) return NO_MORE_MEMORY;
        tensor = Tensor(stack[0]);
        return nullptr;
    }
    Error find_storage(Storage *storage) const {
        int32_t dtype;
        TORCH(aoti_torch_get_dtype, tensor, &dtype);
        for (int s = 0; s <= BOOL; s++)
            if (DTYPES[s] == dtype) {
                *storage = Storage(s);
                return nullptr;
            }
        return "got a dtype that no kernel reads";
    }
};

constexpr int64_t MAX_DIMS = 64;  // As in torch's own kernels.

struct Shape {
    int64_t dims = 0, sizes[MAX_DIMS];

    Error read(Tensor tensor) {
        int64_t *from;
        TORCH(aoti_torch_get_dim, tensor, &dims);
        if (dims > MAX_DIMS) return "got a tensor of more than 64 dimensions";
        TORCH(aoti_torch_get_sizes, tensor, &from);
        std::memcpy(sizes, from, size_t(dims) * sizeof(int64_t));
        return nullptr;
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

Error allocate(const Shape &shape, Storage storage, Owned &to) {
    int64_t strides[MAX_DIMS], stride = 1;
    for (int64_t d = shape.dims - 1; d >= 0; d--) {
        strides[d] = stride;
        stride *= shape.sizes[d] > 1 ? shape.sizes[d] : 1;
    }
    if (aoti_torch_empty_strided(shape.dims, shape.sizes, strides, DTYPES[storage], CPU, 0,
                                 &to.tensor))
        return NO_MORE_MEMORY;
    const size_t bytes = size_t(shape.count() * SIZES[storage]);
    if (bytes >= FRESH) advise(to.data(), bytes);
    return nullptr;
}

// Reads a word from a text of words, and moves on to the next one; -1 for an unknown word.
template <size_t COUNT> int read_word(const char *&text, const char *const (&words)[COUNT]) {
    for (size_t k = 0; k < COUNT; k++) {
        const size_t length = std::strlen(words[k]);
        if (std::strncmp(text, words[k], length) || text[length] != ' ') continue;
        text += length + 1;
        return int(k);
    }
    return -1;
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

// A handle is a tensor of one byte, that of a Holder. No other tensor gets its address, so a copy
// of a handle holds nothing. Without a free Holder, a handle holds nothing either. There is no lock
// that another thread might hold at a fork.
struct Holder {
    std::atomic<bool> is_used;
    std::atomic<Tensor> gradient;
    uint8_t byte;
};
constexpr size_t MAX_HOLDERS = 4096;
Holder holders[MAX_HOLDERS];
std::atomic<size_t> next_holder;

void free_holder(void *, void *context) {
    const auto holder = (Holder *)context;
    const Owned freed(holder->gradient.exchange(nullptr));
    holder->is_used = false;
}

void free_nothing(void *, void *) {}

Error hold(Owned &gradient, Owned &handle) {
    static uint8_t nothing;
    uint8_t *byte = &nothing;
    Holder *holder = nullptr;
    for (size_t k = 0; k < MAX_HOLDERS && !holder; k++) {
        Holder &each = holders[next_holder++ % MAX_HOLDERS];
        if (!each.is_used.exchange(true)) holder = &each;
    }
    if (holder) {
        byte = &holder->byte;
        holder->gradient = gradient.give();
    }
    const int64_t one = 1;  // The device index is -1: torch refuses 0 here.
    if (!torch_from_blob(byte, 1, &one, &one, 0, DTYPES[UINT8], CPU, -1, &handle.tensor, STRIDED,
                         nullptr, 0, holder ? free_holder : free_nothing, holder))
        return nullptr;
    if (holder) free_holder(nullptr, holder);
    return NO_MORE_MEMORY;
}

// What the handle holds, or null.
Tensor take(const Owned &handle) {
    const size_t offset = size_t(handle.data()) - size_t(&holders[0].byte);
    const size_t position = offset / sizeof(Holder);
    const bool is_held = position < MAX_HOLDERS && offset % sizeof(Holder) == 0;
    return is_held ? holders[position].gradient.exchange(nullptr) : nullptr;
}

// ---- The operators

// The arguments of all operators.
struct Arguments {
    enum { INPUT, TARGET, CALL, UPSTREAM, HANDLE };
    Owned input, target;
    Shape shape;  // Of the input.
    int64_t dim;
    Call call;

    explicit Arguments(const Value *stack) : input(stack[INPUT]), target(stack[TARGET]) {}

    Error read(const Value *stack) {
        const Error error = read_call(String(stack[CALL]));
        torch_delete_string(String(stack[CALL]));
        TRY(error);
        TRY(input.make_contiguous());
        TRY(target.make_contiguous());
        TRY(shape.read(input.tensor));
        TRY(input.find_storage(&call.input_storage));
        TRY(target.find_storage(&call.target_storage));
        call.outer = shape.count(0, dim);
        call.classes = shape.dims ? shape.sizes[dim] : 1;
        call.inner = shape.count(dim + 1, shape.dims);
        call.batch = shape.dims > 1 ? shape.sizes[0] : 1;
        call.weighs_elements = false;
        return nullptr;
    }

    Error read_call(String string) {  // See `pack` in ops.py.
        const char *text;
        TORCH(torch_string_c_str, string, &text);
        const int kind = read_word(text, KINDS), is_index = read_word(text, {"dense", "index"});
        dim = read_integer(text);
        const int reduction = read_word(text, REDUCTIONS);
        call.ignore_index = read_integer(text);
        const int is_double = read_word(text, {"float32", "float64"});
        if (kind < 0 || is_index < 0 || reduction < 0 || is_double < 0)
            return "got a call that no kernel knows";
        call.kind = Kind(kind);
        call.is_index = is_index;
        call.reduction = Reduction(reduction);
        call.is_double = is_double;
        call.delta = read_float(text);
        call.smoothing = read_float(text);
        return nullptr;
    }

    Storage loss_storage() const { return call.is_double ? FLOAT64 : FLOAT32; }

    // Computes the loss, and the input's gradient if there is a tensor for it.
    Error run(Owned &loss, const Owned &gradient, const void *upstream) const {
        Shape losses;
        if (call.reduction == NONE) losses = PER_ELEMENT[call.kind] ? shape : shape.without(dim);
        TRY(allocate(losses, loss_storage(), loss));
        Job job(call);
        job.input = input.data();
        job.target = target.data();
        job.weight = job.sample_weight = nullptr;
        job.upstream = upstream;
        job.losses = loss.data();
        job.grad_input = gradient.tensor ? gradient.data() : nullptr;
        job.grad_target = nullptr;
        if (shape.count()) compute(job);
        else std::memset(job.losses, 0, size_t(losses.count() * SIZES[loss_storage()]));
        return job.bad == NO_MEMORY ? NO_MORE_MEMORY : nullptr;
    }
};

Error loss(Value *stack) {
    Arguments arguments(stack);
    TRY(arguments.read(stack));
    Owned loss;
    TRY(arguments.run(loss, Owned(), nullptr));
    stack[0] = Value(loss.give());
    return nullptr;
}

Error loss_and_gradient(Value *stack) {
    Arguments arguments(stack);
    TRY(arguments.read(stack));
    Owned loss, gradient, handle;
    TRY(allocate(arguments.shape, arguments.call.input_storage, gradient));
    TRY(arguments.run(loss, gradient, nullptr));
    TRY(hold(gradient, handle));
    stack[0] = Value(loss.give());
    stack[1] = Value(handle.give());
    return nullptr;
}

Error scale(const Owned &gradient, const Owned &factor) {
    Value stack[2];
    TORCH(aoti_torch_new_tensor_handle, gradient.tensor, (Tensor *)&stack[0]);
    TORCH(aoti_torch_new_tensor_handle, factor.tensor, (Tensor *)&stack[1]);
    TORCH(torch_call_dispatcher, "aten::mul_", "Tensor", stack, VERSION);
    const Owned scaled(stack[0]);
    return nullptr;
}

Error loss_gradient(Value *stack) {
    Arguments arguments(stack);
    Owned upstream(stack[Arguments::UPSTREAM]), handle(stack[Arguments::HANDLE]);
    TRY(arguments.read(stack));
    TRY(upstream.make_contiguous());
    Storage storage;
    TRY(upstream.find_storage(&storage));
    if (storage != arguments.loss_storage()) return "got an upstream gradient of another dtype";
    const Call &call = arguments.call;
    const void *data = upstream.data();
    // Like `is_deferred` in ops.py.
    bool is_scaled = call.reduction != NONE && call.input_storage != FLOAT16 &&
                     call.target_storage != FLOAT16;
    double factor = 1;
    if (is_scaled) factor = call.is_double ? *(double *)data : *(float *)data;
    is_scaled &= std::isfinite(factor);  // The product of ∞ and the 0 of an ignored sample is NaN.
    Owned loss, gradient(is_scaled ? take(handle) : nullptr);
    if (!gradient.tensor) {
        TRY(allocate(arguments.shape, call.input_storage, gradient));
        TRY(arguments.run(loss, gradient, is_scaled ? nullptr : data));
    }
    if (is_scaled && factor != 1) TRY(scale(gradient, upstream));
    stack[0] = Value(gradient.give());
    return nullptr;
}

// Throws a RuntimeError.
template <Error (*OPERATOR)(Value *)> void call(Value *stack, uint64_t, uint64_t) {
    if (const Error error = OPERATOR(stack))
        aoti_torch_check(false, "torchlosses", __FILE__, __LINE__, error);
}

// False if torch refuses them.
bool register_operators() {
    c_locale = newlocale(LC_ALL_MASK, "C", nullptr);
    void *library;
    return !(aoti_torch_library_init_impl("torchlosses", "CPU", __FILE__, __LINE__, &library) ||
             torch_library_impl(library, "native_loss", call<loss>, VERSION) ||
             torch_library_impl(library, "native_loss_and_gradient", call<loss_and_gradient>,
                                VERSION) ||
             torch_library_impl(library, "native_loss_gradient", call<loss_gradient>, VERSION));
}

}  // namespace
