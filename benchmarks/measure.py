"""How the benchmarks measure: interleaved medians, peak memory, and whether a result is right.

Nothing here knows an op. A case module describes its problems with the classes below; ``run.py`` selects and prints.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from rankernel import backends

WARM_UP_SECONDS = 0.2
MIN_ROUNDS = 3
TURN_SECONDS = 0.5
MIN_SAMPLE_SECONDS = 1e-3
EPSILON = 1e-5
RESET_TOLERANCE = 1 << 20  # bytes; a sandbox may accept the reset of the high-water mark and ignore it

Call = Callable[[], torch.Tensor | tuple[torch.Tensor, ...] | None]


class Expected:
    """What the result should be, and how far PyTorch itself is from it in the same dtype.

    A result matches when its largest absolute error is at most twice that of PyTorch plus ``EPSILON``, the bound that
    the tests use too. Both results are computed once, when first asked for.
    """

    def __init__(self, exact: Callable[[], torch.Tensor], eager: Callable[[], torch.Tensor]) -> None:
        """Keeps how to compute both.

        Args:
            exact: computes the result in a wider dtype than the implementations.
            eager: computes it by plain PyTorch in the dtype of the implementations.
        """
        self._compute_exact = exact
        self._compute_eager = eager

    @cached_property
    def _exact(self) -> torch.Tensor:
        return self._compute_exact().double()

    @cached_property
    def allowed(self) -> float:
        """The largest error that still matches."""
        return 2 * self.error(self._compute_eager()) + EPSILON

    def error(self, result: torch.Tensor) -> float:
        """Largest absolute difference; infinite for another shape or for infinities in other places."""
        if result.shape != self._exact.shape:
            return float("inf")
        finite = torch.isfinite(self._exact)
        if not torch.equal(result[~finite].double(), self._exact[~finite]):
            return float("inf")
        return float((result.double() - self._exact)[finite].abs().amax()) if finite.any() else 0.0


@dataclass(frozen=True)
class Implementation:
    """One way to do the work of a problem: a row of the table.

    Attributes:
        name: as printed; without commas.
        build: prepares everything that is not timed and returns the call to time.
        expected: what the call should return, one for each tensor of a tuple; None for a row that is not a result,
            such as building a mask.
        work: useful operations or bytes of one call, in the unit of the problem; None where no rate is meaningful.
        native_op: for rankernel's own rows, the op whose kernel runs; speed-ups are those of these rows.
        compare: whether the row takes part in speed-ups.
        yardstick: the rates of the other rows are also given as a fraction of this row's.
        isa: highest instruction set that a row of rankernel may use; None for the best one.
        backend: that a row of rankernel runs.
    """

    name: str
    build: Callable[[], Call]
    expected: Expected | tuple[Expected, ...] | None = None
    work: float | None = None
    native_op: str | None = None
    compare: bool = True
    yardstick: bool = False
    isa: str | None = None
    backend: str = "cpu"

    @property
    def label(self) -> str:
        """The name as printed: with the instruction set where one was asked for."""
        return f"{self.name} [{self.isa}]" if self.isa else self.name

    def context(self) -> contextlib.AbstractContextManager[None]:
        """For rows of rankernel, forces the native kernels, so that no row times the reference unnoticed."""
        if self.native_op is None:
            return contextlib.nullcontext()
        return backends.use(backend=self.backend, isa=self.isa)


@dataclass(frozen=True)
class Finding:
    """A number of interest that two rows give together.

    Attributes:
        metric: name in the CSV.
        text: printed with the number in place of ``{}``.
        of: name of the implementation whose number is the numerator or minuend.
        over: name of the other implementation.
        unit: what the number is: "" is the ratio of the medians, "s" their difference, "%" by how much the first is
            longer, and "B" the difference of the peak memories.
    """

    metric: str
    text: str
    of: str
    over: str
    unit: str = ""

    def value(self, of: Result, over: Result) -> float | None:
        """The number; None where memory cannot be measured."""
        if self.unit == "B":
            return None if of.peak_bytes is None or over.peak_bytes is None else of.peak_bytes - over.peak_bytes
        if self.unit == "s":
            return of.median - over.median
        return of.median / over.median if self.unit == "" else 100 * (of.median / over.median - 1)


@dataclass(frozen=True)
class Problem:
    """One case in one dtype. ``unit`` is that of ``Implementation.work``: ``"FLOP"``, ``"B"``, ``"pair"``, ..."""

    implementations: tuple[Implementation, ...]
    findings: tuple[Finding, ...] = ()
    unit: str = "FLOP"


@dataclass(frozen=True)
class Case:
    """A named shape.

    Attributes:
        name: what ``--case`` selects.
        shape: the shape in words.
        build: makes the problem of a dtype; must leave all expensive work to the builds of its implementations. None
            for shapes that would keep a CPU busy for minutes.
        dtypes: those that run unless ``--dtype`` says otherwise.
        seconds: how long to measure; at least ``MIN_ROUNDS`` rounds run however long they take.
        default: whether it runs when no case is asked for.
        build_on_gpu: ``build`` with the inputs on a GPU; None where rankernel has no kernels for one.
    """

    name: str
    shape: str
    build: Callable[[torch.dtype], Problem] | None
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float32)
    seconds: float = 5.0
    default: bool = False
    build_on_gpu: Callable[[torch.dtype], Problem] | None = None


@dataclass
class Result:
    """What was measured of one implementation.

    Attributes:
        samples: seconds per call, at least one entry a round.
        calls_per_sample: how many calls each sample is the mean of; more than 1 for calls shorter than a millisecond.
        first_call: seconds that the very first call took: compilation, page faults, lazy loading.
        peak_bytes: extra memory during one call, its output included; None where it cannot be measured.
        error, allowed: largest absolute error and the largest one that matches; None where nothing is expected. Of
            several tensors, those of the one that is the furthest off.
        failed: why there is no measurement.
    """

    implementation: Implementation
    samples: list[float] = field(default_factory=list)
    calls_per_sample: int = 1
    first_call: float = 0.0
    peak_bytes: int | None = None
    error: float | None = None
    allowed: float | None = None
    failed: str = ""

    @property
    def matches(self) -> bool:
        """Whether the result is the expected one."""
        return self.error is not None and self.allowed is not None and self.error <= self.allowed

    @cached_property
    def percentiles(self) -> tuple[float, float, float]:
        """p20, median and p80 of the seconds per call."""
        p20, median, p80 = np.percentile(self.samples, [20, 50, 80])
        return float(p20), float(median), float(p80)

    @property
    def median(self) -> float:
        """Median seconds per call."""
        return self.percentiles[1]

    @property
    def rate(self) -> float | None:
        """Useful work per second at the median."""
        return None if self.implementation.work is None or self.failed else self.implementation.work / self.median


def speed_up(subject: Result, peer: Result) -> float | None:
    """How many times as fast as ``peer`` the row ``subject`` is; None unless both take part and are right."""
    if not all(result.matches and result.implementation.compare for result in (subject, peer)):
        return None
    return peer.median / subject.median


def for_isas(implementations: Sequence[Implementation], isas: Sequence[str]) -> list[Implementation]:
    """The same rows, with those of rankernel once per instruction set."""
    rows: list[Implementation] = []
    for implementation in implementations:
        if implementation.native_op is None or implementation.backend != "cpu" or not isas:
            rows.append(implementation)
        else:
            rows += [replace(implementation, isa=isa) for isa in isas]
    return rows


def run(
    implementations: Sequence[Implementation], seconds: float, progress: Callable[[str], None] = lambda _: None
) -> list[Result]:
    """Builds, checks and measures all implementations; one that raises keeps its row and says why.

    Every round gives every implementation a turn, so that a change of the machine's speed meets all of them alike.
    A turn is one sample, or as many as fit in ``TURN_SECONDS``: slow peers do not leave the fast ones with few.
    """
    results, calls = [], []
    with torch.no_grad():
        for implementation in implementations:
            progress(f"preparing {implementation.label}")
            result = Result(implementation)
            results.append(result)
            try:
                calls.append((result, _prepare(result)))
            except Exception as error:
                result.failed = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
        turn = min(TURN_SECONDS, seconds / (MIN_ROUNDS * max(1, len(calls))))
        begin, rounds = time.perf_counter(), 0
        with _no_garbage_collection():
            while calls and (rounds < MIN_ROUNDS or time.perf_counter() - begin < seconds):
                rounds += 1
                progress(f"round {rounds}")
                for result, call in calls:
                    with result.implementation.context():
                        _take_turn(result, call, turn)
    progress("")
    return results


def _prepare(result: Result) -> Call:
    """Builds the call, checks its result, measures its memory and warms it up for ``WARM_UP_SECONDS``."""
    implementation = result.implementation
    with implementation.context():
        call = implementation.build()
        begin = time.perf_counter()
        output = call()
        _wait_for_gpu()
        result.first_call = time.perf_counter() - begin
        if implementation.expected is not None:
            if output is None:
                raise TypeError("expected a tensor to compare, got None")
            result.error, result.allowed = _furthest_off(implementation.expected, output)
        del output
        spent, calls = 0.0, 0

        def timed() -> torch.Tensor | tuple[torch.Tensor, ...] | None:
            nonlocal spent, calls
            begin = time.perf_counter()
            output = call()
            _wait_for_gpu()
            spent += time.perf_counter() - begin
            calls += 1
            return output

        result.peak_bytes = peak_memory(timed)
        while spent < WARM_UP_SECONDS:
            timed()
    result.calls_per_sample = max(1, round(MIN_SAMPLE_SECONDS * calls / spent))
    return call


def _furthest_off(
    expected: Expected | tuple[Expected, ...], output: torch.Tensor | tuple[torch.Tensor, ...]
) -> tuple[float, float]:
    """Error and allowed error of the tensor where their ratio is the largest; a NaN counts as such."""
    wanted = expected if isinstance(expected, tuple) else (expected,)
    outputs = output if isinstance(output, tuple) else (output,)
    pairs = [(one.error(tensor), one.allowed) for one, tensor in zip(wanted, outputs, strict=True)]
    return max(pairs, key=lambda pair: float("inf") if math.isnan(pair[0]) else pair[0] / pair[1])


def _take_turn(result: Result, call: Call, seconds: float) -> None:
    begin = time.perf_counter()
    while True:
        result.samples.append(_sample(call, result.calls_per_sample))
        if time.perf_counter() - begin + result.samples[-1] * result.calls_per_sample > seconds:
            return


def _sample(call: Call, calls: int) -> float:
    if calls == 1:
        begin = time.perf_counter()
        output = call()
        _wait_for_gpu()
        end = time.perf_counter()
        del output  # freeing the output is not part of the call
        return end - begin
    begin = time.perf_counter()
    for _ in range(calls):
        call()
    _wait_for_gpu()
    return (time.perf_counter() - begin) / calls


def _wait_for_gpu() -> None:
    """Until everything launched is done, where this process uses a GPU at all."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def peak_memory(call: Call) -> int | None:
    """Bytes by which the memory of this process rises at most during ``call``; always calls it.

    Where it uses a GPU, this is what PyTorch's allocator hands out there; else it is the resident memory.

    Memory that the allocator holds free is handed back first (``malloc_trim``), then the kernel's high-water mark is
    set to what is resident now (``/proc/self/clear_refs``, proc(5)). Memory that an implementation already keeps
    between calls is not seen. None where the system does not offer this.
    """
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
        allocated = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - allocated
    before = _reset_peak()
    output = call()
    peak = None if before is None else max(0, _status("VmHWM") - before)
    del output
    return peak


def _reset_peak() -> int | None:
    """Makes the high-water mark of resident memory what is resident now and returns it; None where that fails."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        resident, peak = _status("VmRSS"), _status("VmHWM")
    except (OSError, AttributeError, KeyError):
        return None
    return resident if peak - resident < RESET_TOLERANCE else None


def _status(name: str) -> int:
    """Bytes that ``/proc/self/status`` gives for ``name``."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[name].split()[0]) * 1024
