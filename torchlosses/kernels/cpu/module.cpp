// Loss and gradient in one pass on the CPU, as an extension module that fits every Python from 3.11
// on, and includes and links nothing of torch: a tensor is an object with methods. Threads are
// torch's own, by the function of its stable interface whose address `set_up` is given.
//
// A call of a small loss takes as long as its way to the kernel. So that way is here too: a call like
// one before it is known by its key, and goes from the public function to the kernel in one step.

#define Py_LIMITED_API 0x030b0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include "run.h"

namespace {

// What tensors and kernels are asked for.
enum Name {
    COMPUTE, CONTIGUOUS, CURRENT_LEVEL, DATA, DATA_PTR, DEVICE, DTYPE, IS_CONTIGUOUS, IS_NEG, MUL_,
    NEW_EMPTY, REQUIRES_GRAD, SHAPE, STRIDE, TO,
};
constexpr const char *NAMES[] = {
    "compute", "contiguous", "_current_level", "data", "data_ptr", "device", "dtype",
    "is_contiguous", "is_neg", "mul_", "new_empty", "requires_grad", "shape", "stride", "to",
};
PyObject *names[sizeof NAMES / sizeof *NAMES];

// What `set_up` was given.
PyObject *dtypes, *scalars, *empty_like, *expand, *complain, *plain, *detectors, *is_grad_enabled,
    *forward_ad;
PyObject *own_compute;  // Of this module.

// Owns a reference; null after an error.
class Ref {
    PyObject *object;

public:
    Ref(PyObject *object = nullptr) : object(object) {}
    Ref(const Ref &) = delete;
    ~Ref() { Py_XDECREF(object); }
    Ref &operator=(PyObject *other) {
        Py_XDECREF(object);
        object = other;
        return *this;
    }
    operator PyObject *() const { return object; }
};

// The place of a name among those that kernels know, or -1 and an error.
template <int N> int choice(PyObject *name, const char *const (&names)[N]) {
    for (int k = 0; k < N; k++)
        if (PyUnicode_CompareWithASCIIString(name, names[k]) == 0) return k;
    PyErr_Format(PyExc_ValueError, "no kernel knows %R", name);
    return -1;
}

PyObject *get(PyObject *object, Name name) { return PyObject_GetAttr(object, names[name]); }
PyObject *call_method(PyObject *object, Name name, PyObject *argument = nullptr) {
    return PyObject_CallMethodObjArgs(object, names[name], argument, nullptr);
}
PyObject *call(PyObject *function, PyObject *a, PyObject *b = nullptr, PyObject *c = nullptr,
               PyObject *d = nullptr) {
    return PyObject_CallFunctionObjArgs(function, a, b, c, d, nullptr);
}

bool takes(Py_ssize_t expected, Py_ssize_t count) {
    if (count != expected)
        PyErr_Format(PyExc_TypeError, "got %zd arguments; expected %zd", count, expected);
    return count == expected;
}

// Null where an error is set: some tensors have no numbers, whatever a mode or a hook made of them.
void *address_of(PyObject *tensor) {
    Ref number(call_method(tensor, DATA_PTR));
    void *address = number ? PyLong_AsVoidPtr(number) : nullptr;
    if (!address && !PyErr_Occurred())
        PyErr_SetString(PyExc_RuntimeError, "a tensor has no memory");
    return address;
}

// A tensor whose elements lie in order, or none. All that answers false has set an error.
struct Ordered {
    Ref tensor;
    void *address = nullptr;

    bool own(PyObject *made) {
        tensor = made;
        if (made) address = address_of(made);
        return address;
    }
    bool cast(PyObject *of, PyObject *dtype) {
        if (of == Py_None) return true;
        Ref like(call_method(of, TO, dtype));
        return like && own(call_method(like, CONTIGUOUS));
    }
};

// An input or target as it was handed over, each part asked for once.
struct Argument {
    PyObject *tensor;
    Ref dtype, shape;
    void *address;
    bool is_contiguous;

