// The extension module: numbers and addresses come in, and none of Python's objects. It fits every
// Python from 3.11 on, and includes and links nothing of torch: `connect` is given the addresses of
// functions of its stable interface.

#define Py_LIMITED_API 0x030b0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <iterator>

#include "operators.h"

namespace {

void *address(PyObject *number) { return PyLong_AsVoidPtr(number); }

bool has_arity(Py_ssize_t expected, Py_ssize_t count) {
    if (count != expected)
        PyErr_Format(PyExc_TypeError, "got %zd arguments; expected %zd", count, expected);
    return count == expected;
}

constexpr const char *CAPSULE = "torchlosses.Call";

void free_call(PyObject *capsule) { std::free(PyCapsule_GetPointer(capsule, CAPSULE)); }

// prepare(kind, reduction, is_index, is_double, weighs_elements, input_storage, target_storage, outer,
// classes, inner, batch, ignore_index, delta, smoothing): what `run` takes for such a call.
PyObject *py_prepare(PyObject *, PyObject *args) {
    int kind, reduction, is_index, is_double, weighs_elements, input, target;
    long long outer, classes, inner, batch, ignore_index;
    double delta, smoothing;
    if (!PyArg_ParseTuple(args, "iipppiiLLLLLdd", &kind, &reduction, &is_index, &is_double,
                          &weighs_elements, &input, &target, &outer, &classes, &inner, &batch,
                          &ignore_index, &delta, &smoothing))
        return nullptr;
    const auto call = (Call *)std::malloc(sizeof(Call));
    if (!call) return PyErr_NoMemory();
    *call = {Kind(kind), Reduction(reduction), bool(is_index), bool(is_double),
             bool(weighs_elements), Storage(input), Storage(target), outer, classes, inner, batch,
             ignore_index, delta, smoothing};
    return PyCapsule_New(call, CAPSULE, free_call);
}

// run(call, input, target, weight, sample_weight, upstream, losses, grad_input, grad_target): fills
// the last three, by the addresses of tensors that lie in order, or 0 for none; weights and upstream
// have the dtype of the losses. Returns the first sample whose class is none, or -1.
PyObject *py_run(PyObject *, PyObject *const *args, Py_ssize_t count) {
    if (!has_arity(9, count)) return nullptr;
    const auto call = (const Call *)PyCapsule_GetPointer(args[0], CAPSULE);
    if (!call) return nullptr;
    Job job(*call);
    job.input = address(args[1]);
    job.target = address(args[2]);
    job.weight = address(args[3]);
    job.sample_weight = address(args[4]);
    job.upstream = address(args[5]);
    job.losses = address(args[6]);
    job.grad_input = address(args[7]);
    job.grad_target = address(args[8]);
    if (PyErr_Occurred()) return nullptr;
    if (job.outer * job.inner * job.classes <= WITH_GIL) {
        compute(job);
    } else {
        Py_BEGIN_ALLOW_THREADS
        compute(job);
        Py_END_ALLOW_THREADS
    }
    if (job.bad == NO_MEMORY) return PyErr_NoMemory();
    return PyLong_FromLongLong(job.bad == INT64_MAX ? -1 : job.bad.load());
}

// advise(address, bytes): asks for huge pages.
PyObject *py_advise(PyObject *, PyObject *const *args, Py_ssize_t count) {
    if (!has_arity(2, count)) return nullptr;
    void *begin = address(args[0]);
    const size_t bytes = PyLong_AsSize_t(args[1]);
    if (PyErr_Occurred()) return nullptr;
    advise(begin, bytes);
    Py_RETURN_NONE;
}

// connect(addresses of TORCH_FUNCTIONS and of aoti_torch_check): registers the operators, and runs
// the kernels in torch's threads. Returns whether torch takes the operators.
PyObject *py_connect(PyObject *, PyObject *const *args, Py_ssize_t count) {
    if (!has_arity(std::size(TORCH_NAMES), count)) return nullptr;
    static bool is_connected = false;
    if (is_connected) return PyBool_FromLong(true);
#define SET(name, ...) name = (decltype(name))address(*args++);
    TORCH_FUNCTIONS(SET)
#undef SET
    aoti_torch_check = (decltype(aoti_torch_check))address(*args);
    if (PyErr_Occurred()) return nullptr;
    parallel_for = torch_parallel_for;
    is_connected = register_operators();
    return PyBool_FromLong(is_connected);
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
    if (!has_arity(5, count)) return nullptr;
    const long operation = PyLong_AsLong(args[0]), is_double = PyLong_AsLong(args[1]);
    const int64_t n = PyLong_AsLongLong(args[4]);
    const void *from = address(args[2]);
    void *to = address(args[3]);
    if (PyErr_Occurred()) return nullptr;
    TARGETS[target].apply(operation != 0, is_double != 0, from, to, n);
    Py_RETURN_NONE;
}

PyMethodDef methods[] = {
    {"prepare", py_prepare, METH_VARARGS, nullptr},
    {"run", (PyCFunction)(void *)py_run, METH_FASTCALL, nullptr},
    {"advise", (PyCFunction)(void *)py_advise, METH_FASTCALL, nullptr},
    {"connect", (PyCFunction)(void *)py_connect, METH_FASTCALL, nullptr},
    {"set_target", py_set_target, METH_O, nullptr},
    {"apply", (PyCFunction)(void *)py_apply, METH_FASTCALL, nullptr},
    {nullptr, nullptr, 0, nullptr},
};
PyModuleDef module = {PyModuleDef_HEAD_INIT, "_cpu", nullptr, -1, methods,
                      nullptr, nullptr, nullptr, nullptr};

template <size_t COUNT>
int add(PyObject *created, const char *name, const char *const (&strings)[COUNT]) {
    PyObject *tuple = PyTuple_New(COUNT);
    if (!tuple) return -1;
    for (size_t k = 0; k < COUNT; k++)
        PyTuple_SetItem(tuple, Py_ssize_t(k), PyUnicode_FromString(strings[k]));
    const int error = PyModule_AddObjectRef(created, name, tuple);
    Py_DECREF(tuple);
    return error;
}

}  // namespace

PyMODINIT_FUNC PyInit__cpu() {
    PyObject *created = PyModule_Create(&module);
    if (!created || add(created, "LOSSES", KINDS) || add(created, "REDUCTIONS", REDUCTIONS) ||
        add(created, "TORCH_NAMES", TORCH_NAMES) ||
        PyModule_AddIntConstant(created, "FRESH", long(FRESH)))
        return nullptr;
    return created;
}
