"""What is said of a record, in sentences, figures and tables: the numbers of the record, under the right names."""

from __future__ import annotations

import dataclasses
import io
import statistics
from pathlib import Path
from typing import Any

import pytest

import weftlora
from weftlora.cli import inspect
from weftlora.cli.output import Screen
from weftlora.inspection.record import (
    Chosen,
    HeadSimilarity,
    Inspection,
    Parameters,
    SiteDirections,
    SiteUsage,
    Usage,
    verdict,
)
from weftlora.report.inspection.page import tiles


@pytest.fixture(scope="module")
def looked_at(hydra_run: Path) -> Inspection:
    return weftlora.inspect(hydra_run, rows=2, spectra=0)


def routed(found: Inspection, entropy: float, balance: float) -> Inspection:
    assert found.routers is not None
    used = Usage(9, [0.5, 0.5], entropy, balance, [0.5, 0.5])
    sites = [SiteUsage(site.site, used, {}) for site in found.routers.sites]
    return dataclasses.replace(found, routers=dataclasses.replace(found.routers, sites=sites))


@pytest.mark.parametrize(
    ("entropy", "balance", "said"),
    [
        (0.99, 1.0, "mix all heads almost evenly for every token, so they hardly route"),
        (0.7, 0.71, "give every token nearly the same mix of heads, so they hardly route"),
        (0.85, 0.99, "mix the heads in shares that depend on the token, and use all of them"),
        (0.7, 0.85, "mix the heads in shares that depend on the token, and prefer some of them"),
        (0.3, 0.95, "choose among the heads, and use all of them"),
        (0.3, 0.5, "choose among the heads, and prefer some of them"),
    ],
)
def test_what_routers_do_follows_from_entropy_and_balance(
    entropy: float, balance: float, said: str, looked_at: Inspection
):
    sentences = verdict(routed(looked_at, entropy, balance))
    assert f"The routers {said}: entropy {entropy:.2f}, balance {balance:.2f} (1 is even)." in sentences


@pytest.mark.parametrize(
    ("cosine", "said"), [(0.95, "do nearly the same"), (0.6, "are more alike than not"), (-0.2, "are distinct")]
)
def test_how_alike_heads_are_follows_from_their_cosine(cosine: float, said: str, looked_at: Inspection):
    found = dataclasses.replace(looked_at, heads=[HeadSimilarity("q", [[1.0, cosine], [cosine, 1.0]], cosine)])
    assert f"The heads {said}: their B's have a mean cosine of {cosine:.2f}." in verdict(found)


def test_sizes_and_movement_are_counted(looked_at: Inspection):
    sites = [dataclasses.replace(s, norm=1.0, relative=0.02) for s in looked_at.sites]
    sites[3] = dataclasses.replace(sites[3], relative=0.5)
    sites[4] = dataclasses.replace(sites[4], norm=0.0, relative=0.0)
    found = dataclasses.replace(looked_at, sites=sites, parameters=Parameters(1234, 5678, 9, 12340))
    said = verdict(found)
    assert said[0] == "1,234 trainable parameters (10.00% of the base) on 28 adapted modules in 4 blocks."
    assert (
        said[1]
        == f"ΔW is 2.00% of W at the median module and 50.00% at most, in {sites[3].site}; 1 module did not move."
    )
    assert dict(tiles(found)) == {
        "trainable parameters": "1,234",
        "of the base": "10.00%",
        "stored numbers": "5,678",
        "adapted modules": "28",
        "saved in full beside it": "9",
        "rank": "2",
        "can be merged": "0 of 28",
    }


def test_gains_are_averaged_by_size_and_merging_is_counted(looked_at: Inspection):
    chosen = [Chosen(0, 1.0, 1.0, -0.3), Chosen(1, 1.0, 1.0, 0.1)]
    sites = [dataclasses.replace(s, mergeable=n > 0, why_not="because.") for n, s in enumerate(looked_at.sites)]
    found = dataclasses.replace(looked_at, sites=sites, directions=[SiteDirections("q", "launched", chosen)])
    assert "Dash has learned gains of 0.2 on average, 0.3 at most." in verdict(found)
    assert verdict(found)[-1] == "Of 28 modules, 1 cannot be merged: because."


def printed(found: Inspection) -> list[list[str]]:
    shown = io.StringIO()
    Screen(file=shown, width=80).print(inspect.shown(found))
    return [line.split() for line in shown.getvalue().splitlines()]


def test_the_terminals_tables_have_the_means_of_the_record(looked_at: Inspection):
    lines, routers = printed(looked_at), looked_at.routers
    assert routers is not None
    at = lines.index(["block", "entropy", "balance", "top-1", "share", "head", "cosine"])
    used: list[Any] = [site.whole for site in routers.sites if site.site.startswith("model.layers.0.")]
    cosines = [
        head.mean for head in looked_at.heads if head.site.startswith("model.layers.0.") and head.mean is not None
    ]
    means = [statistics.mean(values) for values in (
        [u.entropy for u in used], [u.balance for u in used], [max(u.top1) for u in used], cosines,
    )]  # fmt: skip
    assert lines[at + 1] == ["0", *(f"{mean:.2f}" for mean in means)]
    at = lines.index(["domain", "tokens", "entropy", "balance", "apart"])
    for line, domain in zip(lines[at + 1 :], routers.domains, strict=False):
        own = [site.domains[domain] for site in routers.sites]
        apart = statistics.mean(site.apart(domain) for site in routers.sites)
        shown = [statistics.mean(u.entropy for u in own), statistics.mean(u.balance for u in own), apart]
        assert line == [domain, f"{own[0].tokens:,}", *(f"{value:.2f}" for value in shown)]


def test_the_terminals_ranks_are_the_records(alora_run: Path):
    found = weftlora.inspect(alora_run, base=False)
    lines = printed(found)
    at = lines.index(["rank", "by", "block"])
    for number in range(4):
        ranks = [str(site.rank) for site in found.sites if site.block == f"model.layers.{number}"]
        assert lines[at + 2 + number] == [str(number), *ranks]
