// The eager entry points of Python: parse arguments as torch does, then call
// the dispatcher unboxed. torch.ops costs several times as much a call. The
// optimizers' steps go past the dispatcher where it has nothing to decide.
#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros_like.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <cstdio>
#include <unordered_map>

#include "kernels/cuda/conv2d.h"
#include "kernels/cuda/max_pool2d.h"
#include "kernels/workspace.h"
#include "ops/arguments.h"
#include "ops/gradient_step.h"
#include "ops/operators.h"
#include "ops/result_memory.h"

namespace py = pybind11;

namespace cnnkernels {
namespace {

[[noreturn]] void bad_type(const char* op, const char* name, const char* expected,
                           py::handle value) {
  throw py::type_error(std::string(op) + "(): argument '" + name + "' must be " + expected +
                       ", not " + Py_TYPE(value.ptr())->tp_name);
}

const at::Tensor& tensor_argument(const char* op, const char* name, py::handle value) {
  if (!THPVariable_Check(value.ptr())) bad_type(op, name, "Tensor", value);
  return THPVariable_Unpack(value.ptr());
}

std::optional<at::Tensor> optional_tensor(const char* op, const char* name, py::handle value) {
  if (value.is_none()) return std::nullopt;
  return tensor_argument(op, name, value);
}

// `entry` counts from one the entries of a sequence, and is zero for an int of its own: torch's
// error for a number over 64 bits is a TypeError in a sequence and a ValueError outside.
int64_t int_argument(const char* op, const char* name, py::handle value, Py_ssize_t entry = 0) {
  if (!PyIndex_Check(value.ptr()) || PyBool_Check(value.ptr())) {
    bad_type(op, name, "int or a tuple of ints", value);
  }
  const Py_ssize_t number = PyNumber_AsSsize_t(value.ptr(), PyExc_OverflowError);
  if (number == -1 && PyErr_Occurred() != nullptr) {
    const bool overflow = PyErr_ExceptionMatches(PyExc_OverflowError) != 0;
    PyErr_Clear();
    if (!overflow) bad_type(op, name, "int or a tuple of ints", value);
    const std::string sentence = std::string(op) + "(): argument '" + name +
                                 "' overflows 64 bits: " + std::string(py::str(value));
    if (entry == 0) throw py::value_error(sentence);
    throw py::type_error(sentence + " at position " + std::to_string(entry));
  }
  return number;
}

bool bool_argument(const char* op, const char* name, py::handle value) {
  if (!PyBool_Check(value.ptr())) bad_type(op, name, "bool", value);
  return value.ptr() == Py_True;
}

// An int, or a sequence of one or two.
class PairArgument {
 public:
  PairArgument(const char* op, const char* name, py::handle value) : size_(2) {
    if (PyTuple_Check(value.ptr()) || PyList_Check(value.ptr())) {
      const Py_ssize_t size = PySequence_Fast_GET_SIZE(value.ptr());
      if (size < 1 || size > 2) {
        throw std::runtime_error(std::string(op) + "(): argument '" + name +
                                 "' must be one int or two, but got " +
                                 std::string(py::repr(value)));
      }
      size_ = static_cast<size_t>(size);
      for (size_t i = 0; i < size_; ++i) {
        values_[i] = int_argument(op, name, PySequence_Fast_GET_ITEM(value.ptr(), i), i + 1);
      }
    } else {
      values_[0] = values_[1] = int_argument(op, name, value);
    }
  }
  operator at::IntArrayRef() const { return {values_, size_}; }

 private:
  int64_t values_[2];
  size_t size_;
};

// A stride that may be left out, which means the kernel size.
class StrideArgument {
 public:
  StrideArgument(const char* op, const char* name, py::handle value) {
    const bool absent =
        value.is_none() ||
        ((PyTuple_Check(value.ptr()) || PyList_Check(value.ptr())) && py::len(value) == 0);
    if (!absent) pair_.emplace(op, name, value);
  }
  operator at::IntArrayRef() const {
    return pair_.has_value() ? at::IntArrayRef(*pair_) : at::IntArrayRef();
  }

 private:
  std::optional<PairArgument> pair_;
};

template <bool Relu>
at::Tensor conv2d(py::handle input, py::handle weight, py::handle bias, py::handle stride,
                  py::handle padding, py::handle dilation, py::handle groups) {
  constexpr const char* op = ops::Convolution<Relu>::kName;
  const at::Tensor& x = tensor_argument(op, "input", input);
  const at::Tensor& w = tensor_argument(op, "weight", weight);
  const std::optional<at::Tensor> b = optional_tensor(op, "bias", bias);
  const PairArgument strides(op, "stride", stride);
  const PairArgument dilations(op, "dilation", dilation);
  const int64_t group_count = int_argument(op, "groups", groups);
  if (PyUnicode_Check(padding.ptr())) {
    const std::string mode = py::cast<std::string>(padding);
    const py::gil_scoped_release no_gil;
    return ops::Convolution<Relu>::kCallPadding(x, w, b, strides, mode, dilations, group_count);
  }
  const PairArgument paddings(op, "padding", padding);
  const py::gil_scoped_release no_gil;
  return ops::Convolution<Relu>::kCall(x, w, b, strides, paddings, dilations, group_count);
}

struct PoolPython {
  PairArgument kernel_size;
  StrideArgument stride;
  PairArgument padding, dilation;

