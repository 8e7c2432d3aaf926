#include "direct.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <vector>

namespace py = pybind11;

namespace constrained_ops {
namespace {

// Larger tensors are worth several threads, and their kernels take long beside the dispatcher.
constexpr int64_t largest = 16384;

// Most programs have their memory above this address; of tensors below it one more question is asked.
constexpr uint64_t low_address = uint64_t(1) << 46;

// What constrained_ops/_direct.py has found in PyTorch; lives as long as the process.
struct Python {
  const dlpack::Exchange* exchange;
  std::vector<py::object> types, observers;
  py::object is_cpu, is_neg, is_zero, empty_like, empty_strided, copy_;
  std::map<ScalarType, py::object> dtypes;
  py::object cpu = py::str("cpu"), keywords = py::make_tuple("dtype", "device");
};
const Python* python = nullptr;

// Takes a new reference, null where a Python exception is set.
py::object checked(PyObject* object) {
  if (!object) throw PythonError();
  return py::reinterpret_steal<py::object>(object);
}

bool is_true(const py::object& answer) {
  const int yes = PyObject_IsTrue(answer.ptr());
  if (yes < 0) throw PythonError();
  return yes;
}

bool says_yes(const py::object& question, PyObject* tensor) {
  return is_true(checked(PyObject_CallOneArg(question.ptr(), tensor)));
}

bool is_observed() {
  return std::any_of(python->observers.begin(), python->observers.end(),
                     [](const py::object& watches) { return is_true(checked(PyObject_CallNoArgs(watches.ptr()))); });
}

ScalarType scalar_type_of(const dlpack::DataType& dtype) {
  if (dtype.code == dlpack::bfloat && dtype.bits == 16) return ScalarType::BFloat16;
  if (dtype.code == dlpack::floating) {
    if (dtype.bits == 16) return ScalarType::Half;
    if (dtype.bits == 32) return ScalarType::Float;
    if (dtype.bits == 64) return ScalarType::Double;
  }
  return ScalarType::Undefined;
}

py::object tuple_of(size_t count, const int64_t* values) {
  py::object tuple = checked(PyTuple_New(static_cast<Py_ssize_t>(count)));
  for (size_t i = 0; i < count; ++i)
    PyTuple_SET_ITEM(tuple.ptr(), static_cast<Py_ssize_t>(i), checked(PyLong_FromLongLong(values[i])).release().ptr());
  return tuple;
}

struct Callable {
  PyMethodDef method;
  DirectCall call;
  py::object dispatched;
};

bool is_plain(PyObject* argument) {
  auto* const type = reinterpret_cast<PyObject*>(Py_TYPE(argument));
  return std::any_of(python->types.begin(), python->types.end(),
                     [=](const py::object& each) { return each.ptr() == type; });
}

// By the first tensor, lest DLPack be asked for what it has not: it takes its time to refuse.
bool is_for_cpu(PyObject* const* arguments, Py_ssize_t count) {
  const auto* const first = std::find_if(arguments, arguments + count, is_plain);
  return first != arguments + count && says_yes(python->is_cpu, *first);
}

PyObject* call(PyObject* self, PyObject* const* arguments, Py_ssize_t count) {
  const auto& callable = *static_cast<const Callable*>(PyCapsule_GetPointer(self, nullptr));
  try {
    PyObject* result = nullptr;
    if (!is_observed() && is_for_cpu(arguments, count) && callable.call(arguments, count, result)) return result;
  } catch (const PythonError&) {
    return nullptr;
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
    return nullptr;
  }
  return PyObject_Vectorcall(callable.dispatched.ptr(), arguments, count, nullptr);
}

// bounds_fit(raw, lower, upper)
PyObject* bounds_fit(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  DirectTensor raw;
  bool fit = count == 3 && raw.see(arguments[0]);
  for (int i = 1; i < 3 && fit; ++i) {
    if (PyFloat_Check(arguments[i]) || PyLong_Check(arguments[i])) continue;
    DirectTensor bound;
    fit = bound.see(arguments[i]) && bound.scalar_type() == compute_dtype(raw.scalar_type()) && broadcasts(bound, raw);
  }
  return PyBool_FromLong(fit);
}
PyMethodDef bounds_fit_method = {
    "bounds_fit", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&bounds_fit)), METH_FASTCALL,
    "Whether bounds that are tensors need no conversion before an operator may have them, as far as that is soon\n"
    "found out: they and raw are plain tensors on the CPU. False before open_direct()."};

