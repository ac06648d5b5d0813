// Checks of the conversions between 16-bit floats and float.
#pragma once

namespace kernel_tests {

// Every value widens to what its bits say, and floats narrow to the nearest.
void check_conversions();

}  // namespace kernel_tests