  PoolPython(const char* op, py::handle kernel_size, py::handle stride, py::handle padding,
             py::handle dilation, const std::string& prefix = "")
      : kernel_size(op, (prefix + "kernel_size").c_str(), kernel_size),
        stride(op, (prefix + "stride").c_str(), stride),
        padding(op, (prefix + "padding").c_str(), padding),
        dilation(op, (prefix + "dilation").c_str(), dilation) {}
};

at::Tensor max_pool2d(py::handle input, py::handle kernel_size, py::handle stride,
                      py::handle padding, py::handle dilation, py::handle ceil) {
  const at::Tensor& x = tensor_argument("max_pool2d", "input", input);
  const PoolPython pool("max_pool2d", kernel_size, stride, padding, dilation);
  const bool ceil_mode = bool_argument("max_pool2d", "ceil_mode", ceil);
  const py::gil_scoped_release no_gil;
  return ops::max_pool2d(x, pool.kernel_size, pool.stride, pool.padding, pool.dilation, ceil_mode);
}

ops::TensorPair max_pool2d_with_indices(py::handle input, py::handle kernel_size, py::handle stride,
                                        py::handle padding, py::handle dilation, py::handle ceil) {
  const at::Tensor& x = tensor_argument("max_pool2d", "input", input);
  const PoolPython pool("max_pool2d", kernel_size, stride, padding, dilation);
  const bool ceil_mode = bool_argument("max_pool2d", "ceil_mode", ceil);
  const py::gil_scoped_release no_gil;
  return ops::max_pool2d_with_indices(x, pool.kernel_size, pool.stride, pool.padding, pool.dilation,
                                      ceil_mode);
}

at::Tensor conv2d_relu_max_pool2d(py::handle input, py::handle weight, py::handle bias,
                                  py::handle stride, py::handle padding, py::handle dilation,
                                  py::handle groups, py::handle pool_kernel_size,
                                  py::handle pool_stride, py::handle pool_padding,
                                  py::handle pool_dilation, py::handle pool_ceil) {
  const char* const op = "conv2d_relu_max_pool2d";
  const at::Tensor& x = tensor_argument(op, "input", input);
  const at::Tensor& w = tensor_argument(op, "weight", weight);
  const std::optional<at::Tensor> b = optional_tensor(op, "bias", bias);
  const PairArgument strides(op, "stride", stride);
  const PairArgument dilations(op, "dilation", dilation);
  const int64_t group_count = int_argument(op, "groups", groups);
  const PoolPython pool(op, pool_kernel_size, pool_stride, pool_padding, pool_dilation, "pool_");
  const bool pool_ceil_mode = bool_argument(op, "pool_ceil_mode", pool_ceil);
  if (PyUnicode_Check(padding.ptr())) {
    const std::string mode = py::cast<std::string>(padding);
    const py::gil_scoped_release no_gil;
    return ops::conv2d_relu_max_pool2d_padding(x, w, b, strides, mode, dilations, group_count,
                                               pool.kernel_size, pool.stride, pool.padding,
                                               pool.dilation, pool_ceil_mode);
  }
  const PairArgument paddings(op, "padding", padding);
  const py::gil_scoped_release no_gil;
  return ops::conv2d_relu_max_pool2d(x, w, b, strides, paddings, dilations, group_count,
                                     pool.kernel_size, pool.stride, pool.padding, pool.dilation,
                                     pool_ceil_mode);
}

// A number of a parameter group. The sum refuses, as torch does, what float() would parse.
double number_argument(py::handle value) {
  if (PyFloat_CheckExact(value.ptr())) return PyFloat_AS_DOUBLE(value.ptr());
  if (THPVariable_Check(value.ptr())) return THPVariable_Unpack(value.ptr()).item<double>();
  const bool plain = PyLong_CheckExact(value.ptr());
  const double number =
      PyFloat_AsDouble(plain ? value.ptr() : py::object(py::float_(0.0) + value).ptr());
  if (number == -1 && PyErr_Occurred() != nullptr) throw py::error_already_set();
  return number;
}

// An entry of a dict under one of the names below; null where there is none.
PyObject* find(py::handle dict, PyObject* name) {
  PyObject* const value = PyDict_GetItemWithError(dict.ptr(), name);
  if (value == nullptr && PyErr_Occurred() != nullptr) throw py::error_already_set();
  return value;
}

PyObject* interned(const char* name) { return PyUnicode_InternFromString(name); }

// A parameter group of torch.optim.SGD, or one with a learning rate alone.
class Group {
 public:
  explicit Group(const py::dict& group) : group_(group) {}

