"""Compiles the kernels ahead of time, which needs no GPU, and prints one JSON record for each.

In a process of its own, without TRITON_INTERPRET, since that counts when the kernels are imported:

    python tests/aot_compile.py                       # every kernel on every architecture
    python tests/aot_compile.py --sm 90 --dims 128    # some of them
    python tests/aot_compile.py --sm 90 --dims 64 --sweep     # other tiles: what a clock may try
"""
import argparse
import json
import re
import subprocess
import sys
import tempfile
from itertools import product
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import swa_kernel as swa

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
TRAINING = ("_forward", "_backward_q", "_backward_kv")
TYPES = {"position": "*i64", "cu_seqlens": "*i32", "scale": "fp32"} | dict.fromkeys(
    ("lse", "delta", "part", "part_lse"), "*fp32") | dict.fromkeys(
    ("N", "T", "S", "W", "G", "n_blocks", "n_splits"), "i32")


# BM, BN, warps and stages of --sweep
GRID = list(product((32, 64, 128), (64, 128), (4, 8), (1, 2, 3)))
# Operations a pair, head and dimension; and those of a processor's tensor cores in a cycle (bf16)
WORK = {"_forward": 4, "_backward_q": 6, "_backward_kv": 8}
TENSOR_RATE = {80: 2048, 89: 1024, 90: 4096, 100: 8192}


def inner_loops(sass):
    """The innermost loops, which are the hot ones, each as the list of its instructions."""
    code = [(int(at, 16), text) for at, text in
            re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;/]*);", sass)]
    loops = [(int(m[1], 16), at) for at, text in code
             if (m := re.search(r"BRA.* 0x([0-9a-f]+)", text)) and int(m[1], 16) < at]
    inner = [(lo, hi) for lo, hi in loops
             if not any((a, b) != (lo, hi) and lo <= a and b <= hi for a, b in loops)]
    return [[text for at, text in code if lo <= at <= hi] for lo, hi in inner]


def loop_figures(loops):
    """Of the full blocks' loop its instructions; of the worst one what it should not have.

    The stack's size alone says little of spills: ptxas parks there what a later loop needs.
    """
    def most(pattern):
        return max((sum(bool(re.search(pattern, x)) for x in loop) for loop in loops), default=0)

    products = [len(loop) for loop in loops if any("MMA" in text for text in loop)]
    return {"loop": min(products, default=0), "loop_spills": most("LDL|STL"),
            "small_copies": most(r"LDGSTS(?!\S*\.128 )")}


def build(name, dtype, sm, constants, warps, stages):
    """One kernel, its pointers and strides aligned to 16 bytes as they are in practice: figures."""
    fn = getattr(swa, name)
    signature, fixed, attrs = {}, {}, {}
    for i, arg in enumerate(fn.arg_names):
        if arg in constants:
            signature[arg], fixed[i,] = "constexpr", constants[arg]
            continue
        signature[arg] = "i32" if arg.startswith("s_") else TYPES.get(arg, "*" + dtype)
        if arg.startswith("s_") or signature[arg][0] == "*":
            attrs[i,] = [["tt.divisibility", 16]]
    compiled = triton.compile(ASTSource(fn, signature, fixed, attrs), GPUTarget("cuda", sm, 32),
                              {"num_warps": warps, "num_stages": stages})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(compiled.asm["cubin"])
        usage, sass = (subprocess.run([CUOBJDUMP, flag, file.name], capture_output=True, text=True,
                                      check=True).stdout for flag in ("-res-usage", "-sass"))
    figures = loop_figures(inner_loops(sass))
    if name in WORK:
        # Its loop's instructions, of which each of four schedulers issues one a cycle, against the
        # cycles of the tensor cores: above 1 the products wait.
        cycles = WORK[name] * constants["BM"] * constants["BN"] * constants["D"] / TENSOR_RATE[sm]
        figures["issue"] = round(figures["loop"] * warps / 4 / cycles, 2)
    return {"kernel": name, "dtype": dtype, "sm": sm, "D": constants["D"],
            "packed": constants.get("PACKED", False), "sinks": constants.get("SINKS", 0),
            "warps": warps, "stages": stages,
            "tile": [constants[x] for x in ("BM", "BG", "BN", "BS") if x in constants],
            "registers": int(re.search(r"REG:(\d+)", usage)[1]),
            "stack": int(re.search(r"STACK:(\d+)", usage)[1]), **figures,
            "shared": compiled.metadata.shared, "wgmma": "wgmma.mma_async" in compiled.asm["ptx"]}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--sm", type=int, nargs="+", default=[80, 89, 90, 100], help="targets")
    parser.add_argument("--dims", type=int, nargs="+", default=[32, 64, 96, 128], help="head sizes")
    parser.add_argument("--dtypes", nargs="+", default=["bf16"], help="bf16, fp16, fp32")
    parser.add_argument("--sinks", type=int, default=0, help="keys visible to all queries")
    parser.add_argument("--sweep", action="store_true",
                        help="the training kernels with every tile of GRID, not those in use")
    parser.add_argument("--packed", action="store_true", help="the variant for cu_seqlens")
    args = parser.parse_args()
    for sm in args.sm:
        for dtype in args.dtypes:
            for D in args.dims:
                BD, packed = swa._pad(D), {"PACKED": args.packed} | ({} if args.packed else
                                                                     {"cu_seqlens": None})
                tiles = swa.TILES[BD, "sm_90" if sm in (90, 100) else "sm_80"]
                if dtype == "fp32":
                    tiles = [swa.FP32_TILE] * 3
                jobs = product(TRAINING, GRID) if args.sweep else zip(TRAINING, tiles, strict=True)
                for name, (BM, BN, warps, stages) in jobs:
                    constants = packed | {"D": D, "BD": BD, "BM": BM, "BN": BN,
                                          "SINKS": args.sinks}
                    print(json.dumps(build(name, dtype, sm, constants, warps, stages)), flush=True)
                BN = 32 if dtype == "fp32" else 64
                for name, tile in (("_decode", {"BG": 16, "BN": BN}), ("_combine", {"BS": 128})):
                    record = build(name, dtype, sm, tile | {"D": D, "BD": BD}, 4, 3)
                    print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()
