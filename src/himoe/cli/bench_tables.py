"""The tables of `himoe bench`."""

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.markup import escape

from himoe.bench.ratios import case_name
from himoe.cli.tables import simple_table


def print_layer(console: Console, result: Mapping[str, Any]) -> None:
    """Print a table of ratios, one of times and memory, what each backend comes to, and who did not take part."""
    _print_environment(console, result["environment"])
    rows = result["rows"]
    if not rows:
        console.print("nothing was measured: no shape is left for these options", highlight=False)
        return
    _print_ratios(console, rows)
    _print_times(console, rows)
    _print_summary(console, result)
    for name, reason in result["unavailable"].items():
        _line(console, f"[bold]{name}[/bold] {escape(reason)}")
    for (name, reason), cases in _not_timed(result).items():
        where = cases[0] if len(cases) == 1 else f"{len(cases)} cases, the first {cases[0]}"
        _line(console, f"[bold]{name}[/bold] not timed in {where}: {escape(reason)}")
    if result["left_out"]:
        _line(console, f"left out, the two minutes were over: {', '.join(result['left_out'])}")
    if result["bf16_left_out"]:
        _line(console, "left out: bf16, which this CPU multiplies at less than half the rate of fp32; ask with --dtype")
    for row in rows:
        for name, complaint in row["failed"].items():
            _line(console, f"[bold red]wrong[/bold red] {case_name(row)}: [bold]{name}[/bold] {escape(complaint)}")


def _not_timed(result: Mapping[str, Any]) -> dict[tuple[str, str], list[str]]:
    """Return who was not timed and why, with the cases; not those that this machine lacks."""
    found: dict[tuple[str, str], list[str]] = {}
    for row in result["rows"]:
        for name, reason in row["not_run"].items():
            if name not in result["unavailable"]:
                found.setdefault((name, reason), []).append(case_name(row))
    return found


def _print_ratios(console: Console, rows: list[Mapping[str, Any]]) -> None:
    peers = list(dict.fromkeys(peer for row in rows for one in row["backends"].values() for peer in one["ratio_vs"]))
    console.print("[bold]Time of the peer over ours[/bold], above 1 ours is faster", highlight=False)
    table = simple_table("case", ["backend", *peers])
    for row in rows:
        case = case_name(row)
        for backend, one in row["backends"].items():
            cells = [_number(one["ratio_vs"].get(peer)) for peer in peers]
            table.add_row(case, f"[bold]{backend}[/bold]" if backend == row["backend"] else backend, *cells)
            case = ""
    console.print(table)
    console.print("in bold: the backend that the layer takes by itself, or the one asked for.", style="dim")
    console.print("dense: one network of the same active FLOPs; the fraction of its speed.", style="dim")
    console.print()


def _print_times(console: Console, rows: list[Mapping[str, Any]]) -> None:
    console.print("[bold]Forward and backward[/bold]", highlight=False)
    columns = ["min ms", "median", "CPU ms", "runs", "GFLOP/s", "peak MiB", "saved", "error"]
    for row in rows:
        sizes = " ".join(f"{letter} {row['shape'][letter]}" for letter in "TDFEK")
        _line(console, f"\n[bold]{case_name(row)}[/bold], {sizes}, largest load {row['largest_load']:.1f}× the mean")
        table = simple_table("", columns)
        for column, width in zip(table.columns, (10, 8, 8, 8, 4, 7, 8, 6, 5), strict=True):
            column.min_width = width  # so that the tables of all cases stand in line
        for name, one in row["times"].items():
            numbers = [one["minimum_ms"], one["median_ms"], one["cpu_ms"]]
            cells = [f"{number:,.1f}" for number in numbers] + [str(one["repeats"])]
            cells += [f"{one[key]:,.1f}" for key in ("gflops", "peak_mib", "saved_mib")] + [f"{one['error']:.0e}"]
            table.add_row(name, *cells)
        console.print(table)
    console.print()
    console.print("peak: beyond what was held before. saved: MiB kept from forward for backward.", style="dim")
    console.print("error: worst row of output and gradients against fp64.", style="dim", highlight=False)
    console.print()


def _print_summary(console: Console, result: Mapping[str, Any]) -> None:
    console.print("[bold]Together[/bold]", highlight=False)
    for backend, peers in result["summary"].items():
        for peer, one in peers.items():
            worst = f"worst {one['worst']:.2f} at {one['worst_case']}" if one["cases"] > 1 else one["worst_case"]
            means = f"{one['geometric_mean']:.2f}× in the geometric mean ({one['geometric_mean_cpu']:.2f}× of CPU time)"
            _line(console, f"{backend} vs {peer}: {means}, {escape(worst)}")
    for backend, one in result["skew"].items():
        _line(console, f"{backend}: Zipf's law takes at most {one['worst']:.2f}× the uniform time, {one['worst_case']}")
    for backend in result["summary"]:
        rates = [row["times"][backend]["of_product"] for row in result["rows"] if backend in row["times"]]
        _line(console, f"{backend}: {min(rates):.0%} to {max(rates):.0%} of the rate of one large product")
    console.print()


