import json

import pytest
from fake_run import EXPERTS, LAYERS, fake_run, write_lines

from himoe.report import RunFolder
from himoe.report.thinning import MAX_LOAD_BINS, MAX_POINTS, NUM_BINS, load_history, series


def lines(values):
    return [{"step": i + 1, "y": value} for i, value in enumerate(values)]


def curve(values):
    return series(lines(values), "step", lambda line: line["y"])


def layer(load, **statistics):
    return {"layer": 0, "load": load, **statistics}


def test_a_short_series_stays_as_it_is():
    short = curve([1.0, None, float("nan"), 4.0])
    assert (short.x, short.y, short.low, short.high) == ([1, 2, 3, 4], [1, None, None, 4], [], [])
    assert len(curve([1.0] * MAX_POINTS).y) == MAX_POINTS


def test_a_long_series_keeps_its_mean_and_its_spikes():
    values = [float(i % 2) for i in range(100_000)]
    values[54_321] = 99.0
    values[54_323] = -7.0
    long = curve(values)
    assert len(long.x) == len(long.y) == len(long.low) == len(long.high) == NUM_BINS
    assert (max(long.high), min(long.low)) == (99.0, -7.0)
    assert long.y[0] == pytest.approx(0.5)
    assert sum(long.y) / NUM_BINS == pytest.approx(sum(values) / len(values))
    assert long.x[0] == pytest.approx(100.5)  # steps 1 … 200


def test_a_bin_without_values_is_a_gap():
    values = [1.0] * 5000
    values[:100] = [None] * 100
    long = curve(values)
    assert (long.y[0], long.low[0], long.high[0]) == (None, None, None)
    assert long.y[-1] == 1.0


def test_load_is_shown_relative_to_the_layers_mean(run):
    first, second = layer([1, 2, 3, 2], max_vio_batch=0.5), layer([0, 0, 0, 0])
    write_lines(run / "load.jsonl", [{"step": 10, "layers": [first]}, {"step": 15, "layers": [second]}])
    history = load_history(RunFolder.open(run))
    assert history.edges == [0, 10, 15]
    assert history.layers[0].ratio == [[0.5, 1.0, 1.5, 1.0], [None] * 4]
    assert history.layers[0].statistics["max_vio_batch"] == [0.5, None]


def test_a_long_history_is_pooled_by_adding_loads(run):
    count = 4 * MAX_LOAD_BINS
    write_lines(
        run / "load.jsonl",
        [{"step": i + 1, "layers": [layer([i % 4, 3 - i % 4], group_mass=i % 4)]} for i in range(count)],
    )
    history = load_history(RunFolder.open(run))
    assert history.lines_per_bin == 4
    assert history.edges == list(range(0, count + 1, 4))
    assert history.layers[0].ratio == [[1.0, 1.0]] * MAX_LOAD_BINS
    assert history.layers[0].statistics["group_mass"] == [1.5] * MAX_LOAD_BINS


def test_every_column_of_every_layer_averages_one(tmp_path):
    history = load_history(RunFolder.open(fake_run(tmp_path / "run", steps=7000)))
    assert len(history.layers) == LAYERS
    assert len(history.edges) - 1 == 234  # 700 lines, 3 a bin
    for one in history.layers:
        assert all(sum(column) == pytest.approx(EXPERTS) for column in one.ratio)


def test_a_torn_last_line_leaves_no_empty_bin(run):
    path = run / "load.jsonl"
    path.write_bytes(path.read_bytes()[:-10])
    history = load_history(RunFolder.open(run))
    assert history.edges[-1] == 290
    assert len(history.layers[0].ratio) == len(history.ends) == 29


def test_lines_written_since_they_were_counted_wait_for_the_next_report(run):
    folder = RunFolder.open(run)
    assert folder.num_load_lines == 30
    with (run / "load.jsonl").open("a") as file:
        file.write(json.dumps({"step": 310, "layers": [layer([1] * EXPERTS)]}) + "\n")
    assert load_history(folder).edges[-1] == 300


def test_a_dense_model_has_no_history(run):
    (run / "load.jsonl").unlink()
    assert load_history(RunFolder.open(run)).layers == []