  py::list params() const {
    static PyObject* const name = interned("params");
    return py::list(py::reinterpret_borrow<py::object>(get(name)));
  }

  double lr() const { return number_argument(get_lr()); }

  // The learning rate where it is a tensor that may stay where it is, on the parameters' device.
  std::optional<at::Tensor> device_lr() const {
    const py::handle value = get_lr();
    if (PyFloat_CheckExact(value.ptr()) || !THPVariable_Check(value.ptr())) return std::nullopt;
    const at::Tensor& tensor = THPVariable_Unpack(value.ptr());
    return is_elsewhere(tensor) ? std::make_optional(tensor) : std::nullopt;
  }

  // Whether a number is on a device on which there are parameters too, other than the CPU.
  bool is_elsewhere(const at::Tensor& number) const {
    if (number.is_cpu()) return false;
    for (const py::handle param : params()) {
      if (THPVariable_Check(param.ptr()) &&
          THPVariable_Unpack(param.ptr()).device() == number.device()) {
        return true;
      }
    }
    return false;
  }

  // All but the learning rate.
  StepOptions sgd_options() const {
    static PyObject* const momentum = interned("momentum");
    static PyObject* const dampening = interned("dampening");
    static PyObject* const weight_decay = interned("weight_decay");
    static PyObject* const nesterov = interned("nesterov");
    static PyObject* const maximize = interned("maximize");
    StepOptions options;
    options.momentum = number_argument(get(momentum));
    options.dampening = number_argument(get(dampening));
    options.weight_decay = number_argument(get(weight_decay));
    options.nesterov = truth(get(nesterov));
    options.maximize = truth(get(maximize));
    return options;
  }

 private:
  py::handle get_lr() const {
    static PyObject* const name = interned("lr");
    return get(name);
  }

  py::handle get(PyObject* name) const {
    PyObject* const value = find(group_, name);
    if (value == nullptr) throw py::key_error(py::cast<std::string>(name));
    return value;
  }

  static bool truth(py::handle value) {
    const int result = PyObject_IsTrue(value.ptr());
    if (result < 0) throw py::error_already_set();
    return result == 1;
  }

  const py::dict& group_;
};

// Momentum buffers are where torch.optim.SGD keeps them: in
// state[param]["momentum_buffer"], from the parameter's first gradient on.
PyObject* momentum_buffer_name() {
  static PyObject* const name = interned("momentum_buffer");
  return name;
}

// Finds momentum buffers without running any Python code, as the hash of a tensor would. The
// state is in the order of first gradients, mostly that of the parameters, so that each search
// begins behind what the last one found.
class MomentumBuffers {
 public:
  explicit MomentumBuffers(py::handle state)
      : state_(state && PyDict_Check(state.ptr()) ? state.ptr() : nullptr) {}

  // Null where there is none, or not where it is expected.
  const at::Tensor* of(PyObject* param) {
    if (state_ == nullptr) return nullptr;
    PyObject *key, *value;
    for (int round = 0; round < 2; ++round) {
      while (PyDict_Next(state_, &at_, &key, &value)) {
        if (key == param) return tensor_in(value);
      }
      at_ = 0;
    }
    return nullptr;
  }

 private:
  static const at::Tensor* tensor_in(PyObject* of_param) {
    if (!PyDict_Check(of_param)) return nullptr;
    PyObject* const buffer = find(of_param, momentum_buffer_name());
    if (buffer == nullptr || !THPVariable_CheckExact(buffer)) return nullptr;
    return &THPVariable_Unpack(buffer);
  }

