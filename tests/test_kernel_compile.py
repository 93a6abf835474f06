"""Compiles the Triton kernels for sm_80, sm_90 and sm_100 without a GPU and looks at the code: no spills, wide loads,
integer atomics.

The compiler refuses to run in a process where Triton interprets, so the tests run this file as a script.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TYPES = {
    "logits_ptr": "*{dtype}",
    "gradient_ptr": "*{dtype}",
    "x_ptr": "*{dtype}",
    "targets_ptr": "*i64",
    "domain_ids_ptr": "*i64",
    "sums_ptr": "*i64",
    "token_bytes_ptr": "*i32",
    "label_smoothing": "fp32",
    "z_loss": "fp32",
    "softcap": "fp32",
    "n": "i64",
}
"""Of the arguments; other pointers are to float32, other numbers 32-bit integers."""

EVERYTHING = {"SMOOTHING", "Z_LOSS", "SOFTCAP", "weights", "references"}
VARIANTS = {
    # name: dtype, classes, row stride, what is off, what is on
    "training bf16 50304": ("bf16", 50304, 50304, set(), set()),
    "training bf16 128256": ("bf16", 128256, 128256, set(), set()),
    "training fp32 50304": ("fp32", 50304, 50304, set(), set()),
    "training bf16 4096": ("bf16", 4096, 4096, set(), set()),
    "training bf16 1000": ("bf16", 1000, 1000, set(), set()),
    "training bf16 50257": ("bf16", 50257, 50257, set(), set()),
    "training fp32 50257": ("fp32", 50257, 50257, set(), set()),
    "padded bf16 50257": ("bf16", 50257, 50304, set(), set()),
    "softcap bf16 50304": ("bf16", 50304, 50304, set(), {"SOFTCAP"}),
    "everything bf16 50304": ("bf16", 50304, 50304, set(), EVERYTHING),
    "everything fp32 128256": ("fp32", 128256, 128256, set(), EVERYTHING),
    "everything bf16 50257": ("bf16", 50257, 50257, set(), EVERYTHING),
    "without statistics": ("bf16", 50304, 50304, {"COUNT", "DISTRIBUTION"}, set()),
    "losses only": ("fp16", 50304, 50304, {"GRADIENT"}, set()),
    "gradient only": ("fp16", 50304, 50304, {"LOSS", "COUNT", "DISTRIBUTION"}, set()),
}
ARCHITECTURES = (80, 90, 100)


def build(kernel, architecture, dtype, constants, aligned=(), **options):
    """Compile one kernel and assemble it. `aligned`: integers known to be multiples of 16."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, attrs = {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        else:
            default = "*fp32" if name.endswith("_ptr") else "i32"
            signature[name] = TYPES.get(name, default).format(dtype=dtype)
            if name.endswith("_ptr") or name in aligned:
                attrs[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attrs)
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    ptx = compiled.asm["ptx"]
    return {
        "wide_loads": len(re.findall(r"ld\.global[\w.:]*\.v4\.b32", ptx)),
        "wide_stores": len(re.findall(r"st\.global[\w.:]*\.v4\.b32", ptx)),
        "narrow_loads": len(re.findall(r"ld\.global[\w.:]*\.b16", ptx)),
        "narrow_stores": len(re.findall(r"st\.global[\w.:]*\.b16", ptx)),
        "atomics": sorted(set(re.findall(r"\b(?:atom|red)\.[\w.]+", ptx))),
        **assemble(ptx, architecture, Path(triton.__file__).parent / "backends" / "nvidia" / "bin"),
    }


def assemble(ptx, architecture, tools):
    """Registers and spills, from the assembler that triton brings (the first that accepts this version of PTX)."""
    for name in ("ptxas-blackwell", "ptxas"):
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / "kernel.ptx"
            source.write_text(ptx)
            target = f"--gpu-name=sm_{architecture}{'a' * (architecture >= 90)}"
            command = [tools / name, "-v", target, source, "-o", Path(folder) / "kernel.cubin"]
            try:
                log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
            except (OSError, subprocess.CalledProcessError):
                continue
        registers = re.search(r"Used (\d+) registers", log)
        spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
        if registers and spills:
            return {"registers": int(registers[1]), "spills": int(spills[1]) + int(spills[2])}
    return {}


