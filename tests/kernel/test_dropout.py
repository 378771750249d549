"""Packed dropout: the right share, no trace of a lattice, one bit per element, governed by torch's generator."""

import math

import numpy as np
import pytest
import torch

from weftlora.kernel.dropout import draw, dropped, masked, packed_bits

MANY = 1 << 22


def bits_of(count: int, p: float, seed: int = 0) -> np.ndarray:
    return np.unpackbits(packed_bits(count, p, seed), bitorder="little")[:count]


@pytest.mark.parametrize("p", [0.5, 0.25, 0.75, 0.05, 0.1, 0.001, 0.3, 0.999, 13 / 256])
def test_the_share_of_dropped_elements_is_p_and_not_a_rounded_p(p: float):
    """Over four million elements to five standard errors: 0.05 and the nearest 1/256 are told apart."""
    share = bits_of(MANY, p).mean()
    error = math.sqrt(p * (1 - p) / MANY)
    assert abs(share - p) < 5 * error
    if p == 0.05:
        assert abs(share - 13 / 256) > 5 * error


@pytest.mark.parametrize("p", [0.5, 0.05, 0.3])
@pytest.mark.parametrize("distance", [1, 2, 7, 8, 63, 64, 65, 768])
def test_elements_are_dropped_independently_of_one_another(p: float, distance: int):
    bits = bits_of(MANY, p).astype(np.float64) - p
    correlation = (bits[:-distance] * bits[distance:]).mean() / (p * (1 - p))
    assert abs(correlation) < 5 / math.sqrt(MANY) + (1e-4 if distance < 64 else 0)


@pytest.mark.parametrize("p", [0.5, 0.05, 0.001])
def test_every_place_in_a_word_has_the_same_share(p: float):
    share = bits_of(MANY, p).reshape(-1, 64).mean(0)
    assert np.abs(share - p).max() < 5 * math.sqrt(p * (1 - p) / (MANY / 64))


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 63, 64, 65, 1000])
def test_any_number_of_elements_has_a_bit_each(count: int):
    assert len(packed_bits(count, 0.3, 0)) == math.ceil(count / 8)


def test_the_generator_of_torch_governs_the_masks():
    x = torch.ones(64, 64)
    torch.manual_seed(3)
    first, second = draw(x, 0.3), draw(x, 0.3)
    torch.manual_seed(3)
    assert torch.equal(draw(x, 0.3), first)
    assert not torch.equal(first, second)
    state = torch.get_rng_state()
    third = draw(x, 0.3)
    torch.set_rng_state(state)  # as gradient checkpointing does
    assert torch.equal(draw(x, 0.3), third)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(4, 16), (3, 5), (2, 3, 7), (1, 1), (0, 8)])
def test_masked_keeps_values_to_the_bit_and_drops_the_bits_that_are_set(dtype: torch.dtype, shape: tuple[int, ...]):
    x = torch.randn(shape).to(dtype)
    bits = draw(x, 0.4)
    gone = torch.from_numpy(np.unpackbits(bits.numpy(), bitorder="little")[: x.numel()].astype(bool)).view(shape)
    got = masked(x, bits, 0.4)
    assert got.dtype == dtype
    assert torch.equal(got, torch.where(gone, torch.zeros_like(x), x))


def test_masked_of_a_transposed_input_has_its_rows():
    x = torch.randn(16, 8).T
    bits = draw(x, 0.5)
    assert torch.equal(masked(x, bits, 0.5), masked(x.contiguous(), bits, 0.5))


def test_dropped_is_unbiased_and_its_derivative_is_the_mask():
    x = torch.ones(512, 512, dtype=torch.float64, requires_grad=True)
    y = dropped(x, 0.3)
    assert y.mean().item() == pytest.approx(1, abs=0.01)
    [g] = torch.autograd.grad(y.sum(), x)
    assert torch.equal(g, y.detach())


def test_off_the_cpu_a_seed_is_kept_and_the_mask_made_again():
    """On the meta device, which draws as an accelerator does: eight bytes are kept, whatever the size of x."""
    bits = draw(torch.empty(64, 64, device="meta"), 0.3)
    assert (bits.dtype, bits.shape, bits.device.type) == (torch.int64, (), "cpu")


def test_the_drawing_costs_less_than_torchs_own_dropout():
    """A tenth of its work; a third is asked for, on a machine with other work."""
    import time

    x = torch.randn(1024, 768, dtype=torch.bfloat16)

    def cost(run) -> float:
        times = []
        for _ in range(7):
            start = time.process_time()
            run()
            times.append(time.process_time() - start)
        return min(times)

    assert cost(lambda: masked(x, draw(x, 0.05), 0.05)) < cost(lambda: torch.nn.functional.dropout(x, 0.05)) / 3