    bool look(PyObject *of) {
        tensor = of;
        address = address_of(of);
        if (!address) return false;
        Ref contiguous(call_method(of, IS_CONTIGUOUS));
        is_contiguous = contiguous == Py_True;
        if (contiguous) dtype = get(of, DTYPE);
        if (dtype) shape = get(of, SHAPE);
        return shape;
    }
    bool order(Ordered &to) const {
        if (!is_contiguous) return to.own(call_method(tensor, CONTIGUOUS));
        to.tensor = Py_NewRef(tensor);
        to.address = address;
        return true;
    }
};

// The C library maps fresh memory for every tensor of so many bytes, and the kernel enters each
// page of it at first touch. In pages of 4 kB that takes longer than all arithmetic here, so Linux
// is asked for huge ones. It may not grant them; no value changes. PyTorch's own allocator asks for
// them too, for all tensors, under THP_MEM_ALLOC_ENABLE=1.
constexpr size_t FRESH = 1 << 25, HUGE_PAGE = 1 << 21;

void advise(void *address, size_t size) {
#ifdef MADV_HUGEPAGE
    if (size < FRESH) return;
    const size_t first = ((size_t)address + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE;
    const size_t last = ((size_t)address + size) / HUGE_PAGE * HUGE_PAGE;
    madvise((void *)first, last - first, MADV_HUGEPAGE);
#endif
}

// empty(like, bytes): memory like a contiguous tensor's, in huge pages where it is fresh.
PyObject *py_empty(PyObject *, PyObject *const *args, Py_ssize_t count) {
    Ordered tensor;
    if (!takes(2, count) || !tensor.own(call(empty_like, args[0]))) return nullptr;
    advise(tensor.address, PyLong_AsSize_t(args[1]));
    return Py_NewRef(tensor.tensor);
}

// The place of a dtype among those that kernels know, or -1.
int storage_of(PyObject *dtype) {
    for (int k = 0; k < PyTuple_Size(dtypes); k++)
        if (PyTuple_GetItem(dtypes, k) == dtype) return k;
    PyErr_SetString(PyExc_TypeError, "no kernel knows such a dtype");
    return -1;
}

// The tensor that the losses go to.
PyObject *empty_losses(const Job &job, PyObject *shape, int64_t dim) {
    PyObject *scalar = PyTuple_GetItem(scalars, job.is_double);
    if (job.reduction != NONE) return call(empty_like, scalar);
    if (job.kind == SQUARES) return call_method(scalar, NEW_EMPTY, shape);
    Ref before(PyTuple_GetSlice(shape, 0, dim));
    Ref after(PyTuple_GetSlice(shape, dim + 1, PyTuple_Size(shape)));
    Ref samples(PySequence_Concat(before, after));
    return samples ? call_method(scalar, NEW_EMPTY, samples) : nullptr;
}

// What a call makes; gradients only where they are needed.
struct Results {
    Ordered losses, grad_input, grad_target;
};

bool empty_gradient(Ordered &gradient, const Ordered &like, int64_t size) {
    if (!gradient.own(call(empty_like, like.tensor))) return false;
    advise(gradient.address, size_t(size));
    return true;
}

// The loss of a call, and the gradients by input and target that are needed, times `upstream` if it
// is not None. The gradient by a contiguous input may be written over it. A class that is none makes
// NaN of its sample, and is an error where that is wanted.
bool make(PyObject *what, const Argument &input, const Argument &target, PyObject *weight,
          PyObject *sample_weight, bool needs_input, bool needs_target, PyObject *upstream,
          bool over_input, bool complains, Results &results) {
    Job job;
    const int kind = choice(PyTuple_GetItem(what, 0), KINDS);
    const int reduction = choice(PyTuple_GetItem(what, 3), REDUCTIONS);
    if (kind < 0 || reduction < 0) return false;
    job.kind = Kind(kind);
    job.reduction = Reduction(reduction);
    job.is_index = PyObject_IsTrue(PyTuple_GetItem(what, 1)) == 1;
    const int64_t dim = PyLong_AsLongLong(PyTuple_GetItem(what, 2));
    int overflow;
    job.ignore_index = PyLong_AsLongLongAndOverflow(PyTuple_GetItem(what, 4), &overflow);
    PyObject *dtype = PyTuple_GetItem(what, 5);
    job.is_double = dtype == PyTuple_GetItem(dtypes, FLOAT64);
    job.delta = PyFloat_AsDouble(PyTuple_GetItem(what, 6));
    job.smoothing = PyFloat_AsDouble(PyTuple_GetItem(what, 7));

    int64_t outer = 1;
    job.classes = job.inner = 1;
    const int64_t rank = PyTuple_Size(input.shape);
    for (int64_t d = 0; d < rank; d++) {
        const int64_t size = PyLong_AsLongLong(PyTuple_GetItem(input.shape, d));
        (d < dim ? outer : d == dim ? job.classes : job.inner) *= size;
    }
    const int64_t batch = rank > 1 ? PyLong_AsLongLong(PyTuple_GetItem(input.shape, 0)) : 1;
    job.samples = outer * job.inner;
    job.elements = job.samples * job.classes;

    Ordered from, to, weights, sample_weights, upstreams;
    const int input_storage = storage_of(input.dtype), target_storage = storage_of(target.dtype);
    if (input_storage < 0 || target_storage < 0 || !input.order(from) || !target.order(to) ||
        !weights.cast(weight, dtype) || !upstreams.cast(upstream, dtype) ||
        !results.losses.own(empty_losses(job, input.shape, dim)))
        return false;
    job.input_storage = Storage(input_storage);
    job.target_storage = Storage(target_storage);
    job.weighs_elements = false;
    if (sample_weight != Py_None) {
        Ref expanded(call(expand, what, sample_weight, input.shape));
        if (!expanded || !sample_weights.cast(PyTuple_GetItem(expanded, 0), dtype)) return false;
        job.weighs_elements = PyTuple_GetItem(expanded, 1) == Py_True;
    }
    if (needs_input && over_input && !results.grad_input.own(Py_NewRef(from.tensor))) return false;
    if (needs_input && !over_input &&
        !empty_gradient(results.grad_input, from, job.elements * SIZES[input_storage]))
        return false;
    if (needs_target &&
        !empty_gradient(results.grad_target, to, job.elements * SIZES[target_storage]))
        return false;

    job.input = from.address;
    job.target = to.address;
    job.weight = weights.address;
    job.sample_weight = sample_weights.address;
    job.upstream = upstreams.address;
    job.has_upstreams = job.upstream && job.reduction == NONE;
    job.losses = results.losses.address;
    job.grad_input = results.grad_input.address;
    job.grad_target = results.grad_target.address;
    job.uniform = job.smoothing / double(job.classes);
    job.is_guarded = job.delta != 0;
    job.is_smooth = job.smoothing != 0;
    job.is_of_class = job.is_index && job.kind != SQUARES && job.smoothing == 0;
    job.is_elementwise = !job.is_index && job.kind != LOGITS && !job.weight &&
                         (!job.sample_weight || job.weighs_elements) &&
                         (job.kind == SQUARES || job.reduction != NONE);
    if (job.elements <= WITH_GIL) {
        compute(job, batch);
    } else {
        Py_BEGIN_ALLOW_THREADS
        compute(job, batch);
        Py_END_ALLOW_THREADS
    }
    if (job.bad == NO_MEMORY) PyErr_NoMemory();
    else if (complains && job.bad != INT64_MAX) {
        Ref bad(PyLong_FromLongLong(job.bad));
        Ref none(call(complain, what, target.tensor, bad, input.shape));
    }
    return !PyErr_Occurred();
}

// compute(call, input, target, weight, sample_weight, needs, upstream = None, over_input = False,
// complains = True): loss, grad_input, grad_target, as `make` makes them.
PyObject *py_compute(PyObject *, PyObject *const *args, Py_ssize_t count) {
    Argument input, target;
    Results results;
    if ((count < 6 && !takes(6, count)) || (count > 9 && !takes(9, count)) || !input.look(args[1]) ||
        !target.look(args[2]) ||
        !make(args[0], input, target, args[3], args[4], PyTuple_GetItem(args[5], 0) == Py_True,
              PyTuple_GetItem(args[5], 1) == Py_True, count > 6 ? args[6] : Py_None,
              count > 7 && args[7] == Py_True, count < 9 || args[8] == Py_True, results))
        return nullptr;
    const auto or_none = [](const Ordered &gradient) {
        return gradient.tensor ? (PyObject *)gradient.tensor : Py_None;
    };
    return PyTuple_Pack(3, (PyObject *)results.losses.tensor, or_none(results.grad_input),
                        or_none(results.grad_target));
}

// rescale(gradients, grad_loss, …): gradients of a reduced loss times that of the loss, in place, as
// tensors of their own; or None for none. None in all where the factor is not finite: its product
// with the 0 of an ignored sample is NaN.
PyObject *py_rescale(PyObject *, PyObject *const *args, Py_ssize_t count) {
    if (count < 2 && !takes(2, count)) return nullptr;
    const void *factor = address_of(args[1]);
    if (!factor) return nullptr;
    Ref dtype(get(args[1], DTYPE));
    if (!dtype) return nullptr;
    Ref is_neg(call_method(args[1], IS_NEG));
    if (!is_neg) return nullptr;
    const bool is_double = dtype == PyTuple_GetItem(dtypes, FLOAT64);
    const double number = is_double ? *(const double *)factor : *(const float *)factor;
    if (!std::isfinite(number)) Py_RETURN_NONE;
    const bool is_one = is_neg == Py_False && number == 1;
    const Py_ssize_t size = PySequence_Size(args[0]);
    Ref results(PyTuple_New(size));
    for (Py_ssize_t k = 0; results && k < size; k++) {
        Ref gradient(PySequence_GetItem(args[0], k));
        Ref own(gradient == Py_None ? Py_NewRef(Py_None) : get(gradient, DATA));
        if (own && own != Py_None && !is_one) own = call_method(own, MUL_, args[1]);
        if (!own) return nullptr;
        PyTuple_SetItem(results, k, Py_NewRef(own));
    }
    return results ? Py_NewRef(results) : nullptr;
}

// Whether kernels can read a tensor's numbers, at no more memory than it has.
bool is_readable(const Argument &argument) {
    Ref is_neg(call_method(argument.tensor, IS_NEG));
    if (is_neg != Py_False) return false;
    if (argument.is_contiguous) return true;
    Ref strides(call_method(argument.tensor, STRIDE));
    for (Py_ssize_t d = 0; strides && d < PyTuple_Size(strides); d++)
        if (PyLong_AsLongLong(PyTuple_GetItem(strides, d)) == 0) return false;
    return strides;
}

// Whether it is a tensor or a parameter, and of no class of somebody else.
bool is_plain(PyObject *tensor) {
    PyObject *type = (PyObject *)Py_TYPE(tensor);
    return type == PyTuple_GetItem(plain, 0) || type == PyTuple_GetItem(plain, 1);
}

// Whether options are of the types that they are declared as: a number that equals another may be of
// one that is refused.
bool has_plain_types(PyObject *form) {
    const auto option = [form](int k) { return PyTuple_GetItem(form, k); };
    const auto is_number = [](PyObject *x) { return PyFloat_CheckExact(x) || PyLong_CheckExact(x); };
    return PyUnicode_CheckExact(option(0)) && PyUnicode_CheckExact(option(1)) &&
           (option(2) == Py_None || PyLong_CheckExact(option(2))) &&
           PyLong_CheckExact(option(3)) && is_number(option(4)) && is_number(option(5)) &&
           PyBool_Check(option(6));
}

// Whether a call may go unseen: no tracer, mode, transform or detection of anomalies is on.
bool is_unseen() {
    for (Py_ssize_t k = 0; k < PyTuple_Size(detectors); k++) {
        Ref found(PyObject_CallNoArgs(PyTuple_GetItem(detectors, k)));
        if (!found || PyObject_IsTrue(found)) return false;
    }
    Ref level(get(forward_ad, CURRENT_LEVEL));  // Private; see checks.py.
    return level && PyLong_AsLong(level) < 0;
}

// The places in a key; a tensor has three.
enum Part { FORM, LEARNS, TENSORS };

// All that decides whether a call is right and how it is served: of its form and of its input,
// target, weight and sample_weight, which are looked at. Null where kernels may not serve it, or with
// an error set.
PyObject *make_key(PyObject *form, PyObject *const *tensors, Argument *arguments) {
    if (!is_unseen() || !has_plain_types(form)) return nullptr;
    Ref key(PyTuple_New(TENSORS + 4 * 3)), learns(PyObject_CallNoArgs(is_grad_enabled));
    if (!key || !learns) return nullptr;
    bool requires_any = false;
    for (int k = 0; k < 4; k++) {
        Argument &argument = arguments[k];
        PyObject *none = Py_None, *parts[] = {none, none, none};
        Ref device;
        if (tensors[k] != none) {
            if (!is_plain(tensors[k]) || !argument.look(tensors[k]) || !is_readable(argument))
                return nullptr;
            Ref requires_grad(get(tensors[k], REQUIRES_GRAD));
            if (!requires_grad || (k > 1 && requires_grad == Py_True)) return nullptr;
            requires_any |= requires_grad == Py_True;
            device = get(tensors[k], DEVICE);
            if (!device) return nullptr;
            parts[0] = argument.dtype, parts[1] = argument.shape, parts[2] = device;
        }
        for (int part = 0; part < 3; part++)
            PyTuple_SetItem(key, TENSORS + 3 * k + part, Py_NewRef(parts[part]));
    }
    PyTuple_SetItem(key, FORM, Py_NewRef(form));
    PyTuple_SetItem(key, LEARNS, Py_NewRef(requires_any ? (PyObject *)learns : Py_False));
    return Py_NewRef(key);
}

// None for a call that is not known; but what a signal or a user's code has raised goes on.
PyObject *none_known() {
    if (PyErr_Occurred() && !PyErr_ExceptionMatches(PyExc_RuntimeError)) return nullptr;
    PyErr_Clear();
    Py_RETURN_NONE;
}

// find_key(form, input, target, weight, sample_weight): the key that a call is known by, or None
// where kernels may not serve it. `form` is (kind, reduction, dim, ignore_index, delta,
// label_smoothing, from_logits) as the caller gave them.
PyObject *py_find_key(PyObject *, PyObject *const *args, Py_ssize_t count) {
    Argument arguments[4];
    if (!takes(5, count)) return nullptr;
    PyObject *key = make_key(args[0], args + 1, arguments);
    return key ? key : none_known();
}

// serve(known, kernels, apply, form, input, target, weight, sample_weight): the loss of a call for
// whose key `known` has (kernels, way), by `apply` if gradients are wanted, and by the way's own
// kernels if not. None where it has none.
PyObject *py_serve(PyObject *, PyObject *const *args, Py_ssize_t count) {
    if (!takes(8, count)) return nullptr;
    PyObject *const *tensors = args + 4;
    Argument arguments[4];
    Ref key(make_key(args[3], tensors, arguments));
    PyObject *known = key ? PyDict_GetItemWithError(args[0], key) : nullptr;
    if (!known || PyTuple_GetItem(known, 0) != args[1]) return none_known();
    Ref way(Py_NewRef(PyTuple_GetItem(known, 1)));
    if (PyTuple_GetItem(key, LEARNS) == Py_True)
        return PyObject_CallFunctionObjArgs(args[2], (PyObject *)way, tensors[0], tensors[1],
                                            tensors[2], tensors[3], nullptr);
    PyObject *what = PyTuple_GetItem(way, 1);
    Ref function(get(PyTuple_GetItem(way, 0), COMPUTE));
    if (function == own_compute) {
        Results results;
        const bool is_made = make(what, arguments[0], arguments[1], tensors[2], tensors[3], false,
                                  false, Py_None, false, true, results);
        return is_made ? Py_NewRef(results.losses.tensor) : nullptr;
    }
    Ref needs(PyTuple_Pack(2, Py_False, Py_False));
    if (!function || !needs) return nullptr;
    Ref results(PyObject_CallFunctionObjArgs(function, what, tensors[0], tensors[1], tensors[2],
                                             tensors[3], (PyObject *)needs, nullptr));
    return results ? PySequence_GetItem(results, 0) : nullptr;
}

// set_up(address of torch_parallel_for or None, dtypes in the order of Storage, 0-D tensors of
// float32 and float64, torch.empty_like, functions of `__init__.py`, types of tensors, functions that say
// whether a call is seen, torch.is_grad_enabled, and the module torch.autograd.forward_ad)
PyObject *py_set_up(PyObject *, PyObject *const *args, Py_ssize_t count) {
    PyObject **const given[] = {&dtypes, &scalars, &empty_like, &expand,
                                 &complain, &plain, &detectors, &is_grad_enabled, &forward_ad};
    if (!takes(10, count)) return nullptr;
    parallel_for = args[0] == Py_None ? nullptr
                                      : (decltype(parallel_for))PyLong_AsVoidPtr(args[0]);
    for (int k = 0; k < 9; k++) *given[k] = Py_NewRef(args[k + 1]);
    for (int k = 0; k < int(sizeof NAMES / sizeof *NAMES); k++)
        if (!(names[k] = PyUnicode_InternFromString(NAMES[k]))) return nullptr;
    if (PyErr_Occurred()) return nullptr;
    Py_RETURN_NONE;
}

// set_target(number): 0 is the baseline, and more is not taken than the processor has. Answers what
// is taken.
PyObject *py_set_target(PyObject *, PyObject *number) {
    const long wanted = PyLong_AsLong(number), best = find_target();
    if (PyErr_Occurred()) return nullptr;
    target = int(wanted < 0 ? 0 : wanted < best ? wanted : best);
    return PyLong_FromLong(target);
}

// apply(operation, is_double, from, to, number of elements): 0 is exp, 1 is log.
PyObject *py_apply(PyObject *, PyObject *const *args, Py_ssize_t count) {
    if (!takes(5, count)) return nullptr;
    const long operation = PyLong_AsLong(args[0]), is_double = PyLong_AsLong(args[1]);
    const void *from = PyLong_AsVoidPtr(args[2]);
    void *to = PyLong_AsVoidPtr(args[3]);
    const int64_t n = PyLong_AsLongLong(args[4]);
    if (PyErr_Occurred()) return nullptr;
    TARGETS[target].apply(operation != 0, is_double != 0, from, to, n);
    Py_RETURN_NONE;
}

PyMethodDef methods[] = {
    {"compute", (PyCFunction)(void *)py_compute, METH_FASTCALL, nullptr},
    {"empty", (PyCFunction)(void *)py_empty, METH_FASTCALL, nullptr},
    {"find_key", (PyCFunction)(void *)py_find_key, METH_FASTCALL, nullptr},
    {"rescale", (PyCFunction)(void *)py_rescale, METH_FASTCALL, nullptr},
    {"serve", (PyCFunction)(void *)py_serve, METH_FASTCALL, nullptr},
    {"set_up", (PyCFunction)(void *)py_set_up, METH_FASTCALL, nullptr},
    {"set_target", py_set_target, METH_O, nullptr},
    {"apply", (PyCFunction)(void *)py_apply, METH_FASTCALL, nullptr},
    {nullptr, nullptr, 0, nullptr},
};
PyModuleDef module = {PyModuleDef_HEAD_INIT, "_cpu", nullptr, -1, methods,
                      nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__cpu() {
    PyObject *created = PyModule_Create(&module);
    if (created) own_compute = PyObject_GetAttrString(created, "compute");
    return created;
}
