"""The site puts the terms together: what masks, gates and extra slots do, and that what is None costs nothing."""

import pytest
import torch
from torch import Tensor, nn

from weftlora.adapter.site import Site, build_site
from weftlora.errors import ConfigError, MergeError
from weftlora.kernel import Slots
from weftlora.terms.structure.hydra import Hydra
from weftlora.terms.structure.plain import Plain
from weftlora.terms.structure.tied import Tied

R, IN, OUT = 3, 5, 4
STRUCTURES = [Plain(), Hydra(heads=3), Hydra(heads=2, router_input="Ax"), Tied(), Tied("vera")]
every_structure = pytest.mark.parametrize("structure", STRUCTURES, ids=str)


def site_of(structure: Plain | Hydra | Tied, *, random: bool = True, dropout: float = 0.0, scale: float = 1.5) -> Site:
    torch.manual_seed(0)
    site = build_site(structure, (R, IN, OUT), scale=scale, dropout=dropout).double()
    if random:
        for p in site.parameters():
            nn.init.normal_(p)
    return site


def update(site: Site, x: Tensor) -> Tensor:
    return site(x, torch.zeros(*x.shape[:-1], OUT, dtype=x.dtype))


def tokens() -> Tensor:
    return torch.randn(2, 6, IN, generator=torch.Generator().manual_seed(1)).double()


def columns(site: Site, slot: int) -> Tensor:
    """Which columns of B belong to one rank slot, over all heads."""
    return torch.arange(slot, site.structure.factors(1.0).B.shape[1], R)


class Boost(nn.Module):
    """Slots with learned gains: gated by the layer, not by α/r, not by the mask."""

    def __init__(self, count: int = 2):
        super().__init__()
        torch.manual_seed(3)
        self.register_buffer("down", torch.randn(count, IN).double())
        self.register_buffer("up", torch.randn(OUT, count).double())
        self.gain = nn.Parameter(torch.randn(count).double())

    def slots(self, scale: float, mask: Tensor | None, layer_gate: Tensor | None) -> Slots:
        return Slots(self.down, self.up, self.gain if layer_gate is None else self.gain * layer_gate)


class Twin(nn.Module):
    """Frozen slots −(α/r) B₀A₀, each under the mask and gate of its twin slot."""

    def __init__(self, a: Tensor, b: Tensor):
        super().__init__()
        self.register_buffer("down", a.detach().clone())
        self.register_buffer("up", b.detach().clone())

    def slots(self, scale: float, mask: Tensor | None, layer_gate: Tensor | None) -> Slots:
        gate = torch.full((R,), -scale, dtype=self.down.dtype)
        for given in (mask, layer_gate):
            gate = gate if given is None else gate * given
        return Slots(self.down, self.up, gate)


# ---------------------------------------------------------------------- the start


@every_structure
def test_a_fresh_site_changes_nothing_bit_for_bit(structure):
    site, x = site_of(structure, random=False), tokens()
    y = torch.randn(2, 6, OUT).double()
    assert torch.equal(site(x, y), y)


def test_a_plain_site_owns_exactly_a_and_b():
    assert set(site_of(Plain()).state_dict()) == {"structure.A", "structure.B"}


def test_a_hydra_site_also_owns_its_router():
    site = site_of(Hydra(heads=3))
    assert {k: tuple(v.shape) for k, v in site.state_dict().items()} == {
        "structure.A": (R, IN),
        "structure.B": (OUT, 3 * R),
        "structure.router": (3, IN),
    }
    assert site_of(Hydra(heads=3, router_input="Ax")).structure.router.shape == (3, R)


@every_structure
def test_what_the_axes_do_not_need_is_neither_allocated_nor_saved(structure):
    site = site_of(structure)
    assert site.mask is None
    assert site.layer_gate is None
    assert not [k for k in site.state_dict() if not k.startswith("structure.")]
    assert not list(site.buffers()) or isinstance(structure, Tied)


def test_a_mask_and_a_layer_gate_are_saved_once_they_exist():
    site = site_of(Plain())
    site.mask, site.layer_gate = torch.ones(R), torch.tensor(0.5)
    assert {"mask", "layer_gate"} < set(site.state_dict())
    assert {name for name, _ in site.named_parameters()} == {"structure.A", "structure.B"}


