"""How many threads each of several processes gets."""

import os

import pytest

from inference.workers import threads_of


@pytest.mark.parametrize(("jobs", "asked", "wanted"), [
    (1, "", 4), (2, "", 2), (3, "", 1), (9, "", 1), (1, "1", 1), (1, "3", 3), (1, "8", 4), (2, "8", 2), (1, "0", 4),
    (1, "two", 4),
])  # fmt: skip
def test_an_even_share_of_the_cores_and_no_more_than_is_asked_for(
    jobs: int, asked: str, wanted: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", asked)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 2, 4, 6}, raising=False)
    assert threads_of(jobs) == wanted
