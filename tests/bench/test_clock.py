from collections import Counter

from himoe.bench.clock import LEAST, MOST, Times, order, race, repeats


def test_everyone_gets_the_same_share_of_the_time_and_two_repeats_at_least():
    assert repeats({"a": 0.1, "b": 0.5, "c": 60.0}, seconds=6.0) == {"a": 20, "b": 4, "c": LEAST}
    assert repeats({"a": 0.0}, seconds=1.0) == {"a": MOST}
    assert repeats({}, seconds=1.0) == {}


def test_turns_are_interleaved_and_the_first_one_changes():
    assert list(order({"a": 2, "b": 2, "c": 2})) == ["a", "b", "c", "b", "c", "a"]


def test_slow_contestants_take_part_in_rounds_that_are_spread_out():
    turns = list(order({"fast": 12, "slow": 3}))
    assert Counter(turns) == {"fast": 12, "slow": 3}
    places = [place for place, name in enumerate(turns) if name == "slow"]
    assert places[0] >= 3 and places[1] - places[0] >= 4 and places[2] - places[1] >= 4


def test_a_race_calls_between_before_every_repeat_and_times_each():
    calls = []
    steps = {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}
    times = race(steps, seconds=0.0, between=lambda name: calls.append(f"before {name}"))
    assert calls[:4] == ["before a", "a", "before b", "b"]
    assert {name: len(one.wall) for name, one in times.items()} == {"a": LEAST, "b": LEAST}
    assert all(
        call.removeprefix("before ") == following for call, following in zip(calls[::2], calls[1::2], strict=True)
    )


def test_minimum_and_median():
    times = Times(wall=[3.0, 1.0, 2.0], cpu=[5.0, 4.0, 6.0])
    assert (times.minimum, times.median, times.cpu_minimum) == (1.0, 2.0, 4.0)
