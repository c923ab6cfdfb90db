"""Rows of a step: the same for any number of micro-batches and ranks, read ahead, with the documents they hold."""

import os
import threading

import numpy as np
import pytest

from himoe.data import TrainingOrder
from himoe.errors import DataError
from himoe.train.batches import Batches, document_ids

END = 0
B, S = 12, 6


def make_order():
    return TrainingOrder({"a": np.arange(500) % 37, "b": np.arange(300) % 23}, S, 3, weights={"a": 0.7, "b": 0.3})


def make_batches(order=None, **options):
    return Batches(order or make_order(), **{"batch_size": B, "accumulate": 1, "end_of_document": END, **options})


def rows_of(batches, step):
    return [batches.micro_batch(step, index) for index in range(batches.accumulate)]


class Watched:
    """An order that notes which samples are read, in which thread, and can be told to fail or to wait."""

    def __init__(self, *, broken=(), gate=None):
        self.order, self.broken, self.gate = make_order(), broken, gate
        self.read = []

    def sample(self, i):
        self.read.append((i, threading.current_thread()))
        if i in self.broken:
            raise DataError(f"sample {i} is damaged")
        if self.gate and threading.current_thread() is not threading.main_thread():
            assert self.gate.wait(30)
        return self.order.sample(i)


@pytest.mark.parametrize("accumulate", [1, 2, 3, 6])
@pytest.mark.parametrize("world_size", [1, 2])
def test_micro_batches_and_ranks_only_slice_the_rows_of_a_step(accumulate, world_size):
    order = make_order()
    ranks = [make_batches(order, accumulate=accumulate, rank=r, world_size=world_size) for r in range(world_size)]
    for step in (0, 1, 7):
        pieces = [ranks[rank].micro_batch(step, index) for index in range(accumulate) for rank in range(world_size)]
        assert {piece.tokens.shape for piece in pieces} == {(B // accumulate // world_size, S + 1)}
        expected = [order.sample(i) for i in range(step * B, (step + 1) * B)]
        assert np.array_equal(np.concatenate([piece.tokens for piece in pieces]), expected)


def test_any_step_may_come_next():
    through = make_batches(accumulate=2)
    steps = [[part.tokens for part in rows_of(through, step)] for step in range(6)]
    jumping = make_batches(accumulate=2)
    for step in (4, 5, 0, 1, 1, 3, 2):
        assert np.array_equal([part.tokens for part in rows_of(jumping, step)], steps[step])


def test_the_next_step_is_read_in_the_background_once():
    watched = Watched()
    batches = make_batches(watched, accumulate=2)
    for step in range(4):
        rows_of(batches, step)
    batches.micro_batch(4, 0)
    for thread in {thread for _, thread in watched.read if thread is not threading.main_thread()}:
        assert thread.daemon
        thread.join()
    assert sorted(i for i, _ in watched.read) == list(range(6 * B))
    assert {i for i, thread in watched.read if thread is threading.main_thread()} == set(range(B))


def test_waiting_counts_only_what_blocks():
    gate = threading.Event()
    batches = make_batches(Watched(gate=gate), accumulate=2)
    assert batches.wait_seconds == 0
    batches.micro_batch(0, 0)
    waited = batches.wait_seconds
    assert waited > 0
    batches.micro_batch(0, 1)
    assert batches.wait_seconds == waited  # its rows were there already
    threading.Timer(0.2, gate.set).start()
    batches.micro_batch(1, 0)
    assert batches.wait_seconds > waited


def test_an_error_in_the_background_surfaces_where_its_step_is_asked_for():
    batches = make_batches(Watched(broken={B + 3}), accumulate=2)
    assert len(rows_of(batches, 0)) == 2
    with pytest.raises(DataError, match="sample 15 is damaged"):
        batches.micro_batch(1, 0)
    assert batches.micro_batch(2, 0).tokens.shape == (B // 2, S + 1)  # and other steps are none the worse


def test_a_step_that_is_never_asked_for_may_be_damaged():
    batches = make_batches(Watched(broken={B}))
    rows_of(batches, 0)
    rows_of(batches, 0)


def test_a_forked_process_reads_for_itself():
    gate = threading.Event()
    batches = make_batches(Watched(gate=gate))
    batches.micro_batch(0, 0)
    child = os.fork()  # with step 1 half read by a thread that the child does not have
    if child == 0:
        expected = [make_order().sample(i) for i in range(B, 2 * B)]
        os._exit(0 if np.array_equal(batches.micro_batch(1, 0).tokens, expected) else 1)
    gate.set()
    assert os.waitpid(child, 0)[1] == 0


# --- documents


def test_documents_by_hand():
    inputs = np.array([[7, 8, END, 5, END, END, 3], [END, 1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6, END]])
    assert document_ids(inputs, END).tolist() == [[0, 0, 1, 1, 2, 3, 3], [1] * 7, [0] * 6 + [1]]


@pytest.mark.parametrize("inputs", [[[1, 2, 3], [4, 5, 6]], [[END, 2, 3], [4, 5, 6]]])
def test_rows_of_one_document_each_need_no_ids(inputs):
    assert document_ids(np.array(inputs), END) is None


def test_the_last_target_belongs_to_no_row():
    """The token after the inputs may end a document; nothing that is attended to lies behind it."""
    tokens = np.array([1, 2, 3, END])
    batches = make_batches(TrainingOrder({"all": tokens}, 3, 0), batch_size=1)
    assert batches.micro_batch(0, 0).document_ids is None


def test_batches_number_the_documents_of_each_micro_batch():
    batches = make_batches(TrainingOrder({"all": np.arange(100) % 4}, S, 0), accumulate=3)
    part = batches.micro_batch(2, 1)
    assert np.array_equal(part.document_ids, document_ids(part.tokens[:, :-1], END))
    assert part.document_ids.shape == (B // 3, S)
    assert part.document_ids.max() > 0


def test_documents_do_not_count_where_attention_may_cross_them():
    crossing = make_batches(cross_documents=True).micro_batch(0, 0)
    assert crossing.document_ids is None
    assert (crossing.tokens == END).any()
