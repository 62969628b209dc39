"""Compiles the kernels ahead of time, without a GPU, and prints one JSON record a kernel.

Run in a process of its own, without TRITON_INTERPRET, since that variable counts at import:

    python tests/aot_compile.py                     # every architecture: minutes
    python tests/aot_compile.py sm_90 128           # one architecture, one head dimension
"""
import json
import re
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import swa_kernel as swa

DUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
KERNELS = {"fwd": swa._fwd_kernel, "dq": swa._dq_kernel, "dkv": swa._dkv_kernel,
           "decode": swa._decode_kernel, "combine": swa._combine_kernel}
FP32 = {"lse", "delta", "part", "part_lse"}
INT32 = {"N", "T", "S", "W", "G", "H", "n_blocks", "n_splits"}


def loop_spills(sass):
    """Local loads and stores inside the innermost loops that multiply matrices, the hot ones.

    STACK > 0 alone says little: ptxas parks what a later loop needs while an earlier one runs.
    """
    code, worst = re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;]*);", sass), 0
    code = [(int(at, 16), text) for at, text in code]
    jumps = [(int(m[1], 16), at) for at, text in code
             if (m := re.search(r"BRA.* 0x([0-9a-f]+)", text)) and int(m[1], 16) < at]
    for lo, hi in jumps:
        body = [text for at, text in code if lo <= at <= hi]
        nested = any((a, b) != (lo, hi) and lo <= a and b <= hi for a, b in jumps)
        if not nested and any("MMA" in text or "FFMA" in text for text in body):
            worst = max(worst, sum("LDL" in text or "STL" in text for text in body))
    return worst


def build(kernel, dtype, sm, constants, warps, stages):
    """Compile for one architecture with 16-byte aligned pointers and strides; its figures."""
    fn = KERNELS[kernel]
    signature, fixed, attrs = {}, {}, {}
    for i, name in enumerate(fn.arg_names):
        if name in constants:
            signature[name], fixed[i,] = "constexpr", constants[name]
        elif name == "scale":
            signature[name] = "fp32"
        elif name in INT32:
            signature[name] = "i32"
        else:
            aligned = name.startswith("s_")
            signature[name] = "i32" if aligned else "*i64" if name == "position" else \
                "*i32" if name == "cu_seqlens" else "*fp32" if name in FP32 else "*" + dtype
            if name not in ("position", "cu_seqlens"):
                attrs[i,] = [["tt.divisibility", 16]]
    compiled = triton.compile(ASTSource(fn, signature, fixed, attrs), GPUTarget("cuda", sm, 32),
                              {"num_warps": warps, "num_stages": stages})
    cubin = Path("/tmp") / f"swa_{kernel}_{sm}.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    usage = subprocess.run([DUMP, "--dump-resource-usage", cubin], capture_output=True, text=True,
                           check=True).stdout
    sass = subprocess.run([DUMP, "-sass", cubin], capture_output=True, text=True, check=True).stdout
    cubin.unlink()
    return {"kernel": kernel, "dtype": dtype, "sm": sm, "D": constants["D"],
            "packed": constants.get("PACKED", False), "warps": warps, "stages": stages,
            "tile": [constants.get("BM"), constants.get("BN")],
            "registers": int(re.search(r"REG:(\d+)", usage)[1]),
            "stack": int(re.search(r"STACK:(\d+)", usage)[1]),
            "loop_spills": loop_spills(sass), "shared": compiled.metadata.shared,
            "wgmma": "wgmma.mma_async" in compiled.asm["ptx"]}
