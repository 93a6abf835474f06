"""A small network over sets of domains, with its gradient and Adam, in numpy: the same parameters for any number.

Two hidden layers, each mixing a domain's own numbers with the mean over all domains (Zaheer et al., arXiv 1703.06114):
h = relu(x W + mean(x) U + b). Permuting the domains permutes the output. Everything is float32 and deterministic.
"""

from __future__ import annotations

import base64

import numpy as np


class SetNetwork:
    """From [B, K, inputs] to one number a domain, [B, K]. parameters: nine arrays, (W, U, b) a layer."""

    def __init__(self, inputs: int, hidden: int, rng: np.random.Generator):
        sizes = [(inputs, hidden), (hidden, hidden), (hidden, 1)]
        self.parameters: list[np.ndarray] = []
        for depth, (rows, columns) in enumerate(sizes):
            # He initialisation over both paths; the last layer small, so that the output begins near zero.
            scale = np.sqrt(1.0 / rows) * (0.1 if depth == 2 else 1.0)
            own, mean = (rng.normal(0, scale, (rows, columns)).astype(np.float32) for _ in range(2))
            self.parameters += [own, mean, np.zeros(columns, dtype=np.float32)]

    def forward(self, x: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
        """x: float32 [B, K, inputs]. Returns the output, float32 [B, K], and each layer's input for `backward`."""
        inputs = []
        for depth in range(3):
            own, mean, bias = self.parameters[3 * depth : 3 * depth + 3]
            inputs.append(x)
            # One product for all domains of all sets: a stack of small ones costs several times as much.
            each = (x.reshape(-1, x.shape[2]) @ own).reshape(*x.shape[:2], -1)
            x = each + (x.mean(axis=1) @ mean + bias)[:, None]
            if depth < 2:
                x = np.maximum(x, 0.0)
        return x[..., 0], inputs

    def backward(self, inputs: list[np.ndarray], d_out: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
        """Gradients of the parameters, and of x, float32 [B, K, inputs], from that of the output, [B, K]."""
        gradients: list[np.ndarray] = [np.empty(0)] * 9
        d = d_out[..., None]
        for depth in (2, 1, 0):
            x, (own, mean, _) = inputs[depth], self.parameters[3 * depth : 3 * depth + 3]
            d_sum = d.sum(axis=1)
            flat = d.reshape(-1, d.shape[2])
            gradients[3 * depth] = x.reshape(len(flat), -1).T @ flat
            gradients[3 * depth + 1] = x.mean(axis=1).T @ d_sum
            gradients[3 * depth + 2] = d_sum.sum(axis=0)
            d = (flat @ own.T).reshape(x.shape) + (d_sum @ mean.T)[:, None] / np.float32(x.shape[1])
            if depth > 0:
                d = d * (x > 0)
        return gradients, d

    def follow(self, other: SetNetwork, rate: float) -> None:
        """Move all parameters by `rate` of the way to those of `other`."""
        for own, target in zip(self.parameters, other.parameters, strict=True):
            own += np.float32(rate) * (target - own)


class Adam:
    """Adam (Kingma and Ba, arXiv 1412.6980, algorithm 1) on the parameters of a network, in place."""

    def __init__(self, parameters: list[np.ndarray], learning_rate: float):
        self.parameters, self.learning_rate, self.steps = parameters, learning_rate, 0
        self.mean = [np.zeros_like(p) for p in parameters]
        self.square = [np.zeros_like(p) for p in parameters]

    def step(self, gradients: list[np.ndarray]) -> None:
        self.steps += 1
        correction = np.sqrt(1 - 0.999**self.steps) / (1 - 0.9**self.steps)
        rate = np.float32(self.learning_rate * correction)
        for p, g, mean, square in zip(self.parameters, gradients, self.mean, self.square, strict=True):
            mean += np.float32(0.1) * (g - mean)
            square += np.float32(0.001) * (g * g - square)
            p -= rate * mean / (np.sqrt(square) + np.float32(1e-8))


def to_text(array: np.ndarray, dtype: str = "<f4") -> str:
    """The numbers of an array as base64 text: exact if they are of that type, and a third of the size of JSON."""
    return base64.b64encode(np.ascontiguousarray(array, dtype=dtype).tobytes()).decode()


def from_text(text: str, shape: tuple[int, ...], dtype: str = "<f4") -> np.ndarray:
    """What to_text gave, back. Raises ValueError if it is not of that shape."""
    array = np.frombuffer(base64.b64decode(text), dtype=dtype)
    return array.astype(array.dtype.newbyteorder("=")).reshape(shape)
