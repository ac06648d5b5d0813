// How a pooling lays out its input planes.
#pragma once

#include "kernels/cpu/packed_planes.h"
#include "kernels/max_pool2d.h"

namespace cnnkernels {

// The columns that windows reach, and the border around them.
PackedPlanes packed_pool_input(const MaxPool2dProblem& problem);

}  // namespace cnnkernels