  PyObject* const state_;
  Py_ssize_t at_ = 0;
};

// Steps a group whose tensors are all ordinary ones and have the momentum buffers that they need:
// every step but the first. Otherwise returns false, and has changed nothing.
bool ordinary_step(const py::list& params, py::handle state, const StepOptions& options,
                   std::atomic<int64_t>& calls) {
  // The lists of the last groups, by the address of their parameters, which is no more than a
  // hint: what is found there is checked, and made anew where it does not fit.
  constexpr size_t kGroups = 64;
  static auto& lists = *new std::unordered_map<const PyObject*, StepList>;
  if (operators_are_observed()) return false;
  if (lists.size() > kGroups) lists.clear();
  // Taken out: while the interpreter is released another thread may step the same group.
  StepList list = std::move(lists[params.ptr()]);
  MomentumBuffers buffers(state);
  const at::Tensor* first = nullptr;
  const Py_ssize_t size = PyList_GET_SIZE(params.ptr());
  for (Py_ssize_t i = 0; i < size; ++i) {
    PyObject* const key = PyList_GET_ITEM(params.ptr(), i);
    if (!THPVariable_CheckExact(key)) return false;
    const at::Tensor& param = THPVariable_Unpack(key);
    const at::Tensor& grad = param.unsafeGetTensorImpl()->grad();
    if (!grad.defined()) {
      if (!param.is_leaf()) return false;  // which deserves torch's warning
      continue;
    }
    const at::Tensor* const buffer = options.momentum != 0 ? buffers.of(key) : nullptr;
    if (options.momentum != 0 && buffer == nullptr) return false;
    if (!is_ordinary_step(param, grad, buffer)) return false;
    if (first == nullptr) {
      if (!not_native(param).empty()) return false;
      first = &param;
      list.restart(dtype_of(param));
    }
    if (param.scalar_type() != first->scalar_type()) return false;
    list.add(param, grad, buffer, options.unscale);
  }
  if (first == nullptr) return true;
  // A short step takes no longer than many a call that keeps the interpreter, which spares it
  // the references.
  constexpr int64_t kShortElements = 256 * 1024;
  if (list.elements() < kShortElements) {
    list.step(options, calls);
  } else {
    const std::vector<at::Tensor> references = list.references();
    const py::gil_scoped_release no_gil;
    list.step(options, calls);
  }
  lists[params.ptr()] = std::move(list);
  return true;
}

// The tensors of a parameter group that have a gradient, and those gradients.
struct GroupTensors {
  std::vector<py::handle> keys;  // the parameters as the optimizer's state knows them
  std::vector<at::Tensor> params, grads;

  GroupTensors(const char* op, const py::list& group) {
    for (const py::handle key : group) {
      const at::Tensor& param = tensor_argument(op, "params", key);
      const at::Tensor& grad = param.grad();
      if (!grad.defined()) continue;
      keys.push_back(key);
      params.push_back(param);
      grads.push_back(grad);
    }
  }

