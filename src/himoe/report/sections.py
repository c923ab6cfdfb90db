"""What the report says, section by section, from headline to the command that runs it again.

All text that a run brings along (its name, its domains, its command) is HTML-escaped here.
"""

from __future__ import annotations

import json
import math
import shlex
from html import escape
from typing import Any

from himoe.registry import GROUPED_PRESETS, GROUPED_SELECTORS
from himoe.report import charts
from himoe.report.numbers import count, duration, saved, show, size
from himoe.report.page import Page, html_table
from himoe.report.read import RunFolder, number, table
from himoe.report.thinning import LoadHistory, load_history

MAX_VIO_TEXT = (
    "<b>MaxVio</b> is how far the busiest expert is above its fair share: 0 means perfectly even, 1 means it gets twice"
    " its share. <b>Batch</b> looks at each optimizer step alone, <b>window</b> at the last 50 steps added together,"
    " which takes out the luck of a single batch. Both count the pairs that the router chose, before a capacity limit"
    " drops any."
)
LOAD_TEXT = (
    "Each row is an expert, each column an interval of training. Colour is the expert’s load (the token–expert pairs it"
    " worked on) divided by the layer’s mean: <b>1 is its fair share</b>. The scale is the same for all layers."
)
DOMAIN_TEXT = (
    "Unigram and bigram are byte models of the training text, scored on the same held-out text in bits per byte:"
    " what predicting from byte frequencies alone achieves."
)
ONE_GROUP_TEXT = (
    "The experts form one group. <b>C</b> says how decided the router is: low when all experts are the same to it, 1"
    " when it gives a token’s whole probability to one of them."
)
GROUPS_TEXT = " Lines separate the groups; the numbers of a group’s experts stand under its name."
MASS_TEXT = (
    "For each token the router spreads a probability of 1 over all experts. <b>Σm²</b> says how that probability is"
    " divided <i>between</i> the groups: low when every group gets an equal part, so that all groups (devices) share"
    " the work; 1 when a token lives in one group alone. <b>C</b> says how decided the router is <i>inside</i> a group:"
    " low when a group’s experts are all the same to it, 1 when it puts everything on one of them, so that experts"
    " specialise. Hi-MoE pushes the first down and the second up."
)


def build_page(run: RunFolder, plotly_js: str) -> str:
    """Return the report of `run` as one HTML document."""
    page, loads = Page(run.name), load_history(run)
    page.parts.append(_headline(run))
    page.section("Learning", _learning(page, run))
    page.section("Held-out text by domain", _domain_table(run))
    page.section("Load of the experts", _load(page, run, loads))
    page.section("What the router learns", _router(page, run, loads))
    page.section("Optimisation", page.grid(charts.step_charts(run)))
    page.section("Run it again", _again(run))
    page.parts.append(
        f"<footer>Made by himoe {escape(str(run.env.get('himoe') or ''))} from the run folder alone."
        " Drag over a chart to zoom in, double-click to zoom out; click a name in a legend to hide it.</footer>"
    )
    return page.document(plotly_js)


def _text(value: Any) -> str:
    return escape(str(value))


def _headline(run: RunFolder) -> str:
    end, data = run.outcome, table(run.env.get("data"))
    parameters = table(end.get("parameters")) or table(run.env.get("parameters"))
    status = str(end.get("status"))
    moe = table(run.config.get("moe"))
    layers = end.get("layers") or []
    what = f"<b>{count(parameters.get('total'))} parameters</b>, {count(parameters.get('active'))} active per token"
    if layers:
        num_groups = int(number(moe.get("num_groups")) or 1)
        grouped = moe.get("preset") in GROUPED_PRESETS or moe.get("selector") in GROUPED_SELECTORS
        groups = f" in {num_groups} groups" if grouped else f" (measured in {num_groups} groups)"
        groups = groups if num_groups > 1 else ""
        method = f", balanced by <b>{_text(moe['preset'])}</b>" if moe.get("preset") else ""
        experts = f"{_text(moe.get('num_experts'))} experts{groups}, top {_text(moe.get('top_k'))}"
        what += f"; {len(layers)} mixture-of-experts layer{'s' * (len(layers) > 1)} of {experts}{method}"
    done = f"Trained for <b>{count(end.get('tokens'))} tokens</b> in {duration(end.get('seconds'))}"
    done = done if number(end.get("tokens")) else "Nothing is recorded yet"
    done += f"; data: {_text(data['name'])}" if data.get("name") else ""
    notes = "".join(f'<p class="note">{_text(note)}</p>' for note in run.notes)
    kind = status if status in ("finished", "interrupted") else "unfinished"
    return (
        f'<header><p class="eyebrow">Training run<span class="status {kind}">{_text(status)}</span></p>'
        f'<h1>{_text(run.name)}</h1><p class="lead">{what}. {done}.</p>{notes}</header>{_tiles(run)}'
    )


