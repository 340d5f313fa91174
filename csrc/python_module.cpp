// Copyright (c) mmdcnv4 contributors.
// SPDX-License-Identifier: Apache-2.0
//
// python_module.cpp — the module mmdcnv4._C. Its import loads the library; its one function is the
// short way from Python into the operator.
//
// `torch.ops` accepts everything that a schema can say, and takes longer for it than the call
// itself. The function here reads the arguments that nearly every call has: plain tensors, exact
// ints and floats, pairs of them. To anything else it answers NotImplemented, without an effect;
// mmdcnv4/ops/functional.py then goes the long way, which also words the errors about types.

#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/autocast_mode.h>
#include <Python.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>

#include <array>

#include "dcnv4_op.h"

namespace {

// The lock of the interpreter is given back while the operator runs.
class WithoutInterpreterLock {
 public:
  WithoutInterpreterLock() : state_(PyEval_SaveThread()) {}
  ~WithoutInterpreterLock() { PyEval_RestoreThread(state_); }
  WithoutInterpreterLock(const WithoutInterpreterLock&) = delete;
  WithoutInterpreterLock& operator=(const WithoutInterpreterLock&) = delete;

 private:
  PyThreadState* state_;
};

bool read_int(PyObject* object, int64_t& number) {
  if (!PyLong_CheckExact(object)) return false;
  int overflow = 0;
  number = PyLong_AsLongLongAndOverflow(object, &overflow);
  return overflow == 0;
}

// An int stands for a pair of equal numbers.
bool read_pair(PyObject* object, std::array<int64_t, 2>& pair) {
  if (PyTuple_CheckExact(object) && PyTuple_GET_SIZE(object) == 2)
    return read_int(PyTuple_GET_ITEM(object, 0), pair[0]) &&
           read_int(PyTuple_GET_ITEM(object, 1), pair[1]);
  if (PyList_CheckExact(object) && PyList_GET_SIZE(object) == 2)
    return read_int(PyList_GET_ITEM(object, 0), pair[0]) &&
           read_int(PyList_GET_ITEM(object, 1), pair[1]);
  const bool is_read = read_int(object, pair[0]);
  pair[1] = pair[0];
  return is_read;
}

bool read_double(PyObject* object, double& number) {
  if (PyFloat_CheckExact(object)) {
    number = PyFloat_AS_DOUBLE(object);
    return true;
  }
  int64_t whole = 0;
  const bool is_read = read_int(object, whole);
  number = static_cast<double>(whole);
  return is_read;
}

bool read_bool(PyObject* object, bool& flag) {
  flag = object == Py_True;
  return flag || object == Py_False;
}

bool has_kernels(const at::Device& device) {
#ifdef MMDCNV4_WITH_CUDA
  if (device.is_cuda()) return true;
#endif
  return device.is_cpu();
}

// Other layouts have no kernel; the long way says so in words.
bool is_dense(const at::Tensor& tensor) {
  return tensor.layout() == at::kStrided && !tensor.is_nested() && !tensor.is_quantized();
}

// What the operator takes as it is: the dtypes of its contract, no forward-mode derivative.
bool is_plain_call(const at::Tensor& value, const at::Tensor& offset_mask) {
  const auto type = value.scalar_type(), mask_type = offset_mask.scalar_type();
  const bool is_half = type == at::kHalf || type == at::kBFloat16;
  const bool has_legal_types = type == mask_type || (is_half && mask_type == at::kFloat);
  const auto device = value.device();
  return has_kernels(device) && is_dense(value) && is_dense(offset_mask) &&
         (has_legal_types ||
          (type != at::kDouble && at::autocast::is_autocast_enabled(device.type()))) &&
         !value._fw_grad(/*level=*/0).defined() && !offset_mask._fw_grad(/*level=*/0).defined();
}

// Modes that the call has to be seen by: overrides of torch functions, transforms of torch.func,
// torch.jit.trace. Modes of the dispatcher see it anyway.
bool has_observer() {
  constexpr c10::DispatchKeySet kKeys{c10::DispatchKey::FuncTorchDynamicLayerFrontMode,
                                      c10::DispatchKey::Tracer};
  return at::impl::torch_function_mode_enabled() ||
         c10::impl::tls_local_dispatch_key_set().included_.has_any(kKeys);
}

PyObject* call_dcnv4(PyObject* module, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  std::array<int64_t, 2> kernel_size, stride, padding, dilation;
  int64_t groups = 0;
  double offset_scale = 0;
  bool remove_center = false, softmax = false;
  if (count != 10 || !THPVariable_CheckExact(arguments[0]) ||
      !THPVariable_CheckExact(arguments[1]) || !read_pair(arguments[2], kernel_size) ||
      !read_int(arguments[3], groups) || !read_pair(arguments[4], stride) ||
      !read_pair(arguments[5], padding) || !read_pair(arguments[6], dilation) ||
      !read_double(arguments[7], offset_scale) || !read_bool(arguments[8], remove_center) ||
      !read_bool(arguments[9], softmax))
    Py_RETURN_NOTIMPLEMENTED;
  const at::Tensor& value = THPVariable_Unpack(arguments[0]);
  const at::Tensor& offset_mask = THPVariable_Unpack(arguments[1]);
  if (!is_plain_call(value, offset_mask) || has_observer()) Py_RETURN_NOTIMPLEMENTED;
  at::Tensor output;
  {
    const WithoutInterpreterLock unlocked;
    output = mmdcnv4::dcnv4_op().call(value, offset_mask, kernel_size, groups, stride, padding,
                                      dilation, offset_scale, remove_center, softmax);
  }
  return THPVariable_Wrap(std::move(output));
  END_HANDLE_TH_ERRORS
}

PyMethodDef functions[] = {
    {"dcnv4", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(call_dcnv4)),
     METH_FASTCALL,
     "dcnv4(value, offset_mask, kernel_size, groups, stride, padding, dilation, offset_scale, "
     "remove_center, softmax): the result, or NotImplemented for arguments that are not plain."},
    {nullptr, nullptr, 0, nullptr}};

} // namespace

// import mmdcnv4._C
PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, functions,
                                   nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&definition);
}
