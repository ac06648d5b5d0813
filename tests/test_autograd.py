"""The autograd Functions, the operators' own derivatives, and torch.func on both."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any, cast

import pytest
import torch
from conftest import BACKENDS, runs_kernel
from torch import Tensor
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.nn import functional as F

import cnnkernels
from cnnkernels import _backend, _transforms, functional
from cnnkernels.autograd import (
    Conv2dFunction,
    Conv2dReLUFunction,
    Conv2dReLUMaxPool2dFunction,
    MaxPool2dFunction,
)


def random(*size: int) -> Tensor:
    return torch.randn(size, dtype=torch.float64, requires_grad=True)


def distinct(*size: int) -> Tensor:
    """No two elements closer than finite differences can tell apart."""
    count = torch.Size(size).numel()
    return torch.randperm(count).double().div_(8).view(size).requires_grad_()


# Each with its tensors; small, since the checks take a call for each element.
FUNCTIONS: dict[str, tuple[Callable[..., Tensor], Callable[[], tuple[Tensor, ...]]]] = {
    "conv2d": (
        lambda x, w, b: Conv2dFunction.apply(x, w, b, 2, (1, 0), (1, 2), 2),
        lambda: (random(2, 2, 3, 4), random(2, 1, 2, 2), random(2)),
    ),
    "conv2d unbatched": (
        lambda x, w: Conv2dFunction.apply(x, w, None, 1, 1),
        lambda: (random(2, 3, 3), random(2, 2, 2, 2)),
    ),
    "conv2d_relu": (
        lambda x, w, b: Conv2dReLUFunction.apply(x, w, b, 2, (1, 0), (1, 2), 2),
        lambda: (random(2, 2, 3, 4), random(2, 1, 2, 2), random(2)),
    ),
    "conv2d_relu unbatched": (
        lambda x, w: Conv2dReLUFunction.apply(x, w, None, 1, 1),
        lambda: (random(2, 3, 3), random(2, 2, 2, 2)),
    ),
    "max_pool2d": (
        lambda x: MaxPool2dFunction.apply(x, (3, 2), 2, 1, 1, True),
        lambda: (distinct(2, 1, 4, 5),),
    ),
    "max_pool2d unbatched": (
        lambda x: MaxPool2dFunction.apply(x, 2, 1, 0, 2),
        lambda: (distinct(2, 4, 4),),
    ),
    "block": (
        lambda x, w, b: Conv2dReLUMaxPool2dFunction.apply(x, w, b, 1, 1, 1, 1, 2),
        lambda: (random(2, 1, 2, 3), random(2, 1, 2, 2), random(2)),
    ),
    "block unbatched": (
        lambda x, w: Conv2dReLUMaxPool2dFunction.apply(x, w, None, 1, 0, 1, 1, 3, 2, 1),
        lambda: (random(1, 4, 4), random(2, 1, 2, 2)),
    ),
    "functional conv2d": (
        lambda x, w, b: functional.conv2d(x, w, b, 1, "same"),
        lambda: (random(1, 2, 3, 3), random(2, 2, 2, 3), random(2)),
    ),
    "functional conv2d_relu": (
        lambda x, w, b: functional.conv2d_relu(x, w, b, 1, "same"),
        lambda: (random(1, 2, 3, 3), random(2, 2, 2, 3), random(2)),
    ),
    "functional max_pool2d": (
        lambda x: functional.max_pool2d(x, 3, 2, 1),
        lambda: (distinct(2, 1, 4, 5),),
    ),
    "functional block": (
        lambda x, w, b: functional.conv2d_relu_max_pool2d(x, w, b, padding=1),
        lambda: (random(2, 1, 2, 3), random(2, 1, 2, 2), random(2)),
    ),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradcheck(name: str) -> None:
    function, tensors = FUNCTIONS[name]
    assert gradcheck(function, tensors(), check_batched_grad=True)
    if not name.startswith("functional"):
        assert gradcheck(function, tensors(), check_forward_ad=True, check_backward_ad=False)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradgradcheck(name: str) -> None:
    function, tensors = FUNCTIONS[name]
    has_jvp = not name.startswith("functional")
    assert gradgradcheck(function, tensors(), check_fwd_over_rev=has_jvp)


def test_functions_take_defaults_and_names() -> None:
    input, weight = random(1, 2, 6, 6), random(3, 2, 3, 3)
    torch.testing.assert_close(Conv2dFunction.apply(input, weight), F.conv2d(input, weight))
    torch.testing.assert_close(
        Conv2dReLUFunction.apply(input, weight, stride=2), F.relu(F.conv2d(input, weight, stride=2))
    )
    torch.testing.assert_close(
        MaxPool2dFunction.apply(input, kernel_size=3), F.max_pool2d(input, 3)
    )
    torch.testing.assert_close(
        Conv2dReLUMaxPool2dFunction.apply(input, weight, padding=1),
        F.max_pool2d(F.relu(F.conv2d(input, weight, padding=1)), 2),
    )


def test_functions_run_the_kernels() -> None:
    input, weight = random(1, 2, 6, 6), random(3, 2, 3, 3)
    with runs_kernel("conv2d", "conv2d_backward"):
        Conv2dFunction.apply(input, weight).sum().backward()
    with runs_kernel("conv2d_relu", "conv2d_backward"):
        Conv2dReLUFunction.apply(input, weight).sum().backward()
    with runs_kernel("max_pool2d", "max_pool2d_backward"):
        MaxPool2dFunction.apply(input, 2).sum().backward()
    with runs_kernel("conv2d_relu_max_pool2d", "conv2d_relu_max_pool2d_backward"):
        Conv2dReLUMaxPool2dFunction.apply(input, weight).sum().backward()


def test_what_relu_clips_has_no_gradient_and_nan_has() -> None:
    input = torch.full((1, 1, 4, 4), -1.0, dtype=torch.float64)
    input[0, 0, 0, 0] = float("nan")
    ours, theirs = input.clone().requires_grad_(), input.clone().requires_grad_()
    weight = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    Conv2dReLUMaxPool2dFunction.apply(ours, weight).sum().backward()
    F.max_pool2d(F.relu(F.conv2d(theirs, weight)), 2).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad)
    for conv2d_relu in (functional.conv2d_relu, Conv2dReLUFunction.apply):
        ours, theirs = input.clone().requires_grad_(), input.clone().requires_grad_()
        conv2d_relu(ours, weight).sum().backward()
        F.relu(F.conv2d(theirs, weight)).sum().backward()
        torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.fixture(params=[*BACKENDS, "functions"])
def _operators(request: pytest.FixtureRequest) -> Iterator[None]:
    """The backends, and the autograd Functions also where no transform calls for them."""
    if request.param == "functions":
        with _backend.using(cast(_backend.Operators, _transforms)):
            yield
    else:
        with cnnkernels.use_backend(request.param):
            yield


# One network, written on either set of functions.
def _network(conv2d: Any, conv2d_relu: Any, max_pool2d: Any, block: Any) -> Callable[..., Tensor]:
    def network(input: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        hidden = conv2d(input, weight, bias, padding="same")
        # Smooth, so that second derivatives are not all zero.
        hidden = conv2d_relu(torch.tanh(hidden), weight, bias, padding="same")
        hidden = block(torch.tanh(hidden), weight, bias, padding=1)
        return (max_pool2d(hidden, 2, 1) ** 2).sum()

    return network


OURS = _network(
    functional.conv2d,
    functional.conv2d_relu,
    functional.max_pool2d,
    functional.conv2d_relu_max_pool2d,
)
THEIRS = _network(
    F.conv2d,
    lambda *args, **kwargs: F.relu(F.conv2d(*args, **kwargs)),
    F.max_pool2d,
    lambda *args, **kwargs: F.max_pool2d(F.relu(F.conv2d(*args, **kwargs)), 2),
)


def arguments(*batch: int) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.randn(*batch, 1, 2, 4, 4, dtype=torch.float64),
        torch.randn(2, 2, 2, 3, dtype=torch.float64),
        torch.randn(2, dtype=torch.float64),
    )


TRANSFORMS: dict[str, Callable[[Callable[..., Tensor]], Callable[..., Any]]] = {
    "grad": lambda f: grad(f, argnums=(0, 1, 2)),
    "grad of grad": lambda f: grad(
        lambda *t: sum(g.pow(2).sum() for g in grad(f, argnums=(0, 1, 2))(*t)), argnums=(0, 1, 2)
    ),
    "jacfwd": lambda f: jacfwd(f, argnums=(1, 2)),
    "jacrev of jacrev": lambda f: jacrev(jacrev(f, argnums=1), argnums=1),
    "jacfwd of jacrev": lambda f: jacfwd(jacrev(f, argnums=1), argnums=(1, 2)),
    "hessian": lambda f: hessian(f, argnums=2),
    "jvp": lambda f: lambda *t: jvp(f, t, t),
}


@pytest.mark.usefixtures("_operators")
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_torch_func(transform: str) -> None:
    apply = TRANSFORMS[transform]
    tensors = arguments()
    torch.testing.assert_close(apply(OURS)(*tensors), apply(THEIRS)(*tensors))


@pytest.mark.usefixtures("_operators")
@pytest.mark.parametrize("in_dims", [(0, None, None), (None, 0, None), (1, None, -1), (0, 0, 0)])
@pytest.mark.parametrize("transform", ["value", "grad", "grad of grad"])
def test_vmap(transform: str, in_dims: tuple[int | None, ...]) -> None:
    apply = TRANSFORMS.get(transform, lambda f: f)
    tensors = [
        t if dim is None else torch.stack([t, t + 1, t * 2], dim)
        for t, dim in zip(arguments(), in_dims, strict=True)
    ]
    ours = vmap(apply(OURS), in_dims)(*tensors)
    torch.testing.assert_close(ours, vmap(apply(THEIRS), in_dims)(*tensors))


@pytest.mark.usefixtures("_operators")
def test_vmap_over_single_images_and_nothing() -> None:
    images, weight = torch.randn(3, 2, 6, 6), torch.randn(4, 2, 3, 3)
    torch.testing.assert_close(
        vmap(functional.conv2d, (0, None))(images, weight), F.conv2d(images, weight)
    )
    torch.testing.assert_close(
        vmap(functional.conv2d_relu, (0, None))(images, weight), F.relu(F.conv2d(images, weight))
    )
    pooled, indices = vmap(lambda x: functional.max_pool2d(x, 2, return_indices=True))(images)
    torch.testing.assert_close((pooled, indices), F.max_pool2d(images, 2, return_indices=True))
    assert vmap(functional.max_pool2d, (0, None))(images[:0], 2).shape == (0, 2, 3, 3)


@pytest.mark.usefixtures("_operators")
def test_per_sample_gradients() -> None:
    model = torch.nn.Sequential(
        torch.nn.Conv2d(1, 3, 3), torch.nn.ReLU(), torch.nn.MaxPool2d(2), torch.nn.Flatten()
    ).double()
    images = torch.randn(4, 1, 6, 6, dtype=torch.float64)

    def loss(parameters: dict[str, Tensor], image: Tensor) -> Tensor:
        return functional_call(model, parameters, (image.unsqueeze(0),)).square().sum()

    parameters = {name: p.detach() for name, p in model.named_parameters()}
    expected = vmap(grad(loss), (None, 0))(parameters, images)
    cnnkernels.replace_modules(model)
    torch.testing.assert_close(vmap(grad(loss), (None, 0))(parameters, images), expected)


@pytest.mark.usefixtures("_operators")
def test_forward_mode() -> None:
    input, weight, bias = arguments()
    results = []
    for network in (OURS, THEIRS):
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(weight, torch.ones_like(weight))
            results.append(forward_ad.unpack_dual(network(input, dual, bias)))
    torch.testing.assert_close(results[0].primal, results[1].primal)
    torch.testing.assert_close(results[0].tangent, results[1].tangent)


@pytest.mark.usefixtures("_operators")
def test_autocast_under_transforms() -> None:
    input, weight, bias = (t.float() for t in arguments())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = grad(OURS, argnums=1)(input, weight, bias)
        theirs = grad(THEIRS, argnums=1)(input, weight, bias)
    assert ours.dtype is torch.float32
    torch.testing.assert_close(ours, theirs, rtol=0.1, atol=1.0)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("trained", ["input", "weight", "bias", "input and bias"])
def test_double_backward_where_some_are_frozen(trained: str) -> None:
    """As in a gradient penalty on the input of a network that is not trained."""
    sizes = {"input": (1, 2, 6, 6), "weight": (3, 2, 3, 3), "bias": (3,)}
    tensors = {
        name: torch.randn(size, dtype=torch.float64).requires_grad_(name in trained)
        for name, size in sizes.items()
    }
    wanted = [tensor for tensor in tensors.values() if tensor.requires_grad]
    results = []
    for call in (
        functional.conv2d_relu_max_pool2d,
        lambda *t: F.max_pool2d(F.relu(functional.conv2d(*t)), 2),
        lambda *t: F.max_pool2d(functional.conv2d_relu(*t), 2),
        lambda *t: F.max_pool2d(F.relu(F.conv2d(*t)), 2),
    ):
        loss = call(*tensors.values()).square().sum()
        grads = torch.autograd.grad(loss, wanted, create_graph=True)
        results.append(torch.autograd.grad(sum(g.square().sum() for g in grads), wanted))
    torch.testing.assert_close(results[0], results[3])
    torch.testing.assert_close(results[1], results[3])
    torch.testing.assert_close(results[2], results[3])


@pytest.mark.usefixtures("backend")
def test_input_changed_in_place_before_backward_is_an_error() -> None:
    input, weight = random(1, 2, 6, 6), random(3, 2, 3, 3)
    for call in (functional.conv2d, functional.conv2d_relu, functional.conv2d_relu_max_pool2d):
        copy = input * 1
        output = call(copy, weight)
        copy.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            output.sum().backward()


@pytest.mark.usefixtures("backend")
def test_an_output_of_relu_changed_in_place_before_backward_is_an_error() -> None:
    """As torch.relu's: it tells what was clipped."""
    input, weight = random(1, 2, 6, 6), random(3, 2, 3, 3)
    for image in (input, input[0]):
        output = functional.conv2d_relu(image, weight)
        output.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            output.sum().backward()


