"""How many products at once, with how many BLAS threads each: the three ways side by side.

    python benchmarks/products.py [--small]

Products of panels of the engine's size, (S, side).T @ (S, side) in float32: one at a time with all
threads, as many as there are cores with one thread each, and everything between. What the engine
chooses on this machine (`engine/blas.py`) is marked; it should be the fastest, or near it.
"""

from __future__ import annotations

import statistics
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from measure import arguments
from threadpoolctl import ThreadpoolController, threadpool_limits


def rate(products: int, threads: int, draws: int, side: int, repeats: int) -> float:
    """Return operations a second of ``products`` at once, each with ``threads`` BLAS threads."""
    rng = np.random.default_rng(0)
    panels = [rng.standard_normal((draws, side), dtype=np.float32) for _ in range(products + 1)]
    rounds = max(1, 16 // products)
    seconds = []
    with threadpool_limits(threads, user_api="blas"), ThreadPoolExecutor(products) as pool:
        for _ in range(repeats + 1):  # the first starts threads and touches memory
            began = time.perf_counter()
            for _ in range(rounds):
                list(pool.map(lambda k: panels[k].T @ panels[k + 1], range(products)))
            seconds.append(time.perf_counter() - began)
    return 2 * draws * side**2 * products * rounds / statistics.median(seconds[1:])


def main() -> None:
    """Print a line for each way."""
    from lkarray.engine import blas

    asked = arguments(__doc__)
    draws, side = (300, 256) if asked.small else (7_500, 2_048)
    cores = blas.cores()
    for library in ThreadpoolController().select(user_api="blas").info():
        layer = library.get("threading_layer", "?")
        print(f"{library['internal_api']} {library['version']}, threads by {layer}, {cores} cores")
    chosen = blas.products_at_once(), 1
    ways = {(cores // threads, threads) for threads in (2**k for k in range(12)) if threads < cores}
    rates = {
        way: rate(*way, draws, side, asked.repeats) for way in sorted(ways | {chosen, (1, cores)})
    }
    alone = rates[1, cores]
    for (products, threads), value in rates.items():
        note = "  the engine's choice" if (products, threads) == chosen else ""
        print(
            f"{products:4d} products of {threads:3d} threads {value / 1e12:7.3f} TFLOP/s "
            f"{value / alone:6.2f} of one with all{note}"
        )
    ratio = max(rates.values()) / rates[chosen]
    print(f"the fastest way against the choice {ratio:.2f}  bar 1.15: {verdict(ratio)}")


def verdict(ratio: float) -> str:
    """Say whether the bar is met."""
    return "met" if ratio <= 1.15 else "NOT met"


if __name__ == "__main__":
    main()
