"""relevance_feedback: against float64 on random problems, every instruction set and dtype, and what it is for."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from attention_cases import DTYPES
from rankernel import backends, reference, relevance_feedback

PUBLISHED = {"kl": (0.005, 100), "weighted_ranknet": (0.001, 20)}
LOSSES = list(PUBLISHED)


@dataclass
class Problem:
    """Float64 inputs that every dtype and instruction set is tried on."""

    query: torch.Tensor
    documents: torch.Tensor
    teacher: torch.Tensor
    options: dict[str, object]


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """Any sizes, ties of the teacher, masks with NaN behind them, strided or shared documents, every option."""
    batch, count = draw(st.sampled_from([1, 2, 5])), draw(st.sampled_from([0, 1, 2, 3, 9, 17, 40, 100]))
    size = draw(st.sampled_from([8, 15, 33, 64, 100, 192, 257]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    query = torch.randn(batch, size, generator=generator, dtype=torch.float64)
    shape = draw(st.sampled_from(["contiguous", "transposed", "sliced", "expanded"]))
    if shape == "transposed":
        documents = torch.randn(count, batch, size, generator=generator, dtype=torch.float64).transpose(0, 1)
    elif shape == "sliced":
        documents = torch.randn(batch, count + 1, size + 3, generator=generator, dtype=torch.float64)[:, 1:, :size]
    elif shape == "expanded":
        documents = torch.randn(count, size, generator=generator, dtype=torch.float64).expand(batch, count, size)
    else:
        documents = torch.randn(batch, count, size, generator=generator, dtype=torch.float64)
    teacher = 3 * torch.randn(batch, count, generator=generator, dtype=torch.float64)
    if draw(st.booleans()):
        teacher = teacher.round()
    options: dict[str, object] = {
        "loss": draw(st.sampled_from(LOSSES)),
        "learning_rate": draw(st.sampled_from([0.001, 0.005])),
        "num_steps": draw(st.sampled_from([0, 1, 2, 20, 100])),
        "scale": draw(st.sampled_from([None, None, 0.3])),
    }
    if draw(st.booleans()):
        where = torch.rand(batch, count, generator=generator) < draw(st.sampled_from([0.1, 0.7]))
        teacher = teacher.masked_fill(~where, float("nan"))
        documents = documents.clone() if shape == "expanded" else documents
        documents[~where] = float("nan")
        options["where"] = where
    return Problem(query, documents, teacher, options)


def tensors(batch: int = 4, count: int = 30, size: int = 48) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    query, documents = (
        torch.randn(batch, size, generator=generator),
        torch.randn(batch, count, size, generator=generator),
    )
    return query, documents, 3 * torch.randn(batch, count, generator=generator)


def rms(x: torch.Tensor) -> float:
    return x.double().square().mean().sqrt().item() if x.numel() else 0.0


@pytest.mark.usefixtures("poisoned_memory")
@given(problems())
def test_every_isa_and_dtype(problem: Problem) -> None:
    for dtype in DTYPES:
        inputs = problem.query.float(), problem.documents.to(dtype), problem.teacher.float()
        truth = reference.relevance_feedback(*(t.double() for t in inputs), **problem.options)
        eager = reference.relevance_feedback(*inputs, **problem.options)
        for isa in backends.available_isas():
            with backends.use(backend="cpu", isa=isa):
                ours = relevance_feedback(*inputs, **problem.options)
                again = relevance_feedback(*inputs, **problem.options)
            assert ours.dtype == torch.float32
            assert torch.equal(ours, again)
            # Adam divides every component of the gradient by its own size, so where one cancels to almost nothing its
            # rounding error becomes a step: the root mean square is compared, not the worst component.
            bound = 2 * rms(eager - truth) + 2 * torch.finfo(torch.float32).eps
            assert rms(ours - truth) <= bound, f"{isa} {dtype}: {rms(ours - truth):.3g} above {bound:.3g}"


def loss_of(loss: str, logits: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """The losses as METHODS has them, of one query."""
    if loss == "kl":
        return F.kl_div(logits.log_softmax(-1), teacher.log_softmax(-1), log_target=True, reduction="sum")
    ranks = 1 + (teacher[:, None] < teacher).sum(dim=1)
    losses = F.softplus(logits - logits[:, None]) / (ranks + ranks[:, None])
    return losses[teacher[:, None] > teacher].mean()


@pytest.mark.parametrize("loss", LOSSES)
def test_gradient(isa: str, loss: str) -> None:
    """Adam's first step is learning_rate * g / (|g| + 1e-8): gradients near 1e-8 show in it with their sizes."""
    unit = 1e-8
    query, documents, teacher = (t.double() for t in tensors())
    query, documents, teacher = query / unit, documents * unit, teacher.round()
    documents[1, 7:] = float("nan")
    where = documents[..., 0].isfinite()
    steps = []
    for q, p, t, valid in zip(query, documents, teacher, where, strict=True):
        leaf = q.clone().requires_grad_()
        (grad,) = torch.autograd.grad(loss_of(loss, 0.3 * p[valid] @ leaf, t[valid]), leaf)
        steps.append(grad / (grad.abs() + 1e-8))
    expected = torch.stack(steps)
    assert 0.001 < expected.abs().median() < 0.5
    inputs = query.float(), documents.float(), teacher.float()
    moved = relevance_feedback(*inputs, loss=loss, learning_rate=1 / unit, num_steps=1, where=where, scale=0.3)
    torch.testing.assert_close((query - moved) * unit, expected, rtol=1e-4, atol=1e-4 * expected.abs().median().item())