def test_an_output_of_relu_is_freed_with_its_graph() -> None:
    """A node that kept its own output with its history would never be."""

    class Witness:
        pass

    output, witness = functional.conv2d_relu(random(1, 2, 6, 6), random(3, 2, 3, 3)), Witness()
    assert output.grad_fn is not None
    output.grad_fn.metadata["witness"] = witness
    lives = weakref.ref(witness)
    del output, witness
    assert lives() is None


@pytest.mark.usefixtures("backend")
def test_saved_tensor_hooks_see_the_output_of_relu() -> None:
    input, weight = random(1, 2, 6, 6), random(3, 2, 3, 3)
    expected = torch.autograd.grad(F.relu(F.conv2d(input, weight)).square().sum(), (input, weight))
    packed: list[torch.Size] = []

    def pack(tensor: Tensor) -> Tensor:
        packed.append(tensor.shape)
        return tensor.detach().clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = functional.conv2d_relu(input, weight)
    assert output.shape in packed
    grads = torch.autograd.grad(output.square().sum(), (input, weight))
    torch.testing.assert_close(grads, expected)


@pytest.mark.usefixtures("backend")
def test_compiled_autograd() -> None:
    """A backward graph of saved tensors and arguments that torch._dynamo traces, then reuses."""
    from torch._dynamo import compiled_autograd

    graphs = 0

    def compile_backward(graph: torch.fx.GraphModule) -> Callable[..., Any]:
        nonlocal graphs
        graphs += 1
        return cast(Callable[..., Any], torch.compile(graph, backend="eager"))

    for _ in range(2):
        ours = [tensor.requires_grad_() for tensor in arguments()]
        theirs = [tensor.detach().requires_grad_() for tensor in ours]
        THEIRS(*theirs).backward()
        loss = OURS(*ours)
        with (
            runs_kernel("conv2d_backward", "max_pool2d_backward"),
            compiled_autograd._enable(compile_backward),
        ):
            loss.backward()
        torch.testing.assert_close([t.grad for t in ours], [t.grad for t in theirs])
    assert graphs == 1


