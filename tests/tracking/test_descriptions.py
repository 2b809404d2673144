"""Descriptions in Markdown, of trials and sweeps."""

from __future__ import annotations

from typing import Any

import pytest
from tracked_sweep import STORE, attempt, checkpoint, manifest, validated

from orchestration.record.manifest import Manifest
from orchestration.record.trial_state import TrialState
from orchestration.tracking.descriptions import SweepFacts, code, percent, summary_of, sweep_note, text, trial_note
from rrn_core import configure
from rrn_core.config import Split

SPLIT = Split(labeled=46, unlabeled=321, val=101, sha256="ab" * 32)


def finished(part: str, seed: int, *scores: float, **changes: Any) -> Manifest:
    config = configure(partition=part, seed=seed, **changes).model_dump(mode="json")
    history = tuple(validated(epoch, score) for epoch, score in enumerate(scores, start=1))
    return manifest(len(scores), trial_id=f"{part}-{seed}", seed=seed, config=config, history=history, status="finished")


def note_of(manifest: Manifest, *, store: str = STORE) -> str:
    return trial_note(manifest, store=store, state=manifest.status)


class TestOfATrial:
    def test_it_names_data_result_and_rule(self) -> None:
        done = finished("1/8", 3, 0.5, 0.4, dataset="camvid", split=SPLIT)
        note = note_of(done.model_copy(update={"checkpoints": (checkpoint(2, 0.4),)}), store=f"{STORE}/")
        assert "camvid, partition 1/8 (`every_kth`): 46 labelled, 321 unlabelled, 101 validation images; split `abababababab`" in note
        assert "after the last epoch, 2: 38.00 / 39.00 / 40.00" in note
        assert "at the best epoch, 1: 48.00 / 49.00 / 50.00 (highest val/miou, chosen on the images that it is measured on)" in note
        assert f"last `{STORE}/sweep/abc/checkpoints/00000002-1`" in note
        assert "`rrn-sweep config.yaml --data-root DATA`" in note

    def test_the_embedded_data_need_no_folder(self) -> None:
        note = note_of(finished("1/8", 3, 0.5))
        assert "digits, partition 1/8 (`every_kth`): 64 labelled, 448 unlabelled, 64 validation images" in note
        assert "--data-root" not in note

    def test_an_unfinished_one_has_the_result_of_its_newest_epoch(self) -> None:
        note = note_of(manifest(2, attempts=(attempt(1, "lost"), attempt(2, None))))
        assert "running, 2 of 32 epochs; 2 attempts: lost, open" in note
        assert "after the newest epoch, 2: " in note

    def test_before_the_first_epoch_there_is_no_result(self) -> None:
        assert "Result" not in note_of(manifest(0))

    def test_a_failure_has_its_reason_with_markdown_escaped(self) -> None:
        note = note_of(manifest(1, status="failed", failure="code", reason="[x](http://y) <b>*\n# a | `b`"))
        assert "failed, 1 of 32 epochs; &#91;code&#93; &#91;x&#93;(http://y) &lt;b&gt;&#42; &#35; a &#124; &#96;b&#96;" in note

    def test_unknown_settings_are_ignored(self) -> None:
        assert "1/8" in note_of(manifest(1, config={"partition": "1/8", "dataset": "digits"}))


class TestOfASweep:
    def note(self, *trials: Manifest, total: int = 0, facts: SweepFacts | None = None, **states: str) -> str:
        summaries = [summary_of(found, TrialState(states.get(f"s{found.config['seed']}", "finished"))) for found in trials]
        return sweep_note("my_sweep", summaries, facts or SweepFacts(), links={"charts | all": "#/experiments/1"}, total=total)

    def test_cells_are_means_over_seeds_by_both_rules(self) -> None:
        trials = [finished(part, seed, 0.5, 0.4 + 0.01 * seed) for part in ("1/8", "full") for seed in (1, 2, 3)]
        note = self.note(*trials, total=8)
        assert "| 1/8 | 3 | 42.00 ± 1.00 | 50.00 ± 0.00 |\n| full | 3 | 42.00 ± 1.00 | 50.00 ± 0.00 |" in note
        assert "6 of 8 trials finished, 2 not started" in note
        assert "compares `partition`; method rrn; seeds 1, 2, 3" in note
        assert "[charts &#124; all](#/experiments/1)" in note

    def test_only_finished_trials_count_and_the_others_are_listed(self) -> None:
        trials = [finished("1/8", seed, 0.5) for seed in (1, 2, 3, 4)]
        note = self.note(*trials, total=4, s2="running", s3="failed", s4="interrupted")
        assert "| 1/8 | 1 | 50.00 | 50.00 |" in note
        assert "1 of 4 trials finished, 1 running, 1 failed, 1 interrupted" in note

    def test_every_split_is_listed_once(self) -> None:
        note = self.note(*[finished(part, seed, 0.5) for part in ("1/8", "full") for seed in (1, 2)])
        assert note.count("64 labelled, 448 unlabelled") == 1
        assert note.count("512 labelled, 512 unlabelled") == 1

    def test_purpose_and_command(self) -> None:
        note = self.note(facts=SweepFacts(about="the | paper's *table*", command="rrn-sweep run a.yaml\n--data-root /d"))
        assert "the &#124; paper's &#42;table&#42;" in note
        assert note.endswith("**Run again:**\n\n    rrn-sweep run a.yaml --data-root /d")

    def test_a_search_counts_the_trials_that_are_still_to_come(self) -> None:
        assert "1 of 30 trials finished, 29 not started" in self.note(finished("1/8", 1, 0.5), total=1, facts=SweepFacts(total=30))

    def test_a_sweep_of_a_thousand_cells_is_cut_where_a_line_ends(self) -> None:
        trials = [finished(f"n:{count}", 1, 0.5) for count in range(1, 400)]
        note = self.note(*trials, total=399)
        assert len(note) < 5000
        assert "\n379 more in the charts" in note
        assert "- and 389 more" in note


@pytest.mark.parametrize(("values", "shown"), [((), "-"), ((None,), "-"), ((0.5,), "50.00"), ((0.4, None, 0.5), "45.00 ± 7.07")])
def test_means_are_in_percent(values: tuple[float | None, ...], shown: str) -> None:
    assert percent(values) == shown


def test_text_and_code_stay_in_their_line() -> None:
    assert text("a_b\n| c \\ [d] & <e>") == "a&#95;b &#124; c &#92; &#91;d&#93; &amp; &lt;e&gt;"
    assert code("a`b\nc") == "`a'b c`"
