"""LSTM, GRU and RNN in operations that can be mapped over tasks and compiled.

The formulas are those of torch's documentation of `nn.LSTM`, `nn.GRU` and `nn.RNN`: Hochreiter and
Schmidhuber, *Long Short-Term Memory*, 1997, with a forget gate; Cho et al., arXiv 1406.1078, 2014,
with the reset gate behind the product; Elman, *Finding Structure in Time*, 1990.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.func import vjp
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence

from koi.errors import EngineError
from koi.inner.checks.granted import is_torchs_own

# What goes from step to step: h, and an LSTM's c behind it.
State = tuple[Tensor, ...]
# From the inputs' part of the gates, the state, and the state's weight and bias to the next state.
Step = Callable[[Tensor, State, Tensor, Tensor | None], State]


def map_recurrence(module: nn.Module, *, kernel: bool) -> None:
    """Make the recurrent layers and cells of ``module``, a copy to work on, fit for vmap.

    Torch 2.13 can neither map their kernels over tasks nor trace the layers. Subclasses, and layers
    with a ``forward`` of their own, stay as they are. With ``kernel``, an LSTM in float32 on the
    CPU takes the tasks in turn: oneDNN's kernel for the whole sequence is up to twice as fast as
    products of all tasks at each step. It can neither be compiled nor, in good time,
    differentiated twice.

    >>> layer, mapped, x = nn.GRU(2, 3), nn.GRU(2, 3), torch.randn(5, 4, 2)
    >>> _ = mapped.load_state_dict(layer.state_dict())
    >>> map_recurrence(mapped, kernel=False)
    >>> torch.allclose(mapped(x)[0], layer(x)[0], atol=1e-6)
    True
    """
    for layer in module.modules():
        if is_torchs_own(layer, nn.LSTM, nn.GRU, nn.RNN):
            layer.forward = partial(_sequence, layer, kernel and type(layer) is nn.LSTM)
        elif is_torchs_own(layer, nn.LSTMCell, nn.GRUCell, nn.RNNCell):
            layer.forward = partial(_cell, layer)


def _sequence(layer: Any, kernel: bool, input: Tensor, hx: Any = None) -> tuple[Tensor, Any]:
    """Return the outputs of ``layer``, an LSTM, GRU or RNN, and its last states."""
    if isinstance(input, PackedSequence):
        raise EngineError(
            f"nn.{type(layer).__name__} was given a packed sequence, whose steps differ in size: "
            "pad the sequences and mask the loss, or use vectorize=False and compile=False"
        )
    if input.dim() not in (2, 3):
        raise ValueError(
            f"nn.{type(layer).__name__} was given an input of shape {tuple(input.shape)}: it must "
            "be (T, N, C), with batch_first=True (N, T, C), or (T, C)"
        )
    lstm, batch = layer.mode == "LSTM", 0 if layer.batch_first else 1
    unbatched = input.dim() == 2
    if unbatched:
        input = input.unsqueeze(batch)
    if hx is None:
        count = layer.num_layers * (2 if layer.bidirectional else 1)
        sizes = [layer.proj_size or layer.hidden_size, layer.hidden_size][: 1 + lstm]
        start = [input.new_zeros(count, input.shape[batch], size) for size in sizes]
    else:
        start = [part.unsqueeze(1) if unbatched else part for part in (hx if lstm else [hx])]
    layer.check_forward_args(input, start if lstm else start[0], None)

    weights = [weight for group in layer.all_weights for weight in group]
    if kernel and _has_kernel(layer, input):
        result = LSTMKernel.apply(layer, input, *start, *weights)  # type: ignore[no-untyped-call]
    else:
        result = _composed(layer, input, *start, *weights)
    outputs, last = result[0], tuple(result[1:])
    if unbatched:
        outputs, last = outputs.squeeze(batch), tuple(part.squeeze(1) for part in last)
    return outputs, last if lstm else last[0]


def _composed(layer: Any, input: Tensor, *tensors: Tensor) -> State:
    """Return the outputs of ``layer`` and its last states, in plain operations.

    Args:
        layer: the LSTM, GRU or RNN, of which the settings count.
        input: shape (T, N, C), or (N, T, C) with ``batch_first``.
        tensors: the initial states, shape (layers · directions, N, H), and the weights, in the
            order of ``layer.all_weights``.
    """
    lstm, size = layer.mode == "LSTM", len(layer.all_weights[0])
    weights = tensors[1 + lstm :]
    outputs, *start = _lowered(lstm and not layer.proj_size, [input, *tensors[: 1 + lstm]])
    if layer.batch_first:
        outputs = outputs.transpose(0, 1)
    ends: list[State] = []
    for depth in range(layer.num_layers):
        if depth > 0:
            outputs = F.dropout(outputs, layer.dropout, layer.training)
        directions = []
        for backwards in (False, True)[: 1 + layer.bidirectional]:
            number = len(ends)
            state = tuple(part[number] for part in start)
            own = weights[number * size : (number + 1) * size]
            steps, end = _steps(layer, outputs, state, own, backwards)
            directions.append(steps)
            ends.append(end)
        outputs = torch.cat(directions, -1) if layer.bidirectional else directions[0]
    if layer.batch_first:
        outputs = outputs.transpose(0, 1)
    return outputs, *[torch.stack(parts) for parts in zip(*ends, strict=True)]


def _steps(
    layer: Any, inputs: Tensor, state: State, weights: Sequence[Tensor], backwards: bool
) -> tuple[Tensor, State]:
    """Return the outputs of one layer in one direction, in their order, and the state at its end.

    Args:
        layer: the LSTM, GRU or RNN.
        inputs: shape (T, N, C).
        state: shape (N, H) each.
        weights: those of this layer and direction, as in ``layer.all_weights``.
        backwards: from the last input to the first.
    """
    projection = weights[-1] if layer.proj_size else None
    w_ih, w_hh, *biases = weights[:-1] if layer.proj_size else weights
    given, bias = _given(layer.mode, inputs, w_ih, biases)
    outputs, step = [], _STEPS[layer.mode]
    for row in given.unbind()[::-1] if backwards else given.unbind():
        state = step(row, state, w_hh, bias)
        if projection is not None:
            state = F.linear(state[0], projection), *state[1:]
        outputs.append(state[0])
    return torch.stack(outputs[::-1] if backwards else outputs), state


def _cell(layer: Any, input: Tensor, hx: Any = None) -> Any:
    """Return the next state of ``layer``, an LSTMCell, GRUCell or RNNCell."""
    mode = _CELLS.get(type(layer)) or f"RNN_{layer.nonlinearity.upper()}"
    shape = *input.shape[:-1], layer.hidden_size
    if hx is None:
        start = [input.new_zeros(shape)] * (2 if mode == "LSTM" else 1)
    else:
        start = list(hx) if mode == "LSTM" else [hx]
    if input.dim() not in (1, 2) or any(part.shape != shape for part in start):
        raise RuntimeError(
            f"{type(layer).__name__} was given an input of shape {tuple(input.shape)} and a state "
            f"of shape {tuple(start[0].shape)}: they must be (N, {layer.input_size}) and (N, "
            f"{layer.hidden_size}), or both without N"
        )
    input, *start = _lowered(False, [input, *start])
    biases = [layer.bias_ih, layer.bias_hh] if layer.bias else []
    given, bias = _given(mode, input, layer.weight_ih, biases)
    state = _STEPS[mode](given, tuple(start), layer.weight_hh, bias)
    return state if mode == "LSTM" else state[0]


def _given(
    mode: str, inputs: Tensor, weight: Tensor, biases: Sequence[Tensor]
) -> tuple[Tensor, Tensor | None]:
    """Return the inputs' part of the gates, and the bias that is left for the state's part."""
    if not biases:
        return F.linear(inputs, weight), None
    if mode == "GRU":  # has a gate between the two
        return F.linear(inputs, weight, biases[0]), biases[1]
    return F.linear(inputs, weight, biases[0] + biases[1]), None


def _lowered(one_kernel: bool, tensors: list[Tensor]) -> list[Tensor]:
    """Return input and state in the precision of autocast, where torch's own layer has them so.

    On the CPU an LSTM without projections is one kernel, which is all in the lower precision; of
    the others, only the products are.
    """
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device) or (device == "cpu" and not one_kernel):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return [t if t.dtype == torch.float64 else t.to(dtype) for t in tensors]


def _lstm(given: Tensor, state: State, weight: Tensor, bias: Tensor | None) -> State:
    h, c = state
    i, f, g, o = (given + F.linear(h, weight, bias)).chunk(4, -1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def _gru(given: Tensor, state: State, weight: Tensor, bias: Tensor | None) -> State:
    (h,) = state
    r, z, n = given.chunk(3, -1)
    r_h, z_h, n_h = F.linear(h, weight, bias).chunk(3, -1)
    n = (n + (r + r_h).sigmoid() * n_h).tanh()
    return (n + (z + z_h).sigmoid() * (h - n),)


def _elman(
    nonlinearity: Callable[[Tensor], Tensor],
    given: Tensor,
    state: State,
    weight: Tensor,
    bias: Tensor | None,
) -> State:
    return (nonlinearity(given + F.linear(state[0], weight, bias)),)


# by what torch's layers have as their ``mode``
_STEPS: dict[str, Step] = {
    "LSTM": _lstm,
    "GRU": _gru,
    "RNN_TANH": partial(_elman, torch.tanh),
    "RNN_RELU": partial(_elman, torch.relu),
}
_CELLS = {nn.LSTMCell: "LSTM", nn.GRUCell: "GRU"}


def _has_kernel(layer: Any, input: Tensor) -> bool:
    """Return whether torch has one kernel for all that an LSTM does with ``input``, in float32.

    Not with dropout, of which `LSTMKernel.backward` would draw another.
    """
    return (
        input.device.type == "cpu"
        and input.dtype == torch.float32
        and not layer.proj_size
        and not (layer.training and layer.dropout)
        and not torch.is_autocast_enabled("cpu")
        and torch.backends.mkldnn.is_available()
    )


class LSTMKernel(Function):
    """Torch's own LSTM, whose vmap is a loop over the tasks."""

    @staticmethod
    def forward(layer: Any, input: Tensor, h: Tensor, c: Tensor, *weights: Tensor) -> State:
        """Return what `_composed` does."""
        result: State = torch.lstm(
            input,
            (h, c),
            weights,
            layer.bias,
            layer.num_layers,
            layer.dropout,
            layer.training,
            layer.bidirectional,
            layer.batch_first,
        )
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: State) -> None:  # noqa: ARG004
        """Keep the inputs."""
        ctx.layer, *tensors = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        """Return the gradients; for a loss that takes gradients itself, inside of vmap."""
        forward = partial(_composed, ctx.layer)
        pull_back: Callable[[State], State] = vjp(forward, *ctx.saved_tensors)[1]
        return None, *pull_back(grads)

    @staticmethod
    def vmap(
        info: Any, dims: tuple[int | None, ...], layer: Any, *tensors: Tensor
    ) -> tuple[State, tuple[int, ...]]:
        """Return the results of all tasks, which are along the first dimension."""
        size = info.batch_size
        rows = [
            [tensor] * size if dim is None else tensor.unbind(dim)
            for tensor, dim in zip(tensors, dims[1:], strict=True)
        ]
        each = [LSTMKernel.forward(layer, *row) for row in zip(*rows, strict=True)]
        return tuple(torch.stack(parts) for parts in zip(*each, strict=True)), (0, 0, 0)
