import random

import numpy as np
import pytest

from himoe.data.preparation.split import DIGEST, HeldOut, Lowest, Split, digest
from himoe.errors import DataError

DOCUMENTS = [f"document number {i}, with its own text" for i in range(2000)]


def arrays(documents):
    sizes = [len(document.encode()) for document in documents]
    return np.array([digest(document) for document in documents], DIGEST), np.array(sizes, np.int64)


def split(documents, fraction, *, minimum_bytes=1, portions=3):
    """Return the training and held-out documents, of which the split learns in several portions."""
    part = HeldOut(fraction, minimum_bytes)
    for portion in np.array_split(np.arange(len(documents)), portions):
        part.add(*arrays([documents[i] for i in portion]))
    bound = part.bound("notes")
    held_out = [document for document in documents if digest(document) < bound]
    return [document for document in documents if document not in set(held_out)], held_out


def test_the_fraction_is_held_out():
    train, held_out = split(DOCUMENTS, 0.1)
    assert 150 < len(held_out) < 250
    assert len(train) + len(held_out) == len(DOCUMENTS)
    by_hand = [text for text in DOCUMENTS if int.from_bytes(digest(text), "big") / 2**128 < 0.1]
    assert held_out == by_hand


def test_adding_removing_or_reordering_documents_moves_no_other():
    before = set(split(DOCUMENTS, 0.1)[1])
    shuffled = random.Random(1).sample(DOCUMENTS, len(DOCUMENTS))
    assert set(split(shuffled, 0.1, portions=7)[1]) == before
    after = set(split([*DOCUMENTS, "one more"], 0.1)[1])
    assert after - {"one more"} == before
    assert set(split(DOCUMENTS[1000:], 0.1)[1]) == before & set(DOCUMENTS[1000:])


def test_a_larger_fraction_only_adds_held_out_documents():
    small, large = (set(split(DOCUMENTS, fraction)[1]) for fraction in (0.1, 0.3))
    assert small < large


def test_equal_documents_fall_on_the_same_side():
    train, held_out = split(DOCUMENTS[:50] * 3, 0.3)
    assert not set(train) & set(held_out)
    assert len(held_out) % 3 == 0


@pytest.mark.parametrize("fraction", [1e-9, 0.5, 1 - 1e-9])
def test_each_side_gets_a_document_whatever_the_fraction(fraction):
    train, held_out = split(["one", "two"], fraction)
    assert len(train) == len(held_out) == 1


@pytest.mark.parametrize("portions", [1, 2, 50])
def test_held_out_reaches_the_wanted_bytes_by_the_next_lowest_digests(portions):
    size = len(DOCUMENTS[0].encode())
    _, held_out = split(DOCUMENTS, 0.001, minimum_bytes=100 * size, portions=portions)
    assert 100 * size <= sum(len(document.encode()) for document in held_out) < 102 * size
    assert sorted(held_out, key=digest) == sorted(DOCUMENTS, key=digest)[: len(held_out)]


def test_what_one_domain_needs_changes_sides_in_all_that_have_it():
    low, *rest = sorted(DOCUMENTS, key=digest)
    for fraction, needed, held_out in ((1e-9, rest[5:], rest[5]), (1 - 1e-9, rest[:5], rest[4])):
        parts = [HeldOut(fraction), HeldOut(fraction)]
        for part, documents in zip(parts, ([low, *rest], needed), strict=True):
            part.add(*arrays(documents))
        split = Split.of(parts, ["large", "small"])
        changed = arrays([held_out])[0]
        assert split.is_held_out(changed).tolist() == [fraction < 0.5]
        assert split.is_held_out(arrays(rest[6:-1])[0]).any() == (fraction > 0.5)


def test_repeated_documents_count_once_towards_the_wanted_bytes():
    size = len(DOCUMENTS[0].encode())
    _, held_out = split(DOCUMENTS[:200] * 2, 0.001, minimum_bytes=10 * size)
    assert len(held_out) == 2 * len(set(held_out)) >= 20


@pytest.mark.parametrize(
    ("documents", "found"),
    [([], "no document"), (["alone"], "one document only"), (["same", "same", "same"], "one document only")],
)
def test_too_few_different_documents_are_refused(documents, found):
    with pytest.raises(DataError, match=rf"notes: too short to hold a part out, it has {found}; give a longer text"):
        split(documents, 0.1)


@pytest.mark.parametrize("fraction", [0.0, 1.0, -1, float("nan")])
def test_an_impossible_fraction_is_refused(fraction):
    with pytest.raises(DataError, match=r"held_out is .* allowed is a fraction between 0 and 1"):
        split(DOCUMENTS, fraction)


def test_the_lowest_documents_are_found_whatever_the_order_and_digests_that_end_in_zero_bytes():
    digests = np.array([bytes([value]) * 15 + b"\0" for value in (5, 1, 3, 1, 4)] + [b"\0" * 16], DIGEST)
    for order in ([0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0], [2, 0, 5, 1, 4, 3]):
        lowest = Lowest(25)
        for i in order:
            lowest.add(digests[[i]], np.array([10]))
        assert lowest.digests.tolist() == [min(digests.tolist()), b"\1" * 15, b"\3" * 15]
