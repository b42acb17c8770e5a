"""Targets: what they say of this machine and of others, and what is no target."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import FrozenInstanceError, replace

import pytest

from graphopt import target
from graphopt.errors import InputError
from graphopt.target import Target


@pytest.fixture
def fresh_host() -> Iterator[None]:
    """Look at a machine that the test makes up, and at the real one again afterwards."""
    caches = (target.host, target._host_cpu)  # pyright: ignore[reportPrivateUsage]
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


@pytest.mark.parametrize("name", Target.names())
def test_every_name_parses_to_a_target_of_that_name(name: str) -> None:
    found = Target.parse(name)
    assert found.name == name
    assert Target.parse(f" {name.upper()} ") == found
    assert found.opset[0] < found.opset[1]
    assert found.alignment >= 1
    assert "float32" in found.dtypes
    assert hash(found) == hash(Target.parse(name))


@pytest.mark.parametrize("name", Target.names())
def test_json_and_back(name: str) -> None:
    found = Target.parse(name)
    assert Target.from_dict(json.loads(json.dumps(found.to_dict()))) == found


@pytest.mark.parametrize("name", ["", "tpu", "cpu:x", "arm64:cortex-a1", "cuda:sm_1", "portable:x"])
def test_unknown_targets_are_told_what_exists(name: str) -> None:
    with pytest.raises(InputError, match=r"unknown target .*cpu, portable, .*cuda:sm_89"):
        Target.parse(name)


def test_portable_is_no_machine() -> None:
    portable = Target.portable()
    assert (portable.device, portable.arch, portable.isa) == ("any", "", frozenset())
    assert portable.keep_opset
    assert not portable.domains
    assert portable.foreign() is None


def test_a_target_is_frozen_data() -> None:
    with pytest.raises(FrozenInstanceError):
        Target.portable().name = "x"  # pyright: ignore[reportAttributeAccessIssue]


def test_the_host_reads_x86_features(monkeypatch: pytest.MonkeyPatch, fresh_host: None) -> None:
    monkeypatch.setattr(target.platform, "machine", lambda: "AMD64")
    monkeypatch.setattr(target, "cpuinfo", lambda: {"flags": "fpu avx2 fma avx512f avx512_vnni"})
    here = Target.parse("cpu")
    assert here.arch == "x86_64"
    assert here.isa == {"avx2", "fma", "avx512f", "avx512_vnni"}
    assert here.alignment == 16
    assert "float16" not in here.dtypes


def test_the_host_reads_arm_features(monkeypatch: pytest.MonkeyPatch, fresh_host: None) -> None:
    monkeypatch.setattr(target.platform, "machine", lambda: "aarch64")
    monkeypatch.setattr(target, "cpuinfo", lambda: {"Features": "fp asimd asimdhp asimddp i8mm"})
    here = Target.parse("cpu")
    assert here.isa == {"neon", "fp16", "dotprod", "i8mm"}
    assert "float16" in here.dtypes
    assert Target.parse("arm64:cortex-a76").foreign() is None
    assert Target.parse("arm64:neoverse-v1").foreign() == "this machine's CPU lacks bf16, sve"


def test_a_machine_without_cpuinfo(monkeypatch: pytest.MonkeyPatch, fresh_host: None) -> None:
    monkeypatch.setattr(target.platform, "machine", lambda: "arm64")
    monkeypatch.setattr(target, "cpuinfo", dict[str, str])
    assert Target.parse("cpu").isa == {"neon"}


def test_foreign_names_the_architecture() -> None:
    here = Target.parse("cpu")
    assert here.foreign() is None
    other = replace(here, arch="riscv64")
    assert other.foreign() == f"it is for riscv64 and this machine is {here.arch}"


@pytest.mark.parametrize(
    "change", [{"name": None}, {"isa": "avx2"}, {"opset": 3}, {"opset": [1]}, {"extra": 1}]
)
def test_damaged_data_is_refused(change: dict[str, object]) -> None:
    data = {**Target.parse("cpu").to_dict(), **change}
    if change == {"name": None}:
        del data["name"]
    with pytest.raises(InputError):
        Target.from_dict(data)