def test_operators_pass_opcheck() -> None:
    """Schema, autograd registration, fake tensors and compiled graphs, by torch's own checker."""
    if not cnnkernels.is_native_available():
        # Without a library the operators are compositions, which opcheck has nothing to ask.
        assert torch._C._dispatch_has_kernel_for_dispatch_key(
            "cnnkernels::conv2d", "CompositeImplicitAutograd"
        )
        return
    ops = torch.ops.cnnkernels
    input, weight, bias = random(2, 2, 5, 6), random(4, 2, 2, 3), random(4)
    channels_last = input.detach().float().to(memory_format=torch.channels_last)
    filters = weight.detach().float()
    grad = torch.randn(2, 4, 4, 4)
    conv, pool = ([1], [0], [1], 1), ([2], [2], [0], [1], False)
    output, argmax = ops.max_pool2d_argmax(channels_last, 2)
    pooled, winners = ops.conv2d_relu_max_pool2d_argmax(channels_last, filters, None, *conv, *pool)
    grad_pooled = torch.ones_like(pooled)
    every, some = [True, True, True], [True, False, True]
    for operator, args, kwargs in [
        (ops.conv2d.default, (input, weight, bias), {"padding": [1]}),
        (ops.conv2d.padding, (input, weight, bias), {"padding": "same"}),
        (ops.conv2d.default, (channels_last, filters), {}),
        (ops.conv2d_relu.default, (input, weight, bias), {"padding": [1]}),
        (ops.conv2d_relu.padding, (input, weight, bias), {"padding": "same"}),
        (ops.conv2d_relu.default, (channels_last, filters), {}),
        (ops.conv2d_relu.default, (channels_last, filters[:1]), {}),
        (ops.conv2d_relu.default, (channels_last[:0], filters), {}),
        (ops.conv2d_relu.default, (channels_last[0], filters), {}),
        (ops.conv2d_backward.default, (grad, channels_last, filters, *conv, every), {}),
        (ops.conv2d_backward.default, (grad.double(), input, weight, *conv, some), {}),
        (ops.max_pool2d.default, (input, [2]), {}),
        (ops.max_pool2d_with_indices.default, (input, [3], [2], [1]), {}),
        (ops.max_pool2d_argmax.default, (input, [3], [2], [1]), {}),
        (ops.max_pool2d_backward.default, (output, argmax, input.shape, [2]), {}),
        (ops.max_pool2d_gather.default, (channels_last, argmax, [2]), {}),
        (ops.conv2d_relu_max_pool2d.default, (input, weight, bias), {}),
        (ops.conv2d_relu_max_pool2d.padding, (input, weight, bias), {"padding": "same"}),
        (ops.conv2d_relu_max_pool2d_argmax.default, (input, weight, bias, *conv, *pool), {}),
        (
            ops.conv2d_relu_max_pool2d_backward.default,
            (grad_pooled, channels_last, filters, winners, *conv, *pool, every),
            {},
        ),
    ]:
        torch.library.opcheck(operator, args, kwargs)
    params, grads, buffers = ([torch.randn(3), torch.randn(2, 2)] for _ in range(3))
    torch.library.opcheck(ops.gd_step_.default, (params, grads, 0.1))
    settings = {"weight_decay": 0.1, "momentum": 0.9, "lr": 0.1, "dampening": 0.0}
    flags = {"nesterov": False, "maximize": False, "is_first_step": False}
    torch.library.opcheck(ops.sgd_step_.default, (params, grads, buffers), {**settings, **flags})