@pytest.mark.parametrize("loss", LOSSES)
def test_defaults_are_published(loss: str) -> None:
    query, documents, teacher = tensors()
    rate, steps = PUBLISHED[loss]
    ours = relevance_feedback(query, documents, teacher, loss=loss)
    assert torch.equal(
        ours, relevance_feedback(query, documents, teacher, loss=loss, learning_rate=rate, num_steps=steps)
    )
    for index, (p, t) in enumerate(zip(documents, teacher, strict=True)):
        scores = p @ query[index]
        factor = (t.max() - t.min()) / (scores.max() - scores.min()) / 2
        scaled = relevance_feedback(query[index, None], p[None], t[None], loss=loss, scale=factor.item())
        torch.testing.assert_close(scaled[0], ours[index], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("loss", LOSSES)
def test_learns_the_teacher(isa: str, loss: str) -> None:
    query, documents, teacher = tensors(count=60, size=128)

    def state(vectors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        before = (documents @ query[..., None])[..., 0]
        scale = (teacher.amax(1) - teacher.amin(1)) / (before.amax(1) - before.amin(1)) / 2
        logits = scale[:, None] * (documents @ vectors[..., None])[..., 0]
        losses = torch.stack([loss_of(loss, z, t) for z, t in zip(logits, teacher, strict=True)])
        ordered = (logits[:, :, None] > logits[:, None]) == (teacher[:, :, None] > teacher[:, None])
        return losses, ordered.float().mean(dim=(1, 2))

    losses, agreement = zip(*(state(relevance_feedback(query, documents, teacher, loss=loss, num_steps=n))
                              for n in (0, 10, 20, 100)), strict=True)  # fmt: skip
    for before, after in itertools.pairwise(losses):
        assert (after < before).all()
    assert (agreement[-1] > agreement[0]).all()


def test_published_recipe_is_two_calls() -> None:
    """A cross-encoder's scores, then those of an LLM for fewer documents; bfloat16 documents throughout."""
    query, documents, teacher = tensors(count=100)
    documents = documents.bfloat16()
    best = torch.arange(100) < 20
    stages = []
    for backend in ("cpu", "reference"):
        with backends.use(backend=backend):
            first = relevance_feedback(query.bfloat16(), documents, teacher)
            stages.append(
                relevance_feedback(
                    first, documents, -teacher, loss="weighted_ranknet", where=best.expand(len(query), -1)
                )
            )
    torch.testing.assert_close(*stages, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("loss", LOSSES)
def test_batch_and_threads_do_not_show(isa: str, loss: str) -> None:
    query, documents, teacher = tensors(batch=7, size=100)
    where = torch.rand(teacher.shape, generator=torch.Generator().manual_seed(1)) < 0.8
    threads = torch.get_num_threads()
    try:
        results = []
        for number in (1, 2, 5):
            torch.set_num_threads(number)
            results.append(relevance_feedback(query, documents, teacher, loss=loss, where=where))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    for i in range(len(query)):
        alone = relevance_feedback(
            query[i, None], documents[i, None], teacher[i, None], loss=loss, where=where[i, None]
        )
        assert torch.equal(alone[0], results[0][i])
        kept = where[i]
        short = relevance_feedback(query[i, None], documents[i, None, kept], teacher[i, None, kept], loss=loss)
        assert torch.equal(short[0], results[0][i])


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_nothing_to_learn(loss: str, backend: str) -> None:
    query, documents, teacher = tensors(batch=6, count=5)
    teacher[0] = 2.5  # a teacher without preference
    documents[1] = documents[1, :1]  # documents that the query cannot tell apart
    query[2] = 0.0
    where = torch.ones_like(teacher, dtype=torch.bool)
    where[3, 1:], where[4] = False, False
    with backends.use(backend=backend):
        out = relevance_feedback(query, documents, teacher, loss=loss, where=where)
        few = [relevance_feedback(query, documents[:, :k], teacher[:, :k], loss=loss) for k in (0, 1)]
        none = relevance_feedback(query[:0], documents[:0], teacher[:0], loss=loss)
        no_columns = relevance_feedback(query[:, :0], documents[..., :0], teacher, loss=loss, scale=1.0)
        no_steps = relevance_feedback(query, documents, teacher, loss=loss, num_steps=0)
    assert torch.equal(out[:5], query[:5])
    assert not torch.isclose(out[5], query[5]).all()
    assert all(torch.equal(result, query) for result in (*few, no_steps))
    assert no_steps.data_ptr() != query.data_ptr()
    assert none.shape == (0, 48)
    assert no_columns.shape == (6, 0)


@pytest.mark.parametrize("loss", LOSSES)
def test_nan_stays_with_its_query(isa: str, loss: str) -> None:
    query, documents, teacher = tensors(count=2)
    before = relevance_feedback(query, documents, teacher, loss=loss)
    documents[2, 1, 3] = float("nan")
    after = relevance_feedback(query, documents, teacher, loss=loss)
    assert torch.equal(after[[0, 1, 3]], before[[0, 1, 3]])
    assert after[2].isnan().all()


@pytest.mark.parametrize("loss", LOSSES)
def test_huge_differences(isa: str, loss: str) -> None:
    """Logits 1e4 apart in the wrong order still pull the query to the teacher, and in the right order do not."""
    query, documents = torch.tensor([[1.0]]), torch.tensor([[[1.0], [-1.0]]])
    inputs = query, documents, torch.tensor([[-1e4, 1e4]])
    options = {"loss": loss, "learning_rate": 0.1, "num_steps": 50, "scale": 1e4}
    out = relevance_feedback(*inputs, **options)
    assert out < 0
    truth = reference.relevance_feedback(*(t.double() for t in inputs), **options)
    torch.testing.assert_close(out, truth.float(), rtol=1e-3, atol=1e-3)


def test_opcheck() -> None:
    query, documents, teacher = tensors(batch=2, count=5, size=8)
    where = torch.tensor([[True] * 5, [True, False, True, True, False]])
    for arguments in (
        (query, documents, teacher, where, "kl", 0.01, 3, None),
        (query, documents.bfloat16(), teacher, None, "weighted_ranknet", 0.01, 3, 0.5),
    ):
        torch.library.opcheck(torch.ops.rankernel.relevance_feedback.default, arguments)


def test_compile_is_one_graph_for_any_number_of_documents() -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(relevance_feedback, backend=counter, fullgraph=True)
    for count in (9, 20, 31, 57):
        inputs = tensors(count=count)
        assert torch.equal(compiled(*inputs), relevance_feedback(*inputs))
    assert counter.frame_count == 2  # the first number, then any


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_is_for_inference(backend: str) -> None:
    query, documents, teacher = tensors()
    expected = relevance_feedback(query, documents, teacher)
    with backends.use(backend=backend):
        out = relevance_feedback(query.requires_grad_(), documents.requires_grad_(), teacher)
        assert not out.requires_grad
        with torch.no_grad():
            quiet = relevance_feedback(query, documents, teacher)
        with torch.inference_mode():
            inference = relevance_feedback(query.clone(), documents.clone(), teacher.clone())
    for result in (out, quiet, inference):
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)


def test_float64_runs_the_reference() -> None:
    inputs = [t.double() for t in tensors()]
    with pytest.warns(UserWarning, match="no kernel for torch.float64"):
        out = relevance_feedback(*inputs)
    assert out.dtype == torch.float64
    with backends.use(backend="cpu"), pytest.raises(NotImplementedError, match="no kernel for"):
        relevance_feedback(*inputs)


BAD = {
    "loss: expected one of 'kl', 'weighted_ranknet', got 'ranknet'": (ValueError, {"loss": "ranknet"}),
    "learning_rate: expected a positive finite": (ValueError, {"learning_rate": 0.0}),
    "num_steps: expected an integer": (ValueError, {"num_steps": -1}),
    "num_steps: expected an integer of at least 0, got 1.5": (ValueError, {"num_steps": 1.5}),
    "scale: expected a positive finite": (ValueError, {"scale": float("inf")}),
    "query_vectors: expected a floating-point": (TypeError, {"query_vectors": torch.zeros(4, 48, dtype=torch.int64)}),
    "query_vectors: expected 2 dimensions": (ValueError, {"query_vectors": torch.zeros(48)}),
    "document_vectors: expected a floating-point": (
        TypeError, {"document_vectors": torch.zeros(4, 30, 48, dtype=torch.int32)},
    ),
    "document_vectors: expected shape": (ValueError, {"document_vectors": torch.zeros(4, 30, 47)}),
    "teacher_scores: expected a floating-point": (
        TypeError, {"teacher_scores": torch.zeros(4, 30, dtype=torch.int64)},
    ),
    "teacher_scores: expected shape": (ValueError, {"teacher_scores": torch.zeros(4, 31)}),
    "teacher_scores: expected finite": (ValueError, {"teacher_scores": torch.full((4, 30), float("-inf"))}),
    "where: expected torch.bool": (TypeError, {"where": torch.ones(4, 30)}),
    "where: expected shape": (ValueError, {"where": torch.ones(4, 29, dtype=torch.bool)}),
}  # fmt: skip


@pytest.mark.parametrize("message", BAD)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_bad_input(message: str, backend: str) -> None:
    error, changes = BAD[message]
    names = ("query_vectors", "document_vectors", "teacher_scores")
    arguments = dict(zip(names, tensors(), strict=True)) | changes
    with backends.use(backend=backend), pytest.raises(error, match=message):
        relevance_feedback(**arguments)
