"""The top of the report: what was trained, what went wrong, and the key numbers."""

from __future__ import annotations

from himoe.registry import GROUPED_PRESETS, GROUPED_SELECTORS
from himoe.report.numbers import count, duration, saved, show, size, text_of
from himoe.report.page import tile
from himoe.report.read import RunFolder, number, table
from himoe.report.thinning import mean
from himoe.run_folder import COMPLETE

SHOWN_ALARMS = 5


def headline(run: RunFolder) -> str:
    """Return what a reader should see first: what was trained, what went wrong, how good it is."""
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
        method = f", balanced by <b>{text_of(moe['preset'])}</b>" if moe.get("preset") else ""
        numbers = [number(layer.get("experts_per_token")) for layer in layers]
        varies = any(value is not None and not value.is_integer() for value in numbers)
        chosen = "a varying number per token" if varies else f"top {text_of(moe.get('top_k'))}"
        experts = f"{text_of(moe.get('num_experts'))} experts{groups}, {chosen}"
        what += f"; {len(layers)} mixture-of-experts layer{'s' * (len(layers) > 1)} of {experts}{method}"
    done = f"Trained for <b>{count(end.get('tokens'))} tokens</b> in {duration(end.get('seconds'))}"
    done = done if number(end.get("tokens")) else "Nothing is recorded yet"
    done += f"; data: {text_of(data['name'])}" if data.get("name") else ""
    notes = "".join(f'<p class="note">{text_of(note)}</p>' for note in run.notes)
    kind = "finished" if status in COMPLETE else "unfinished"
    return (
        f'<header><p class="eyebrow">Training run<span class="status {kind}">{text_of(status)}</span></p>'
        f'<h1>{text_of(run.name)}</h1><p class="lead">{what}. {done}.</p>{notes}{_alarms(run)}</header>{_tiles(run)}'
    )


def _tiles(run: RunFolder) -> str:
    end, tiles = run.outcome, []
    bits, bigram = number(end.get("bits_per_byte")), run.baseline("bigram")
    if bits is not None:
        what = "over all held-out text" if end.get("status") in COMPLETE else "at the last evaluation"
        tiles.append(tile("Held-out bits per byte", show(bits), f"{what}; lower is better"))
        if bigram:
            label = "Under byte-bigram" if bits <= bigram else "Over byte-bigram"
            share = saved(bits, bigram).removeprefix("−")
            tiles.append(tile(label, share, f"the bigram model needs {show(bigram)}"))
    tiles += _best_tile(run)
    for key, label in (("max_vio_window", "MaxVio, window"), ("cv_window", "CV of load, window")):
        found = [(number(layer.get(key)), layer.get("layer")) for layer in end.get("layers") or []]
        value, layer = max(((value, layer) for value, layer in found if value is not None), default=(None, None))
        if value is not None:
            tiles.append(tile(label, show(value), f"layer {text_of(layer)}, the worst; 0 is perfectly even"))
    if number(end.get("tokens_per_second")) is not None:
        tiles.append(tile("Tokens per second", show(end["tokens_per_second"], 0), _machine(run)))
    memory = number(end.get("peak_memory_mib"))
    if memory is not None:
        value, unit = size(memory * 2**20).split(" ")
        tiles.append(tile("Peak memory", value, "of the whole process", unit))
    return f'<dl class="tiles">{"".join(tiles)}</dl>' if tiles else ""


def _best_tile(run: RunFolder) -> list[str]:
    """Return the tile of the best evaluation along the way, unless the run ended with it."""
    best = table(run.outcome.get("best"))
    step, bits = number(best.get("step")), number(best.get("bits_per_byte"))
    if step is None or bits is None or step == number(run.outcome.get("step")):
        return []
    return [tile("Best along the way", show(bits), f"bits per byte at step {step:,.0f}, on the text scored then")]


def _machine(run: RunFolder) -> str:
    device, threads = str(run.env.get("device") or "cpu"), run.env.get("threads")
    where = f"on {text_of(device)}"
    if device == "cpu" and threads:
        where = f"on {text_of(threads)} CPU thread{'s' * (threads != 1)}"
    waiting = mean(number(line.get("data_wait")) for line in run.train)
    return where if waiting is None else f"{where}; {100 * waiting:.1f}\N{NO-BREAK SPACE}% of the time waiting for data"


def _alarms(run: RunFolder) -> str:
    """Return every alarm of the run with its step and what to do; the first few of many are open."""
    if not run.alarms:
        return ""
    items = [
        f"<li><b>Step {line['step']:,.0f}: {text_of(line.get('alarm')).replace('_', ' ')}</b>"
        f" {text_of(line.get('text') or '')}</li>"
        for line in run.alarms
    ]
    more = ""
    if len(items) > SHOWN_ALARMS:
        rest = "".join(items[SHOWN_ALARMS:])
        more = f"<details><summary>{len(items) - SHOWN_ALARMS} more</summary><ul>{rest}</ul></details>"
    title = "An alarm went off" if len(items) == 1 else f"{len(items)} alarms went off"
    return f'<div class="alarms"><h2>{title}</h2><ul>{"".join(items[:SHOWN_ALARMS])}</ul>{more}</div>'
