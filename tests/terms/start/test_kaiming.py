"""Values of A at step 0."""

import math

import pytest
import torch
from torch import nn

from weftlora.terms.start.kaiming import kaiming_uniform


def test_it_is_torchs_kaiming_uniform_with_a_of_root_five():
    torch.manual_seed(3)
    ours = kaiming_uniform(64, 48)
    torch.manual_seed(3)
    theirs = nn.init.kaiming_uniform_(torch.empty(64, 48), a=math.sqrt(5))
    torch.testing.assert_close(ours, theirs)
    assert ours.dtype == torch.float32


@pytest.mark.parametrize("fan_in", [1, 7, 400])
def test_values_fill_the_bound(fan_in: int):
    values = kaiming_uniform(500, fan_in)
    assert values.abs().max() <= 1 / math.sqrt(fan_in)
    assert values.abs().max() > 0.95 / math.sqrt(fan_in)
    assert values.std().item() == pytest.approx(1 / math.sqrt(3 * fan_in), rel=0.1)


def test_the_same_seed_gives_the_same_values_and_can_live_on_any_device():
    torch.manual_seed(1)
    first = kaiming_uniform(2, 3)
    torch.manual_seed(1)
    assert torch.equal(first, kaiming_uniform(2, 3))
    assert kaiming_uniform(2, 3, device="meta").is_meta