@pytest.mark.skipif(BACKENDS == ["torch"], reason="needs the compiled library")
def test_compiled_autograd_takes_nodes_of_one_kind_and_other_sizes() -> None:
    weight = torch.randn(2, 2, 3, 3, requires_grad=True)

    def gradient(size: int) -> Tensor:
        image = torch.ones(size, 2, 12, 12)
        hidden = functional.conv2d_relu(functional.conv2d(image, weight), weight)
        hidden = functional.conv2d_relu_max_pool2d(hidden, weight)
        block = functional.conv2d_relu_max_pool2d(hidden, weight, padding=1)
        return torch.autograd.grad(block.sum(), weight)[0]

    expected = [gradient(size) for size in (2, 3, 4)]
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
        compiled = [gradient(size) for size in (2, 3, 4)]
    torch.testing.assert_close(compiled, expected)


@pytest.mark.skipif(BACKENDS == ["torch"], reason="needs the compiled library")
def test_a_tangent_of_the_bias_is_not_lost() -> None:
    ops, image = torch.ops.cnnkernels, torch.randn(1, 1, 6, 6)
    weight, bias = torch.randn(2, 1, 3, 3), torch.randn(2)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(bias, torch.ones(2))
        for operator in (ops.conv2d, ops.conv2d_relu, ops.conv2d_relu_max_pool2d):
            with pytest.raises(NotImplementedError, match="forward-mode"):
                operator(image, weight, dual)


