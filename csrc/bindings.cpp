// The Python side of the compiled library: what it was built with, and the plans of the optimizers. Importing it
// registers the CPU operators.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>

#include "cpu/cache.h"
#include "cpu/levels.h"
#include "cpu/pages.h"
#include "cpu/step.h"

namespace py = pybind11;
using namespace constrained_ops;

namespace constrained_ops {
void define_direct(py::module_& m);  // cpu/direct.cpp
}

namespace {

Dtype dtype_named(const std::string& name) {
  if (name == "float16") return Dtype::half;
  if (name == "bfloat16") return Dtype::bfloat16;
  if (name == "float32") return Dtype::float32;
  if (name == "float64") return Dtype::float64;
  throw std::invalid_argument("no dtype " + name);
}

// Numbers and one-element tensors alike.
double number(PyObject* object) {
  const double value = PyFloat_AsDouble(object);
  if (value == -1 && PyErr_Occurred()) throw py::error_already_set();
  return value;
}

// Of a constrained_ops.optim._plans.Hyper.
StepOptions options_of(const py::handle& hyper) {
  PyObject* const h = hyper.ptr();
  if (!PyTuple_Check(h) || PyTuple_GET_SIZE(h) != 9) throw std::invalid_argument("hyper must be tuples of 9");
  const auto item = [&](int i) { return PyTuple_GET_ITEM(h, i); };
  const auto flag = [&](int i) { return PyObject_IsTrue(item(i)) == 1; };
  return {
      {number(item(0)), number(item(1)), number(item(2)), number(item(3)), number(item(4)), flag(5), flag(6), flag(7)},
      py::handle(item(8)).equal(py::str("euclidean"))};
}

// grads: addresses of gradients as ints.
void run(StepPlan& plan, const py::list& grads, const py::list& hyper, double grad_scale) {
  if (grads.size() != plan.size()) throw std::invalid_argument("one gradient per slot");
  std::vector<const void*> pointers(grads.size());
  for (size_t i = 0; i < pointers.size(); ++i) {
    pointers[i] = PyLong_AsVoidPtr(PyList_GET_ITEM(grads.ptr(), static_cast<Py_ssize_t>(i)));
    if (!pointers[i] && PyErr_Occurred()) throw py::error_already_set();
  }
  std::vector<StepOptions> groups;
  for (const auto& each : hyper) groups.push_back(options_of(each));
  if (groups.size() < plan.groups()) throw std::invalid_argument("hyperparameters of a group are missing");
  const py::gil_scoped_release released;
  plan.run(pointers, groups, grad_scale);
}

// With hundreds of parameters a Python loop over all of them costs more than the step; and where a step's memory has
// passed through the caches, each line of Python comes from beyond them.

// Whether the values of a dict are the very objects of a list from `next` on, which moves on.
bool has_values(const py::handle& dict, const py::list& objects, Py_ssize_t& next) {
  if (!PyDict_Check(dict.ptr())) return false;
  PyObject *key, *value;
  for (Py_ssize_t at = 0; PyDict_Next(dict.ptr(), &at, &key, &value);)
    if (next == PyList_GET_SIZE(objects.ptr()) || PyList_GET_ITEM(objects.ptr(), next++) != value) return false;
  return true;
}

// Whether those of dicts, one after the other, are the objects of a list.
bool same_values(const py::list& dicts, const py::list& objects) {
  Py_ssize_t next = 0;
  for (const auto& dict : dicts)
    if (!has_values(dict, objects, next)) return false;
  return next == PyList_GET_SIZE(objects.ptr());
}

// The gradients of parameters, or of those with a true in `with_grad`. None where something is not what it was: the
// parameters of an optimizer's groups, the dicts in its state, the values in some of these, or a gradient's type.
py::object gradients(const py::list& groups, const py::object& state, const py::list& params, const py::list& types,
                     const py::object& with_grad, const py::list& all_states, const py::list& states,
                     const py::list& state_values) {
  static PyObject* const of_group = PyUnicode_InternFromString("params");
  static PyObject* const grad_name = PyUnicode_InternFromString("grad");
  Py_ssize_t next = 0, next_state = 0;
  for (const auto& group : groups)
    for (const auto& param : group[of_group])
      if (next == PyList_GET_SIZE(params.ptr()) || PyList_GET_ITEM(params.ptr(), next++) != param.ptr())
        return py::none();
  if (next != PyList_GET_SIZE(params.ptr()) || !has_values(state, all_states, next_state) ||
      next_state != PyList_GET_SIZE(all_states.ptr()) || !same_values(states, state_values))
    return py::none();
  py::list grads;
  for (size_t i = 0; i < params.size(); ++i) {
    const py::handle param = PyList_GET_ITEM(params.ptr(), static_cast<Py_ssize_t>(i));
    const auto grad = py::reinterpret_steal<py::object>(PyObject_GetAttr(param.ptr(), grad_name));
    if (!grad) throw py::error_already_set();
    if (!py::type::handle_of(grad).is(types[i])) return py::none();
    if (with_grad.is_none() || with_grad[py::int_(i)].ptr() == Py_True) grads.append(grad);
  }
  return grads;
}

void add(StepPlan& plan, StepKind kind, int32_t group, int64_t numel, std::tuple<int64_t, int64_t, int64_t> rows,
         uintptr_t param, uintptr_t exp_avg, uintptr_t exp_avg_sq, uintptr_t max_exp_avg_sq, uintptr_t raw,
         uintptr_t step, double lower, double upper, uintptr_t lower_each, uintptr_t upper_each, double total) {
  const auto memory = [](uintptr_t address) { return reinterpret_cast<void*>(address); };
  plan.add({kind,
            group,
            numel,
            {std::get<0>(rows), std::get<1>(rows), std::get<2>(rows)},
            memory(param),
            memory(exp_avg),
            memory(exp_avg_sq),
            memory(max_exp_avg_sq),
            memory(raw),
            static_cast<float*>(memory(step)),
            memory(lower_each),
            memory(upper_each),
            lower,
            upper,
            total});
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build facts of constrained_ops, and plans of its optimizers.";
  m.def("simd", [] { return loops().name; }, "The instruction set whose loops run.");
  m.attr("build") = py::dict(py::arg("torch") = CO_TORCH_VERSION, py::arg("compiler") = CO_COMPILER,
                             py::arg("cuda") = CO_CUDA_VERSION, py::arg("cuda_architectures") = CO_CUDA_ARCHITECTURES,
                             py::arg("cuda_left_out") = CO_CUDA_LEFT_OUT);

  define_direct(m);

  m.def(
      "ask_for_huge_pages",
      [](uintptr_t address, uintptr_t bytes) { ask_for_huge_pages(reinterpret_cast<void*>(address), bytes); },
      py::arg("address"), py::arg("bytes"), "For fresh memory, before it is first written.");
  m.def("cache_bytes", &cache_bytes, "What the last level of the processor's caches holds.");
  m.def("same_values", &same_values, py::arg("dicts"), py::arg("objects"));
  m.def("gradients", &gradients, py::arg("groups"), py::arg("state"), py::arg("params"), py::arg("types"),
        py::arg("with_grad"), py::arg("all_states"), py::arg("states"), py::arg("state_values"));

  py::enum_<StepKind>(m, "StepKind", "What stands around Adam in a step; see csrc/step.h.")
      .value("plain", StepKind::plain)
      .value("box", StepKind::box)
      .value("box_by_element", StepKind::box_by_element)
      .value("interval", StepKind::interval)
      .value("lower_only", StepKind::lower_only)
      .value("upper_only", StepKind::upper_only)
      .value("bounded_by_element", StepKind::bounded_by_element)
      .value("exponential", StepKind::exponential)
      .value("exponential_by_element", StepKind::exponential_by_element)
      .value("simplex", StepKind::simplex)
      .value("softmax", StepKind::softmax);

  py::class_<StepPlan>(m, "StepPlan", "Steps on memory that the caller keeps alive; addresses are ints, 0 for none.")
      .def(py::init([](const std::string& dtype, const std::string& state, int64_t cache_bytes) {
             return std::make_unique<StepPlan>(dtype_named(dtype), dtype_named(state), cache_bytes);
           }),
           py::arg("dtype"), py::arg("state"), py::arg("cache_bytes"))
      .def("add", &add, py::kw_only(), py::arg("kind"), py::arg("group"), py::arg("numel"), py::arg("rows"),
           py::arg("param"), py::arg("exp_avg"), py::arg("exp_avg_sq"), py::arg("max_exp_avg_sq"), py::arg("raw"),
           py::arg("step"), py::arg("lower"), py::arg("upper"), py::arg("lower_each"), py::arg("upper_each"),
           py::arg("total"))
      .def_property_readonly("past_caches", &StepPlan::past_caches,
                             "Whether steps write what they do not read past the caches.")
      .def("run", &run, py::arg("grads"), py::arg("hyper"), py::arg("grad_scale"));
}
