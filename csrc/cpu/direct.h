// Operators of the CPU, each in two tables: PyTorch's dispatcher's, and one for calls from Python past the dispatcher,
// which takes several times as long as the kernel of a small tensor. An operator is written once, for either kind of
// tensor. Only small, ordinary and dense tensors take the direct road, and only while nothing else wants to see the
// call (constrained_ops/_direct.py).
#pragma once

#include <Python.h>

#include <map>
#include <span>
#include <string>
#include <type_traits>
#include <utility>

#include "../tensors.h"
#include "dlpack.h"

namespace constrained_ops {

// What a direct call meets and does not take: the dispatcher does.
struct NotDirect {};

// The error that Python has been told of.
struct PythonError {};

// A tensor of Python's, as the operators see torch::stable::Tensor. Without an object it is the empty tensor of a
// result that is not wanted, None in Python. Needs the GIL.
class DirectTensor {
 public:
  DirectTensor() = default;
  // Throws NotDirect unless it is a small and plain tensor of the CPU.
  explicit DirectTensor(PyObject* argument);
  DirectTensor(const DirectTensor& other) : object_(other.object_), view_(other.view_), numel_(other.numel_) {
    Py_XINCREF(object_);
  }
  DirectTensor& operator=(const DirectTensor&) = delete;
  ~DirectTensor() { Py_XDECREF(object_); }

  // As torch.empty_like, and with sizes and strides of its own.
  static DirectTensor empty_like(const DirectTensor& other, ScalarType dtype);
  static DirectTensor empty_strided(size_t rank, const int64_t* sizes, const int64_t* strides, ScalarType dtype);

  PyObject* object() const { return object_; }

  int64_t dim() const { return view_.ndim; }
  std::span<const int64_t> sizes() const { return {view_.shape, static_cast<size_t>(view_.ndim)}; }
  std::span<const int64_t> strides() const { return {view_.strides, static_cast<size_t>(view_.ndim)}; }
  int64_t size(int64_t dim) const { return view_.shape[dim]; }
  int64_t stride(int64_t dim) const { return view_.strides[dim]; }
  int64_t numel() const { return numel_; }
  bool is_contiguous() const;
  ScalarType scalar_type() const;
  size_t element_size() const { return view_.dtype.bits / 8; }
  bool is_cpu() const { return true; }
  int32_t get_device_index() const { return -1; }
  const void* const_data_ptr() const { return mutable_data_ptr(); }
  void* mutable_data_ptr() const { return static_cast<char*>(view_.data) + view_.byte_offset; }

 private:
  // Steals the reference, null included.
  static DirectTensor result(PyObject* object);
  // False where PyTorch has no view of that kind; no Python exception remains.
  bool look();

  PyObject* object_ = nullptr;
  dlpack::Tensor view_{};
  int64_t numel_ = 0;
};

inline DirectTensor empty_strided(size_t rank, const int64_t* sizes, const int64_t* strides, const DirectTensor&,
                                  ScalarType dtype) {
  return DirectTensor::empty_strided(rank, sizes, strides, dtype);
}
inline DirectTensor empty_strided(const DirectTensor& shape_of, const DirectTensor&, ScalarType dtype) {
  return DirectTensor::empty_like(shape_of, dtype);
}
inline DirectTensor not_wanted(const DirectTensor&, ScalarType) { return {}; }
[[noreturn]] inline DirectTensor empty_like(const DirectTensor&) { throw NotDirect(); }
[[noreturn]] inline void copy_(const DirectTensor&, const DirectTensor&) { throw NotDirect(); }

// False if the arguments are not what the operator takes directly. Otherwise `result` is a new reference, or null where
// a Python exception is set.
using DirectCall = bool (*)(PyObject* const* arguments, Py_ssize_t count, PyObject*& result);

// By the names of the operators, say "bounded_forward.tensor".
std::map<std::string, DirectCall>& direct_calls();

// The value of an argument. Throws NotDirect.
template <typename T>
struct DirectArgument;
template <>
struct DirectArgument<double> {
  static double of(PyObject* argument);
};
template <>
struct DirectArgument<int64_t> {
  static int64_t of(PyObject* argument);
};
template <>
struct DirectArgument<DirectTensor> {
  static DirectTensor of(PyObject* argument) { return DirectTensor(argument); }
};
template <>
struct DirectArgument<std::optional<DirectTensor>> {
  static std::optional<DirectTensor> of(PyObject* argument) {
    if (argument == Py_None) return std::nullopt;
    return DirectTensor(argument);
  }
};

// A new reference to what an operator returns. Throws PythonError.
PyObject* direct_result(const DirectTensor& result);
template <typename... Tensors>
PyObject* direct_result(const std::tuple<Tensors...>& results) {
  PyObject* const tuple = PyTuple_New(sizeof...(Tensors));
  if (!tuple) throw PythonError();
  Py_ssize_t at = 0;
  std::apply([&](const auto&... each) { (PyTuple_SET_ITEM(tuple, at++, direct_result(each)), ...); }, results);
  return tuple;
}

template <typename Signature>
struct Direct;
template <typename Result, typename... Parameters>
struct Direct<Result (*)(Parameters...)> {
  template <auto operation>
  static bool call(PyObject* const* arguments, Py_ssize_t count, PyObject*& result) {
    if (count != sizeof...(Parameters)) return false;
    try {
      result = run<operation>(arguments, std::index_sequence_for<Parameters...>());
    } catch (const NotDirect&) {
      return false;
    } catch (const PythonError&) {
      result = nullptr;
    } catch (const std::exception& error) {
      PyErr_SetString(PyExc_RuntimeError, error.what());
      result = nullptr;
    }
    return true;
  }

 private:
  template <auto operation, size_t... i>
  static PyObject* run(PyObject* const* arguments, std::index_sequence<i...>) {
    return direct_result(operation(DirectArgument<std::decay_t<Parameters>>::of(arguments[i])...));
  }
};

template <auto dispatched, auto direct>
void implement(torch::stable::detail::StableLibrary& library, const std::string& name) {
  library.impl(name.c_str(), TORCH_BOX(dispatched));
  direct_calls()[name] = &Direct<decltype(direct)>::template call<direct>;
}

}  // namespace constrained_ops
