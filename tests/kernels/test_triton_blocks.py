"""Which block sizes a call gets, and the command that measures them."""

import json

import pytest
import torch
import triton_here

from himoe.kernels.triton import blocks, tune
from himoe.kernels.triton.blocks import Blocks, ShapeClass

pytestmark = triton_here.marks


@pytest.fixture
def table(tmp_path, monkeypatch):
    file = tmp_path / "tuned.json"
    file.write_text("{}")
    monkeypatch.setattr(blocks, "TUNED_FILE", file)
    blocks._tuned.cache_clear()
    yield file
    blocks._tuned.cache_clear()


def test_shape_classes_round_rows_per_expert_up():
    def rows(pairs, num_experts):
        return blocks.shape_class(8, 8, pairs, num_experts, torch.bfloat16, torch.device("cpu")).rows

    assert [rows(*given) for given in ((0, 4), (8, 4), (132, 4), (256, 4), (257, 4), (10**9, 4))] == [
        32, 32, 64, 64, 128, 4096,
    ]  # fmt: skip


def test_the_shipped_table_can_be_read_and_names_products():
    table = json.loads(blocks.TUNED_FILE.read_text())
    assert all(key.split()[0] in blocks.PRODUCTS and len(value) == len(Blocks._fields) for key, value in table.items())


def test_measured_sizes_go_before_the_default(table):
    shape = ShapeClass(2048, 768, 512, "bfloat16", (9, 0))
    table.write_text(json.dumps({"up D2048 F768 rows512 bfloat16 sm90": [64, 256, 32, 4, 8, 5]}))
    assert blocks.choose("up", shape) == Blocks(64, 256, 32, 4, 8, 5)
    for other in (shape._replace(rows=256), shape._replace(capability=(8, 0)), shape._replace(dtype="float16")):
        assert blocks.choose("up", other) == blocks.default("up", other)
    assert blocks.choose("rows", shape) == blocks.default("rows", shape)


def test_the_command_keeps_the_fastest_of_what_runs(table, monkeypatch, capsys):
    few = [Blocks(16, 16, 16, 2, 4, 1), Blocks(16, 16, 32, 2, 4, 1), Blocks(32, 16, 16, 2, 4, 1)]
    monkeypatch.setattr(tune, "candidates", lambda shape: iter(few))
    times = iter([3.0, 1.0, 2.0] * 4)
    computed = []

    def timer(run):
        result = run()
        computed.append(result[0] if isinstance(result, tuple) else result)
        return next(times)

    arguments = ["--shape", "20,16,16,3,2", "--dtype", "float32", "--write"]
    assert tune.main(arguments, device=triton_here.DEVICE, timer=timer) == 0
    for i in range(0, 12, 3):  # whatever the block sizes, the product is the same
        torch.testing.assert_close(computed[i], computed[i + 1], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(computed[i], computed[i + 2], rtol=1e-4, atol=1e-5)
    written = json.loads(table.read_text())
    assert {key.split()[0] for key in written} == set(blocks.PRODUCTS)
    assert all(value == list(few[1]) for value in written.values())
    assert capsys.readouterr().out.count("1.0000 ms") == 4


@pytest.mark.parametrize("shape", ["1,2,3", "8,8,8,4,5", "8,0,8,4,2"])
def test_a_shape_that_cannot_be_is_refused(shape, capsys):
    with pytest.raises(SystemExit):
        tune.main(["--shape", shape])
    assert "T,D,F,E,K" in capsys.readouterr().err
