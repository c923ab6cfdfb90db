"""What the report says, section by section, from headline to the command that runs it again.

All text that a run brings along (its name, its domains, its command) is HTML-escaped here.
"""

from __future__ import annotations

import json
import math
import shlex
from html import escape
from typing import Any

from himoe.report import charts
from himoe.report.headline import headline
from himoe.report.numbers import NOTHING, count, saved, show, size, text_of
from himoe.report.page import Page, html_table
from himoe.report.read import RunFolder, number, table
from himoe.report.step_charts import step_charts
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
BY_LENGTH = ("by_context", "by_length")
CONTEXT_TEXT = "All domains together. The more of a document the model has seen, the better it should predict."
LENGTH_TEXT = "All domains together; a document’s length is in tokens."
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
    page.parts.append(headline(run))
    page.section("Learning", _learning(page, run))
    page.section("Held-out text by domain", _domain_table(run))
    page.section("Held-out text by length", _by_length(page, run))
    page.section("Load of the experts", _load(page, run, loads))
    page.section("What the router learns", _router(page, run, loads))
    page.section("Optimisation", page.grid(step_charts(run)))
    page.section("Run it again", _again(run))
    page.parts.append(
        f"<footer>Made by himoe {escape(str(run.env.get('himoe') or ''))} from the run folder alone."
        " Drag over a chart to zoom in, double-click to zoom out; click a name in a legend to hide it.</footer>"
    )
    return page.document(plotly_js)


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
        row = [text_of(name), show(own.get("loss")), show(own.get("perplexity"), 1), f"<b>{show(bits)}</b>"]
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


def _by_length(page: Page, run: RunFolder) -> str:
    """Return the charts of the last evaluation by context and by document length, where it has them."""
    last = run.evals[-1] if run.evals else {}
    context, length = ([one for one in last.get(key) or [] if number(table(one).get("to"))] for key in BY_LENGTH)
    return page.grid(
        [
            charts.bucket_chart(context, "By context", "tokens of the document seen before, up to …", CONTEXT_TEXT),
            charts.bucket_chart(length, "By length of the document", "tokens of the document, up to …", LENGTH_TEXT),
        ]
    )


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
    over_time += _variable_experts(loads)
    if any(value for layer in loads.layers for value in layer.statistics["drop_rate"]):
        text = f"Share of the chosen pairs that the capacity limit dropped. {_pooled(loads)}".strip()
        over_time.append(charts.layer_chart(loads, "drop_rate", "Dropped pairs", text))
        over_time[-1].layout["yaxis"] = {"rangemode": "tozero", "tickformat": ".0%"}
    groups = run.groups(loads.num_experts)
    maps = [charts.heat_map(layer, loads, groups) for layer in loads.layers]
    scale = '<div class="scale"><span>0: idle</span><i></i><span>2 × fair share or more</span></div>'
    text = f"{LOAD_TEXT}{GROUPS_TEXT}" if len(groups) > 1 else LOAD_TEXT
    return f"<p>{MAX_VIO_TEXT}</p>{page.grid(over_time)}<p>{text}</p>{scale}{page.grid(maps)}"


def _variable_experts(loads: LoadHistory) -> list[charts.Chart]:
    """Return charts of the experts per token and of what was cut off, where the selector lets the number vary."""
    found = []
    numbers = [value for layer in loads.layers for value in layer.statistics["experts_per_token"] if value is not None]
    if any(value != numbers[0] for value in numbers):
        text = f"Mean number of experts that the router chose for a token. {_pooled(loads)}".strip()
        found.append(charts.layer_chart(loads, "experts_per_token", "Experts per token", text))
        found[-1].layout["yaxis"] = {"rangemode": "tozero"}
    if any(value for layer in loads.layers for value in layer.statistics["truncated_mass"]):
        text = f"Share of a token’s scores on experts that its limit, max_k, cut off. {_pooled(loads)}".strip()
        found.append(charts.layer_chart(loads, "truncated_mass", "Cut off by max_k", text))
        found[-1].layout["yaxis"] = {"rangemode": "tozero", "tickformat": ".0%"}
    return found


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
        "Effective experts": "effective_experts",
        "Experts per token": "experts_per_token",
        "Σm²": "group_mass",
        "C": "concentration",
        "Dropped": "drop_rate",
    }
    if not any(number(layer.get("drop_rate")) for layer in layers):
        del columns["Dropped"]
    if all((number(layer.get("experts_per_token")) or 0.0).is_integer() for layer in layers):
        del columns["Experts per token"]
    if not any(number(layer.get("effective_experts")) for layer in layers):
        del columns["Effective experts"]
    rows = [[text_of(layer.get("layer")), *(show(layer.get(key)) for key in columns.values())] for layer in layers]
    if any(layer.get("dead_experts") for layer in layers):
        columns["Dead experts"] = "dead_experts"
        for row, layer in zip(rows, layers, strict=True):
            row.append(text_of(", ".join(map(str, layer.get("dead_experts") or [])) or NOTHING))
    return html_table(["Layer", *columns], rows, "Balance by layer at the end") if rows else ""


def _again(run: RunFolder) -> str:
    command = run.env.get("command") or ""
    command = shlex.join(map(str, command)) if isinstance(command, list) else str(command)
    stored = f"himoe train {shlex.quote(str(run.path / 'config.json'))}"
    parts = [
        f"<p>{text}</p><div class=command><pre>{text_of(line)}</pre></div>"
        for text, line in (("As it was started:", command), ("From the configuration it stored:", stored))
        if line
    ]
    rows = "".join(f"<tr><th scope=row>{key}</th><td>{text_of(value)}</td></tr>" for key, value in _facts(run) if value)
    if rows:
        parts.append(f'<div class="scroll"><table class="facts"><tbody>{rows}</tbody></table></div>')
    config = text_of(json.dumps(run.config, indent=2, ensure_ascii=False))
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
