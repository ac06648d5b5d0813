// Makes a library of the CUDA operators with emulated kernels, which registers them for CPU
// tensors: loaded beside the package's own, it takes these over. It counts for itself which kernels
// ran.
#include <ATen/record_function.h>
#include <torch/library.h>

#include "ops/arguments.h"

namespace cnnkernels {

namespace {

// Where operators are observed the optimizers' steps go through the dispatcher, as those of CUDA
// tensors do.
std::unique_ptr<at::ObserverContext> observe(const at::RecordFunction&) { return nullptr; }
const auto observer = at::addGlobalCallback(at::RecordFunctionCallback(observe));

}  // namespace

TORCH_LIBRARY(cnnkernels_emulated, m) {
  m.def("conv2d_calls", [] { return kernel_calls().conv2d.load(); });
  m.def("conv2d_relu_calls", [] { return kernel_calls().conv2d_relu.load(); });
  m.def("conv2d_backward_calls", [] { return kernel_calls().conv2d_backward.load(); });
  m.def("conv2d_relu_max_pool2d_calls",
        [] { return kernel_calls().conv2d_relu_max_pool2d.load(); });
  m.def("conv2d_relu_max_pool2d_backward_calls",
        [] { return kernel_calls().conv2d_relu_max_pool2d_backward.load(); });
  m.def("max_pool2d_calls", [] { return kernel_calls().max_pool2d.load(); });
  m.def("max_pool2d_backward_calls", [] { return kernel_calls().max_pool2d_backward.load(); });
  m.def("max_pool2d_gather_calls", [] { return kernel_calls().max_pool2d_gather.load(); });
  m.def("gd_step__calls", [] { return kernel_calls().gd_step.load(); });
  m.def("sgd_step__calls", [] { return kernel_calls().sgd_step.load(); });
}

}  // namespace cnnkernels