def print_parts(console: Console, result: Mapping[str, Any]) -> None:
    """Print what surrounds the experts, for every shape."""
    _print_environment(console, result["environment"])
    for found in result["parts"]:
        shape = found["shape"]
        sizes = " ".join(str(shape[letter]) for letter in "TDFEK")
        _line(console, f"[bold]{shape['name']} {found['dtype']}[/bold], T D F E K = {sizes}, {found['time']} time")
        table = simple_table("part", ["ms", "of the layer"])
        for name, one in found["parts"].items():
            table.add_row(name, f"{one['ms']:,.2f}", f"{one['share']:.1%}")
        console.print(table)
        share, extra = found["surrounding_share"], found["hi_moe_extra_share"]
        _line(console, f"router + dispatch + combine + statistics: {share:.1%} of the layer")
        _line(console, f"Hi-MoE's extra over plain top-k: {extra:.1%} of the layer\n")


def print_step(console: Console, result: Mapping[str, Any]) -> None:
    """Print a step by its parts."""
    _print_environment(console, result["environment"])
    _line(console, f"[bold]A step of {escape(result['recipe'])}[/bold], the fastest of {result['steps']}")
    _print_parts_of_step(console, result)
    with_clock, without = result["step_ms"]["with_clock"], result["step_ms"]["without_clock"]
    _line(
        console,
        f"without the clock {without['minimum']:,.1f} ms (median {without['median']:,.1f}), "
        f"with it {with_clock['minimum']:,.1f} ms (median {with_clock['median']:,.1f})",
    )
    _line(console, f"{result['tokens_per_second']:,.0f} tokens/s in the fastest step")


def _print_parts_of_step(console: Console, found: Mapping[str, Any]) -> None:
    table = simple_table("part", ["ms", "share"])
    for name, one in sorted(found["parts"].items(), key=lambda part: -part[1]["ms"]):
        table.add_row(name, f"{one['ms']:,.2f}", f"{one['share']:.1%}")
    table.add_row("[bold]together[/bold]", f"{found['parts_ms']:,.2f}", f"{sum_of_shares(found):.1%}")
    console.print(table)


def sum_of_shares(found: Mapping[str, Any]) -> float:
    """Return what the shares of the parts add up to."""
    return sum(one["share"] for one in found["parts"].values())


def print_model(console: Console, result: Mapping[str, Any]) -> None:
    """Print both models' steps, their ratio and its bound."""
    _print_environment(console, result["environment"])
    model, peer = result["model"], result["peer"]
    _line(
        console,
        f"{model['num_layers']} layers, D {model['dim']}, E {model['experts']}, K {model['top_k']}, "
        f"F {model['expert_dim']}, {model['tokens']:,} tokens\n",
    )
    for name, found in result["steps"].items():
        _line(console, f"[bold]{name}[/bold], {found['step_ms']['without_clock']['minimum']:,.1f} ms a step")
        _print_parts_of_step(console, found)
        console.print()
    _line(
        console,
        f"[bold]{result['ratio']:.2f}×[/bold] {peer} over ours (medians {result['ratio_median']:.2f}×, CPU time "
        f"{result['ratio_cpu']:.2f}×)",
    )
    _line(
        console,
        f"Amdahl's bound: {result['amdahl_bound']:.2f}×, with {result['experts_share']:.0%} of the peer's step in its "
        f"experts and {result['experts_ratio']:.2f}× between them",
    )


def print_diagnosis(console: Console, found: Mapping[str, Any]) -> None:
    """Print which backend runs where, and what this machine has."""
    console.print("[bold]Backends[/bold]", highlight=False)
    for name, reason in found["backends"].items():
        _line(console, f"  {name:<10} {escape(reason) if reason else 'can run'}")
    console.print("\n[bold]What auto takes[/bold]", highlight=False)
    table = simple_table("device", ["dtype", "shape", "auto takes", "possible"])
    for choice in found["choices"]:
        cells = [choice[key] for key in ("device", "dtype", "shape", "backend")]
        table.add_row(*cells, ", ".join(choice["possible"]))
    console.print(table)
    console.print("\n[bold]Machine[/bold]", highlight=False)
    compiler, rates = found["compiler"], found["matmul_gflops"]
    gpu = found["cuda"]
    settings = ", ".join(f"{name} {value}" for name, value in found["thread_settings"].items() if value is not None)
    facts = {
        "cpu": f"{found['cpu']}, {found['cores']} cores, {found['cpu_capability']}",
        "product": ", ".join(f"{dtype} {rate:,.0f} GFLOP/s" for dtype, rate in rates.items()),
        "gpu": f"{gpu['name']}, {gpu['capability']}, CUDA {gpu['cuda']}" if gpu else "none",
        "threads": settings,
        "BLAS": found["blas"],
        "compiler": f"{compiler['path']}: {compiler['version']}" if compiler["path"] else f"no {compiler['name']}",
        "torch": found["torch"],
        "python": found["python"],
        "himoe": f"{found['himoe']} {found['git_commit'] or ''}",
        **{name: version or "not installed" for name, version in found["packages"].items()},
    }
    for name, fact in facts.items():
        _line(console, f"  {name:<15} {escape(str(fact))}")


def _print_environment(console: Console, found: Mapping[str, Any]) -> None:
    machine = found["cpu"] if found["device"] == "cpu" else found["device"]
    rates = ", ".join(f"{dtype} {rate:,.0f}" for dtype, rate in found["matmul_gflops"].items())
    packages = ", ".join(f"{name} {version}" for name, version in found["packages"].items() if version)
    _line(console, f"{escape(machine)}, {found['threads']} threads, {found['cpu_capability']}, BLAS {found['blas']}")
    _line(console, f"torch {found['torch']}, {packages}; one product: {rates} GFLOP/s\n")


def _line(console: Console, text: str) -> None:
    console.print(text, highlight=False, soft_wrap=True)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"
