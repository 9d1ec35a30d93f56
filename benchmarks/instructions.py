"""What a CUDA kernel asks of each pipe, counted in its machine code: it needs nvcc and nvdisasm, and no GPU.

python -m benchmarks.instructions SOURCE KERNEL [--arch 90] [--sum 3,4*0.5,7] [--per 8]

SOURCE is a file of csrc/cuda, KERNEL a regular expression for the demangled name, spaces left out. Without ``--sum``
the basic blocks are listed, each with a number; with it, those named are added up (``4*0.5``: taken every second time)
and divided by ``--per``, such as the elements of a thread. Branches that are rarely taken are for the reader to leave
out, and an instruction counts whether or not its predicate holds.

The cycles are those of a quarter of a multiprocessor per warp, on compute capability 8.0 and 9.0 (CUDA C++ Programming
Guide, throughput of native arithmetic instructions): one instruction is issued a cycle; per cycle 32 lanes of fp32, 16
of integers, comparisons, selects, minima, integer products (on the fp32 pipe) and fp64, 8 of memory and shuffles, 4 of
the rest. A product of fp64 tiles, 16 x 8 x 4 on 9.0 and half of that on 8.0, has the tensor cores for 16 cycles. Memory
gives a quarter of an H200's multiprocessor 4.6 bytes a cycle: 4.25 TB/s by 132 of them, at 1.755 GHz.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

CSRC = Path(__file__).resolve().parent.parent / "csrc"

# Cycles of a warp instruction by pipe; "integer" is what is named nowhere.
CYCLES = {"fp32": 1, "product": 2, "integer": 2, "fp64": 2, "memory": 4, "special": 8, "tensor": 16, "other": 0}
NAMES = {
    "fp32": "FADD FFMA FMUL",
    "product": "HADD2 HFMA2 HMUL2 IMAD",
    "fp64": "DADD DFMA DMUL DSETP",
    "memory": "ATOM ATOMG ATOMS LD LDG LDGSTS LDL LDS RED REDG SHFL ST STG STL STS",
    "special": "BREV F2F F2I FLO I2F MUFU POPC S2R",
    "tensor": "DMMA",
    "other": "ACQBULK BAR BMOV BRA BREAK BSSY BSYNC CALL CCTL CS2R DEPBAR ERRBAR EXIT LDC LDGDEPBAR MEMBAR "
    "NANOSLEEP NOP PREEXIT R2UR RET WARPSYNC YIELD",
}
PIPE = {name: group for group, names in NAMES.items() for name in names.split()}
ENDS = {"BRA", "BRX", "EXIT", "RET"}


def pipe(opcode: str) -> str:
    """The pipe of an instruction.

    >>> [pipe(code) for code in ("FADD", "IMAD.WIDE.U32", "LOP3.LUT", "LDG.E.128", "UIADD3", "POPC")]
    ['fp32', 'product', 'integer', 'memory', 'other', 'special']
    """
    name = opcode.split(".")[0]
    return PIPE.get(name, "other" if name.startswith("U") else "integer")


def blocks(code: str) -> Iterator[tuple[str, Counter[str]]]:
    """The label and the instructions by pipe of each basic block of a function as nvdisasm prints it.

    >>> text = ".L_x_1:\\n  /*0010*/  @P0 FADD R1, R1, R2 ;\\n  /*0020*/  BRA `(.L_x_1) ;\\n  /*0030*/  EXIT ;"
    >>> [(label, dict(found)) for label, found in blocks(text)]
    [('.L_x_1', {'fp32': 1, 'other': 1}), ('', {'other': 1})]
    """
    label, found = "", Counter[str]()
    for line in code.splitlines():
        if target := re.match(r"\s*(\.L_x_\d+):", line):
            if found:
                yield label, found
            label, found = target[1], Counter()
        elif instruction := re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P[0-9T]+ )?\s*([A-Z0-9_.]+)", line):
            found[pipe(instruction[1])] += 1
            if instruction[1].split(".")[0] in ENDS:
                yield label, found
                label, found = "", Counter()
    if found:
        yield label, found


def functions(source: str, arch: str) -> Iterator[tuple[str, str]]:
    """The demangled name, without spaces, and the code of each kernel of a source file."""
    tools = f"{os.environ.get('PATH', '')}{os.pathsep}{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/bin"
    nvcc, nvdisasm = (shutil.which(name, path=tools) for name in ("nvcc", "nvdisasm"))
    if nvcc is None or nvdisasm is None:
        raise SystemExit("nvcc and nvdisasm are needed: put the bin folder of a CUDA toolkit on PATH")
    with tempfile.TemporaryDirectory() as folder:
        cubin = f"{folder}/code.cubin"
        flags = ["-std=c++17", "-O3", "--fmad=false", f"-I{CSRC}", f"-arch=sm_{arch}", "-cubin", "-o", cubin]
        subprocess.run([nvcc, *flags, source], check=True)
        text = subprocess.run([nvdisasm, "-c", cubin], check=True, capture_output=True, text=True).stdout
    parts = re.split(r"^\s*\.text\.(\S+):$", text, flags=re.M)[1:]
    names = subprocess.run(["c++filt"], input="\n".join(parts[::2]), check=True, capture_output=True, text=True).stdout
    yield from zip(names.replace(" ", "").splitlines(), parts[1::2], strict=True)


def line(found: Counter[str], per: float) -> str:
    """Instructions and cycles of a block or of several.

    >>> line(Counter(fp32=8, integer=4), per=8)
    'issued 1.5  fp32 1.0  integer 1.0'
    """
    cycles = {name: found[name] * each / per for name, each in CYCLES.items()}
    cycles["fp32"] += cycles.pop("product")
    cycles.pop("other")
    return "  ".join([f"issued {sum(found.values()) / per:.1f}", *(f"{k} {v:.1f}" for k, v in cycles.items() if v)])


def main() -> None:
    """List a kernel's blocks, or add some of them up."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("kernel")
    parser.add_argument("--arch", default="90")
    parser.add_argument("--sum", dest="wanted", help="numbers of blocks, each with how often it is taken")
    parser.add_argument("--per", type=float, default=1.0)
    arguments = parser.parse_args()
    for name, code in functions(arguments.source, arguments.arch):
        if not re.search(arguments.kernel, name):
            continue
        print(name)
        every = list(blocks(code))
        if arguments.wanted is None:
            for i, (label, found) in enumerate(every):
                print(f"{i:5} {label:<12} {line(found, arguments.per)}")
            continue
        total = Counter[str]()
        for part in arguments.wanted.split(","):
            number, _, times = part.partition("*")
            for group, count in every[int(number)][1].items():
                total[group] += count * float(times or 1)  # type: ignore[assignment]
        print(f"{'sum':>5} {'':<12} {line(total, arguments.per)}")


if __name__ == "__main__":
    main()