bool are(std::span<const int64_t> numbers, PyObject* ints) {
  if (PyTuple_GET_SIZE(ints) != static_cast<Py_ssize_t>(numbers.size())) return false;
  for (size_t d = 0; d < numbers.size(); ++d)
    if (PyLong_AsLongLong(PyTuple_GET_ITEM(ints, static_cast<Py_ssize_t>(d))) != numbers[d]) return false;
  return true;
}

// Whether tensors have these layouts: (dtype, shape, stride, address), shape and stride tuples of ints, address an int,
// or None for any. Plain ones are not asked by way of Python.
bool same_layouts(const py::list& tensors, const py::list& layouts) {
  if (tensors.size() != layouts.size()) return false;
  for (size_t i = 0; i < tensors.size(); ++i) {
    const py::handle tensor = tensors[i];
    const py::tuple layout = layouts[i];
    const py::handle dtype = layout[0], shape = layout[1], stride = layout[2], address = layout[3];
    DirectTensor seen;
    if (seen.look_at(tensor.ptr())) {
      if (!dtype.is(python->dtypes.at(seen.scalar_type())) || !are(seen.sizes(), shape.ptr()) ||
          !are(seen.strides(), stride.ptr()))
        return false;
      if (!address.is_none() && seen.numel() > 0 && PyLong_AsVoidPtr(address.ptr()) != seen.const_data_ptr())
        return false;
    } else if (!dtype.equal(tensor.attr("dtype")) || !shape.equal(tensor.attr("shape")) ||
               !stride.equal(tensor.attr("stride")()) ||
               !(address.is_none() || address.equal(tensor.attr("data_ptr")()))) {
      return false;
    }
  }
  return true;
}

}  // namespace

bool DirectTensor::look_at(PyObject* argument) {
  if (!python || !is_plain(argument)) return false;
  Py_INCREF(argument);
  object_ = Reference(argument);
  if (!look()) {  // a layout that DLPack does not have
    PyErr_Clear();
    return false;
  }
  return dtype_ != ScalarType::Undefined;
}

bool DirectTensor::read(PyObject* argument) {
  if (!see(argument) || numel_ > largest) return false;
  if (numel_ > 0) {
    if (!view_.data) return false;  // the wrapper of another tensor
    // Zeros without memory: the address of a part of them is its offset.
    const bool is_low = reinterpret_cast<uintptr_t>(view_.data) < low_address;
    if (is_low && says_yes(python->is_zero, argument)) return false;
  }
  return !says_yes(python->is_neg, argument);  // yet to be negated
}

bool DirectTensor::look() {
  if (python->exchange->tensor_from_py_object(object(), &view_) != 0) return false;
  numel_ = 1;
  for (const int64_t size : sizes()) numel_ *= size;
  dtype_ = scalar_type_of(view_.dtype);
  return true;
}

DirectTensor DirectTensor::result(PyObject* object) {
  DirectTensor tensor;
  tensor.object_ = Reference(object);
  if (!object || !tensor.look()) throw PythonError();
  return tensor;
}

DirectTensor DirectTensor::empty_like(const DirectTensor& other, ScalarType dtype) {
  if (dtype != other.dtype_) return empty_strided(other.dim(), other.view_.shape, other.view_.strides, dtype);
  return result(PyObject_CallOneArg(python->empty_like.ptr(), other.object()));
}

DirectTensor DirectTensor::empty_strided(size_t rank, const int64_t* sizes, const int64_t* strides, ScalarType dtype) {
  const py::object size = tuple_of(rank, sizes), stride = tuple_of(rank, strides);
  PyObject* const arguments[] = {size.ptr(), stride.ptr(), python->dtypes.at(dtype).ptr(), python->cpu.ptr()};
  return result(PyObject_Vectorcall(python->empty_strided.ptr(), arguments, 2, python->keywords.ptr()));
}

