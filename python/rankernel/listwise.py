"""The kinds of :func:`rankernel.listwise_loss`: parameters, published defaults, and whose conventions a preset follows.

Every kind reads its numbers from one :class:`Settings`, which is also what the native code and the Triton kernels get.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import NamedTuple

import torch

__all__ = ["CONVENTIONS", "KINDS", "REDUCTIONS", "Kind", "Settings", "settings_of"]

REDUCTIONS = ("none", "sum", "mean", "pair_mean")
"""The positions are those of ``Reduction`` in csrc/listwise_loss.h."""
CONVENTIONS = ("allrank", "rax", "tfr")


class Settings(NamedTuple):
    """Numbers of one call, in the order of ``ListwiseSettings`` in csrc/listwise_loss.h; each kind uses a few.

    Attributes:
        sigma: multiplies score differences (pair kinds), swaps (groco) or scores (soft_topk).
        temperature: divides scores.
        unit: multiplies the loss; 1 / ln 2 counts it in bits.
        k: only the best k count; 0 for all.
        mu: weight of ndcg_loss2 in ndcg_loss2pp.
        margin: of skip_ranknet.
        number: of samples (pg_rank), negatives (groco), iterations (neural_ndcg).
        tolerance: of neural_ndcg.
        option: 1 where the kind's yes-no choice differs from its default.
        divisor: of a list's pair sum: 0 one, 1 its pairs, 2 its items.
    """

    sigma: float = 1.0
    temperature: float = 1.0
    unit: float = 1.0
    k: float = 0.0
    mu: float = 10.0
    margin: float = 0.0
    number: float = 0.0
    tolerance: float = 0.0
    option: float = 0.0
    divisor: float = 0.0


_DIVISORS = ("sum", "mean", "items")


def _positive(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name}: expected a positive finite number, got {value!r}")
    return float(value)


def _not_negative(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{name}: expected a finite number of at least 0, got {value!r}")
    return float(value)


def _whole(name: str, value: object, least: int = 1) -> float:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 2**31:
        raise ValueError(f"{name}: expected an integer of at least {least}, got {value!r}")
    return float(value)


def _top(name: str, value: object) -> float:
    return 0.0 if value is None else _whole(name, value)


def _flag(name: str, value: object) -> float:
    if not isinstance(value, bool):
        raise ValueError(f"{name}: expected True or False, got {value!r}")
    return float(value)


def _base(name: str, value: object) -> float:
    if _positive(name, value) <= 1.0:
        raise ValueError(f"{name}: expected a number above 1, got {value!r}")
    return 1.0 / math.log(_positive(name, value))


def _one_of(*choices: str) -> Callable[[str, object], float]:
    def position(name: str, value: object) -> float:
        if value not in choices:
            raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {value!r}")
        return float(choices.index(str(value)))

    return position


# Parameter of the public function -> field of Settings, and its check. `seed` goes beside the settings.
_PARAMETERS: dict[str, tuple[str, Callable[[str, object], float]]] = {
    "sigma": ("sigma", _positive),
    "steepness": ("sigma", _positive),
    "temperature": ("temperature", _positive),
    "log_base": ("unit", _base),
    "k": ("k", _top),
    "mu": ("mu", _not_negative),
    "margin": ("margin", _not_negative),
    "num_samples": ("number", functools.partial(_whole, least=2)),
    "num_negatives": ("number", _whole),
    "max_iterations": ("number", _whole),
    "tolerance": ("tolerance", _not_negative),
    "pair_reduction": ("divisor", _one_of(*_DIVISORS)),
    "ranks": ("option", _one_of("labels", "scores")),
    "truncation": ("option", _one_of("both", "either")),
    "ties": ("option", _one_of("stable", "shuffle")),
    "relevance": ("option", _one_of("best", "average")),
    "normalize": ("option", _flag),
}


@dataclass(frozen=True, eq=False)
class Kind:
    """One loss.

    Attributes:
        name: as :func:`rankernel.listwise_loss` takes it.
        index: of ``ListwiseKind`` in csrc/listwise_loss.h.
        defaults: its parameters, with the published values.
        conventions: what a preset changes, ``reduction`` included.
        pairwise: a sum over pairs, which ``reduction="pair_mean"`` and ``pair_reduction`` can average.
        distillation: labels are teacher scores, so that equal ones are a target like any other.
        seeded: draws random numbers, and takes ``seed``.
        source: of the formula.
    """

    name: str
    index: int
    defaults: Mapping[str, object]
    source: str
    conventions: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    pairwise: bool = False
    distillation: bool = False
    seeded: bool = False


def _kinds() -> dict[str, Kind]:
    kinds: list[Kind] = []

    def kind(
        name: str, source: str, conventions: Mapping[str, Mapping[str, object]] | None = None, /, **given: object
    ) -> None:
        traits = {trait: bool(given.pop(trait, False)) for trait in ("pairwise", "distillation", "seeded")}
        kinds.append(Kind(name, len(kinds), MappingProxyType(given), source, conventions or {}, **traits))

    pooled: dict[str, object] = {"reduction": "pair_mean"}
    bits: dict[str, object] = {"log_base": 2.0, "reduction": "sum"}
    nats: dict[str, object] = {"log_base": math.e, "reduction": "mean", "truncation": "either"}
    ndcg: dict[str, object] = {
        "sigma": 1.0, "k": None, "log_base": 2.0, "truncation": "both", "pair_reduction": "sum",
    }  # fmt: skip
    kind("ranknet", "Burges et al. 2005",
         {"allrank": pooled, "rax": pooled, "tfr": {"pair_reduction": "items", "reduction": "mean"}},
         pairwise=True, sigma=1.0, log_base=math.e, pair_reduction="mean")  # fmt: skip
    kind("weighted_ranknet", "FIRST, arXiv 2406.15657",
         pairwise=True, sigma=1.0, ranks="labels", log_base=math.e, pair_reduction="mean")  # fmt: skip
    kind("soft_ranknet", "DeAR; targets sigmoid(y_i - y_j)",
         pairwise=True, distillation=True, sigma=1.0, log_base=math.e, pair_reduction="mean")  # fmt: skip
    kind("lambdarank", "Burges 2010; Wang et al. 2018", {"allrank": bits, "tfr": nats}, pairwise=True, **ndcg)
    kind("ndcg_loss1", "Wang et al. 2018, eq. 15", {"allrank": bits}, pairwise=True, **ndcg)
    kind("ndcg_loss2", "Wang et al. 2018, eq. 16", {"allrank": bits, "tfr": nats}, pairwise=True, **ndcg)
    kind("ndcg_loss2pp", "Wang et al. 2018, eq. 17", {"allrank": bits}, pairwise=True, mu=10.0, **ndcg)
    kind("lipo", "LiPO-lambda, arXiv 2402.01878",
         pairwise=True, sigma=1.0, log_base=math.e, pair_reduction="sum")  # fmt: skip
    kind("dcg_lambda", "rax dcg_lambdaweight", {"rax": pooled},
         pairwise=True, sigma=1.0, k=None, normalize=False, log_base=math.e, pair_reduction="mean")  # fmt: skip
    kind("dcg2_lambda", "rax dcg2_lambdaweight", {"rax": pooled},
         pairwise=True, sigma=1.0, k=None, normalize=False, log_base=math.e, pair_reduction="mean")  # fmt: skip
    kind("skip_ranknet", "rankernel's own",
         pairwise=True, sigma=1.0, margin=0.0, log_base=math.e, pair_reduction="mean")  # fmt: skip
    kind("listnet", "Cao et al. 2007", {"allrank": {}}, temperature=1.0)
    kind("softmax", "Bruch et al. 2019", {"rax": {}, "tfr": {}}, temperature=1.0, normalize=False)
    kind("infonce", "BlockRank, arXiv 2510.05396, section 3.3", temperature=0.05)
    kind("decoupled_softmax", "DEXML, arXiv 2310.10636", temperature=0.05)
    kind("kl_distillation", "Hinton et al. 2015; DeAR", distillation=True, temperature=2.0)
    kind("margin_mse", "Hofstaetter et al. 2020", distillation=True)
    shuffled: dict[str, object] = {"ties": "shuffle"}
    kind("listmle", "Xia et al. 2008; Plackett-Luce",
         {"allrank": shuffled, "rax": {}, "tfr": shuffled}, seeded=True, k=None, ties="stable")  # fmt: skip
    kind("p_listmle", "Lan et al. 2014", {"tfr": {"normalize": False}}, normalize=True)
    kind("pg_rank", "Neural PG-RANK, arXiv 2310.04407", seeded=True, k=10, num_samples=8)
    kind("approx_ndcg", "Qin et al. 2010; Bruch et al. 2019",
         {"allrank": {}, "rax": {}, "tfr": {"temperature": 0.1}}, temperature=1.0)  # fmt: skip
    kind("approx_mrr", "Qin et al. 2010",
         {"rax": {}, "tfr": {"temperature": 0.1, "relevance": "average"}},
         temperature=1.0, relevance="best")  # fmt: skip
    kind("neural_ndcg", "Pobrotyn and Bialobrzeski 2021", {"allrank": {}},
         temperature=1.0, k=None, max_iterations=50, tolerance=1e-6)  # fmt: skip
    kind("soft_topk", "DEXML, arXiv 2310.10636", k=5, steepness=2.0)
    kind("groco", "GroCo; Petersen et al. 2022", steepness=1.0, num_negatives=10)
    return {k.name: k for k in kinds}


KINDS: Mapping[str, Kind] = MappingProxyType(_kinds())


def kind_named(name: object) -> Kind:
    """The kind of that name. Raises ValueError for another."""
    if not isinstance(name, str) or name not in KINDS:
        raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {name!r}")
    return KINDS[name]


_Given = tuple[tuple[str, object, type], ...]  # name, value, its type, because 1, 1.0 and True are one key of a cache


def _resolve(kind: Kind, reduction: str | None, convention: str | None, given: _Given) -> tuple[int, tuple[float, ...]]:
    parameters = dict(kind.defaults)
    chosen = "mean"
    if convention is not None:
        if convention not in kind.conventions:
            has = ", ".join(map(repr, kind.conventions)) or "none"
            raise ValueError(f"convention: {kind.name} has {has}, got {convention!r}")
        preset = dict(kind.conventions[convention])
        chosen = str(preset.pop("reduction", chosen))
        parameters.update(preset)
    for name, value, _ in given:
        if name not in kind.defaults:
            raise ValueError(f"{name}: {kind.name} takes {', '.join(kind.defaults) or 'no parameters'}")
        parameters[name] = value
    reduction = reduction or chosen
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: expected one of {', '.join(map(repr, REDUCTIONS))}, got {reduction!r}")
    if reduction == "pair_mean":
        if not kind.pairwise:
            raise ValueError(f"reduction: 'pair_mean' averages over pairs, and {kind.name} is not a sum over pairs")
        if any(name == "pair_reduction" for name, _, _ in given):
            raise ValueError("pair_reduction: reduction='pair_mean' averages over all pairs already")
        parameters["pair_reduction"] = "sum"
    if kind.name == "soft_topk" and parameters["k"] is None:
        raise ValueError("k: soft_topk needs an integer, got None")
    fields = {}
    for name, value in parameters.items():
        to, check = _PARAMETERS[name]
        fields[to] = check(name, value)
    return REDUCTIONS.index(reduction), tuple(Settings(**fields))


_resolve_once = functools.lru_cache(maxsize=512)(_resolve)


def _resolve_for_graph(
    name: str, reduction: str | None, convention: str | None, given: _Given
) -> tuple[int, tuple[float, ...]]:
    return _resolve(KINDS[name], reduction, convention, given)


# What torch.compiler.assume_constant_result sets; calling that would import Dynamo, and Triton with it, for everyone.
_resolve_for_graph._dynamo_marked_constant = True  # type: ignore[attr-defined]


def settings_of(
    kind: Kind, reduction: str | None, convention: str | None, parameters: Mapping[str, object]
) -> tuple[int, tuple[float, ...]]:
    """Index of the reduction, and the :class:`Settings`, of one call.

    Args:
        kind: the loss.
        reduction: one of :data:`REDUCTIONS`, or None for the convention's, ``"mean"`` without one.
        convention: one of :data:`CONVENTIONS` that the kind has, or None.
        parameters: replace the kind's defaults and the convention's.

    Raises:
        ValueError: an unknown name, or a value out of range, naming the parameter.
    """
    given = tuple((name, value, type(value)) for name, value in parameters.items())
    if torch.compiler.is_compiling():
        return _resolve_for_graph(kind.name, reduction, convention, given)
    try:
        return _resolve_once(kind, reduction, convention, given)
    except TypeError:  # unhashable: no parameter takes such a value
        wrong = next(name for name, value in parameters.items() if value.__hash__ is None)
        raise ValueError(f"{wrong}: expected a number or a name, got {parameters[wrong]!r}") from None
