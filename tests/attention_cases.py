"""Random attention problems and the error bound, for the tests of block_attention and document_scores."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st

from rankernel import BlockLayout

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_document = st.one_of(st.integers(0, 5), st.integers(6, 70), st.sampled_from([31, 32, 33, 64, 96, 130]))
_list = st.tuples(
    st.sampled_from([0, 1, 7, 32, 45, 64]), st.lists(_document, max_size=5), st.sampled_from([0, 1, 2, 16, 33])
)


@dataclass
class Problem:
    """Float64 inputs that every dtype and instruction set is tried on."""

    layout: BlockLayout
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    options: dict[str, object]

    def inputs(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.query.to(dtype), self.key.to(dtype), self.value.to(dtype)


@st.composite
def problems(draw: st.DrawFn, attention: bool = True) -> Problem:
    """Several lists with empty, one-token and odd-sized segments, grouped heads, any head size, every option."""
    layout = BlockLayout.from_lengths(
        draw(st.lists(_list, min_size=1, max_size=3)), draw(st.sampled_from(["block", "block", "causal"]))
    )
    kv_heads, group = draw(st.sampled_from([1, 2, 3])), draw(st.sampled_from([1, 2, 3, 4, 7]))
    head_size = draw(st.sampled_from([8, 9, 16, 24, 33, 64, 80, 128, 200, 256]))
    options: dict[str, object] = {
        "scale": draw(st.sampled_from([None, 0.05, 0.4])),
        "softcap": draw(st.sampled_from([None, None, 3.0])),
    }
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    if attention:
        options["window"] = draw(st.sampled_from([None, None, 1, 5, 40, 1000]))
        if draw(st.booleans()):
            options["sinks"] = 3 * torch.randn(kv_heads * group, generator=generator)
    tensors = []
    for heads in (kv_heads * group, kv_heads, kv_heads):
        scale = draw(st.sampled_from([0.3, 1.0, 3.0]))
        # Contiguous; heads before tokens, as Hugging Face has it; or a slice of a fused projection.
        shape = draw(st.sampled_from(["contiguous", "transposed", "sliced"]))
        tokens = layout.num_tokens
        if shape == "contiguous":
            tensor = torch.randn(tokens, heads, head_size, generator=generator, dtype=torch.float64)
        elif shape == "transposed":
            tensor = torch.randn(heads, tokens, head_size, generator=generator, dtype=torch.float64).transpose(0, 1)
        else:
            tensor = torch.randn(tokens, heads + 1, head_size + 3, generator=generator, dtype=torch.float64)
            tensor = tensor[:, 1:, :head_size]
        tensors.append(tensor * scale)
    return Problem(layout, *tensors, options)


def assert_close(
    ours: torch.Tensor, eager: torch.Tensor, truth: torch.Tensor, what: str = "", magnitude: float = 0.0
) -> None:
    """Within twice the error of PyTorch eager in the same dtype, plus four ulp of the largest value.

    ``magnitude`` is that of float32 intermediates which may cancel; four of their units are allowed too. -inf must
    stand where truth has it.
    """
    assert ours.shape == truth.shape, f"{what}: shape {list(ours.shape)} instead of {list(truth.shape)}"
    finite = torch.isfinite(truth)
    assert torch.equal(torch.isfinite(ours), finite), f"{what}: non-finite values in other places"
    assert torch.equal(ours[~finite].double(), truth[~finite].double()), f"{what}: other infinities"
    if not finite.any():
        return
    error = (ours.double() - truth.double())[finite].abs().max()
    bound = 2 * (eager.double() - truth.double())[finite].abs().max()
    bound += 4 * torch.finfo(ours.dtype).eps * truth[finite].abs().max().clamp(min=1)
    bound += 4 * torch.finfo(torch.float32).eps * magnitude
    assert error <= bound, f"{what}: error {error:.3g} above {bound:.3g}"