def _tile(label: str, value: str, unit: str, hint: str) -> str:
    unit = f'<span class="unit">{unit}</span>' if unit else ""
    return f'<div class="tile"><dt>{label}</dt><dd class="value">{value}{unit}</dd><dd class="hint">{hint}</dd></div>'


def _tiles(run: RunFolder) -> str:
    end, tiles = run.outcome, []
    bits, bigram = number(end.get("bits_per_byte")), run.baseline("bigram")
    if bits is not None:
        what = "over all held-out text" if end.get("status") == "finished" else "at the last evaluation"
        tiles.append(_tile("Held-out bits per byte", show(bits), "", f"{what}; lower is better"))
        if bigram:
            label = "Under byte-bigram" if bits <= bigram else "Over byte-bigram"
            share = saved(bits, bigram).removeprefix("−")
            tiles.append(_tile(label, share, "", f"the bigram model needs {show(bigram)}"))
    for key, label in (("max_vio_window", "MaxVio, window"), ("cv_window", "CV of load, window")):
        found = [(number(layer.get(key)), layer.get("layer")) for layer in end.get("layers") or []]
        value, layer = max(((value, layer) for value, layer in found if value is not None), default=(None, None))
        if value is not None:
            tiles.append(_tile(label, show(value), "", f"layer {_text(layer)}, the worst; 0 is perfectly even"))
    if number(end.get("tokens_per_second")) is not None:
        tiles.append(_tile("Tokens per second", show(end["tokens_per_second"], 0), "", _machine(run)))
    memory = number(end.get("peak_memory_mib"))
    if memory is not None:
        value, unit = size(memory * 2**20).split(" ")
        tiles.append(_tile("Peak memory", value, unit, "of the whole process"))
    return f'<dl class="tiles">{"".join(tiles)}</dl>' if tiles else ""


def _machine(run: RunFolder) -> str:
    device, threads = str(run.env.get("device") or "cpu"), run.env.get("threads")
    if device != "cpu" or not threads:
        return f"on {_text(device)}"
    return f"on {_text(threads)} CPU thread{'s' * (threads != 1)}"


def _learning(page: Page, run: RunFolder) -> str:
    curves = page.grid([charts.loss_chart(run), charts.bits_chart(run)])
    cap = number(table(run.config.get("data")).get("eval_tokens"))
    if not (curves and run.evals and cap):
        return curves
    text = (
        f"Along the way {count(cap)} tokens of each domain are scored; an open diamond is a score of all held-out text."
    )
    return f"<p>{text}</p>{curves}"


def _domain_table(run: RunFolder) -> str:
    end, rows = run.outcome, []
    scores = table(end.get("domains"))
    for name in run.domains:
        own, base = table(scores.get(name)), run.baselines.get(name, {})
        bits, bigram = own.get("bits_per_byte"), own.get("bigram", base.get("bigram"))
        row = [_text(name), show(own.get("loss")), show(own.get("perplexity"), 1), f"<b>{show(bits)}</b>"]
        row += [show(own.get("unigram", base.get("unigram"))), show(bigram), f"<b>{saved(bits, bigram)}</b>"]
        rows.append([*row, size(run.held_out_bytes.get(name))])
    if not scores:
        return ""
    if len(rows) > 1:
        bits, bigram = end.get("bits_per_byte"), run.baseline("bigram")
        whole = size(sum(run.held_out_bytes.values()) or None)
        loss, unigram = number(end.get("loss")), show(run.baseline("unigram"))
        perplexity = show(None if loss is None else math.exp(min(loss, 700.0)), 1)
        rows.append(["All", show(loss), perplexity, show(bits), unigram, show(bigram), saved(bits, bigram), whole])
    head = ["Domain", "Loss", "Perplexity", "Bits per byte", "Unigram", "Bigram", "Under bigram", "Held-out text"]
    return f"<p>{DOMAIN_TEXT}</p>" + html_table(head, rows, "Scores by domain", total=len(rows) > 1)


