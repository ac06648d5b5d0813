#include "kernels/cuda/conv2d_implicit_gemm.cuh"

namespace cnnkernels::cuda {

template Error launch_gemm<ProductsOfParts>(const PassCall& call, const GemmChoice& choice);

}  // namespace cnnkernels::cuda
