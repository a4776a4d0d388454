"""Ranking losses and their gradients over jagged lists, in one pass."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from rankernel import _C, backends, reference
from rankernel.listwise import KINDS, REDUCTIONS, Settings, kind_named, settings_of
from rankernel.ops import _checks

_NAMES = tuple(KINDS)
_OFFSET_DTYPES = (torch.int64, torch.int32)

_checks.LIBRARY.define(
    "listwise_loss(Tensor scores, Tensor labels, Tensor offsets, Tensor? where, int kind, int reduction, "
    "float[] settings, SymInt seed) -> (Tensor, Tensor)"
)


def listwise_loss(
    scores: torch.Tensor,
    labels: torch.Tensor,
    offsets: torch.Tensor,
    kind: str,
    *,
    where: torch.Tensor | None = None,
    reduction: str | None = None,
    convention: str | None = None,
    seed: int = 0,
    **parameters: Any,
) -> torch.Tensor:
    """A ranking loss over jagged lists; its gradient is computed in the same pass and kept, one float an item.

    The kinds, their formulas, parameters, published defaults and conventions are in the table of the README and in
    :data:`rankernel.listwise.KINDS`. Mathematics is float32 whatever the scores are, sums are float64 on the CPU, and
    memory is linear in the number of items. Ranks go from the highest down, the lower index first among equals, and
    weights made of ranks have no gradient. A list contributes 0, with zero gradients, and is left out of the mean if it
    has fewer than two valid items, no pair or no positive that the kind needs, or (unless the labels are a teacher's
    scores: ``soft_ranknet``, ``kl_distillation``, ``margin_mse``) labels that are all equal.

    Args:
        scores: [n], float32, bfloat16 or float16; the higher the better. Differentiable, once.
        labels: [n], any real dtype; the higher the better. Relevance grades; positives are above 0.
        offsets: [B + 1] int64 or int32, list l is ``offsets[l]:offsets[l + 1]``. Rising, within [0, n]; checked on CPU.
        kind: ``"ranknet"``, ``"listmle"``, ``"approx_ndcg"``, ...
        where: [n] bool, False for items to leave out. These may hold anything, NaN included; their gradient is 0.
        reduction: ``"mean"`` over lists that contribute, ``"sum"``, ``"none"`` (one loss a list), or ``"pair_mean"``
            (pair kinds: the sum over all lists divided by the number of all pairs). None: the convention's, else mean.
        convention: ``"allrank"``, ``"rax"`` or ``"tfr"``: log base, temperature, ties and reduction of that library.
        seed: from 0 to 2^63 - 1, of ``pg_rank``, and of ``listmle`` with shuffled ties; list l draws with ``seed + l``.
        **parameters: of the kind, such as ``sigma``, ``temperature``, ``k``.

    Returns:
        float32 scalar, or [B] for ``reduction="none"`` (float64 for float64 scores, which run the reference).

    Raises:
        ValueError: shapes, devices, offsets, names or numbers that do not fit, naming the argument.
        TypeError: a wrong dtype.
    """
    chosen = kind_named(kind)
    if not torch.compiler.is_compiling() and not 0 <= seed < 2**63:  # in a graph it may not be known yet
        raise ValueError(f"seed: expected an integer from 0 to 2^63 - 1, got {seed}")
    reduction_index, settings = settings_of(chosen, reduction, convention, parameters)
    arguments = (scores, labels, offsets, where, chosen.index, reduction_index, settings, seed)
    if torch.compiler.is_compiling() or type(scores) not in _PLAIN:
        return torch.ops.rankernel.listwise_loss(*arguments)[0]
    # The way through the dispatcher costs as much again as a batch of 64 short lists.
    return _Eager.apply(*arguments) if scores.requires_grad else _forward(*arguments)[0]


_PLAIN = (torch.Tensor, torch.nn.Parameter)  # no fake tensor or other subclass


def _check(scores: torch.Tensor, labels: torch.Tensor, offsets: torch.Tensor, where: torch.Tensor | None) -> None:
    if not scores.dtype.is_floating_point:
        raise TypeError(f"scores: expected a floating-point tensor, got {scores.dtype}")
    if labels.dtype.is_complex:
        raise TypeError(f"labels: expected real numbers, got {labels.dtype}")
    if offsets.dtype not in _OFFSET_DTYPES:
        raise TypeError(f"offsets: expected int64 or int32, got {offsets.dtype}")
    if scores.dim() != 1:
        raise ValueError(f"scores: expected 1 dimension, got shape {list(scores.shape)}")
    if offsets.dim() != 1 or offsets.numel() == 0:
        raise ValueError(f"offsets: expected shape [lists + 1], got {list(offsets.shape)}")
    if where is not None and where.dtype != torch.bool:
        raise TypeError(f"where: expected torch.bool, got {where.dtype}")
    for name, tensor in (("labels", labels), ("where", where), ("offsets", offsets)):
        if tensor is None:
            continue
        if name != "offsets" and tensor.shape != scores.shape:
            raise ValueError(f"{name}: expected the shape of scores, {list(scores.shape)}, got {list(tensor.shape)}")
        if tensor.device != scores.device:
            raise ValueError(f"{name}: expected the device of scores, {scores.device}, got {tensor.device}")


def _why_no_kernel(scores: torch.Tensor, kind: int, implementation: str) -> str | None:
    if why_not := _checks.why_no_kernel_of(implementation, scores):
        return why_not
    if scores.numel() >= 2**31:
        return "kernels count up to 2^31 - 1 items"
    covered = _NAMES if implementation == "cpu" else _covered_on_gpu(implementation)
    return None if _NAMES[kind] in covered else f"{implementation} has no kernel for kind {_NAMES[kind]!r} yet"


@functools.cache
def _covered_on_gpu(implementation: str) -> frozenset[str]:
    if implementation == "cuda":
        extension = _checks.gpu_kernels("listwise_loss", "cuda")
        return frozenset(_NAMES[index] for index in extension.covered_kinds())
    return frozenset(_checks.gpu_kernels("listwise_loss", "triton").KINDS_COVERED)


def _forward(
    scores: torch.Tensor,
    labels: torch.Tensor,
    offsets: torch.Tensor,
    where: torch.Tensor | None,
    kind: int,
    reduction: int,
    settings: Sequence[float],
    seed: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    _check(scores, labels, offsets, where)
    implementation = backends.implementation_for(scores)
    if backends.native_refused("listwise_loss", _why_no_kernel(scores, kind, implementation), implementation):
        return _in_pytorch(scores, labels, offsets, where, kind, reduction, settings, seed)
    scores, labels = scores.contiguous(), labels.to(torch.float32).contiguous()
    offsets = offsets.to(torch.int64).contiguous()
    where = None if where is None else where.contiguous()
    if implementation == "triton":
        kernels = _checks.gpu_kernels("listwise_loss", "triton")
        with torch.cuda.device(scores.device):
            return kernels.listwise_loss(
                scores, labels, offsets, where, _NAMES[kind], REDUCTIONS[reduction], Settings(*settings), seed
            )
    num_lists = offsets.numel() - 1
    loss = scores.new_empty(() if reduction else (num_lists,), dtype=torch.float32)
    grad = scores.new_empty(scores.shape, dtype=torch.float32)
    inputs = (scores.data_ptr(), labels.data_ptr(), 0 if where is None else where.data_ptr(), offsets.data_ptr())
    outputs = (loss.data_ptr(), grad.data_ptr())
    sizes, dtype = (scores.numel(), num_lists), _checks.NATIVE_DTYPES[scores.dtype]
    if implementation == "cuda":
        extension = _checks.gpu_kernels("listwise_loss", "cuda")
        with torch.cuda.device(scores.device):
            size = extension.listwise_loss_workspace(sizes, kind, settings)
            workspace = scores.new_empty(size, dtype=torch.uint8)
            stream = torch.cuda.current_stream().cuda_stream
            status = extension.listwise_loss(
                dtype, inputs, sizes, (kind, reduction), settings, seed, outputs, workspace.data_ptr(), stream
            )
        torch.cuda.check_error(status)
    elif _C.listwise_loss(
        backends.isa_level(), dtype, inputs, sizes, (kind, reduction), settings, seed, outputs, torch.get_num_threads()
    ):
        _bad_offsets(offsets, scores)
    return loss, grad


def _bad_offsets(offsets: torch.Tensor, scores: torch.Tensor) -> None:
    raise ValueError(f"offsets: expected rising positions from 0 to {scores.numel()}, got {offsets.tolist()}")


def _in_pytorch(
    scores: torch.Tensor,
    labels: torch.Tensor,
    offsets: torch.Tensor,
    where: torch.Tensor | None,
    kind: int,
    reduction: int,
    settings: Sequence[float],
    seed: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    bounds = offsets.tolist()
    if bounds != sorted(bounds) or bounds[0] < 0 or bounds[-1] > scores.numel():
        _bad_offsets(offsets, scores)

    def loss_and_grad() -> tuple[torch.Tensor, torch.Tensor]:
        wide = scores.detach().to(torch.promote_types(scores.dtype, torch.float32)).requires_grad_()
        loss = reference.listwise_loss(
            wide, labels, offsets, where, _NAMES[kind], REDUCTIONS[reduction], Settings(*settings), seed
        )
        return loss.detach(), torch.autograd.grad(loss.sum(), wide)[0]

    # Inside an op PyTorch has autograd switched off for the thread, in ways that no public call undoes.
    with ThreadPoolExecutor(max_workers=1) as elsewhere:
        return elsewhere.submit(loss_and_grad).result()


def _fake(
    scores: torch.Tensor, labels: torch.Tensor, offsets: torch.Tensor, where: Any, kind: int, reduction: int, *_: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    wide = torch.promote_types(scores.dtype, torch.float32)
    shape = () if reduction else (offsets.shape[0] - 1,)
    return scores.new_empty(shape, dtype=wide), scores.new_empty(scores.shape, dtype=wide)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    _save(ctx, inputs, output[1])


def _save(ctx: Any, inputs: tuple[Any, ...], grad: torch.Tensor) -> None:
    scores, _, offsets, _, _, reduction, _, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(grad, offsets)
    ctx.per_list, ctx.dtype = reduction == 0, scores.dtype


def _autograd(ctx: Any, grad_loss: torch.Tensor | None, *_: Any) -> tuple[torch.Tensor | None, ...]:
    if grad_loss is None:
        return (None,) * 8
    grad, offsets = ctx.saved_tensors
    if ctx.per_list:
        # The list of every item; those before the first list or after the last have gradient 0 whatever they meet.
        position = torch.arange(grad.shape[0], device=grad.device, dtype=offsets.dtype)
        number = torch.searchsorted(offsets[1:], position, right=True).clamp(max=max(offsets.shape[0] - 2, 0))
        grad_loss = grad_loss[number] if offsets.shape[0] > 1 else grad_loss.new_zeros(grad.shape)
    return ((grad * grad_loss).to(ctx.dtype),) + (None,) * 7


class _Eager(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> torch.Tensor:
        loss, grad = _forward(*inputs)
        _save(ctx, inputs, grad)
        return loss

    backward = staticmethod(_autograd)


_checks.LIBRARY.impl("listwise_loss", _forward, "CompositeExplicitAutograd")
torch.library.register_fake("rankernel::listwise_loss", _fake, lib=_checks.LIBRARY)
torch.library.register_autograd(
    "rankernel::listwise_loss", _autograd, setup_context=_setup_context, lib=_checks.LIBRARY
)
