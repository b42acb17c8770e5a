"""What a model is optimized for: plain data about a device, never a backend object.

A pass asks its target what may be used (opsets, domains, dtypes, alignment); a backend asks it
what to build for. `cpu` is this machine, everything else is described here as data.
"""

from __future__ import annotations

import dataclasses
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from graphopt.errors import InputError

_OLDEST_OPSET = 7  # ONNX Runtime promises every opset from here on
_RUNTIME_OPSETS = ((1, 32, 28), (1, 22, 23), (1, 21, 22), (1, 20, 21))
"""ONNX Runtime version → newest opset for which no operator loses its CPU kernel.

1.20 to 1.22 from its compatibility page; 1.32 read from its kernel registry; between them the
older figure holds, which is on the safe side.
"""

_CPU_FEATURES = {
    # /proc/cpuinfo's name → ours; x86 first, then ARM
    **{name: name for name in ("sse4_2", "avx", "avx2", "fma", "f16c", "avx512f", "avx512bw")},
    **{name: name for name in ("avx512dq", "avx512vl", "amx_int8", "amx_bf16", "amx_fp16")},
    **{name: name for name in ("avx_vnni", "avx512_vnni", "avx512_bf16", "avx512_fp16")},
    # nothing here asks for these, but code made for this machine has them: see `Target.foreign`
    **{name: name for name in ("bmi1", "bmi2", "abm", "movbe", "gfni", "vaes", "vpclmulqdq")},
    **{name: name for name in ("avx512cd", "avx512ifma", "avx512vbmi", "avx512_vbmi2")},
    **{name: name for name in ("avx512_bitalg", "avx512_vpopcntdq", "avx_ifma", "sse4a", "xop")},
    "asimd": "neon",
    "asimddp": "dotprod",
    "asimdhp": "fp16",
    **{name: name for name in ("i8mm", "bf16", "sve", "sve2", "sme")},
}
_ARM_CPUS = {
    # Arm's technical reference manuals; the empty name is any ARMv8-A core
    "": "neon",
    "cortex-a53": "neon",
    "cortex-a55": "neon dotprod fp16",
    "cortex-a72": "neon",
    "cortex-a73": "neon",
    "cortex-a76": "neon dotprod fp16",
    "cortex-a78": "neon dotprod fp16",
    "cortex-a710": "neon dotprod fp16 i8mm bf16 sve sve2",
    "cortex-x2": "neon dotprod fp16 i8mm bf16 sve sve2",
    "neoverse-n1": "neon dotprod fp16",
    "neoverse-n2": "neon dotprod fp16 i8mm bf16 sve sve2",
    "neoverse-v1": "neon dotprod fp16 i8mm bf16 sve",
    "neoverse-v2": "neon dotprod fp16 i8mm bf16 sve sve2",
    "apple-m1": "neon dotprod fp16",
    "apple-m2": "neon dotprod fp16 i8mm bf16",
}
_CUDA_ARCHITECTURES = {
    # NVIDIA's tensor core tables: what each compute capability multiplies in hardware
    "sm_75": "float16 int8",
    "sm_80": "float16 bfloat16 int8",
    "sm_86": "float16 bfloat16 int8",
    "sm_87": "float16 bfloat16 int8",
    "sm_89": "float16 bfloat16 int8 float8_e4m3fn float8_e5m2",
    "sm_90": "float16 bfloat16 int8 float8_e4m3fn float8_e5m2",
    "sm_100": "float16 bfloat16 int8 float8_e4m3fn float8_e5m2 float4_e2m1fn",
    "sm_120": "float16 bfloat16 int8 float8_e4m3fn float8_e5m2 float4_e2m1fn",
}
_INTEGERS = frozenset(
    {"bool"} | {f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)}
)
_FLOATS = frozenset({"float16", "bfloat16", "float32", "float64"})


