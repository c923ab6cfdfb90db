import random

import pytest

from himoe.data.split import split_documents
from himoe.errors import DataError

DOCUMENTS = [f"document number {i}, with its own text" for i in range(2000)]


def test_both_sides_together_are_the_documents_in_their_order():
    train, held_out = split_documents(DOCUMENTS, 0.1)
    assert sorted(train + held_out) == sorted(DOCUMENTS)
    assert train == [document for document in DOCUMENTS if document not in set(held_out)]
    assert 150 < len(held_out) < 250


def test_adding_removing_or_reordering_documents_moves_no_other():
    before = set(split_documents(DOCUMENTS, 0.1)[1])
    shuffled = random.Random(1).sample(DOCUMENTS, len(DOCUMENTS))
    assert set(split_documents(shuffled, 0.1)[1]) == before
    after = set(split_documents([*DOCUMENTS, "one more"], 0.1)[1])
    assert after - {"one more"} == before
    assert set(split_documents(DOCUMENTS[1000:], 0.1)[1]) == before & set(DOCUMENTS[1000:])


def test_a_larger_fraction_only_adds_held_out_documents():
    small, large = (set(split_documents(DOCUMENTS, fraction)[1]) for fraction in (0.1, 0.3))
    assert small < large


def test_equal_documents_fall_on_the_same_side():
    train, held_out = split_documents(DOCUMENTS[:50] * 3, 0.3)
    assert not set(train) & set(held_out)
    assert len(held_out) % 3 == 0


@pytest.mark.parametrize("fraction", [1e-9, 0.5, 1 - 1e-9])
def test_each_side_gets_a_document_whatever_the_fraction(fraction):
    train, held_out = split_documents(["one", "two"], fraction)
    assert len(train) == len(held_out) == 1


def test_held_out_reaches_the_wanted_bytes():
    size = len(DOCUMENTS[0].encode())
    _, held_out = split_documents(DOCUMENTS, 0.001, minimum_bytes=100 * size)
    assert 100 * size <= sum(len(document.encode()) for document in held_out) < 102 * size


@pytest.mark.parametrize(
    ("documents", "found"),
    [([], "no document"), (["alone"], "one document only"), (["same", "same", "same"], "one document only")],
)
def test_too_few_different_documents_are_refused(documents, found):
    with pytest.raises(DataError, match=rf"notes: too short to hold a part out, it has {found}; give a longer text"):
        split_documents(documents, 0.1, where="notes")


@pytest.mark.parametrize("fraction", [0.0, 1.0, -1, float("nan")])
def test_an_impossible_fraction_is_refused(fraction):
    with pytest.raises(DataError, match=r"held_out is .* allowed is a fraction between 0 and 1"):
        split_documents(DOCUMENTS, fraction)
