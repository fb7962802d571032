"""Parts of a recovery that are coded together: each alone where that is cheap or the effort is a number, else more."""

import itertools
from types import SimpleNamespace

import pytest

from bytecap.job.effort import Effort
from bytecap.recovery import loop
from bytecap.recovery.coding_pace import CodingPace
from bytecap.recovery.loop import Clock

PARTS = [[f"{n} first", f"{n} second"] for n in range(24)]


@pytest.fixture
def at(monkeypatch):
    """The time on every clock, in seconds; it passes where a test says so."""
    now = SimpleNamespace(seconds=1000.0)
    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=lambda: now.seconds))
    return now


def run(at, effort, *, own, each=0.0, first=0.0, iteration=0.16, done=0, behind=True):
    """Groups that were coded, and the iterations behind every one, where codings and iterations take so long."""
    clock, groups, made = Clock(Effort.parse(effort), lambda _: None), [], []
    pace = CodingPace(clock, PARTS, done, behind=behind)
    for group in pace:
        at.seconds += own + each * pace.joined + (0 if groups else first)
        pace.coded()
        groups.append(group)
        before = clock.iterations
        while (behind or pace.left) and clock.done < pace.until:
            at.seconds += iteration
            clock.tick()
        made.append(clock.iterations - before)
    assert pace.done == len(PARTS)
    assert pace.left == []
    return groups, made


def given_up(at, effort, *, own, each=0.0, first=0.0):
    """Parts that are coded when a recovery that can do without new codes stops; all if it does not."""
    clock = Clock(Effort.parse(effort), lambda _: None)
    pace = CodingPace(clock, PARTS)
    for _ in pace:
        at.seconds += own + each * pace.joined + first
        first = 0.0
        pace.coded()
        if not pace.worth:
            break
        while clock.done < pace.until:
            at.seconds += 0.16
            clock.tick()
    return pace.done


def names(groups):
    return list(itertools.chain.from_iterable(groups))


@pytest.mark.parametrize(("own", "each"), [(0.1, 0.0), (3.0, 0.0), (2.0, 1.0), (0.5, 2.5), (30.0, 0.0), (0.0, 9.0)])
@pytest.mark.parametrize("behind", [True, False])
def test_groups_add_up_to_all_parts_in_their_order(at, own, each, behind):
    assert names(run(at, "84s", own=own, each=each, first=20.0, behind=behind)[0]) == names(PARTS)


@pytest.mark.parametrize("behind", [True, False])
def test_an_effort_in_iterations_gives_every_part_its_share_whatever_codings_take(at, behind):
    groups, made = run(at, "92", own=1000.0, behind=behind)
    assert groups == PARTS
    last = len(PARTS) if behind else len(PARTS) - 1
    ends = [next(i for i in range(93) if i / 92 >= n / last) for n in range(last + 1)]
    assert made == [b - a for a, b in itertools.pairwise(ends)] + [0] * (not behind)


def test_cheap_codings_are_not_joined(at):
    groups, made = run(at, "84s", own=1.0, each=0.1, first=5.0)
    assert groups == PARTS
    assert sum(made) > 300


def test_dear_codings_are_joined_and_most_of_the_time_goes_into_iterations(at):
    groups, made = run(at, "84s", own=3.4)
    assert 7 <= len(groups) <= 11
    assert 84 * 0.55 < sum(made) * 0.16 < 84 * 0.72
    assert [len(g) for g in groups[:2]] == [2, 2]  # what a coding takes is not known before
    assert all(made[1:])


def test_the_first_coding_does_not_count_since_it_compiles(at):
    assert run(at, "84s", own=0.2, first=30.0)[0] == PARTS


def test_what_joining_does_not_save_is_no_reason_to_join(at):
    groups, _ = run(at, "84s", own=0.3, each=2.2)
    assert len(groups) > 12


def test_the_whole_effort_is_used_before_the_last_group(at):
    for own in (0.5, 3.4, 6.0):
        started = at.seconds
        run(at, "84s", own=own, behind=False)
        assert 84 <= at.seconds - started < 84 + own + 0.2


def test_what_is_left_is_coded_at_once_when_the_time_is_over(at):
    assert [len(g) for g in run(at, "10s", own=1.0, first=30.0)[0]] == [2, 46]


def test_a_recovery_goes_on_behind_the_parts_that_are_coded(at):
    groups, _ = run(at, "84s", own=0.1, done=20)
    assert groups == PARTS[20:]


def test_new_codes_are_given_up_where_no_time_is_left_to_tune_in_as_soon_as_that_is_seen(at):
    assert given_up(at, "84s", own=0.3, each=3.1) < 8
    assert given_up(at, "5s", own=1.0, first=9.0) == 1
    for own, each in ((3.4, 0.0), (2.0, 0.7), (0.3, 0.5)):
        assert given_up(at, "84s", own=own, each=each) == len(PARTS)
    assert given_up(at, "92", own=100.0, each=100.0, first=100.0) == len(PARTS)


def test_codes_are_not_given_up_once_most_are_there(at):
    clock = Clock(Effort(seconds=84.0), lambda _: None)
    pace = CodingPace(clock, PARTS)
    for _ in pace:
        at.seconds += 0.1 if pace.done < 14 else 50.0 * pace.joined
        pace.coded()
        assert pace.worth
