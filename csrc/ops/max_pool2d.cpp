// max_pool2d, its argmax in one byte, and the operators that follow the argmax.
// Their derivatives: autograd.cpp.
#include "ops/max_pool2d.h"

#include "ops/result_memory.h"

namespace cnnkernels {
namespace {

struct Cpu {
  static std::string not_native(const MaxPool2dProblem&) { return ""; }
  static at::Tensor empty(at::IntArrayRef size, at::ScalarType dtype, at::MemoryFormat format,
                          const at::Tensor&) {
    return empty_cpu(size, dtype, format);
  }
  static void forward(const MaxPool2dProblem& problem, const at::Tensor& input,
                      const at::Tensor& output, const at::Tensor& argmax) {
    max_pool2d_forward(problem, active_isa(), torch_thread_pool(), read_data(input),
                       output.mutable_data_ptr(),
                       argmax.defined() ? argmax.mutable_data_ptr() : nullptr);
  }
  static void backward(const MaxPool2dProblem& problem, const at::Tensor& grad_output,
                       const at::Tensor& argmax, const at::Tensor& grad_input) {
    max_pool2d_backward(problem, active_isa(), torch_thread_pool(), read_data(grad_output),
                        read_data(argmax), grad_input.mutable_data_ptr());
  }
  static void gather(const MaxPool2dProblem& problem, const at::Tensor& input,
                     const at::Tensor& argmax, const at::Tensor& values) {
    max_pool2d_gather(problem, torch_thread_pool(), read_data(input), read_data(argmax),
                      values.mutable_data_ptr());
  }
  static void indices(const MaxPool2dProblem& problem, const at::Tensor& argmax,
                      const at::Tensor& indices) {
    max_pool2d_indices(problem, torch_thread_pool(), read_data(argmax),
                       static_cast<int64_t*>(indices.mutable_data_ptr()));
  }
};

}  // namespace

// For all devices: tensors on another one go to ATen.
TORCH_LIBRARY_IMPL(cnnkernels, CompositeExplicitAutograd, m) { MaxPool2dOperators<Cpu>::add_to(m); }

}  // namespace cnnkernels