  // Dense, on devices that have step kernels and of one dtype that they compute.
  bool native() const {
    const auto taken = [](const at::Tensor& tensor) {
      return not_native(tensor, Devices::cpu_and_cuda).empty();
    };
    for (size_t i = 0; i < params.size(); ++i) {
      if (!taken(params[i]) || !taken(grads[i]) ||
          params[i].scalar_type() != params[0].scalar_type() ||
          grads[i].scalar_type() != params[0].scalar_type()) {
        return false;
      }
    }
    return true;
  }
};

// Both return false, and change nothing, where the kernels do not apply.
bool gd_step_group(const py::dict& group_dict) {
  const Group group(group_dict);
  const py::list params = group.params();
  const std::optional<at::Tensor> device_lr = group.device_lr();
  StepOptions options;
  if (!device_lr.has_value()) {
    options.lr = group.lr();
    if (ordinary_step(params, py::handle(), options, kernel_calls().gd_step)) return true;
  }
  const GroupTensors tensors("gd_step_", params);
  if (!tensors.native()) return false;
  const py::gil_scoped_release no_gil;
  const at::NoGradGuard no_grad;
  if (device_lr.has_value()) {
    ops::gd_step_(tensors.params, tensors.grads, *device_lr);
  } else {
    ops::gd_step_(tensors.params, tensors.grads, options.lr);
  }
  return true;
}

bool sgd_step_group(const py::dict& group_dict, const py::object& state, py::handle grad_scale,
                    py::handle found_inf) {
  const char* const op = "sgd_step_";
  const Group group(group_dict);
  const py::list params = group.params();
  const std::optional<at::Tensor> scale = optional_tensor(op, "grad_scale", grad_scale);
  std::optional<at::Tensor> overflow = optional_tensor(op, "found_inf", found_inf);
  const std::optional<at::Tensor> device_lr = group.device_lr();
  StepOptions options = group.sgd_options();
  if (!device_lr.has_value()) options.lr = group.lr();
  const auto elsewhere = [&](const std::optional<at::Tensor>& number) {
    return number.has_value() && group.is_elsewhere(*number);
  };
  if (overflow.has_value() && !elsewhere(overflow)) {
    if (overflow->item<double>() != 0) return true;
    overflow.reset();
  }
  // What is on the parameters' device stays there.
  if (!device_lr.has_value() && !elsewhere(scale) && !overflow.has_value()) {
    options.unscale = scale.has_value();
    if (options.unscale) options.grad_scale = scale->item<double>();
    if (ordinary_step(params, state, options, kernel_calls().sgd_step)) return true;
  }
  const GroupTensors tensors(op, params);
  if (!tensors.native()) return false;
  struct Lists {
    std::vector<at::Tensor> params, grads, buffers;
  } first, later;
  std::vector<py::object> first_states;
  const py::handle name = momentum_buffer_name();
  MomentumBuffers known(state);
  for (size_t i = 0; i < tensors.params.size(); ++i) {
    Lists* lists = &later;
    const at::Tensor* const found =
        options.momentum != 0 ? known.of(tensors.keys[i].ptr()) : nullptr;
    if (found != nullptr) {
      later.buffers.push_back(*found);
    } else if (options.momentum != 0) {
      const py::object of_param = state[tensors.keys[i]];
      const py::object buffer = of_param.attr("get")(name);
      if (buffer.is_none()) {
        lists = &first;
        first_states.push_back(of_param);
        // A step that the device skips leaves its buffers as they are.
        first.buffers.push_back(overflow.has_value() ? at::zeros_like(tensors.grads[i])
                                                     : at::empty_like(tensors.grads[i]));
      } else {
        later.buffers.push_back(tensor_argument(op, "momentum_buffers", buffer));
      }
    }
    lists->params.push_back(tensors.params[i]);
    lists->grads.push_back(tensors.grads[i]);
  }
  {
    const py::gil_scoped_release no_gil;
    const at::NoGradGuard no_grad;
    for (const Lists* lists : {&later, &first}) {
      if (lists->params.empty()) continue;
      const auto step = [&](const auto& lr) {
        ops::sgd_step_(lists->params, lists->grads, lists->buffers, options.weight_decay,
                       options.momentum, lr, options.dampening, options.nesterov, options.maximize,
                       lists == &first, scale, overflow);
      };
      if (device_lr.has_value()) {
        step(*device_lr);
      } else {
        step(options.lr);
      }
    }
  }
  for (size_t i = 0; i < first_states.size(); ++i) first_states[i][name] = first.buffers[i];
  return true;
}

py::dict config() {
  py::list isas;
  for (const Isa isa : supported_isas()) isas.append(isa_name(isa));
  py::dict result;
  result["isa"] = isa_name(active_isa());
  result["isas"] = isas;
  result["cuda"] = cuda_device_of() != nullptr;
  result["cuda_conv2d"] = cuda::policy_name(cuda::active_conv2d_policy());
  result["kept_mib"] = result_memory().mebibytes;
  py::list notes;  // on environment variables that do not hold
  for (const std::string& note :
       {active_isa_note(), cuda::conv2d_policy_note(), result_memory().note}) {
    if (!note.empty()) notes.append(note);
  }
  result["notes"] = notes;
  result["threads"] = at::get_num_threads();
  return result;
}

void set_isa(const std::string& name) {
  for (const Isa isa : supported_isas()) {
    if (name == isa_name(isa)) return set_active_isa(isa);
  }
  throw py::value_error("isa must be one that this machine supports (config()['isas']), but got '" +
                        name + "'");
}

void set_cuda_conv2d(const std::string& name) {
  const cuda::Conv2dPolicyChoice choice = cuda::choose_conv2d_policy(name.c_str());
  if (!choice.note.empty()) throw py::value_error(choice.note);
  cuda::set_conv2d_policy(choice.policy);
}

py::dict aten_plan(const std::string& reason) {
  py::dict result;
  result["algorithm"] = "aten";
  result["reason"] = reason;
  return result;
}

py::dict native_plan(const char* algorithm, Isa isa, int lanes, int threads) {
  py::dict result;
  result["algorithm"] = algorithm;
  result["isa"] = isa_name(isa);
  result["vector_lanes"] = lanes;
  result["threads"] = threads;
  return result;
}

ConvArguments parse_conv(const char* op, const at::Tensor& input, const at::Tensor& weight,
                         py::handle stride, py::handle padding, py::handle dilation,
                         py::handle groups) {
  const PairArgument strides(op, "stride", stride);
  const PairArgument dilations(op, "dilation", dilation);
  Pair paddings;
  if (PyUnicode_Check(padding.ptr())) {
    paddings =
        pad_input(op, input, weight, strides, py::cast<std::string>(padding), dilations).padding;
  } else {
    paddings = expand_pair(op, "padding", PairArgument(op, "padding", padding));
  }
  return conv_arguments(op, strides, paddings, dilations, int_argument(op, "groups", groups));
}

at::Tensor batched(const char* op, const at::Tensor& input) {
  check_input_dimensions(op, input);
  return input.dim() == 3 ? input.unsqueeze(0) : input;
}

// Of tensors as torch allocates them: no view shifts their addresses.
constexpr int64_t kCudaAlignment = 16;

const char* products_name(const Conv2dProblem& problem, cuda::TensorProducts products) {
  if (problem.dtype != DType::float32) return "16-bit";
  return products == cuda::TensorProducts::tf32 ? "tf32" : "exact parts";
}

// How a pass of a convolution runs, under keys that begin with its name; the forward pass, which
// has none, stands for the call.
void explain_pass(py::dict& result, const std::string& name, const Conv2dProblem& problem,
                  const cuda::Conv2dPlan& plan) {
  const auto set = [&](const char* key, const auto& value) {
    result[py::str(name.empty() ? key : name + "_" + key)] = value;
  };
  result[py::str(name.empty() ? "algorithm" : name)] = algorithm_name(plan.algorithm);
  if (plan.algorithm == cuda::Conv2dAlgorithm::aten) {
    char reason[96];
    std::snprintf(reason, sizeof reason, "torch is %s to take %.2f of the kernel's time",
                  plan.measured ? "measured" : "estimated", static_cast<double>(plan.torch_ratio));
    return set("reason", reason);
  }
  if (plan.gemm.rows > 0) {
    set("tile", std::to_string(plan.gemm.rows) + "x" + std::to_string(plan.gemm.columns));
    set("products", products_name(problem, plan.gemm.products));
  }
  if (plan.weight.results > 0) set("products", products_name(problem, plan.weight.products));
  if (plan.parts > 0) set("parts", plan.parts);
  set("workspace_bytes", plan.workspace_bytes);
}

py::dict explain_on_cuda(const Conv2dProblem& problem, const at::Device& device) {
  using cuda::Conv2dPass;
  py::dict result;
  const auto explain = [&](const char* name, Conv2dPass pass) {
    const cuda::Conv2dPlan plan = cuda_conv2d_planner().plan_conv2d(problem, pass, kCudaAlignment,
                                                                    cuda_device_of()(device).limits,
                                                                    cuda::active_conv2d_policy());
    explain_pass(result, name, problem, plan);
  };
  explain("", Conv2dPass::forward);
  result["isa"] = "cuda";
  explain("input_gradient", Conv2dPass::input_gradient);
  explain("weight_gradient", Conv2dPass::weight_gradient);
  explain("bias_gradient", Conv2dPass::bias_gradient);
  result["flops"] = 2 * problem.multiply_adds();
  return result;
}

// The plan of both: a ReLU changes nothing but what is stored.
template <bool Relu>
py::dict explain_conv2d(py::handle input, py::handle weight, py::handle bias, py::handle stride,
                        py::handle padding, py::handle dilation, py::handle groups) {
  constexpr const char* op = ops::Convolution<Relu>::kName;
  const at::Tensor& x = tensor_argument(op, "input", input);
  const at::Tensor& w = tensor_argument(op, "weight", weight);
  const std::optional<at::Tensor> b = optional_tensor(op, "bias", bias);
  const ConvArguments arguments = parse_conv(op, x, w, stride, padding, dilation, groups);
  const std::string reason = conv2d_not_native(op, x, w, b, arguments.stride, arguments.padding,
                                               arguments.dilation, arguments.groups);
  if (!reason.empty()) return aten_plan(reason);
  const Conv2dProblem problem = conv_problem(op, batched(op, x), w, b, arguments);
  if (!x.is_cpu()) return explain_on_cuda(problem, x.device());
  if (mostly_border(problem)) return aten_plan("the border is much larger than the image");
  const ThreadPool pool = torch_thread_pool();
  const Conv2dPlan plan = plan_conv2d(problem, active_isa(), pool.threads);
  py::dict result =
      native_plan(algorithm_name(plan.algorithm), plan.isa, plan.vector_lanes, plan.threads);
  result["images_per_chunk"] = plan.images_per_chunk;
  result["rows_per_task"] = plan.rows_per_task;
  result["channels_per_task"] = plan.channels_per_task;
  result["in_place"] = plan.in_place;
  result["weights_first"] = plan.weights_first;
  if (plan.algorithm == ConvAlgorithm::amx) result["parts"] = plan.parts;
  result["workspace_bytes"] = plan.workspace_bytes;
  result["input_gradient"] =
      algorithm_name(plan_conv2d_input_gradient(problem, plan.isa, pool.threads).algorithm);
  result["weight_gradient"] =
      algorithm_name(plan_conv2d_weight_gradient(problem, plan.isa, pool.threads).algorithm);
  result["flops"] = 2 * problem.multiply_adds();
  return result;
}

// Why max_pool2d's kernels do not take these arguments; empty if they do.
std::string max_pool2d_reason(py::handle input, py::handle kernel_size, py::handle stride,
                              py::handle padding, py::handle dilation, py::handle ceil) {
  const char* const op = "max_pool2d";
  const PoolPython pool(op, kernel_size, stride, padding, dilation);
  return not_native(tensor_argument(op, "input", input),
                    pool_arguments(op, pool.kernel_size, pool.stride, pool.padding, pool.dilation,
                                   bool_argument(op, "ceil_mode", ceil)));
}

py::dict explain_on_cuda(const MaxPool2dProblem& problem, const at::Device& device) {
  const auto plan = cuda::plan_max_pool2d(problem, kCudaAlignment, cuda_device_of()(device).limits);
  const auto blocks = [](const cuda::LaunchGrid& grid) {
    return py::make_tuple(grid.x, grid.y, grid.z);
  };
  py::dict result;
  result["algorithm"] = plan.algorithm;
  result["isa"] = "cuda";
  result["vector_lanes"] = plan.width;
  result["threads"] = plan.forward.threads();
  result["blocks"] = blocks(plan.forward);
  result["argmax_bytes"] = problem.compact_argmax() ? 1 : 4;
  result["backward"] = "gather";
  result["backward_blocks"] = blocks(plan.backward);
  return result;
}

py::dict explain_max_pool2d(py::handle input, py::handle kernel_size, py::handle stride,
                            py::handle padding, py::handle dilation, py::handle ceil) {
  const char* const op = "max_pool2d";
  const at::Tensor& x = tensor_argument(op, "input", input);
  const PoolPython pool(op, kernel_size, stride, padding, dilation);
  const bool ceil_mode = bool_argument(op, "ceil_mode", ceil);
  const PoolArguments arguments =
      pool_arguments(op, pool.kernel_size, pool.stride, pool.padding, pool.dilation, ceil_mode);
  const std::string reason = not_native(x, arguments);
  if (!reason.empty()) return aten_plan(reason);
  const at::Tensor images = batched(op, x);
  const Layout layout = pool_layout(images);
  const MaxPool2dProblem problem = pool_problem(op, images.sizes(), dtype_of(x), layout, arguments);
  if (!x.is_cpu()) return explain_on_cuda(problem, x.device());
  const MaxPool2dPlan plan = plan_max_pool2d(problem, active_isa(), torch_thread_pool().threads);
  py::dict result = native_plan(plan.algorithm, plan.isa, plan.vector_lanes, plan.threads);
  result["argmax_bytes"] = problem.compact_argmax() ? 1 : 4;
  result["backward"] = plan.quads ? "quads" : plan.gathers ? "gather" : "scatter";
  return result;
}

py::dict explain_on_cuda(const Conv2dReluMaxPool2dProblem& problem, const at::Device& device) {
  const cuda::BlockPlan plan = cuda_conv2d_planner().plan_block(
      problem, kCudaAlignment, cuda_device_of()(device).limits, cuda::active_conv2d_policy());
  if (!plan.fused) {
    const std::string reason = cuda::conv2d_not_native(problem.conv);
    py::dict result = reason.empty() ? explain_on_cuda(problem.conv, device) : aten_plan(reason);
    result["fused"] = false;
    result["fused_reason"] = plan.reason;
    return result;
  }
  py::dict result;
  explain_pass(result, "", problem.conv, plan.conv);
  result["isa"] = "cuda";
  result["fused"] = true;
  result["flops"] = 2 * problem.conv.multiply_adds();
  return result;
}

struct BlockCall {
  const at::Tensor& input;
  const at::Tensor& weight;
  std::optional<at::Tensor> bias;
  BlockArguments arguments;
};

BlockCall parse_block(py::handle input, py::handle weight, py::handle bias, py::handle stride,
                      py::handle padding, py::handle dilation, py::handle groups,
                      py::handle pool_kernel_size, py::handle pool_stride, py::handle pool_padding,
                      py::handle pool_dilation, py::handle pool_ceil) {
  const char* const op = "conv2d_relu_max_pool2d";
  const at::Tensor& x = tensor_argument(op, "input", input);
  const at::Tensor& w = tensor_argument(op, "weight", weight);
  const ConvArguments conv = parse_conv(op, x, w, stride, padding, dilation, groups);
  const PoolPython pool(op, pool_kernel_size, pool_stride, pool_padding, pool_dilation, "pool_");
  return {x, w, optional_tensor(op, "bias", bias),
          block_arguments(op, conv.stride, conv.padding, conv.dilation, conv.groups,
                          pool.kernel_size, pool.stride, pool.padding, pool.dilation,
                          bool_argument(op, "pool_ceil_mode", pool_ceil))};
}

// Why the block's kernels do not take these arguments; empty if they do.
std::string conv2d_relu_max_pool2d_reason(py::handle input, py::handle weight, py::handle bias,
                                          py::handle stride, py::handle padding,
                                          py::handle dilation, py::handle groups,
                                          py::handle pool_kernel_size, py::handle pool_stride,
                                          py::handle pool_padding, py::handle pool_dilation,
                                          py::handle pool_ceil) {
  const BlockCall call =
      parse_block(input, weight, bias, stride, padding, dilation, groups, pool_kernel_size,
                  pool_stride, pool_padding, pool_dilation, pool_ceil);
  return block_not_native(call.input, call.weight, call.bias, call.arguments);
}

py::dict explain_conv2d_relu_max_pool2d(py::handle input, py::handle weight, py::handle bias,
                                        py::handle stride, py::handle padding, py::handle dilation,
                                        py::handle groups, py::handle pool_kernel_size,
                                        py::handle pool_stride, py::handle pool_padding,
                                        py::handle pool_dilation, py::handle pool_ceil) {
  const char* const op = "conv2d_relu_max_pool2d";
  const auto [x, w, b, arguments] =
      parse_block(input, weight, bias, stride, padding, dilation, groups, pool_kernel_size,
                  pool_stride, pool_padding, pool_dilation, pool_ceil);
  const std::string reason = block_not_native(x, w, b, arguments);
  if (!reason.empty()) return aten_plan(reason);
  const Conv2dReluMaxPool2dProblem problem = block_problem(op, batched(op, x), w, b, arguments);
  if (!x.is_cpu()) return explain_on_cuda(problem, x.device());
  const Conv2dReluMaxPool2dPlan plan =
      plan_conv2d_relu_max_pool2d(problem, active_isa(), torch_thread_pool().threads);
  py::dict result =
      native_plan(algorithm_name(plan.algorithm), plan.isa, plan.vector_lanes, plan.threads);
  result["images_per_chunk"] = plan.images_per_chunk;
  result["rows_per_task"] = plan.rows_per_task;
  result["channels_per_task"] = plan.channels_per_task;
  result["pool_in_registers"] = plan.pool_in_registers;
  result["staged"] = plan.staged;
  result["backward"] = backward_name(plan.backward);
  result["input_backward"] = backward_name(plan.input_backward);
  result["backward_scratch_bytes"] = block_backward_scratch_bytes(problem, plan);
  result["workspace_bytes"] = plan.workspace_bytes;
  result["flops"] = 2 * problem.conv.multiply_adds();
  return result;
}

void empty_cache() {
  release_workspaces();
  release_results();
}

py::dict kernel_call_counts() {
  const KernelCalls& calls = kernel_calls();
  py::dict result;
  result["conv2d"] = calls.conv2d.load();
  result["conv2d_relu"] = calls.conv2d_relu.load();
  result["conv2d_backward"] = calls.conv2d_backward.load();
  result["max_pool2d"] = calls.max_pool2d.load();
  result["max_pool2d_backward"] = calls.max_pool2d_backward.load();
  result["max_pool2d_gather"] = calls.max_pool2d_gather.load();
  result["conv2d_relu_max_pool2d"] = calls.conv2d_relu_max_pool2d.load();
  result["conv2d_relu_max_pool2d_backward"] = calls.conv2d_relu_max_pool2d_backward.load();
  result["gd_step_"] = calls.gd_step.load();
  result["sgd_step_"] = calls.sgd_step.load();
  return result;
}

}  // namespace
}  // namespace cnnkernels

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("conv2d", &cnnkernels::conv2d<false>);
  m.def("conv2d_relu", &cnnkernels::conv2d<true>);
  m.def("max_pool2d", &cnnkernels::max_pool2d);
  m.def("max_pool2d_with_indices", &cnnkernels::max_pool2d_with_indices);
  m.def("conv2d_relu_max_pool2d", &cnnkernels::conv2d_relu_max_pool2d);
  m.def("gd_step_group", &cnnkernels::gd_step_group);
  m.def("sgd_step_group", &cnnkernels::sgd_step_group);
  m.def("config", &cnnkernels::config);
  m.def("explain_conv2d", &cnnkernels::explain_conv2d<false>);
  m.def("explain_conv2d_relu", &cnnkernels::explain_conv2d<true>);
  m.def("explain_max_pool2d", &cnnkernels::explain_max_pool2d);
  m.def("max_pool2d_reason", &cnnkernels::max_pool2d_reason);
  m.def("conv2d_relu_max_pool2d_reason", &cnnkernels::conv2d_relu_max_pool2d_reason);
  m.def("explain_conv2d_relu_max_pool2d", &cnnkernels::explain_conv2d_relu_max_pool2d);
  m.def("kernel_calls", &cnnkernels::kernel_call_counts);
  m.def("set_isa", &cnnkernels::set_isa);
  m.def("set_cuda_conv2d", &cnnkernels::set_cuda_conv2d);
  m.def("poison_workspaces", &cnnkernels::poison_workspaces);
  m.def("empty_cache", &cnnkernels::empty_cache);
}