@dataclass(frozen=True)
class Target:
    """A device as plain data. Equal targets have equal fields, so it can key a cache."""

    name: str
    """What `parse` takes: `portable`, `cpu`, `arm64:cortex-a76`, `cuda:sm_89`."""
    device: str
    """`any` (no machine), `cpu` or `cuda`."""
    arch: str
    """`x86_64`, `aarch64`, `sm_89` …; empty where there is no machine."""
    isa: frozenset[str]
    """Instruction set features: avx2, avx512_vnni, neon, dotprod, i8mm, fp16 …"""
    opset: tuple[int, int]
    """Oldest and newest opset of the standard domain that its runtime takes."""
    keep_opset: bool
    """True where no pass may raise the model's opset unless it is asked to."""
    domains: frozenset[str]
    """Operator domains beside the standard ones that its backend may put into a model."""
    alignment: int
    """Channel counts that are multiples of this waste no lanes; 1 where nothing is known."""
    dtypes: frozenset[str]
    """Names of the dtypes it computes in by hardware, not by conversion."""

    @classmethod
    def portable(cls) -> Target:
        """No machine: standard operators only, the opset stays. The default of `optimize`."""
        return cls(
            name="portable",
            device="any",
            arch="",
            isa=frozenset(),
            opset=(_OLDEST_OPSET, _runtime_opset()),
            keep_opset=True,
            domains=frozenset(),
            alignment=1,
            dtypes=_INTEGERS | _FLOATS,
        )

    @classmethod
    def parse(cls, text: str | Target) -> Target:
        """The target of a name. InputError lists the names where there is no such target."""
        if isinstance(text, Target):
            return text
        kind, _, model = text.strip().lower().partition(":")
        if kind == "portable" and not model:
            return cls.portable()
        if kind in ("cpu", "ort") and not model:  # as the backend that takes it is also called
            return host()
        if kind == "arm64" and model in _ARM_CPUS:
            return _cpu(text.strip().lower(), "aarch64", frozenset(_ARM_CPUS[model].split()))
        if kind == "cuda" and (not model or model in _CUDA_ARCHITECTURES):
            return _cuda(model)
        raise InputError(f"unknown target {text!r}; there are {', '.join(cls.names())}")

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """Every name that `parse` takes, the general ones before the particular ones."""
        arm = (f"arm64:{name}" if name else "arm64" for name in _ARM_CPUS)
        return ("cpu", "portable", *arm, "cuda", *(f"cuda:{name}" for name in _CUDA_ARCHITECTURES))

    def foreign(self) -> str | None:
        """Why code built for this target's CPU does not run on this machine, or None if it does."""
        if self.device != "cpu":
            return None
        arch, isa = _host_cpu()
        if self.arch != arch:
            return f"it is for {self.arch} and this machine is {arch}"
        lacking = sorted(feature for feature in self.isa if feature not in isa)
        return f"this machine's CPU lacks {', '.join(lacking)}" if lacking else None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data, sets as sorted lists."""
        data = dataclasses.asdict(self)
        sets = {name: sorted(getattr(self, name)) for name in ("isa", "domains", "dtypes")}
        return {**data, **sets, "opset": list(self.opset)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Target:
        """The inverse of `to_dict`. InputError where fields are missing, unknown or ill-typed."""
        fields = [field.name for field in dataclasses.fields(cls)]
        if sorted(data) != sorted(fields):
            raise InputError(f"a target has the fields {', '.join(fields)}, got {', '.join(data)}")
        for name in ("isa", "opset", "domains", "dtypes"):
            if not isinstance(data[name], list):
                raise InputError(f"field {name} of a target is a list, got {data[name]!r}")
        if len(data["opset"]) != 2:
            raise InputError(f"the opset of a target is oldest and newest, got {data['opset']}")
        plain: dict[str, Any] = dict(data)
        plain["opset"] = tuple(data["opset"])
        plain |= {name: frozenset(data[name]) for name in ("isa", "domains", "dtypes")}
        return cls(**plain)


@cache
def host() -> Target:
    """This machine's CPU; its features come from /proc/cpuinfo (none are known elsewhere)."""
    return _cpu("cpu", *_host_cpu())


@cache
def cpuinfo() -> dict[str, str]:
    """The first processor's entries of /proc/cpuinfo; empty where there is no such file."""
    try:
        text = Path("/proc/cpuinfo").read_text("utf-8", "replace")
    except OSError:
        return {}
    first = text.split("\n\n", 1)[0]
    pairs = (line.partition(":") for line in first.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@cache
def _host_cpu() -> tuple[str, frozenset[str]]:
    """Architecture and features."""
    machine = platform.machine().lower()
    arch = {"amd64": "x86_64", "arm64": "aarch64"}.get(machine, machine)
    flags = (cpuinfo().get("flags") or cpuinfo().get("Features") or "").split()
    isa = frozenset(_CPU_FEATURES[flag] for flag in flags if flag in _CPU_FEATURES)
    if not isa and arch == "aarch64":
        isa = frozenset({"neon"})  # part of every ARMv8-A core
    return arch, isa


def _cpu(name: str, arch: str, isa: frozenset[str]) -> Target:
    dtypes = {"float32", "float64", *_INTEGERS}
    if isa & {"fp16", "avx512_fp16", "amx_fp16"}:
        dtypes.add("float16")
    if isa & {"bf16", "avx512_bf16", "amx_bf16"}:
        dtypes.add("bfloat16")
    return Target(
        name=name,
        device="cpu",
        arch=arch,
        isa=isa,
        opset=(_OLDEST_OPSET, _runtime_opset()),
        keep_opset=False,
        domains=frozenset({"com.microsoft"}),
        # float32 lanes of a register; two NEON registers make ONNX Runtime's block of 8
        alignment=16 if "avx512f" in isa else 8,
        dtypes=frozenset(dtypes),
    )


def _cuda(model: str) -> Target:
    """A GPU; without a model, the oldest one."""
    cores = set(_CUDA_ARCHITECTURES[model or "sm_75"].split())
    return Target(
        name=f"cuda:{model}" if model else "cuda",
        device="cuda",
        arch=model,
        isa=frozenset(),
        opset=(_OLDEST_OPSET, _runtime_opset()),
        keep_opset=False,
        domains=frozenset({"com.microsoft"}),
        alignment=8,  # tensor cores take 16-bit operands in multiples of 8
        dtypes=_INTEGERS | cores | {"float32", "float64"},
    )


@cache
def _runtime_opset() -> int:
    """Newest opset that the installed ONNX Runtime takes; the oldest supported one's if none is."""
    from importlib import metadata  # 15 ms that loading an artifact does without

    for package in ("onnxruntime", "onnxruntime-gpu"):
        try:
            major, minor = map(int, metadata.version(package).split(".")[:2])
        except metadata.PackageNotFoundError:
            continue
        for table_major, table_minor, opset in _RUNTIME_OPSETS:
            if (major, minor) >= (table_major, table_minor):
                return opset
    return _RUNTIME_OPSETS[-1][2]