def constants_of(kernels, dtype, n_classes, stride, off, on):
    """The constants and the compiler's options of one variant of the kernel, as a launch would have them."""
    options = kernels.launch_options(n_classes, stride, 4 if dtype == "fp32" else 2, "SOFTCAP" in on)
    constants = {name: options.pop(name) for name in ("PEEL", "WIDTH", "BLOCK")}
    constants |= {name: name not in off for name in ("LOSS", "GRADIENT", "COUNT", "DISTRIBUTION", "SAME_STRIDE")}
    constants |= {name: name in on for name in ("SMOOTHING", "Z_LOSS", "SOFTCAP")}
    # A missing tensor is None, and an integer that is 1 is a constant.
    missing = {
        "weights": ("token_weights_ptr", "domain_weights_ptr"),
        "references": ("reference_losses_ptr", "token_bytes_ptr"),
    }
    missing = [name for what, names in missing.items() if what not in on for name in names]
    missing += [] if constants["LOSS"] else ["losses_ptr"]
    missing += [] if constants["GRADIENT"] else ["gradient_ptr", "scale_ptr"]
    missing += [] if constants["COUNT"] else ["sums_ptr", "domain_ids_ptr"]
    return {"V": n_classes, **constants, **dict.fromkeys(missing)}, options


def build_all():
    from mixloader.kernels import cross_entropy as kernels
    from mixloader.kernels import rescale

    report = {}
    for architecture in ARCHITECTURES:
        for name, (dtype, n_classes, stride, off, on) in VARIANTS.items():
            constants, options = constants_of(kernels, dtype, n_classes, stride, off, on)
            aligned = () if stride % 16 else ("row_stride", "gradient_stride")
            found = build(kernels._rows_kernel, architecture, dtype, constants, aligned, **options)
            report[f"{name} sm_{architecture}"] = {"warps": options["num_warps"], **found}
        constants = {"BLOCK": rescale.BLOCK}
        found = build(rescale._rescale_kernel, architecture, "bf16", constants, ("n",), **rescale.OPTIONS)
        report[f"rescale sm_{architecture}"] = {"warps": rescale.OPTIONS["num_warps"], **found}
        build(rescale._rescale_kernel, architecture, "bf16", {**constants, "n_blocks": 1}, **rescale.OPTIONS)
        constants = {"V": 50304, "BLOCK": kernels.COUNT_BLOCK, "n": 32}
        found = build(kernels._valid_count_kernel, architecture, "bf16", constants, num_warps=16, **kernels.FUSION)
        report[f"count sm_{architecture}"] = {"warps": 16, **found}
    return report


@pytest.fixture(scope="module")
def report():
    """What the compiler made of each kernel, by name of the variant."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed (pip install 'mixloader[triton]')")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, __file__], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def test_nothing_spills(report):
    if not all("spills" in found for found in report.values()):
        pytest.skip("no assembler of this triton accepts its own PTX here")
    assert {name: found["spills"] for name, found in report.items()} == dict.fromkeys(report, 0)
    # An SM has 65,536 registers for all threads of a program.
    assert {name for name, found in report.items() if found["registers"] * found["warps"] * 32 > 65536} == set()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", VARIANTS)
def test_rows_move_128_bits_at_a_time(report, name, architecture):
    dtype, n_classes, stride, off, _ = VARIANTS[name]
    found = report[f"{name} sm_{architecture}"]
    reads = ("LOSS" not in off) + ("GRADIENT" not in off)
    assert found["wide_loads"] >= reads
    assert (found["wide_stores"] > 0) == ("GRADIENT" not in off)
    # The logit of the target, and the edges of rows that are cut: each one load of a few threads, once in a read.
    peeled = (n_classes % 16 or stride % 16) and dtype != "fp32"
    assert found["narrow_loads"] <= 1 + 2 * bool(peeled)
    assert found["narrow_stores"] <= 2 * bool(peeled)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_rescaling_moves_128_bits_at_a_time(report, architecture):
    found = report[f"rescale sm_{architecture}"]
    assert found["wide_loads"] > 0
    assert found["wide_stores"] > 0
    assert found["narrow_loads"] == 0


def test_statistics_are_integer_additions_and_nothing_else_is_atomic(report):
    for name, found in report.items():
        variant = VARIANTS.get(name.rpartition(" ")[0])
        counts = variant is not None and "COUNT" not in variant[3]
        integer = {"red.global.gpu.relaxed.add.u64", "atom.global.gpu.relaxed.add.u64"}
        assert bool(found["atomics"]) == counts, name
        assert set(found["atomics"]) <= integer, name


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    print(json.dumps(build_all(), indent=1))
