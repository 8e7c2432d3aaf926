// Operators of the CPU, each in two tables: PyTorch's dispatcher's, and one for calls from Python past the dispatcher,
// which takes several times as long as the kernel of a small tensor. An operator is written once, for either kind of
// tensor. Only small and plain tensors take the direct road, and only while nothing else wants to see the call
// (constrained_ops/_direct.py).
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

// The error that Python has been told of.
struct PythonError {};

// A reference to an object of Python's, or none.
class Reference {
 public:
  Reference() = default;
  explicit Reference(PyObject* fresh) : object_(fresh) {}
  Reference(const Reference& other) : object_(other.object_) { Py_XINCREF(object_); }
  Reference& operator=(const Reference& other) {
    Reference copy(other);
    std::swap(object_, copy.object_);
    return *this;
  }
  ~Reference() { Py_XDECREF(object_); }
  PyObject* get() const { return object_; }

 private:
  PyObject* object_ = nullptr;
};

// A tensor of Python's, as the operators see torch::stable::Tensor. Without an object it is the empty tensor of a
// result that is not wanted, None in Python. Needs the GIL.
class DirectTensor {
 public:
  // Once, of an argument: false unless it is a plain tensor of a dtype that kernels have.
  bool look_at(PyObject* argument);
  // The same of one on the CPU.
  bool see(PyObject* argument) { return look_at(argument) && view_.device.type == dlpack::cpu; }
  // The same of one that is small, and whose elements are in memory as they are. Throws PythonError.
  bool read(PyObject* argument);

  // As torch.empty_like, and with sizes and strides of its own.
  static DirectTensor empty_like(const DirectTensor& other, ScalarType dtype);
  static DirectTensor empty_strided(size_t rank, const int64_t* sizes, const int64_t* strides, ScalarType dtype);
  void copy_(const DirectTensor& source) const;

  PyObject* object() const { return object_.get(); }

  int64_t dim() const { return view_.ndim; }
  std::span<const int64_t> sizes() const { return {view_.shape, static_cast<size_t>(view_.ndim)}; }
  std::span<const int64_t> strides() const { return {view_.strides, static_cast<size_t>(view_.ndim)}; }
  int64_t size(int64_t dim) const { return view_.shape[dim]; }
  int64_t stride(int64_t dim) const { return view_.strides[dim]; }
  int64_t numel() const { return numel_; }
  bool is_contiguous() const;
  ScalarType scalar_type() const { return dtype_; }
  size_t element_size() const { return view_.dtype.bits / 8; }
  bool is_cpu() const { return true; }
  int32_t get_device_index() const { return -1; }
  const void* const_data_ptr() const { return mutable_data_ptr(); }
  void* mutable_data_ptr() const { return static_cast<char*>(view_.data) + view_.byte_offset; }

 private:
  // Takes a new reference, or null.
  static DirectTensor result(PyObject* object);
  // Looks at the object; false where a Python exception is set.
  bool look();

  Reference object_;
  dlpack::Tensor view_{};
  int64_t numel_ = 0;
  ScalarType dtype_ = ScalarType::Undefined;
};

inline DirectTensor empty_strided(size_t rank, const int64_t* sizes, const int64_t* strides, const DirectTensor&,
                                  ScalarType dtype) {
  return DirectTensor::empty_strided(rank, sizes, strides, dtype);
}
inline DirectTensor empty_strided(const DirectTensor& shape_of, const DirectTensor&, ScalarType dtype) {
  return DirectTensor::empty_like(shape_of, dtype);
}
inline DirectTensor empty_like(const DirectTensor& other) {
  return DirectTensor::empty_like(other, other.scalar_type());
}
inline DirectTensor not_wanted(const DirectTensor&, ScalarType) { return {}; }
inline void copy_(const DirectTensor& destination, const DirectTensor& source) { destination.copy_(source); }

// False if the arguments are not what the operator takes directly. Otherwise `result` is a new reference. Throws
// PythonError.
using DirectCall = bool (*)(PyObject* const* arguments, Py_ssize_t count, PyObject*& result);

// By the names of the operators, say "bounded_forward.tensor".
std::map<std::string, DirectCall>& direct_calls();

// The value of an argument; false for what the dispatcher must judge. Throws PythonError.
bool read_argument(PyObject* argument, double& value);
bool read_argument(PyObject* argument, int64_t& value);
inline bool read_argument(PyObject* argument, DirectTensor& value) { return value.read(argument); }
inline bool read_argument(PyObject* argument, std::optional<DirectTensor>& value) {
  return argument == Py_None || value.emplace().read(argument);
}

// A new reference to what an operator returns.
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
    return count == sizeof...(Parameters) &&
           run<operation>(arguments, result, std::index_sequence_for<Parameters...>());
  }

 private:
  template <auto operation, size_t... i>
  static bool run(PyObject* const* arguments, PyObject*& result, std::index_sequence<i...>) {
    std::tuple<std::decay_t<Parameters>...> values;
    if (!(read_argument(arguments[i], std::get<i>(values)) && ...)) return false;
    result = direct_result(operation(std::get<i>(values)...));
    return true;
  }
};

template <auto dispatched, auto direct>
void implement(torch::stable::detail::StableLibrary& library, const std::string& name) {
  library.impl(name.c_str(), TORCH_BOX(dispatched));
  direct_calls()[name] = &Direct<decltype(direct)>::template call<direct>;
}

}  // namespace constrained_ops