def test_a_tied_follower_saves_only_its_own_vectors():
    owner = site_of(Tied("tl6"))
    follower = build_site(
        Tied("tl6"), (R, IN, OUT), scale=1.0, dropout=0.0, owners={"A": owner.structure, "B": owner.structure}
    )
    assert set(owner.state_dict()) == {f"structure.{part}" for part in "ABuv"}
    assert set(follower.state_dict()) == {"structure.u", "structure.v"}
    assert {id(p) for p in follower.parameters()}.isdisjoint(id(p) for p in owner.parameters())
    assert follower.structure.part("A") is owner.structure.A


# ---------------------------------------------------------------------- the rank mask


@every_structure
def test_a_masked_slot_is_gone_from_the_output(structure):
    site, x = site_of(structure), tokens()
    whole = update(site, x)
    site.mask = torch.tensor([1.0, 0.0, 1.0]).double()
    masked = update(site, x)
    site.mask = None
    factors = site.structure.factors(1.0)
    with torch.no_grad():
        factors.A[1] = 0  # a router that reads A x sees none of it either
        factors.B[:, columns(site, 1)] = 0
    torch.testing.assert_close(masked, update(site, x), rtol=1e-13, atol=1e-13)
    assert not torch.allclose(masked, whole)


@pytest.mark.parametrize("structure", [Plain(), Hydra(heads=3), Tied()], ids=str)
def test_a_masked_slot_gets_exactly_no_gradient_and_the_others_theirs(structure):
    site, x = site_of(structure), tokens()
    site.mask = torch.tensor([1.0, 0.0, 1.0]).double()
    update(site, x).square().sum().backward()
    term = site.structure
    dead, live = columns(site, 1), [c for slot in (0, 2) for c in columns(site, slot).tolist()]
    assert torch.count_nonzero(term.A.grad[1]) == 0
    assert torch.count_nonzero(term.B.grad[:, dead]) == 0
    assert (term.A.grad[[0, 2]].abs().sum(1) > 0).all()
    assert (term.B.grad[:, live].abs().sum(0) > 0).all()
    if isinstance(structure, Tied):
        assert term.u.grad[1] == 0
        assert (term.u.grad[[0, 2]] != 0).all()


@every_structure
def test_an_all_ones_mask_changes_nothing(structure):
    site, x = site_of(structure), tokens()
    before = update(site, x)
    site.mask = torch.ones(R).double()
    assert torch.equal(update(site, x), before)


@pytest.mark.parametrize("structure", [Plain(), Hydra(heads=3), Tied()], ids=str)
def test_survivors_are_not_rescaled_when_a_slot_dies(structure):
    """α/r stays that of the initial rank: each slot's share of the update is the same whoever else is alive. (A router that
    reads A x reads the live slots only.)"""
    site, x = site_of(structure), tokens()
    whole = update(site, x)
    parts = []
    for slot in range(R):
        site.mask = torch.eye(R)[slot].double()
        parts.append(update(site, x))
    torch.testing.assert_close(sum(parts), whole, rtol=1e-12, atol=1e-12)


# ---------------------------------------------------------------------- the layer gate


@every_structure
def test_the_layer_gate_scales_the_whole_update(structure):
    site, x = site_of(structure), tokens()
    site.boost, site.mask = Boost(), torch.tensor([1.0, 0.0, 1.0]).double()
    site.start = (
        None if isinstance(structure, Hydra) else Twin(torch.randn(R, IN).double(), torch.randn(OUT, R).double())
    )
    whole = update(site, x)
    site.layer_gate = torch.tensor(0.3, dtype=torch.float64)
    torch.testing.assert_close(update(site, x), 0.3 * whole, rtol=1e-12, atol=1e-12)
    site.layer_gate = torch.tensor(0.0, dtype=torch.float64)
    assert torch.equal(update(site, x), torch.zeros_like(whole))


@every_structure
def test_the_layer_gate_can_be_differentiated(structure):
    """The hypergradient of a layer search: d update / d gate is the ungated update."""
    site, x = site_of(structure), tokens()
    whole = update(site, x).detach()
    gate = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    site.layer_gate = gate
    (slope,) = torch.autograd.grad((update(site, x) * whole).sum(), gate)
    torch.testing.assert_close(slope, whole.square().sum(), rtol=1e-12, atol=1e-12)