void DirectTensor::copy_(const DirectTensor& source) const {
  checked(PyObject_CallFunctionObjArgs(python->copy_.ptr(), object(), source.object(), nullptr));
}

bool DirectTensor::is_contiguous() const {
  int64_t expected = 1;
  for (int64_t d = dim(); d-- > 0;) {
    if (size(d) != 1 && stride(d) != expected) return numel_ == 0;
    expected *= size(d);
  }
  return true;
}

bool read_argument(PyObject* argument, double& value) {
  if (!PyFloat_CheckExact(argument) && !PyLong_CheckExact(argument)) return false;
  value = PyFloat_AsDouble(argument);
  if (value == -1 && PyErr_Occurred()) throw PythonError();
  return true;
}

bool read_argument(PyObject* argument, int64_t& value) {
  if (!PyLong_CheckExact(argument)) return false;
  value = PyLong_AsLongLong(argument);
  if (value == -1 && PyErr_Occurred()) throw PythonError();
  return true;
}

PyObject* direct_result(const DirectTensor& result) {
  PyObject* const object = result.object() ? result.object() : Py_None;
  Py_INCREF(object);
  return object;
}

std::map<std::string, DirectCall>& direct_calls() {
  static std::map<std::string, DirectCall> calls;
  return calls;
}

void define_direct(py::module_& m) {
  m.def(
      "open_direct",
      [](const py::object& exchange, std::vector<py::object> types, std::vector<py::object> observers,
         py::object is_cpu, py::object is_neg, py::object is_zero, py::object empty_like, py::object empty_strided,
         py::object copy_, const std::vector<py::object>& dtypes) {
        const auto* const table =
            static_cast<const dlpack::Exchange*>(PyCapsule_GetPointer(exchange.ptr(), dlpack::capsule));
        if (!table) throw py::error_already_set();
        if (table->major != dlpack::major_version || !table->tensor_from_py_object) return false;
        python = new Python{table,
                            std::move(types),
                            std::move(observers),
                            std::move(is_cpu),
                            std::move(is_neg),
                            std::move(is_zero),
                            std::move(empty_like),
                            std::move(empty_strided),
                            std::move(copy_),
                            {{ScalarType::Half, dtypes.at(0)},
                             {ScalarType::BFloat16, dtypes.at(1)},
                             {ScalarType::Float, dtypes.at(2)},
                             {ScalarType::Double, dtypes.at(3)}}};
        return true;
      },
      py::kw_only(), py::arg("exchange"), py::arg("types"), py::arg("observers"), py::arg("is_cpu"), py::arg("is_neg"),
      py::arg("is_zero"), py::arg("empty_like"), py::arg("empty_strided"), py::arg("copy_"), py::arg("dtypes"),
      "Say, once and before the first direct(), how C++ meets tensors of Python. False where that is not known.\n\n"
      "`types` are those of plain tensors; direct calls are made while none of `observers` answers true; `dtypes` are\n"
      "float16, bfloat16, float32 and float64.");
  m.def("same_layouts", &same_layouts, py::arg("tensors"), py::arg("layouts"));
  m.attr("bounds_fit") = py::reinterpret_steal<py::object>(PyCFunction_New(&bounds_fit_method, nullptr));
  m.def(
      "direct",
      [](const std::string& name, py::object dispatched) {
        const auto function = reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&call));
        auto* const callable =
            new Callable{{"direct", function, METH_FASTCALL, nullptr}, direct_calls().at(name), std::move(dispatched)};
        const py::capsule self(callable, [](void* memory) { delete static_cast<Callable*>(memory); });
        return py::reinterpret_steal<py::object>(PyCFunction_New(&callable->method, self.ptr()));
      },
      py::arg("name"), py::arg("dispatched"),
      "The operator `name`, called directly where it can be and as `dispatched` elsewhere.");
}

}  // namespace constrained_ops
