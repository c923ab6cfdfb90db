"""`python -m himoe.kernels.triton.tune`: time block sizes of every product on this GPU and keep the fastest.

    python -m himoe.kernels.triton.tune --shape 16384,2048,768,128,8 --dtype bfloat16 --write

Routing is uniform. Candidates that do not fit the chip are passed over. With `--write` the result goes into
`tuned.json` in the package, under the shape class; without it, the table is only printed.
"""

import argparse
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from triton.runtime.errors import OutOfResources
from triton.testing import do_bench

from himoe.functional.dispatch import sort_by_expert
from himoe.kernels.triton import blocks, mlp
from himoe.kernels.triton.blocks import Blocks, ShapeClass

Timer = Callable[[Callable[[], Any]], Any]  # → milliseconds


def candidates(shape: ShapeClass) -> Iterator[Blocks]:
    """Yield the default of every product, then the grid of what is worth a try."""
    yield from dict.fromkeys(blocks.default(product, shape) for product in blocks.PRODUCTS)
    if shape.dtype == "float32":
        sizes = itertools.product((32, 64), (32, 64), (16, 32), (8,), (4, 8), (2, 3))
    else:
        rows = [size for size in (16, 32, 64, 128, 256) if size <= 2 * shape.rows]
        sizes = itertools.product(rows, (64, 128, 256), (32, 64, 128), (8,), (4, 8), (3, 4, 5))
    yield from (Blocks(*size) for size in sizes)


def products(sizes: tuple[int, int, int, int, int], dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Return a swiglu layer's products on random numbers, as functions of their block sizes, and its shape class."""
    tokens, dim, units, num_experts, top_k = sizes
    generator = torch.Generator(device).manual_seed(0)
    normal = partial(torch.randn, generator=generator, device=device, dtype=dtype)
    ids = torch.rand(tokens, num_experts, generator=generator, device=device).topk(top_k).indices
    rows = sort_by_expert(ids, torch.ones_like(ids, dtype=torch.bool), num_experts)
    x, weights = normal(tokens, dim), torch.rand(tokens, top_k, generator=generator, device=device)
    up, down = normal(num_experts, 2 * units, dim) / dim**0.5, normal(num_experts, dim, units) / units**0.5
    shape = blocks.shape_class(dim, units, tokens * top_k, num_experts, dtype, device)
    pairs = mlp.Pairs(rows, top_k, shape)
    rows_of = partial(normal, tokens * top_k)
    hidden, unit, out = rows_of(2 * units), rows_of(units), rows_of(dim)
    runs = {
        "up": lambda chosen: mlp.up_product(x, weights, up, pairs, "swiglu", chosen),
        "rows": lambda chosen: mlp.row_product(unit, down.transpose(1, 2), pairs, chosen),
        "hidden_gradient": lambda chosen: mlp.hidden_gradient(out, weights, hidden, down, pairs, "swiglu", chosen),
        "weight_gradient": lambda chosen: mlp.weight_gradient(hidden, out, up, pairs, chosen),
    }
    return {"runs": runs, "shape": shape}


def search(
    runs: dict[str, Callable[[Blocks], Any]], shape: ShapeClass, timer: Timer
) -> dict[str, tuple[Blocks, float]]:
    """Return the fastest block sizes of every product with their time, as the timer gives it."""
    best: dict[str, tuple[Blocks, float]] = {}
    for product, run in runs.items():
        for chosen in dict.fromkeys(candidates(shape)):
            try:
                run(chosen)
                time = timer(partial(run, chosen))
            except OutOfResources:
                continue
            if product not in best or time < best[product][1]:
                best[product] = chosen, time
    return best


def write(best: dict[str, tuple[Blocks, float]], shape: ShapeClass) -> None:
    """Put the result into the table of the package."""
    table = json.loads(blocks.TUNED_FILE.read_text())
    table |= {shape.key(product): list(chosen) for product, (chosen, _) in best.items()}
    lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in sorted(table.items()))
    blocks.TUNED_FILE.write_text(f"{{\n{lines}\n}}\n")


def main(arguments: list[str] | None = None, device: str = "cuda", timer: Timer | None = None) -> int:
    """Run the command; device and timer are parameters for its test."""
    parser = argparse.ArgumentParser(
        prog="python -m himoe.kernels.triton.tune", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--shape", required=True, help="T,D,F,E,K: tokens, width, expert hidden, experts, choices")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--write", action="store_true", help="keep the result in the package's table")
    given = parser.parse_args(arguments)
    sizes = tuple(int(n) for n in given.shape.split(","))
    if len(sizes) != 5 or min(sizes) < 1 or sizes[4] > sizes[3]:
        parser.error(f"--shape {given.shape}: five whole numbers T,D,F,E,K, K at most E")
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no GPU here")
    made = products(sizes, getattr(torch, given.dtype), torch.device(device))
    best = search(made["runs"], made["shape"], timer or partial(do_bench, return_mode="median"))
    for product, (chosen, time) in best.items():
        print(f"{made['shape'].key(product)}: {chosen} {time:.4f} ms")
    if given.write:
        write(best, made["shape"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
