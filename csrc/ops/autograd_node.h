// A node of the autograd graph that keeps tensors and plain arguments.
//
// torch::autograd::Function keeps what a backward needs as boxed values in a
// hash map and looks its outputs over for views; on small tensors that is a
// large part of a call. Written out, a node costs what torch's own cost. This
// is the only file that knows how torch owns its nodes.
#pragma once

#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/dynamo/compiled_autograd.h>

#include <array>
#include <memory>
#include <optional>
#include <string>
#include <type_traits>
#include <utility>

namespace cnnkernels {

using torch::autograd::variable_list;

// A node for an operator of kInputs differentiable inputs that saves kSaved
// tensors. Derived gives
//   static variable_list backward(const Call&, const variable_list& gradients):
//     the inputs' gradients, undefined where not wanted;
//   Arguments::each_key(arguments, visit): visits every value of the arguments.
//     Compiled autograd caches graphs by them.
template <class Derived, class Arguments, size_t kInputs, size_t kSaved>
class SavingNode : public torch::autograd::Node {
 public:
  struct Call {
    const Arguments& arguments;
    std::array<at::Tensor, kSaved> saved;
    std::array<bool, kInputs> wanted;
  };

  explicit SavingNode(Arguments arguments) : arguments_(std::move(arguments)) {}

  void save(size_t slot, const at::Tensor& tensor) {
    saved_[slot] = torch::autograd::SavedVariable(tensor, is_output_[slot]);
  }

  // An output whose history is this node: set before, and not kept, or the node would own itself.
  void save_output(size_t slot, const at::Tensor& output) {
    is_output_[slot] = true;
    save(slot, output);
  }

  std::string name() const override { return Derived::kName; }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (auto& variable : saved_) variable.reset_data();
  }

  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs& args) const override {
    for (size_t i = 0; i < kSaved; ++i) args.collect(saved_[i], is_output_[i]);
    Arguments::each_key(arguments_, [&](const auto& key) { args.collect(key); });
  }

  // Compiled autograd puts stand-ins into the saved values and takes down a
  // call of `traced`, which it traces later.
  variable_list apply_with_saved(const variable_list& gradients,
                                 torch::dynamo::autograd::SwapSavedVariables& swapped) override {
    namespace dynamo = torch::dynamo::autograd;
    for (auto& variable : saved_) swapped.before(variable);
    Arguments::each_key(arguments_, [&](auto& key) { swapped.before(key); });
    dynamo::PackedArgs packed;
    const Call call = this->call();
    for (const at::Tensor& tensor : call.saved) packed.pack(tensor);
    Arguments::each_key(call.arguments, [&](const auto& key) { packed.pack(key); });
    packed.pack(call.wanted);
    const std::vector<c10::IValue> values = packed.vec();
    std::vector<at::TypePtr> types;
    for (const c10::IValue& value : values) {
      types.push_back(value.isTensor() ? at::TypePtr(at::TensorType::get()) : value.type());
    }
    const auto& compiler = dynamo::getPyCompilerInterface();
    const std::string function =
        compiler->bind_function(swapped.get_py_compiler(), name(), traced, types,
                                /*is_custom_function=*/true);  // numbers the names
    variable_list results = compiler->call_function(
        swapped.get_py_compiler(), "apply_functional", function, gradients, values,
        dynamo::IValuePacker<std::vector<std::optional<torch::autograd::InputMetadata>>>::pack(
            dynamo::get_input_metadata(next_edges())));
    for (auto& variable : saved_) swapped.after(variable);
    Arguments::each_key(arguments_, [&](auto& key) { swapped.after(key); });
    return results;
  }

 private:
  variable_list apply(variable_list&& gradients) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    return Derived::backward(call(), gradients);
  }

  Call call() {
    Call call{arguments_, {}, {}};
    for (size_t i = 0; i < kSaved; ++i) call.saved[i] = saved_[i].unpack(getptr());
    for (size_t i = 0; i < kInputs; ++i) call.wanted[i] = task_should_compute_output(i);
    return call;
  }

  static variable_list traced(const variable_list& gradients,
                              const std::vector<c10::IValue>& values) {
    torch::dynamo::autograd::PackedArgs packed(values);
    Arguments arguments;
    Call call{arguments, {}, {}};
    for (at::Tensor& tensor : call.saved) tensor = packed.unpack<at::Tensor>();
    Arguments::each_key(arguments,
                        [&](auto& key) { key = packed.unpack<std::decay_t<decltype(key)>>(); });
    call.wanted = packed.unpack<std::array<bool, kInputs>>();
    return Derived::backward(call, gradients);
  }

  Arguments arguments_;
  std::array<torch::autograd::SavedVariable, kSaved> saved_;
  std::array<bool, kSaved> is_output_{};
};

// A node between the gradients of its outputs, to be set with set_history, and
// those of `inputs`, in this order. Owned as the torch release owns its nodes.
template <class N, class Arguments, class... Inputs>
auto make_node(Arguments&& arguments, const Inputs&... inputs) {
  using Owner = decltype(torch::autograd::Edge::function);
  const auto make = [&] {
    if constexpr (std::is_same_v<Owner, std::shared_ptr<torch::autograd::Node>>) {
      return std::shared_ptr<N>(new N(std::forward<Arguments>(arguments)),
                                [](N* node) { deleteNode(node); });
    } else {
      return c10::make_intrusive<N>(std::forward<Arguments>(arguments));
    }
  };
  auto node = make();
  node->set_next_edges(torch::autograd::collect_next_edges(inputs...));
  return node;
}

}  // namespace cnnkernels
