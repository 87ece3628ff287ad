"""What `import lkarray` costs beyond what it must import: xarray, zarr and dask.array."""

from __future__ import annotations

import statistics
import subprocess
import sys

BASE = "import xarray, zarr, dask.array"
TIMED = "import time; t = time.perf_counter(); {}; print(time.perf_counter() - t)"


def seconds(code: str, repeats: int = 5) -> float:
    """Return the median time of an import in fresh processes."""
    command = [sys.executable, "-c", TIMED.format(code)]
    runs = [
        float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        for _ in range(repeats)
    ]
    return statistics.median(runs)


def main() -> None:
    base, ours = seconds(BASE), seconds(f"{BASE}; import lkarray")
    print(f"import xarray, zarr, dask.array   {base:.3f} s")
    print(f"and lkarray                       {ours:.3f} s")
    print(f"beyond                            {ours - base:+.3f} s (at most 0.3)")
    print(f"ratio                             {ours / base:.2f}")


if __name__ == "__main__":
    main()
