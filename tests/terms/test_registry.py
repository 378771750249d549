"""Terms of other packages: who names them decides whether their code runs."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from offering import IMPORTED, NOTES_ITS_IMPORT, STRUCTURE, offer
from peft import PeftConfig

import weftlora
from weftlora.adapter.spec import WeftConfig, decode_choice, encode_choice, read_config
from weftlora.errors import AdapterError, ConfigError
from weftlora.terms import registry, trust
from weftlora.terms.axes import AXES

UNFINISHED = """\
from dataclasses import dataclass

from weftlora.terms.structure import Structure


@dataclass(frozen=True)
class Pair(Structure):
    size: int = 2
"""
PLANTED = NOTES_ITS_IMPORT + STRUCTURE


@pytest.fixture(autouse=True)
def _a_process_that_has_seen_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trust, "_trusted", set())
    for name, value in (("_own", set()), ("_local", {}), ("_loaded", {})):
        monkeypatch.setattr(registry, name, value)
    monkeypatch.delenv(trust.VARIABLE, raising=False)


@pytest.fixture
def plant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Offers a package on the path of this process; it is forgotten after the test."""
    modules = []

    def planted(package: str = "pair-terms", source: str = PLANTED, **terms: str) -> Path:
        folder = offer(tmp_path / package, package, source, **(terms or {"pair": "Pair"}))
        monkeypatch.syspath_prepend(str(folder))
        modules.append(package.replace("-", "_"))
        return folder

    yield planted
    for module in modules:
        sys.modules.pop(module, None)


