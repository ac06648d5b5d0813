"""The layers by hand: explicit sums in float64, for one image, without torch.

These functions are the judge of the tutorial's tables. They are written to be read and checked
on paper, and are far too slow for anything else.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]


def output_size(size: int, kernel: int, stride: int = 1, padding: int = 0) -> int:
    """How many positions a window of ``kernel`` pixels has along ``size`` pixels."""
    return (size + 2 * padding - kernel) // stride + 1


def conv2d(
    image: ArrayLike,
    weight: ArrayLike,
    bias: ArrayLike | None = None,
    stride: int = 1,
    padding: int = 0,
) -> Array:
    """Convolution of one image.

    Args:
        image: shape (channels, height, width).
        weight: shape (filters, channels, kernel height, kernel width).
        bias: shape (filters,), or None.
        stride: how many pixels the window moves at a time.
        padding: how many rows and columns of zeros surround the image.

    Returns:
        Shape (filters, output height, output width).
    """
    weights = np.asarray(weight, dtype=np.float64)
    padded = _pad(image, padding)
    filters, _, kernel_height, kernel_width = weights.shape
    height = output_size(padded.shape[1], kernel_height, stride)
    width = output_size(padded.shape[2], kernel_width, stride)
    output = np.zeros((filters, height, width))
    for k in range(filters):
        for row in range(height):
            for col in range(width):
                top, left = row * stride, col * stride
                window = padded[:, top : top + kernel_height, left : left + kernel_width]
                output[k, row, col] = np.sum(window * weights[k])
    if bias is not None:
        output += np.asarray(bias, dtype=np.float64)[:, None, None]
    return output


def conv2d_backward(
    grad_output: Array, image: ArrayLike, weight: ArrayLike
) -> tuple[Array, Array, Array]:
    """Gradients of a convolution with stride 1 and no padding.

    Every output is a sum of products pixel · weight, so its gradient flows to each pixel times
    the weight, to each weight times the pixel, and to the bias unchanged.

    Returns:
        The gradients of image, weight and bias, in the shapes of these.
    """
    images = np.asarray(image, dtype=np.float64)
    weights = np.asarray(weight, dtype=np.float64)
    grad_image, grad_weight = np.zeros_like(images), np.zeros_like(weights)
    _, _, kernel_height, kernel_width = weights.shape
    for k, row, col in np.ndindex(*grad_output.shape):
        rows, cols = slice(row, row + kernel_height), slice(col, col + kernel_width)
        gradient = grad_output[k, row, col]
        grad_image[:, rows, cols] += gradient * weights[k]
        grad_weight[k] += gradient * images[:, rows, cols]
    return grad_image, grad_weight, grad_output.sum(axis=(1, 2))


def max_pool2d(image: ArrayLike, height: int, width: int) -> Array:
    """The largest number of each ``height`` × ``width`` window, windows side by side.

    Args:
        image: shape (channels, rows, columns).
        height: rows of a window.
        width: columns of a window.

    Returns:
        Shape (channels, rows // height, columns // width).
    """
    pixels = np.asarray(image, dtype=np.float64)
    channels, rows, cols = pixels.shape
    output = np.zeros((channels, rows // height, cols // width))
    for c, row, col in np.ndindex(*output.shape):
        top, left = row * height, col * width
        output[c, row, col] = pixels[c, top : top + height, left : left + width].max()
    return output


def max_pool2d_backward(grad_output: Array, image: Array, height: int, width: int) -> Array:
    """Gradient of :func:`max_pool2d`: only the first largest pixel of a window receives it."""
    grad_image = np.zeros_like(image)
    for c, row, col in np.ndindex(*grad_output.shape):
        top, left = row * height, col * width
        window = image[c, top : top + height, left : left + width]
        down, right = np.unravel_index(np.argmax(window), window.shape)
        grad_image[c, top + down, left + right] += grad_output[c, row, col]
    return grad_image


def relu(values: Array) -> Array:
    """Negative numbers become zero."""
    return np.maximum(values, 0.0)


def _pad(image: ArrayLike, padding: int) -> Array:
    pixels = np.asarray(image, dtype=np.float64)
    return np.pad(pixels, ((0, 0), (padding, padding), (padding, padding)))