def test_a_second_backward_finds_nothing_saved(backend: str) -> None:
    image, weight = torch.randn(1, 2, 8, 8), torch.randn(3, 2, 3, 3, requires_grad=True)
    for output in (
        functional.conv2d(image, weight),
        functional.conv2d_relu(image, weight),
        functional.max_pool2d(weight, 2),
        functional.conv2d_relu_max_pool2d(image, weight),
    ):
        output.sum().backward()
        with pytest.raises(RuntimeError, match="second time"):
            output.sum().backward()


def test_transforms_leave_what_no_kernel_takes_to_torch(backend: str) -> None:
    image, weight = torch.randn(1, 1, 300, 300), torch.randn(2, 1, 3, 3)

    def pooled(x: Tensor) -> Tensor:
        return functional.max_pool2d(x, 300).sum()

    def block(x: Tensor) -> Tensor:
        return functional.conv2d_relu_max_pool2d(x, weight, padding=(0, 1100)).sum()

    ours = torch.func.grad(pooled)(image)
    torch.testing.assert_close(ours, torch.func.grad(lambda x: F.max_pool2d(x, 300).sum())(image))
    small = image[..., :20, :20]

    def composed(x: Tensor) -> Tensor:
        return F.max_pool2d(F.relu(F.conv2d(x, weight, padding=(0, 1100))), 2).sum()

    torch.testing.assert_close(torch.func.grad(block)(small), torch.func.grad(composed)(small))


def test_functionalize(backend: str) -> None:
    image, weight = torch.randn(1, 1, 8, 8), torch.randn(2, 1, 3, 3)
    output = torch.func.functionalize(functional.conv2d)(image, weight)
    torch.testing.assert_close(output, F.conv2d(image, weight))
    output = torch.func.functionalize(functional.conv2d_relu)(image, weight)
    torch.testing.assert_close(output, F.relu(F.conv2d(image, weight)))
    assert torch.func.functionalize(functional.max_pool2d)(image, 2).shape == (1, 1, 4, 4)


def test_export_of_a_dilated_pool_with_a_dynamic_height() -> None:
    class Pool(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return functional.max_pool2d(x, 2, dilation=2)

    height = torch.export.Dim("height", min=8, max=64)
    exported = torch.export.export(
        Pool(), (torch.randn(1, 2, 16, 16),), dynamic_shapes={"x": {2: height}}
    )
    image = torch.randn(1, 2, 20, 16)
    torch.testing.assert_close(exported.module()(image), F.max_pool2d(image, 2, dilation=2))
