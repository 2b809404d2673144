"""search.py: proposals are plans, a restarted search proposes the same trials, and no trial is proposed twice."""

from __future__ import annotations

from finished import manifest_of

from orchestration.plan.sweep_file import check
from orchestration.plan.trial_plan import TrialPlan
from orchestration.record.manifest import EpochMetrics, Manifest
from orchestration.run.search import AdaptiveSource

SPACE = {"lambda1": {"low": 0.1, "high": 3.0, "log": True}, "eps": {"low": 0.2, "high": 0.8}, "epochs": {"low": 1, "high": 9}}


def spec_of(sampler: str = "tpe", trials: int = 14, *, space=None, at: str = "last", seed: int = 0):
    search = {"sampler": sampler, "trials": trials, "seed": seed, "at": at}
    return check({"name": "demo", "preset": "digits", "search": search, "space": space or SPACE})


def trained(plan: TrialPlan, *, status: str = "finished") -> Manifest:
    """A finished trial is best where eps is 0.5; it was better still an epoch earlier."""
    score = 1 - abs(getattr(plan.config, "eps", 0.5) - 0.5)
    history = [EpochMetrics(epoch=n, step=n, time_ms=n, metrics={"val/miou": value}) for n, value in ((1, score + 0.5), (2, score))]
    return manifest_of(plan, status=status, history=tuple(history))


def run(source: AdaptiveSource, most: int = 1000) -> dict[str, Manifest]:
    done = {}
    while len(done) < most and (plan := source.next()):
        done[plan.trial_id] = trained(plan)
        source.tell(done[plan.trial_id])
    return done


def test_it_proposes_as_many_different_plans_as_asked_within_the_space():
    for sampler in ("random", "tpe"):
        done = run(AdaptiveSource(spec_of(sampler), {}))
        assert len(done) == 14
        configs = [manifest.config for manifest in done.values()]
        assert all(0.1 <= c["lambda1"] <= 3 and 0.2 <= c["eps"] <= 0.8 and c["epochs"] in range(1, 10) for c in configs)
        assert [manifest.proposal for manifest in done.values()] == list(range(14))


def test_another_seed_proposes_other_plans():
    assert not run(AdaptiveSource(spec_of(seed=1), {})).keys() & run(AdaptiveSource(spec_of(seed=2), {})).keys()


def test_a_restarted_search_proposes_the_trials_of_an_uninterrupted_one():
    for sampler in ("random", "tpe"):
        whole = run(AdaptiveSource(spec_of(sampler), {}))
        begun = run(AdaptiveSource(spec_of(sampler), {}), most=12)
        rest = run(AdaptiveSource(spec_of(sampler), begun))
        assert begun | rest == whole


def test_a_search_over_methods_keeps_the_trials_whose_method_lacks_a_searched_setting():
    space = {"method": {"choices": ["cps", "rrn"]}, "eps": SPACE["eps"]}
    for sampler in ("random", "tpe"):
        whole = run(AdaptiveSource(spec_of(sampler, 6, space=space), {}))
        assert {manifest.config["method"] for manifest in whole.values()} == {"cps", "rrn"}
        begun = run(AdaptiveSource(spec_of(sampler, 6, space=space), {}), most=4)
        rest = run(AdaptiveSource(spec_of(sampler, 6, space=space), begun))
        assert begun | rest == whole
        assert AdaptiveSource(spec_of(sampler, 6, space=space), whole).next() is None


def test_tpe_learns_from_results():
    done = list(run(AdaptiveSource(spec_of(trials=60, space={"eps": SPACE["eps"]}), {})).values())
    distance = [abs(manifest.config["eps"] - 0.5) for manifest in done]
    uniform = 0.15  # mean distance of a uniform draw from the middle of 0.2 to 0.8
    assert sum(distance[40:]) / 20 < uniform / 2


def test_an_unfinished_trial_comes_first_and_counts():
    source = AdaptiveSource(spec_of(trials=3), {})
    plans = [source.next(), source.next()]
    stored = {plan.trial_id: trained(plan, status="running") for plan in plans}
    again = AdaptiveSource(spec_of(trials=3), stored)
    assert again.remaining == 3
    assert [again.next(), again.next()] == plans
    assert again.next().proposal == 2
    assert again.next() is None


def test_a_failed_trial_is_tried_again_and_may_fail_again():
    source = AdaptiveSource(spec_of(trials=1), {})
    plan = source.next()
    failed = trained(plan, status="failed")
    again = AdaptiveSource(spec_of(trials=1), {plan.trial_id: failed})
    assert again.next() == plan
    again.tell(failed)
    assert again.next() is None


def test_a_small_space_is_exhausted_without_a_repeat():
    done = run(AdaptiveSource(spec_of("random", 20, space={"partition": {"choices": ["1/8", "1/4"]}}), {}))
    assert {manifest.config["partition"] for manifest in done.values()} == {"1/8", "1/4"}
    assert len(done) == 2


def test_only_trials_of_the_same_search_count():
    done = run(AdaptiveSource(spec_of(trials=3), {}))
    other_base = check({"name": "demo", "preset": "digits", "base": {"lr": 0.5}, "search": {"trials": 3}, "space": SPACE})
    narrower = spec_of(trials=3, space=SPACE | {"eps": {"low": 0.2, "high": 0.201}})
    wider = spec_of(trials=3, space=SPACE | {"lambda2": {"low": 0.5, "high": 1.0}})
    for spec in (other_base, narrower, wider):
        assert len(run(AdaptiveSource(spec, done))) == 3
    assert len(run(AdaptiveSource(spec_of(trials=3), done))) == 0


def test_values_that_do_not_fit_together_are_not_proposed():
    space = {"crop": {"choices": [64, 128]}, "region_kernel": {"low": 1, "high": 8}}
    done = run(AdaptiveSource(spec_of("random", 20, space=space), {}))
    pairs = {(manifest.config["crop"], manifest.config["region_kernel"]) for manifest in done.values()}
    assert all(kernel <= crop // 16 for crop, kernel in pairs)
    assert len(pairs) >= 10


def test_a_bigger_budget_only_adds():
    before = run(AdaptiveSource(spec_of(trials=3), {}))
    more = run(AdaptiveSource(spec_of(trials=5), before))
    assert len(more) == 2
    assert not more.keys() & before.keys()
