"""Matrix products in graphs compiled for the CPU, by the fastest kernels that torch has.

For float32 torch calls MKL, which on a processor that is not Intel's takes kernels for vectors half
as long, and is slow on small matrices. oneDNN, which torch has too and takes for bfloat16, reaches
more than twice as much with AVX-512: for 25 products of (10 × 64)(64 × 64) 221 GFLOP/s in the place
of 81, for one of (490 × 576)(576 × 64) 269 and 110 (one thread of an AMD EPYC, torch 2.13).
"""

from __future__ import annotations

import ctypes
import functools
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph

aten = torch.ops.aten

CODE = Path(__file__).with_name("products.h")

# With more numbers on the right each few rows of the left matrix read more than the cache holds.
_MOST_ON_THE_RIGHT = 2**22
# Fewer multiplications are done before a second thread has begun.
_LEAST_SHARED = 2**19
# at::native::cpublas::brgemm of floats
_SYMBOL = "_ZN2at6native7cpublas6brgemmEllllllbPKfS3_Pfb"


@functools.cache
def has_kernels() -> bool:
    """Return whether this torch has the kernels, and this processor the vectors they are for."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        return hasattr(ctypes.CDLL(str(library)), _SYMBOL) and _have_code()
    except OSError:
        return False


@torch.library.custom_op("koi::product", mutates_args=())
def product(left: Tensor, right: Tensor) -> Tensor:
    """Return ``left @ right``, shapes (…, M, K) and (…, K, N).

    >>> left, right = torch.randn(2, 3, 4), torch.randn(2, 4, 5)
    >>> torch.equal(product(left, right), left @ right)
    True
    """
    return left @ right


@product.register_fake
def _(left: Tensor, right: Tensor) -> Tensor:
    return left.new_empty(*left.shape[:-1], right.shape[-1])


def multiply(graph: Graph) -> None:
    """Let those products of a graph that the kernels are for be theirs."""
    copies: dict[Any, Any] = {}
    for node in list(graph.nodes):
        if node.target is aten.addmm.default and not node.kwargs and _fits(*node.args[1:]):
            bias, left, right = node.args
            with graph.inserting_before(node):
                found = graph.call_function(torch.ops.koi.product.default, (left, right))
            found.meta.update(node.meta)
            node.target, node.args = aten.add.Tensor, (found, bias)
        elif node.target in (aten.mm.default, aten.bmm.default) and _fits(*node.args):
            found = node
            node.target = torch.ops.koi.product.default
        else:
            continue
        found.args = tuple(_copied_once(graph, factor, copies) for factor in found.args)


def _copied_once(graph: Graph, node: Any, copies: dict[Any, Any]) -> Any:
    """Return a transposed factor as one copy for all products with it, as of a loop's steps."""
    if node.target is not aten.permute.default or node.meta["val"].stride(-1) == 1:
        return node
    source, order = node.args
    key = source, *order
    if key not in copies:
        with graph.inserting_after(node):
            form: dict[str, Any] = {"memory_format": torch.contiguous_format}
            copies[key] = graph.call_function(aten.clone.default, (node,), form)
        copies[key].meta["val"] = node.meta["val"].contiguous()
    return copies[key]


def _fits(*nodes: Any) -> bool:
    left, right = (node.meta["val"] for node in nodes)
    return (
        left.dtype is torch.float32
        and left.device.type == "cpu"
        and all(type(size) is int and size > 0 for size in (*left.shape, *right.shape))
        and math.prod(right.shape[-2:]) <= _MOST_ON_THE_RIGHT
    )


def _have_code() -> bool:
    """Tell the compiler the code of `product`; return whether it could be told."""
    try:
        from torch._inductor import ir
        from torch._inductor.lowering import register_lowering
        from torch._inductor.utils import parallel_num_threads
    except ImportError:
        return False

    code = CODE.read_text(encoding="utf-8")
    declaration = code[code.index('extern "C"') : code.index(" {\n  const")] + ";"

    class Products(ir.ExternKernelOut):  # type: ignore[misc, unused-ignore]
        """A call of what `CODE` defines, which is written before the first one."""

        def codegen(self, wrapper: Any) -> None:
            if code not in wrapper.src_to_kernel:
                wrapper.src_to_kernel[code] = "koi_products"
                wrapper.define_kernel("koi_products", code, None, False, declaration)
            batch, m, n = [1, *map(int, self.get_size())][-3:]
            tensors: Any = self.inputs
            k = int(tensors[0].get_size()[-1])
            strides = [[0, *map(int, t.get_stride())][-3:-1] for t in tensors]
            shared = batch * m * n * k >= _LEAST_SHARED
            threads = parallel_num_threads() if shared else 1
            given = [
                f"(const float*)({t.get_name()}.data_ptr()) + {int(t.get_layout().offset)}"
                for t in tensors
            ]
            made = f"(float*)({self.get_name()}.data_ptr())"
            numbers = batch, m, n, k, *strides[0], *strides[1], threads
            arguments = ", ".join([*given, made, *map(str, numbers)])
            wrapper.writeline(f"koi_products({arguments});")

    def rows_adjoining(matrices: Any) -> Any:
        found = ir.ExternKernel.realize_input(matrices)
        if isinstance(found.get_layout(), ir.FixedLayout):  # another may still change
            row, step = map(int, found.get_stride()[-2:])
            if step == 1 and row >= int(found.get_size()[-1]):
                return found
        return ir.ExternKernel.require_contiguous(found)

    @register_lowering(torch.ops.koi.product.default, type_promotion_kind=None)
    def lowered(left: Any, right: Any) -> Any:
        size = [*left.get_size()[:-1], right.get_size()[-1]]
        layout = ir.FixedLayout(left.get_device(), left.get_dtype(), size)
        return ir.TensorBox.create(Products(layout, [*map(rows_adjoining, (left, right))]))

    return True
