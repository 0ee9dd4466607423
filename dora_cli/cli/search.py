"""``hydra/sweeper=optuna``: the jobs of a sweep are proposed one after the other, from what earlier ones came to.

Nothing of the study is stored: proposals follow from the seed and the results, so the same command makes the same ones
again, and finished jobs answer at once.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import yaml

from dora_cli.checkpoints.atomic import atomic_write_text
from dora_cli.cli.sweep import Ranges, Result, Runner, main_result
from dora_cli.config.launching import Launching
from dora_cli.config.overrides import Interval
from dora_cli.config.sweeps import SAMPLERS
from dora_cli.data.tasks import higher_is_better
from dora_cli.errors import UserError

RESULTS = "optimization_results.yaml"  # as Hydra's plugin calls it


def search(ranges: Ranges, launching: Launching, runner: Runner) -> list[Result]:
    """Run the trials, and write which was the best into the sweep's folder.

    The objective is the metric that chose each run's checkpoint. A trial that failed counts for nothing.

    Raises:
        UserError: two trials have different metrics, which can't be compared.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    asked = launching.search
    assert asked is not None
    sampler = getattr(optuna.samplers, SAMPLERS[launching.sampler])(seed=asked.sampler.seed)
    # The metric, and so which way is up, is known when the first run has ended: values are turned upwards.
    study = optuna.create_study(sampler=sampler, direction="maximize")
    results: list[Result] = []
    scores: dict[int, tuple[str, float]] = {}
    while len(results) < asked.n_trials and not runner.ended:
        first = len(results)
        size = min(asked.n_jobs or runner.at_once, asked.n_trials - first)
        trials = [study.ask() for _ in range(size)]
        proposals = [[_suggest(trial, key, values) for key, values in ranges.axes.items()] for trial in trials]
        jobs = [
            ranges.job([str(v) for v in proposal], _name(first + i, ranges.axes, proposal))
            for i, proposal in enumerate(proposals)
        ]
        done = runner.run(jobs, first + 1, asked.n_trials)
        for i, (trial, result) in enumerate(zip(trials, done, strict=True)):
            score = main_result(result.job.out) if result.ran else None
            if score is None:
                study.tell(trial, state=optuna.trial.TrialState.FAIL)
                continue
            scores[first + i] = score
            if len({name for name, _ in scores.values()}) > 1:
                names = " and ".join(sorted({name for name, _ in scores.values()}))
                raise UserError(f"trials are chosen by {names}, which can't be compared", hint="set data.metrics")
            study.tell(trial, score[1] if _up(asked.direction, score[0]) else -score[1])
        results += done
    if scores:
        best = study.best_trial.number
        name, value = scores[best]
        print(f"\nbest: {results[best].job.name}  {name} {value:.4g}")
        found = {"name": "optuna", "best_evaluated_params": study.best_params, "best_evaluated_result": value}
        atomic_write_text(ranges.parent / RESULTS, yaml.safe_dump(found, sort_keys=False))
    return results


def _up(direction: str | None, metric: str) -> bool:
    return direction == "maximize" if direction else higher_is_better(metric)


def _suggest(trial: Any, key: str, values: list[str] | Interval) -> Any:
    if not isinstance(values, Interval):
        return trial.suggest_categorical(key, values)
    whole = all(isinstance(n, int) for n in (values.low, values.high, values.step or 0))
    if whole:
        return trial.suggest_int(key, values.low, values.high, step=values.step or 1, log=values.log)
    return trial.suggest_float(key, values.low, values.high, step=values.step, log=values.log)


def _name(number: int, keys: Iterable[str], values: Sequence[Any]) -> str:
    """``007,budget=0.1234``: numbers cut to four digits, so the trial's own comes first."""
    shown = (f"{value:.4g}" if isinstance(value, float) else str(value) for value in values)
    return ",".join([f"{number:03}", *(f"{key}={text}" for key, text in zip(keys, shown, strict=True))])
