"""Compiles the Triton kernels for sm_90 without a GPU and looks at the code: no spills, wide loads, integer atomics.

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
    "losses_ptr": "*fp32",
    "softmax_ptr": "*fp32",
    "scale_ptr": "*fp32",
    "factor_ptr": "*fp32",
    "out_ptr": "*fp32",
}
ROWS = {"row_stride": "i32", "ignore_index": "i32", "scale_stride": "i32", "n_domains": "i32", "rows_per_id": "i32"}
VARIANTS = {
    # name: dtype, classes, LOSS, GRADIENT, COUNT
    "training bf16 50304": ("bf16", 50304, True, True, True),
    "training bf16 128256": ("bf16", 128256, True, True, True),
    "training fp32 50304": ("fp32", 50304, True, True, True),
    "training bf16 4096": ("bf16", 4096, True, True, True),
    "training bf16 50257": ("bf16", 50257, True, True, True),
    "training fp32 50257": ("fp32", 50257, True, True, True),
    "without statistics": ("bf16", 50304, True, True, False),
    "losses only": ("fp16", 50304, True, False, True),
    "gradient only": ("fp16", 50304, False, True, False),
}


def build(kernel, dtype, constants, scalars, aligned=(), **options):
    """Compile one kernel for sm_90 and assemble it. `aligned`: integers known to be multiples of 16."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, attrs = {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        else:
            signature[name] = scalars.get(name) or TYPES[name].format(dtype=dtype)
            if name.endswith("_ptr") or name in aligned:
                attrs[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attrs)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    ptx = compiled.asm["ptx"]
    return {
        "wide_loads": len(re.findall(r"ld\.global[\w.:]*\.v4\.b32", ptx)),
        "wide_stores": len(re.findall(r"st\.global[\w.:]*\.v4\.b32", ptx)),
        "narrow_loads": len(re.findall(r"ld\.global[\w.:]*\.b16", ptx)),
        "atomics": sorted(set(re.findall(r"\b(?:atom|red)\.[\w.]+", ptx))),
        **assemble(ptx, Path(triton.__file__).parent / "backends" / "nvidia" / "bin"),
    }


def assemble(ptx, tools):
    """Registers and spills, from the assembler that triton brings (the first that accepts this version of PTX)."""
    for name in ("ptxas-blackwell", "ptxas"):
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / "kernel.ptx"
            source.write_text(ptx)
            command = [tools / name, "-v", "--gpu-name=sm_90a", source, "-o", Path(folder) / "kernel.cubin"]
            try:
                log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
            except (OSError, subprocess.CalledProcessError):
                continue
        registers = re.search(r"Used (\d+) registers", log)
        spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
        if registers and spills:
            return {"registers": int(registers[1]), "spills": int(spills[1]) + int(spills[2])}
    return {}


def build_all():
    from mixloader.kernels import cross_entropy as kernels

    report = {}
    for name, (dtype, n_classes, loss, gradient, count) in VARIANTS.items():
        options = kernels.launch_options(n_classes, n_classes)
        constants = {"V": n_classes, "LOSS": loss, "GRADIENT": gradient, "COUNT": count, "BLOCK": options.pop("BLOCK")}
        # As at a launch: a missing tensor is None, and an integer that is 1 is a constant.
        constants |= {} if loss else {"losses_ptr": None}
        constants |= {} if gradient else {"gradient_ptr": None, "scale_ptr": None, "rows_per_id": 1}
        constants |= {} if count else {"sums_ptr": None, "domain_ids_ptr": None, "scale_stride": 1, "rows_per_id": 1}
        aligned = () if n_classes % 16 else ("row_stride",)
        report[name] = build(kernels._rows_kernel, dtype, constants, ROWS, aligned, **options)
    options = {"num_warps": 16, **kernels.FUSION}
    constants, scalars = {"BLOCK": kernels.RESCALE_BLOCK}, {"n": "i64", "n_blocks": "i32"}
    report["rescale"] = build(kernels._rescale_kernel, "bf16", constants, scalars, ("n",), **options)
    constants = {"BLOCK": kernels.RESCALE_BLOCK, "n_blocks": 1}
    build(kernels._rescale_kernel, "bf16", constants, scalars, **options)
    constants, scalars = {"V": 50304, "BLOCK": kernels.COUNT_BLOCK}, {"n": "i32", "ignore_index": "i32"}
    report["count"] = build(kernels._valid_count_kernel, "bf16", constants, scalars, **options)
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
    # 32 warps of 64 registers are all that an SM has.
    assert max(found["registers"] for found in report.values()) <= 64


@pytest.mark.parametrize("name", [name for name, variant in VARIANTS.items() if variant[1] % 16 == 0])
def test_rows_move_128_bits_at_a_time(report, name):
    _, _, loss, gradient, _ = VARIANTS[name]
    found = report[name]
    assert found["wide_loads"] >= 4 * (loss + gradient) // 2
    assert (found["wide_stores"] >= 4) == gradient
    # The logit of the target is the one load that is not of a whole block.
    assert found["narrow_loads"] <= 1


def test_rescaling_moves_128_bits_at_a_time(report):
    assert report["rescale"]["wide_loads"] > 0
    assert report["rescale"]["wide_stores"] > 0
    assert report["rescale"]["narrow_loads"] == 0


def test_statistics_are_integer_additions_and_nothing_else_is_atomic(report):
    for name, found in report.items():
        counts = name in VARIANTS and VARIANTS[name][4]
        integer = {"red.global.gpu.relaxed.add.u64", "atom.global.gpu.relaxed.add.u64"}
        assert bool(found["atomics"]) == counts, name
        assert set(found["atomics"]) <= integer, name


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    print(json.dumps(build_all(), indent=1))