# ---------------------------------------------------------------------- extra slots


@every_structure
def test_boost_slots_add_up_without_scale_mask_router_or_v(structure):
    site, x = site_of(structure), tokens()
    site.mask = torch.tensor([1.0, 0.0, 1.0]).double()
    without = update(site, x)
    site.boost = boost = Boost()
    with torch.no_grad():
        by_hand = (x @ boost.down.T * boost.gain) @ boost.up.T
    torch.testing.assert_close(update(site, x), without + by_hand, rtol=1e-12, atol=1e-12)


@every_structure
def test_only_the_gain_of_a_boost_slot_is_trained(structure):
    site, x = site_of(structure), tokens()
    site.boost = boost = Boost()
    update(site, x).sum().backward()
    want = (x @ boost.down.T * boost.up.sum(0)).sum((0, 1))
    torch.testing.assert_close(boost.gain.grad, want, rtol=1e-12, atol=1e-12)
    assert [name for name, _ in site.named_parameters() if name.startswith("boost")] == ["boost.gain"]


def test_a_frozen_twin_cancels_its_slot_and_dies_with_it():
    """LoRA-Init: W + s(BA − B₀A₀) is W at the start, and switching slot j off switches off both halves of it."""
    site, x = site_of(Plain()), tokens()
    site.start = Twin(site.structure.A, site.structure.B)
    assert update(site, x).abs().max() < 1e-14 * update(site_of(Plain()), x).abs().max() * 10
    with torch.no_grad():
        site.structure.A += 0.1
    moved = [site.structure.B[:, j : j + 1] @ site.structure.A[j : j + 1] for j in range(R)]
    frozen = [site.start.up[:, j : j + 1] @ site.start.down[j : j + 1] for j in range(R)]
    site.mask = torch.tensor([0.0, 1.0, 0.0]).double()
    torch.testing.assert_close(update(site, x), 1.5 * x @ (moved[1] - frozen[1]).T, rtol=1e-12, atol=1e-13)
    site.mask = torch.zeros(R).double()
    assert torch.equal(update(site, x), torch.zeros(2, 6, OUT).double())


# ---------------------------------------------------------------------- ΔW, modes


@pytest.mark.parametrize("structure", [s for s in STRUCTURES if not isinstance(s, Hydra)], ids=str)
def test_delta_weight_holds_everything_the_site_adds(structure):
    site, x = site_of(structure), tokens()
    site.mask, site.layer_gate = torch.tensor([1.0, 0.0, 1.0]).double(), torch.tensor(0.4, dtype=torch.float64)
    site.boost, site.start = Boost(), Twin(torch.randn(R, IN).double(), torch.randn(OUT, R).double())
    assert site.mergeable
    delta = site.delta_weight()
    assert not delta.requires_grad
    torch.testing.assert_close(update(site, x), x @ delta.T, rtol=1e-12, atol=1e-12)


def test_a_routed_site_has_no_delta_weight():
    site = site_of(Hydra(heads=2))
    assert not site.mergeable
    with pytest.raises(MergeError, match="token"):
        site.delta_weight()


@every_structure
def test_dropout_acts_in_training_only(structure):
    site, x = site_of(structure, dropout=0.5), tokens()
    whole = update(site.eval(), x)
    assert torch.equal(update(site, x), whole)
    assert torch.equal(whole, update(site_of(structure), x))
    torch.manual_seed(0)
    assert not torch.allclose(update(site.train(), x), whole)


@every_structure
def test_the_forward_has_no_side_effects(structure):
    site, x = site_of(structure), tokens()
    before = {k: v.clone() for k, v in site.state_dict().items()}
    update(site, x)
    assert all(torch.equal(before[k], v) for k, v in site.state_dict().items())
    assert set(before) == set(site.state_dict())
    state = torch.get_rng_state()
    update(site, x)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(("train", "grad", "refused"), [(True, True, True), (True, False, False), (False, True, False)])
def test_a_load_balance_term_nobody_adds_to_the_loss_is_refused(train: bool, grad: bool, refused: bool):
    site, x = site_of(Hydra(heads=2, balance=0.01)).train(train), tokens()
    with torch.set_grad_enabled(grad):
        if refused:
            with pytest.raises(ConfigError, match=r"weftlora\.routing"):
                update(site, x)
        else:
            update(site, x)