def a_folder(tmp_path: Path, **structure: object) -> Path:
    """A saved config that names the term, made by hand as anybody could."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    saved = WeftConfig(target_modules=["q_proj"]).to_dict() | {"structure": {"kind": "pair", **structure}}
    (folder / "adapter_config.json").write_text(json.dumps(saved), encoding="utf-8")
    return folder


def the_ways_to_read(folder: Path) -> dict[str, object]:
    content = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    bare = {key: value for key, value in content.items() if key not in ("weft_version", "peft_type")}
    return {
        "weftlora's own reader": lambda: read_config(folder),
        "PeftConfig.from_pretrained": lambda: PeftConfig.from_pretrained(str(folder)),
        "WeftConfig.from_pretrained": lambda: WeftConfig.from_pretrained(str(folder)),
        "WeftConfig of what was read": lambda: WeftConfig(**content),
        "from_peft_type without a type": lambda: WeftConfig.from_peft_type(**bare),
    }


def test_your_own_config_imports_what_it_names(plant):
    folder = plant()
    assert not (folder / IMPORTED).exists()
    config = WeftConfig(structure={"pair": {"size": 3}})
    assert type(config.structure).__name__ == "Pair"
    assert config.structure.size == 3
    assert (folder / IMPORTED).exists()


@pytest.mark.parametrize("way", ["name", "kind", "fields"])
def test_every_way_to_name_a_foreign_term(plant, way: str):
    plant()
    value = {"name": "pair", "kind": {"kind": "Pair", "size": 2}, "fields": {"pair": None}}[way]
    assert decode_choice("structure", value).size == 2


def test_a_saved_config_says_which_release_of_which_package_its_term_is_of(plant):
    plant()
    config = WeftConfig(structure="pair")
    assert config.to_dict()["structure"] == {
        "kind": "pair",
        "package": "pair-terms",
        "version": "1.0",
        "size": 2,
        "mode": "soft",
    }
    assert decode_choice("structure", encode_choice(config.structure)) == config.structure


@pytest.mark.parametrize("way", range(5))
def test_a_config_from_a_folder_imports_nothing_and_says_what_to_type(plant, tmp_path: Path, way: int):
    planted = plant()
    name, read = list(the_ways_to_read(a_folder(tmp_path, package="pair-terms", version="1.0")).items())[way]
    with pytest.raises(AdapterError) as said:
        read()  # type: ignore[operator]
    for part in (
        "'pair'",
        "pair-terms 1.0",
        "trust_terms('pair-terms')",
        "--trust-terms pair-terms",
        "WEFT_TRUST_TERMS",
    ):
        assert part in str(said.value), name
    assert not (planted / IMPORTED).exists(), name
    assert "pair_terms" not in sys.modules


@pytest.mark.parametrize("way", ["call", "variable", "other spelling"])
def test_it_is_imported_once_its_package_is_trusted(plant, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str):
    plant()
    folder = a_folder(tmp_path, package="pair-terms", version="1.0", size=5)
    if way == "variable":
        monkeypatch.setenv(trust.VARIABLE, "another, pair-terms")
    else:
        weftlora.trust_terms("Pair_Terms" if way == "other spelling" else "pair-terms")
    assert read_config(folder).structure.size == 5


def test_trust_in_one_package_is_not_trust_in_another(plant, tmp_path: Path):
    planted = plant()
    weftlora.trust_terms("some-other-terms")
    with pytest.raises(AdapterError, match="pair-terms"):
        read_config(a_folder(tmp_path, package="some-other-terms", version="1.0"))
    assert not (planted / IMPORTED).exists()


def test_what_your_own_config_has_named_is_read_back_in_that_process(plant, tmp_path: Path):
    plant()
    WeftConfig(structure="pair")
    assert read_config(a_folder(tmp_path)).structure.size == 2


def test_what_a_trusted_folder_has_named_is_not_your_own(plant, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    plant()
    folder = a_folder(tmp_path)
    monkeypatch.setenv(trust.VARIABLE, "pair-terms")
    read_config(folder)
    monkeypatch.delenv(trust.VARIABLE)
    with pytest.raises(AdapterError, match="runs that package's code"):
        read_config(folder)


def test_a_folder_cannot_name_a_class_by_its_path(plant, tmp_path: Path):
    planted = plant()
    weftlora.trust_terms("pair-terms")
    for kind in ("pair_terms:Pair", "pair_terms.Pair", "os:system"):
        with pytest.raises(ConfigError):
            WeftConfig(structure={"kind": kind}, peft_type="WEFT")
    assert not (planted / IMPORTED).exists()


def test_a_term_whose_package_is_not_installed_is_named_with_it(tmp_path: Path):
    with pytest.raises(AdapterError, match=r"'pair' of pair-terms 2\.1, which is not installed: install pair-terms"):
        read_config(a_folder(tmp_path, package="pair-terms", version="2.1"))


def test_another_release_than_the_saved_one_is_said(plant, tmp_path: Path):
    plant()
    weftlora.trust_terms("pair-terms")
    with pytest.warns(UserWarning, match=r"saved by pair-terms 0\.1, and pair-terms 1\.0 is installed"):
        read_config(a_folder(tmp_path, package="pair-terms", version="0.1"))


def test_a_name_of_weftloras_own_cannot_be_taken(plant):
    planted = plant("greedy-terms", plain="Pair", hydra="Pair")
    assert WeftConfig(structure="plain").structure == weftlora.Plain()
    with pytest.raises(ConfigError, match="'hydra' is a choice of the axis structure"):
        WeftConfig(ranks="hydra")
    assert registry.offers() == []
    assert not (planted / IMPORTED).exists()


def test_two_packages_of_one_name_are_refused_only_when_it_is_used(plant):
    plant("first-terms")
    plant("second-terms", pair="Pair", other="Pair")
    assert WeftConfig(structure="other").structure.size == 2
    with pytest.raises(ConfigError, match=r"first-terms 1\.0 and second-terms 1\.0 both offer"):
        WeftConfig(structure="pair")


def test_a_package_that_cannot_be_imported_breaks_no_other(plant):
    plant("broken-terms", "raise SystemError('out of order')", broken="Pair")
    plant()
    assert WeftConfig(structure="pair").structure.size == 2
    assert WeftConfig().structure == weftlora.Plain()
    with pytest.raises(
        ConfigError, match=r"'broken' cannot be imported from broken-terms 1\.0 \(SystemError: out of order\)"
    ):
        WeftConfig(structure="broken")


def test_an_entry_point_that_leads_nowhere_is_said(plant):
    plant(pair="Missing")
    with pytest.raises(ConfigError, match="cannot be imported"):
        WeftConfig(structure="pair")


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("Pair = 3", "not a choice of any axis"),
        ("class Pair:\n    pass", "not a choice of any axis"),
        (STRUCTURE.replace("@dataclass(frozen=True)", ""), "not a frozen dataclass"),
        (UNFINISHED, "is unfinished: it does not say build, "),
        (STRUCTURE.replace("size: int = 2", "version: int = 2"), "a field 'version'"),
    ],
)
def test_an_offer_that_is_no_term_is_said(plant, source: str, said: str):
    plant(source=source)
    with pytest.raises(ConfigError, match=said):
        WeftConfig(structure="pair")


def test_a_term_on_another_axis_than_its_own_is_said(plant):
    plant()
    with pytest.raises(ConfigError, match=r"'pair' of pair-terms 1\.0 is a choice of the axis structure, not of ranks"):
        WeftConfig(ranks="pair")


def test_weftloras_own_choices_ask_no_metadata(monkeypatch: pytest.MonkeyPatch):
    def asked(**_: object) -> None:
        raise AssertionError("the metadata of packages was read")

    monkeypatch.setattr(registry.metadata, "entry_points", asked)
    for axis, kinds in AXES.items():
        for name in kinds.keys() - {"only"}:
            assert encode_choice(decode_choice(axis, name))["kind"] == name  # type: ignore[index]
    assert WeftConfig(structure="hydra", boost="dash", layers=[0]).to_dict()["layers"]["kind"] == "only"


def test_an_unknown_field_names_the_nearest_one(plant):
    plant()
    with pytest.raises(ConfigError, match="Pair has no key 'sise': did you mean 'size'"):
        WeftConfig(structure={"pair": {"sise": 3}})


def test_an_unknown_name_suggests_foreign_ones_too(plant):
    planted = plant()
    with pytest.raises(ConfigError, match="did you mean 'pair'"):
        WeftConfig(structure="piar")
    assert not (planted / IMPORTED).exists()


def test_a_class_of_your_own_code_is_read_back_in_its_process(tmp_path: Path):
    @dataclass(frozen=True)
    class Homely(weftlora.Plain):
        size: int = 2

    config = WeftConfig(structure=Homely(4), target_modules=["q_proj"])
    assert config.to_dict()["structure"] == {"kind": "homely", "package": None, "size": 4}
    config.save_pretrained(str(tmp_path))
    assert read_config(tmp_path).structure == Homely(4)


def test_a_class_of_your_own_code_that_no_package_offers_is_named_elsewhere(tmp_path: Path):
    with pytest.raises(ConfigError, match="a class that no package offers is known once"):
        read_config(a_folder(tmp_path, package=None))


def test_a_class_of_your_own_with_a_name_of_weftloras_is_refused():
    @dataclass(frozen=True)
    class Plain(weftlora.Plain):
        pass

    with pytest.raises(ConfigError, match="rename the class"):
        WeftConfig(structure=Plain())


def test_a_comparison_goes_on_with_what_its_recipe_names_and_no_other_foreign_term(plant):
    from weftlora.compare.methods import check_saved, contenders
    from weftlora.compare.record import Method

    planted = plant()
    kept = [
        Method(
            "pair", {"structure": {"kind": "pair", "package": "pair-terms", "version": "1.0"}}, parameters=0, steps=0
        )
    ]
    with pytest.raises(AdapterError, match="runs that package's code"):
        check_saved(contenders(["lora"]), kept, ())
    assert not (planted / IMPORTED).exists()
    check_saved(contenders(["lora", {"structure": "pair"}]), kept, ())
    drawn = [Method("random_layers", {"recipe": "lora", "layers": {"random": 1}}, parameters=0, steps=0)]
    check_saved(contenders(["random_layers"]), drawn, ["random_layers"])


def test_trusting_something_else_than_a_name_is_refused():
    with pytest.raises(ConfigError, match="as pip knows it"):
        weftlora.trust_terms("")
