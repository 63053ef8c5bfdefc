"""Builds the compiled kernels with sanitizers and runs them on problems drawn at random:

python tests/sanitize.py                    # AddressSanitizer with UndefinedBehaviorSanitizer, then ThreadSanitizer
python tests/sanitize.py thread --cases 50 --float64
python tests/sanitize.py --instructions baseline   # compiles these alone, in a quarter of the time
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
KERNELS = HERE.parent / "jaxrnn" / "engines" / "cpu"
SANITIZERS = {"address": "address,undefined", "thread": "thread"}
# Memory of the pool lives as long as the process.
OPTIONS = {"ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1", "TSAN_OPTIONS": "halt_on_error=1"}


def run(sanitizer: str, cases: int, compiler: str, instructions: str | None = None, double: bool = False) -> str:
    """What the program says; raises if it fails."""
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "sanitize"
        flags = ["-std=c++17", "-O1", "-g", f"-fsanitize={SANITIZERS[sanitizer]}", "-fno-sanitize-recover=all"]
        flags += ["-DJAXRNN_FLOAT64"] if double else []
        flags += ["-DJAXRNN_BASELINE"] if instructions == "baseline" else []
        kernels = [KERNELS / f"{name}.cc" for name in ("kernels", "staged", "elementwise", "cell_steps")]
        sources = [*kernels, HERE / "sanitize.cc"]
        objects = [Path(folder) / f"{source.stem}.o" for source in sources]
        compiled = [
            subprocess.Popen([compiler, *flags, f"-I{KERNELS}", "-c", str(source), "-o", str(each)])
            for source, each in zip(sources, objects, strict=True)
        ]
        codes = [each.wait() for each in compiled]
        if any(codes):
            raise SystemExit(f"{sanitizer}: the kernels do not compile")
        subprocess.run([compiler, *flags, *map(str, objects), "-o", str(program), "-lpthread"], check=True)
        chosen = {} if instructions is None else {"JAXRNN_INSTRUCTIONS": instructions}
        result = subprocess.run(
            [str(program), str(cases)], env=os.environ | OPTIONS | chosen, capture_output=True, text=True, check=False
        )
    if result.returncode:
        raise SystemExit(f"{sanitizer}: {result.stdout}{result.stderr}")
    return result.stdout.strip()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sanitizers", nargs="*", default=list(SANITIZERS), help=" or ".join(SANITIZERS))
    parser.add_argument("--cases", type=int, default=200)
    parser.add_argument("--compiler", default=os.environ.get("CXX", "g++"))
    parser.add_argument("--instructions", choices=["avx512", "avx2", "baseline"])
    parser.add_argument("--float64", action="store_true", help="the kernels of float64 in place of float32")
    args = parser.parse_args(argv)
    for sanitizer in args.sanitizers:
        print(f"{sanitizer}: {run(sanitizer, args.cases, args.compiler, args.instructions, args.float64)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
