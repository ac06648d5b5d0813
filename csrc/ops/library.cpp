// The operators' schemas. Kernels register in the file of their operator; the
// Python fallback defines the same schemas when there is no library.
#include <torch/library.h>

TORCH_LIBRARY(cnnkernels, m) {
  m.def(
      "conv2d(Tensor input, Tensor weight, Tensor? bias=None, int[2] stride=1, int[2] padding=0, "
      "int[2] dilation=1, int groups=1) -> Tensor");
  m.def(
      "conv2d.padding(Tensor input, Tensor weight, Tensor? bias=None, int[2] stride=1, "
      "str padding=\"valid\", int[2] dilation=1, int groups=1) -> Tensor");
  m.def(
      "conv2d_relu(Tensor input, Tensor weight, Tensor? bias=None, int[2] stride=1, "
      "int[2] padding=0, int[2] dilation=1, int groups=1) -> Tensor");
  m.def(
      "conv2d_relu.padding(Tensor input, Tensor weight, Tensor? bias=None, int[2] stride=1, "
      "str padding=\"valid\", int[2] dilation=1, int groups=1) -> Tensor");
  m.def(
      "conv2d_backward(Tensor grad_output, Tensor input, Tensor weight, int[2] stride, "
      "int[2] padding, int[2] dilation, int groups, bool[3] output_mask) "
      "-> (Tensor, Tensor, Tensor)");

  m.def(
      "max_pool2d(Tensor input, int[2] kernel_size, int[2] stride=[], int[2] padding=0, "
      "int[2] dilation=1, bool ceil_mode=False) -> Tensor");
  m.def(
      "max_pool2d_with_indices(Tensor input, int[2] kernel_size, int[2] stride=[], "
      "int[2] padding=0, int[2] dilation=1, bool ceil_mode=False) -> (Tensor, Tensor)");
  m.def(
      "max_pool2d_argmax(Tensor input, int[2] kernel_size, int[2] stride=[], int[2] padding=0, "
      "int[2] dilation=1, bool ceil_mode=False) -> (Tensor, Tensor)");
  m.def(
      "max_pool2d_backward(Tensor grad_output, Tensor argmax, SymInt[] input_size, "
      "int[2] kernel_size, int[2] stride=[], int[2] padding=0, int[2] dilation=1, "
      "bool ceil_mode=False) -> Tensor");
  m.def(
      "max_pool2d_gather(Tensor input, Tensor argmax, int[2] kernel_size, int[2] stride=[], "
      "int[2] padding=0, int[2] dilation=1, bool ceil_mode=False) -> Tensor");

  m.def(
      "conv2d_relu_max_pool2d(Tensor input, Tensor weight, Tensor? bias=None, int[2] stride=1, "
      "int[2] padding=0, int[2] dilation=1, int groups=1, *, int[2] pool_kernel_size=2, "
      "int[2] pool_stride=[], int[2] pool_padding=0, int[2] pool_dilation=1, "
      "bool pool_ceil_mode=False) -> Tensor");
  m.def(
      "conv2d_relu_max_pool2d.padding(Tensor input, Tensor weight, Tensor? bias=None, "
      "int[2] stride=1, str padding=\"valid\", int[2] dilation=1, int groups=1, *, "
      "int[2] pool_kernel_size=2, int[2] pool_stride=[], int[2] pool_padding=0, "
      "int[2] pool_dilation=1, bool pool_ceil_mode=False) -> Tensor");
  m.def(
      "conv2d_relu_max_pool2d_argmax(Tensor input, Tensor weight, Tensor? bias, int[2] stride, "
      "int[2] padding, int[2] dilation, int groups, int[2] pool_kernel_size, "
      "int[2] pool_stride, int[2] pool_padding, int[2] pool_dilation, bool pool_ceil_mode) "
      "-> (Tensor, Tensor)");
  m.def(
      "conv2d_relu_max_pool2d_backward(Tensor grad_output, Tensor input, Tensor weight, "
      "Tensor argmax, int[2] stride, int[2] padding, int[2] dilation, int groups, "
      "int[2] pool_kernel_size, int[2] pool_stride, int[2] pool_padding, int[2] pool_dilation, "
      "bool pool_ceil_mode, bool[3] output_mask) -> (Tensor, Tensor, Tensor)");

  m.def("gd_step_(Tensor(a!)[] params, Tensor[] grads, float lr) -> ()");
  m.def("gd_step_.tensor_lr(Tensor(a!)[] params, Tensor[] grads, Tensor lr) -> ()");
  m.def(
      "sgd_step_(Tensor(a!)[] params, Tensor(b!)[] grads, Tensor(c!)[] momentum_buffers, *, "
      "float weight_decay, float momentum, float lr, float dampening, bool nesterov, "
      "bool maximize, bool is_first_step, Tensor? grad_scale=None, Tensor? found_inf=None) -> ()");
  m.def(
      "sgd_step_.tensor_lr(Tensor(a!)[] params, Tensor(b!)[] grads, Tensor(c!)[] momentum_buffers, "
      "*, float weight_decay, float momentum, Tensor lr, float dampening, bool nesterov, "
      "bool maximize, bool is_first_step, Tensor? grad_scale=None, Tensor? found_inf=None) -> ()");
}
