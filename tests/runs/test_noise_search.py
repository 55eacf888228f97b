"""max_keep "auto": the search within a training, which leaves no other trace than the level."""

import json
import logging
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import CONFIG, trainer

from pyro_isingvit import load_run
from pyro_isingvit.core.checkpoint import load_checkpoint
from pyro_isingvit.core.errors import UserError
from pyro_isingvit.ising.noise import LEVELS
from pyro_isingvit.runs import noise_search

EPOCHS = 10
AUTO = replace(CONFIG, ising=replace(CONFIG.ising, max_keep="auto"), train=replace(CONFIG.train, epochs=EPOCHS))


def fixed(level: float):
    return replace(AUTO, ising=replace(AUTO.ising, max_keep=level))


def same(run, other) -> None:
    for part in ("model", "guide"):
        for name, value in run.state()[part].items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(value, other.state()[part][name]), name


def without_times(history: list[dict]) -> list[dict]:
    return [{name: value for name, value in record.items() if "seconds" not in name} for record in history]


def test_with_the_usual_level_chosen_the_training_is_that_of_the_number(data, monkeypatch) -> None:
    monkeypatch.setattr(noise_search, "chosen_keep", lambda nll: 0.98)
    run, expected = trainer(data, config=AUTO).fit(), trainer(data, config=fixed(0.98)).fit()
    same(run, expected)
    assert without_times(run.history) == without_times(expected.history)


def test_another_level_holds_from_the_fork_on(data, monkeypatch, caplog) -> None:
    monkeypatch.setattr(noise_search, "chosen_keep", lambda nll: 0.9)
    searching = trainer(data, config=AUTO)
    assert searching.noise_search.at == EPOCHS // 2 and searching.noise_search.epochs == 2
    with caplog.at_level(logging.INFO):
        run = searching.fit()
    assert [record["max_keep"] for record in run.history] == [0.98] * 5 + [0.9] * 5
    assert len(searching.epoch_seconds) == EPOCHS  # those of the search are not among them
    assert len(run.history) == EPOCHS and [r["epoch"] for r in run.history] == list(range(1, EPOCHS + 1))
    assert set(searching.noise_search.found) == set(LEVELS) and "max_keep 0.9, by the NLL of" in caplog.text
    highest = max(float(run.guide.retention(name).max()) for name in run.guide.layout.sites)
    assert highest <= 0.9 + 1e-6


def test_each_level_ends_with_the_schedule_at_its_end(data, monkeypatch) -> None:
    rates: list[float] = []
    searching = trainer(data, config=AUTO)
    search = searching.noise_search
    losses = search._losses
    monkeypatch.setattr(
        search, "_losses", lambda: (rates.append(searching.scheduler.get_last_lr()[0]), losses())[1]
    )  # after each level
    before = len(searching.scheduler.lr_lambdas)
    searching.fit()
    assert rates == [0.0] * len(LEVELS)  # which comes after the last step of the schedule, and not before
    assert len(searching.scheduler.lr_lambdas) == before


def test_it_resumes_bit_for_bit_from_before_and_after_the_search(data, tmp_path) -> None:
    whole = trainer(data, tmp_path / "whole", AUTO).fit()
    for last in (3, 5, 6):
        folder = tmp_path / str(last)

        def stop(at, last: int = last) -> None:
            if at.epoch == last:
                raise KeyboardInterrupt

        first = trainer(data, folder, AUTO)
        first.on_epoch = stop
        with pytest.raises(KeyboardInterrupt):
            first.fit()
        again = trainer(data, folder, AUTO)
        again.restore()
        same(again.fit(), whole)
    kept = load_run(tmp_path / "5")
    assert kept.guide.max_keep == whole.guide.max_keep
    lines = (tmp_path / "5" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["max_keep"] for line in lines] == [record["max_keep"] for record in whole.history]


@pytest.mark.parametrize("level", range(len(LEVELS)))
def test_an_interruption_within_the_search_repeats_that_level_alone(data, tmp_path, monkeypatch, level) -> None:
    searched = trainer(data, config=AUTO)
    whole = searched.fit()
    first = trainer(data, tmp_path / "r", AUTO)
    losses, calls = first.noise_search._losses, list[int]()

    def stop() -> torch.Tensor:
        calls.append(1)
        if len(calls) == level + 1:
            raise KeyboardInterrupt
        return losses()

    monkeypatch.setattr(first.noise_search, "_losses", stop)
    with pytest.raises(KeyboardInterrupt, match="epochs 1 to 5 are kept"):
        first.fit()
    again = trainer(data, tmp_path / "r", AUTO)
    again.restore()
    search, left = again.noise_search, 2 * (len(LEVELS) - level)
    assert (again.epoch, len(again.session.searched), search.left(again.epoch)) == (5, level, left)
    before = again.seconds
    same(again.fit(), whole)
    assert len(again.cpu_seconds) == left + EPOCHS - 5 and again.seconds > before
    assert search.found == searched.noise_search.found
    assert without_times(again.run.history) == without_times(whole.history)
    assert not load_checkpoint(tmp_path / "r" / "checkpoint.pt")["searched"]


def test_what_was_kept_of_other_validation_images_is_searched_again(data, tmp_path, monkeypatch) -> None:
    first = trainer(data, tmp_path / "r", AUTO)
    monkeypatch.setattr(first.noise_search, "_losses", lambda: torch.ones(len(data.val)))
    monkeypatch.setattr(noise_search, "chosen_keep", lambda nll: 1 / 0)  # all levels are over
    with pytest.raises(ZeroDivisionError):
        first.fit()
    fewer = replace(data, val=data.val.take(np.arange(len(data.val) - 1)))
    for given, known in ((data, len(LEVELS)), (fewer, 0)):
        again = trainer(given, tmp_path / "r", AUTO)
        again.restore()
        assert again.noise_search.left(5) == 2 * (len(LEVELS) - known)


def test_every_method_with_masks_and_only_they_search(data) -> None:
    together = replace(AUTO, method="ising-ensemble", baseline=replace(AUTO.baseline, members=2))
    assert trainer(data, config=together).noise_search.at == 5
    assert trainer(data, config=fixed(0.9)).noise_search.at is None
    assert trainer(data, config=replace(AUTO, method="dropout")).noise_search.at is None
    assert trainer(data, config=AUTO, pilot_fraction=1.0).noise_search.at is None
    assert trainer(data, config=AUTO, epochs=4).noise_search.at is None
    late = trainer(data, config=AUTO, pilot_fraction=0.8)
    assert late.noise_search.at == 8 and late.noise_search.left(0) == 2 * len(LEVELS) and late.noise_search.left(9) == 0
    late.fit()


def test_it_needs_a_validation_part(data) -> None:
    empty = replace(data, val=data.val.take(np.arange(0)))
    with pytest.raises(UserError, match="`max_keep` auto is chosen by validation images"):
        trainer(empty, config=AUTO)
    assert trainer(empty, config=fixed(0.9)).fit().guide.max_keep == 0.9


def test_a_handful_of_images_need_none(data, caplog) -> None:
    few = replace(data, train=data.train.take(np.arange(15)), val=data.val.take(np.arange(0)))
    run = trainer(few, config=AUTO, batch_size=5).fit()
    assert run.guide.max_keep == 0.98 and "max_keep stays 0.98" in caplog.text