def _load(page: Page, run: RunFolder, loads: LoadHistory) -> str:
    """Return what the section on load holds; nothing for a model without mixture-of-experts layers."""
    if not loads.layers:
        return ""
    over_time = []
    for name, text in (("batch", "Loads of one optimizer step."), ("window", "Loads of the last 50 steps together.")):
        chart = charts.layer_chart(loads, f"max_vio_{name}", f"MaxVio, {name}", f"{text} {_pooled(loads)}".strip())
        chart.layout["yaxis"] = {"rangemode": "tozero"}
        chart.switches = (("MaxVio", "yaxis"),)
        over_time.append(chart)
    if any(value for layer in loads.layers for value in layer.statistics["drop_rate"]):
        text = f"Share of the chosen pairs that the capacity limit dropped. {_pooled(loads)}".strip()
        over_time.append(charts.layer_chart(loads, "drop_rate", "Dropped pairs", text))
        over_time[-1].layout["yaxis"] = {"rangemode": "tozero", "tickformat": ".0%"}
    groups = run.groups(loads.num_experts)
    maps = [charts.heat_map(layer, loads, groups) for layer in loads.layers]
    scale = '<div class="scale"><span>0: idle</span><i></i><span>2 × fair share or more</span></div>'
    text = f"{LOAD_TEXT}{GROUPS_TEXT}" if len(groups) > 1 else LOAD_TEXT
    return f"<p>{MAX_VIO_TEXT}</p>{page.grid(over_time)}<p>{text}</p>{scale}{page.grid(maps)}"


def _router(page: Page, run: RunFolder, loads: LoadHistory) -> str:
    """Return what the section on group mass and concentration holds."""
    if not loads.layers:
        return ""
    groups = run.groups(loads.num_experts)
    mass = charts.layer_chart(loads, "group_mass", "Σm²: between the groups", _pooled(loads))
    mass.layout |= charts.bounded(1 / len(groups), f"1/{len(groups)}: all groups equally", "1: one group alone")
    share = charts.layer_chart(loads, "concentration", "C: inside a group", _pooled(loads))
    low = sum(1 / len(group) for group in groups) / len(groups)
    equal = len({len(group) for group in groups}) == 1
    share.layout |= charts.bounded(
        low, f"{f'1/{len(groups[0])}' if equal else show(low)}: all experts alike", "1: one expert takes all"
    )
    if len(groups) == 1:
        return f"<p>{ONE_GROUP_TEXT}</p>{page.grid([share])}{_layer_table(run)}"
    return f"<p>{MASS_TEXT}</p>{page.grid([mass, share])}{_layer_table(run)}"


def _pooled(loads: LoadHistory) -> str:
    return f"Each point is the mean of {loads.lines_per_bin} log lines." if loads.lines_per_bin > 1 else ""


def _layer_table(run: RunFolder) -> str:
    layers = run.outcome.get("layers") or []
    columns = {
        "MaxVio, batch": "max_vio_batch",
        "MaxVio, window": "max_vio_window",
        "CV, window": "cv_window",
        "Σm²": "group_mass",
        "C": "concentration",
    }
    if any(number(layer.get("drop_rate")) for layer in layers):
        columns["Dropped"] = "drop_rate"
    rows = [[_text(layer.get("layer")), *(show(layer.get(key)) for key in columns.values())] for layer in layers]
    return html_table(["Layer", *columns], rows, "Balance by layer at the end") if rows else ""


def _again(run: RunFolder) -> str:
    command = run.env.get("command") or ""
    command = shlex.join(map(str, command)) if isinstance(command, list) else str(command)
    stored = f"himoe train {shlex.quote(str(run.path / 'config.json'))}"
    parts = [
        f"<p>{text}</p><div class=command><pre>{_text(line)}</pre></div>"
        for text, line in (("As it was started:", command), ("From the configuration it stored:", stored))
        if line
    ]
    rows = "".join(f"<tr><th scope=row>{key}</th><td>{_text(value)}</td></tr>" for key, value in _facts(run) if value)
    if rows:
        parts.append(f'<div class="scroll"><table class="facts"><tbody>{rows}</tbody></table></div>')
    config = _text(json.dumps(run.config, indent=2, ensure_ascii=False))
    parts.append(
        f"<details><summary>Configuration, with every default filled in</summary><pre>{config}</pre></details>"
    )
    return "".join(parts)


def _facts(run: RunFolder) -> list[tuple[str, Any]]:
    """Return (label, value) pairs about the environment; those without a value are not shown."""
    env, data = run.env, table(run.env.get("data"))
    versions = [f"{name} {env[name]}" for name in ("himoe", "python", "torch") if env.get(name)]
    text = f"{size(data.get('train_bytes'))}, {count(data.get('train_tokens'))} tokens"
    tokenizer = f"{data.get('tokenizer')}, {count(data.get('vocab_size'))} tokens"
    return [
        ("Started", env.get("started")),
        ("Resumed", ", ".join(f"at step {table(one).get('step')}" for one in env.get("resumed") or [])),
        ("Versions", ", ".join(versions)),
        ("Commit", env.get("git_commit")),
        ("Platform", env.get("platform")),
        ("Processor", env.get("cpu")),
        ("Device", env.get("device")),
        ("Threads", f"{env.get('threads')} on {env.get('cores')} cores" if env.get("threads") else None),
        ("Data", data.get("name")),
        ("Data hash", data.get("hash")),
        ("Training text", text if data.get("train_tokens") else None),
        ("Tokenizer", tokenizer if data.get("tokenizer") else None),
    ]
