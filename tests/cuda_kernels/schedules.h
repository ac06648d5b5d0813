// The orders in which the emulator's warps take turns.
#pragma once

#include <string>

#include "cuda_emulator.h"
#include "support.h"

namespace cuda_kernel_tests {

// Runs body() under every order. An error of the emulator is a failure.
template <class Body>
void for_each_schedule(const std::string& context, Body&& body) {
  using Order = cuda_emulator::Schedule::Order;
  const std::pair<const char*, cuda_emulator::Schedule> schedules[] = {
      {"forward", {Order::forward, 0}},
      {"reverse", {Order::reverse, 0}},
      {"shuffled", {Order::shuffled, 1}},
      {"shuffled again", {Order::shuffled, 2}},
  };
  for (const auto& [name, schedule] : schedules) {
    kernel_tests::set_context(context + ", warps " + name);
    cuda_emulator::schedule() = schedule;
    try {
      body();
    } catch (const cuda_emulator::Error& error) {
      kernel_tests::expect(false, error.what());
    }
  }
  cuda_emulator::schedule() = {};
}

inline void use_random_schedule(kernel_tests::Random& random) {
  using Order = cuda_emulator::Schedule::Order;
  constexpr Order kOrders[] = {Order::forward, Order::reverse, Order::shuffled};
  cuda_emulator::schedule() = {kOrders[random.between(0, 2)],
                               static_cast<uint32_t>(random.between(0, 1000))};
}

}  // namespace cuda_kernel_tests
