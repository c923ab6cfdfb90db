"""Tables of a sweep: what is averaged, what is listed instead, and comparisons at equal tokens and FLOPs."""

import math

import pyarrow.parquet as pq
import pytest

from himoe.analysis import compare_at, read_sweep, settings_of, where
from himoe.analysis.runs import from_rows
from himoe.analysis.settings import families, student
from himoe.analysis.synthetic import curve, rows, tables
from himoe.errors import ConfigError, DataError


def test_student_by_hand():
    mean = student([3.0, 3.2, 3.1, 3.5])  # s = 0.21602, t(0.975, 3) = 3.18245
    assert mean.value == pytest.approx(3.2) and mean.spread == pytest.approx(0.216025, abs=1e-6)
    assert mean.high - mean.value == pytest.approx(3.182446 * 0.216025 / 2, abs=1e-6)
    one = student([3.0])
    assert one.n == 1 and one.low is None and one.high is None


def test_runs_that_failed_or_ended_early_are_listed_and_never_averaged():
    some = rows(seeds=3)
    some[0] |= {"status": "failed", "error": "RuntimeError: no", "cross_entropy": 99.0}
    some[4] |= {"tokens": some[4]["tokens"] // 2, "cross_entropy": 99.0}
    some[8] |= {"cross_entropy": math.nan}
    some.append({**some[9], "run": "again", "started": None, "cross_entropy": 99.0})  # the older of two equal seeds
    settings, left = settings_of(from_rows("x", some))
    assert sorted(one.loss.n for one in settings) == [2, 2, 2, 3, 3, 3, 3, 3, 3]
    assert max(one.loss.value for one in settings) < 10
    told = {one.run: one.reason for one in left}
    assert told[some[0]["run"]].startswith("failed") and "RuntimeError: no" in told[some[0]["run"]]
    assert told[some[4]["run"]] == "ended at 5,000,000 of the 10,000,000 tokens of its setting"
    assert "without a validation loss" in told[some[8]["run"]] and "same seed" in told["again"]


def test_a_family_has_equal_active_parameters_whatever_its_routers_weigh():
    settings, _ = settings_of(from_rows("x", rows(scales=((64, 2), (96, 3)), slices=(1, 16), sparsities=(4, 256))))
    found = families(settings)
    assert [len(one) for one in found] == [4, 4]
    assert [round(one[0].active) for one in found] == [16 * 64**2 * 2, 16 * 96**2 * 3]


def test_equal_tokens_and_flops_are_read_off_the_curves():
    some = rows(sparsities=(4,), slices=(1, 4), seeds=1)
    some[1] |= {"status": "failed", "error": "late"}
    lines = [line for row in some for line in curve(row)]
    sweep = from_rows("x", some, lines)
    first = [line for line in lines if line["run"] == some[0]["run"]]
    at = math.sqrt(first[1]["tokens"] * first[2]["tokens"])
    settings, left = settings_of(compare_at(sweep, tokens=at))
    assert not left and len(settings) == 2  # what failed later had come that far
    loss = next(one.loss.value for one in settings if one.runs[0]["run"] == some[0]["run"])
    assert loss == pytest.approx((first[1]["cross_entropy"] + first[2]["cross_entropy"]) / 2)
    by_flops, _ = settings_of(compare_at(sweep, flops=some[0]["training_flops"] / 2))
    assert {round(one.fact("training_flops") / some[0]["training_flops"], 6) for one in by_flops} == {0.5}
    none, short = settings_of(compare_at(sweep, tokens=2e7))
    assert not none and all("its curve ends at 10,000,000 tokens" in one.reason for one in short)


def test_where_keeps_rows_and_names_what_there_is():
    sweep = from_rows("x", rows())
    assert {row["top_k"] for row in where(sweep, ["moe.top_k=4", "seed=0"]).rows} == {4}
    with pytest.raises(ConfigError, match="no run is left; top_k is 1, 16, 4"):
        where(sweep, ["top_k=3"])
    with pytest.raises(ConfigError, match=r"did you mean 'moe\.top_k'"):
        where(sweep, ["moe.topk=4"])


def test_files_are_read_as_tables_are(tmp_path):
    runs, curves = tables(rows())
    pq.write_table(runs, tmp_path / "runs.parquet")
    pq.write_table(curves, tmp_path / "curves.parquet")
    of_files, of_tables = read_sweep(tmp_path), read_sweep(runs, curves)
    assert of_files.rows == of_tables.rows and of_files.curves == of_tables.curves and of_files.name == tmp_path.name
    assert set(of_files.varied) == {"moe.num_experts", "moe.top_k", "moe.expert_dim"}
    (tmp_path / "runs.parquet").write_bytes(b"PAR1 torn")
    with pytest.raises(DataError, match="not a whole Parquet file"):
        read_sweep(tmp_path)
    with pytest.raises(DataError, match=r"there is no runs\.parquet"):
        read_sweep(tmp_path / "nowhere")
    with pytest.raises(DataError, match="has no tokens"):
        read_sweep(runs.drop_columns(["tokens"]))


def test_paired_intervals_leave_out_what_a_seed_does_to_all():
    settings, _ = settings_of(from_rows("x", rows(common=0.05, own=0.001)))
    for one in settings:
        raw, paired = (mean.high - mean.value for mean in (one.loss, one.paired))
        assert paired < raw / 5 and one.paired.value == pytest.approx(one.loss.value)
    only, _ = settings_of(from_rows("x", rows(sparsities=(4,), slices=(1, 4))))
    assert [one.paired for one in only] == [None, None]  # two settings do not tell a seed's part from their own


def test_paired_intervals_by_hand():
    some = rows(slices=(1, 4, 16), sparsities=(4,), seeds=2)
    for row, loss in zip(some, (3.0, 3.4, 3.1, 3.6, 3.2, 3.5), strict=True):
        row["cross_entropy"] = loss
    settings, _ = settings_of(from_rows("x", some))
    # Seeds' means 3.1 and 3.5; left of the first setting 3.2 and 3.2, of the second 3.3 and 3.4, of the third 3.4, 3.3.
    assert [one.paired.spread for one in settings] == pytest.approx([0.0, 0.0707107 * 1.5**0.5, 0.0707107 * 1.5**0.5])
