"""Golden values, random lists and properties of the kinds, for every implementation of listwise_loss."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from hypothesis import strategies as st

from rankernel.listwise import KINDS

SCORES = [0.5, -0.2, 1.3, 0.0, 0.8]
GRADES = [2, 0, 1, 0, 1]
ORDER = [-2, -5, -1, -4, -3]  # the teacher's ranks 2 5 1 4 3, the higher the better
POSITIVES = [1, 0, 1, 0, 0]


@dataclass(frozen=True)
class Golden:
    """One list whose loss and gradient are known."""

    kind: str
    loss: float
    grad: list[float] | None = None
    labels: list[float] = field(default_factory=lambda: list(GRADES))
    scores: list[float] = field(default_factory=lambda: list(SCORES))
    parameters: dict[str, object] = field(default_factory=dict)
    digits: float = 1e-6  # half a unit of the last digit published


BITS_MEAN = {"pair_reduction": "mean"}
# METHODS.md appendix A: NumPy float64, gradients proved by finite differences.
GOLDEN = {
    "ranknet": Golden("ranknet", 0.503687878595, [-0.24672124, 0.0978974, 0.03667299, 0.1127164, -0.00056555]),
    "first": Golden(
        "weighted_ranknet", 0.0790103891197, [-0.01218719, 0.01614421, -0.02709643, 0.01000274, 0.01313666], ORDER
    ),
    "ndcg2-sum": Golden(
        "ndcg_loss2", 0.599441789959, [-0.40269199, 0.05482083, 0.0551227, 0.16535058, 0.12739789],
        parameters={"convention": "allrank"},
    ),
    "ndcg2-mean": Golden(
        "ndcg_loss2", 0.0749302237449, [-0.0503365, 0.0068526, 0.00689034, 0.02066882, 0.01592474],
        parameters={"convention": "allrank", "reduction": "pair_mean"},
    ),
    "lambdarank-sum": Golden(
        "lambdarank", 0.713067226774, [-0.36025935, 0.10132458, 0.15932137, 0.09168657, 0.00792683],
        parameters={"convention": "allrank"},
    ),
    "lambdarank-mean": Golden(
        "lambdarank", 0.0891334033468, [-0.04503242, 0.01266557, 0.01991517, 0.01146082, 0.00099085],
        parameters=BITS_MEAN,
    ),
    "ndcg2pp-sum": Golden(
        "ndcg_loss2pp", 6.70748512637, [-4.38717928, 0.64953286, 0.71054834, 1.74519234, 1.28190575]
    ),
    "ndcg2pp-mean": Golden(
        "ndcg_loss2pp", 0.838435640796, [-0.54839741, 0.08119161, 0.08881854, 0.21814904, 0.16023822],
        parameters=BITS_MEAN,
    ),
    "lipo": Golden("lipo", 2.94563062338, [-1.48820606, 0.41856473, 0.65814539, 0.37875076, 0.03274518]),
    "listnet": Golden("listnet", 1.61594551523, [-0.32229543, 0.01999904, 0.2085727, 0.03936067, 0.05436302]),
    "softmax": Golden("softmax", 5.84675951234, [-1.29559057, 0.34979937, 0.56769201, 0.42724592, -0.04914673]),
    "listmle": Golden(
        "listmle", 3.37136633977, [-0.53429228, 0.88387169, -0.608077, 0.07956332, 0.17893428], ORDER
    ),
    "p-listmle": Golden(
        "p_listmle", 25.1150442656, [-2.33122713, 3.37593623, -9.12115495, 3.12337782, 4.95306803], ORDER,
        parameters={"convention": "tfr"},
    ),
    "approx-ndcg": Golden(
        "approx_ndcg", -0.644061868566, [-0.04490717, 0.02663023, -0.01208451, 0.02881816, 0.00154328]
    ),
    "approx-ndcg-tfr": Golden(
        "approx_ndcg", -0.75749747009, [-0.0148935, 0.00063172, -0.00884367, 0.00461563, 0.01848982],
        parameters={"convention": "tfr"},
    ),
    "neural-ndcg": Golden("neural_ndcg", -0.7761055346),
    "infonce": Golden(
        "infonce", 0.0422308036993, [0.09444287, -0.22242265, 0.03474359, -0.60460744, 0.69784364], [0, 1, 0, 1, 0],
        [0.1, 0.3, 0.05, 0.35, 0.2],
    ),
    "decoupled": Golden(
        "decoupled_softmax", 0.991108506709, [-0.35519732, 0.1249777, -0.2621531, 0.15264811, 0.33972461], POSITIVES,
        parameters={"temperature": 1.0},
    ),
    "soft-topk": Golden(
        "soft_topk", 0.61469752928, [-0.39739856, 0.10612569, -0.07507857, 0.13930223, 0.22704921], POSITIVES,
        parameters={"k": 2},
    ),
    "margin-mse": Golden("margin_mse", 1.69, [-2.6, 2.6], [2, 0], [0.5, -0.2]),
    "kl": Golden(
        "kl_distillation", 0.222323976115, [-0.26863518, 0.03230135, 0.06838196, 0.11469594, 0.05325592],
        [2, 0, 1.5, -0.5, 1],
    ),
    # Values that the libraries themselves publish.
    "rax-softmax": Golden("softmax", 1.40761, None, [1, 0, 0], [2, 1, 3], digits=5e-6),
    "rax-approx-ndcg": Golden(
        "approx_ndcg", -0.63092977, [0.03763788, 0.03763788, -0.07527576], [0, 0, 1], [-1, 1, 0]
    ),
    "rax-approx-mrr": Golden("approx_mrr", -0.69659, None, [0, 0, 1, 2], [0, 1, 3, 2], digits=5e-6),
    "tfr-pairwise": Golden("ranknet", 0.39906943, None, [1, 0], [0.6, 0.8], {"convention": "tfr"}),
    "tfr-listmle": Golden("listmle", 0.7981389, None, [1, 0], [0.6, 0.8]),
}  # fmt: skip

# Parameters other than the defaults, so that every branch of a kind is met.
VARIANTS: dict[str, list[dict[str, object]]] = {
    "ranknet": [{}, {"sigma": 2.5, "log_base": 2.0}, {"pair_reduction": "items"}],
    "weighted_ranknet": [{}, {"ranks": "scores"}],
    "soft_ranknet": [{}, {"sigma": 0.5}],
    "lambdarank": [{}, {"k": 3}, {"k": 3, "truncation": "either"}, {"convention": "tfr"}],
    "ndcg_loss1": [{}, {"k": 3}, {"k": 2, "truncation": "either", "pair_reduction": "mean"}],
    "ndcg_loss2": [{}, {"k": 3, "pair_reduction": "mean"}],
    "ndcg_loss2pp": [{}, {"mu": 2.0, "k": 4, "truncation": "either"}],
    "lipo": [{}, {"sigma": 0.1}],
    "dcg_lambda": [{}, {"k": 3}, {"k": 2, "normalize": True}],
    "dcg2_lambda": [{}, {"k": 3}, {"k": 2, "normalize": True}],
    "skip_ranknet": [{}, {"margin": 0.5, "sigma": 2.0}],
    "listnet": [{}, {"temperature": 0.5}],
    "softmax": [{}, {"normalize": True, "temperature": 2.0}],
    "infonce": [{}, {"temperature": 1.0}],
    "decoupled_softmax": [{}, {"temperature": 1.0}],
    "kl_distillation": [{}, {"temperature": 1.0}],
    "margin_mse": [{}],
    "listmle": [{}, {"k": 3}, {"ties": "shuffle", "seed": 5}],
    "p_listmle": [{}],  # the raw weights of convention="tfr" pass float32's range at 128 items
    "pg_rank": [{}, {"k": 2, "num_samples": 3, "seed": 2**40 + 1}],
    "approx_ndcg": [{}, {"temperature": 0.1}],
    "approx_mrr": [{}, {"convention": "tfr"}],
    "neural_ndcg": [{}, {"k": 3, "temperature": 0.5, "max_iterations": 7}],
    "soft_topk": [{}, {"k": 1, "steepness": 0.7}],
    "groco": [{}, {"num_negatives": 3, "steepness": 4.0}],
}
assert set(VARIANTS) == set(KINDS)
EVERY_VARIANT = [(kind, parameters) for kind, all_of_kind in VARIANTS.items() for parameters in all_of_kind]
SHIFT_DEPENDENT: set[str] = set()
"""Kinds whose loss changes when all scores move together: none."""


@dataclass
class Lists:
    """Jagged lists; masked items hold NaN scores and labels."""

    scores: torch.Tensor
    labels: torch.Tensor
    offsets: torch.Tensor
    where: torch.Tensor | None

    def alone(self, number: int) -> Lists:
        """One list as a batch of its own."""
        begin, end = self.offsets[number : number + 2].tolist()
        part = slice(begin, end)
        where = None if self.where is None else self.where[part]
        return Lists(self.scores[part], self.labels[part], torch.tensor([0, end - begin]), where)


def random_lists(
    lengths: list[int], seed: int, labels: str = "grades", spread: float = 1.0, masked: bool = False
) -> Lists:
    """Float64 scores that float32 holds exactly; ``labels`` is grades, binary, real, equal, or zeros."""
    generator = torch.Generator().manual_seed(seed)
    n = sum(lengths)
    scores = (spread * torch.randn(n, generator=generator)).double()
    if n > 3:
        scores[1], scores[3] = scores[0], scores[2]  # ties
    draw = torch.rand(n, generator=generator, dtype=torch.float64)
    y = {
        "grades": (5 * draw).floor(),
        "binary": (draw < 0.3).double(),
        "real": (3 * draw - 1).float().double(),
        "equal": torch.full((n,), 2.0, dtype=torch.float64),
        "zeros": torch.zeros(n, dtype=torch.float64),
    }[labels]
    offsets = torch.tensor([0, *torch.tensor(lengths, dtype=torch.int64).cumsum(0).tolist()])
    where = None
    if masked:
        where = torch.rand(n, generator=generator) < 0.7
        scores, y = scores.masked_fill(~where, torch.nan), y.masked_fill(~where, torch.nan)
    return Lists(scores, y, offsets, where)


@st.composite
def lists(draw: st.DrawFn) -> Lists:
    """Empty, single, short and longer lists, all sorts of labels, near and far scores, masks."""
    length = st.one_of(st.integers(0, 6), st.integers(7, 40), st.sampled_from([63, 64, 65, 100, 129]))
    return random_lists(
        draw(st.lists(length, min_size=0, max_size=5)),
        draw(st.integers(0, 2**31)),
        draw(st.sampled_from(["grades", "grades", "binary", "real", "equal", "zeros"])),
        draw(st.sampled_from([0.1, 1.0, 1.0, 8.0, 100.0])),
        draw(st.booleans()),
    )
