// Checks of the kernels' scratch memory.
#pragma once

namespace kernel_tests {

// Blocks are aligned, poisoned, kept up to a bound and released.
void check_workspaces();

}  // namespace kernel_tests
