"""Tune the methods on the deep autoencoder: the same number of trials for each, by Optuna.

The search spaces are the paper's (locoprop, Tables 3 and 5). Every trial is one short training run;
its row goes to tuning_<method>.csv among the results at once, so a search that is stopped goes on
where it was when it is started again. The best values go to tuned.json.
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import optuna

from benchmarks.experiments.autoencoder import DEFAULTS
from benchmarks.shared import autoencoder, cli
from benchmarks.shared.data import DataError, Dataset
from benchmarks.shared.methods import METHODS, Choice, Hyperparameters, SearchSpace
from benchmarks.shared.report import progress
from benchmarks.shared.results import RESULTS, shown
from benchmarks.shared.steps import count_examples
from benchmarks.shared.training import INTERRUPTED, EpochRecord, Problem, Settings, train
from benchmarks.shared.trials import (
    COMPLETE,
    DIVERGED,
    PRUNED,
    SearchSettings,
    Trial,
    TrialsError,
    append_trial,
    best_trial,
    read_trials,
)
from benchmarks.shared.tuned import (
    TUNED,
    TunedError,
    in_search_space,
    load_hyperparameters,
    save_tuned,
)

STARTUP_TRIALS = 4  # random and never pruned, before TPE and the median have anything to go by
PRUNED_FROM_EPOCH = 2  # the first epoch has the warm-up in it
OPTUNA_STATES = {
    COMPLETE: optuna.trial.TrialState.COMPLETE,
    PRUNED: optuna.trial.TrialState.PRUNED,
    # A failed trial would be forgotten; a pruned one warns the sampler off.
    DIVERGED: optuna.trial.TrialState.PRUNED,
}


def distributions(space: SearchSpace) -> dict[str, optuna.distributions.BaseDistribution]:
    return {
        name: optuna.distributions.CategoricalDistribution(allowed.values)
        if isinstance(allowed, Choice)
        else optuna.distributions.FloatDistribution(allowed.low, allowed.high, log=True)
        for name, allowed in space.items()
    }


def make_study(
    space: SearchSpace, past: Sequence[Trial], starts: Sequence[Hyperparameters], seed: int
) -> optuna.Study:
    """A study that knows the past trials; it begins with the values `starts`."""
    study = optuna.create_study(
        # Another seed after each trial: a search that is resumed must not draw the same again.
        sampler=optuna.samplers.TPESampler(
            n_startup_trials=STARTUP_TRIALS, seed=(seed + len(past)) % 2**32
        ),
        pruner=optuna.pruners.MedianPruner(
            n_startup_trials=STARTUP_TRIALS, n_warmup_steps=PRUNED_FROM_EPOCH
        ),
    )
    for trial in past:
        study.add_trial(
            optuna.trial.create_trial(
                state=OPTUNA_STATES[trial.state],
                value=trial.loss if trial.losses else None,
                params=dict(trial.hyperparameters),
                distributions=distributions(space),
                intermediate_values=dict(enumerate(trial.losses, start=1)),
            )
        )
    for start in starts[len(past) :]:
        study.enqueue_trial(dict(start))
    return study


def run_trial(
    study: optuna.Study,
    problem: Problem,
    name: str,
    options: Mapping[str, Any],
    settings: Settings,
    label: str,
) -> Trial:
    """Ask for hyperparameters, train with them, tell the loss.

    Raises:
      KeyboardInterrupt: Ctrl-C; the trial is not told.
    """
    method = METHODS[name]
    asked = study.ask(distributions(method.space))
    records: list[EpochRecord] = []

    def on_epoch(record: EpochRecord) -> None:
        records.append(record)
        asked.report(record.train_loss, record.epoch)
        if record.epoch < settings.epochs and asked.should_prune():
            raise optuna.TrialPruned

    steps = settings.epochs * (count_examples(problem.train) // settings.batch_size)
    try:
        with progress(label, steps) as on_loss:
            values = {**asked.params, **options}
            run = train(problem, name, method, values, settings, on_loss, on_epoch)
        if run.stopped == INTERRUPTED:
            raise KeyboardInterrupt
        state = DIVERGED if run.stopped else COMPLETE
    except optuna.TrialPruned:
        state = PRUNED
    losses = [record.train_loss for record in records]
    study.tell(asked, losses[-1] if state == COMPLETE else None, OPTUNA_STATES[state])
    jax.clear_caches()  # every trial compiles a step of its own
    return Trial(dict(asked.params), losses, state, records[-1].seconds if records else 0.0)


def tune(
    problem: Problem,
    name: str,
    trials: int,
    options: Mapping[str, Any],
    settings: Settings,
    described: SearchSettings,
    path: Path,
    starts: Sequence[Hyperparameters],
) -> None:
    """Search until the file holds `trials` trials of these settings, past ones included."""
    method = METHODS[name]
    past = read_trials(path, method.space, described)
    study = make_study(method.space, past, starts, settings.seed)
    for number in range(len(past) + 1, trials + 1):
        label = f"{method.label} {number}/{trials}"
        trial = run_trial(study, problem, name, options, settings, label)
        append_trial(path, trial, described)
        values = ", ".join(f"{key} {value:.3g}" for key, value in trial.hyperparameters.items())
        print(f"{label}: {trial.state}, loss {trial.loss:.2f} ({values})", flush=True)


def save_best(
    experiment: str, name: str, described: SearchSettings, path: Path, tuned: Path
) -> None:
    trials = read_trials(path, METHODS[name].space, described)
    best = best_trial(trials)
    if best is None:
        print(f"{METHODS[name].label}: no trial was completed; {tuned} is as it was.")
        return
    entry = {
        "hyperparameters": dict(best.hyperparameters),
        "found_by": "python -m benchmarks tune",
        "trials": len(trials),
        "train_loss": best.loss,
        **described,
    }
    save_tuned(experiment, name, entry, tuned)
    print(f"{METHODS[name].label}: best of {len(trials)} trials {best.loss:.2f}, now in {tuned}.")


def describe(dataset: Dataset, settings: Settings, options: Mapping[str, Any]) -> SearchSettings:
    return {
        "dataset": dataset.name,
        "train_images": len(dataset.train),
        **settings._asdict(),
        **options,
    }


def parse_arguments(argv: cli.Argv) -> cli.Parsed:
    parser = cli.make_parser(
        "tune",
        "Search the paper's hyperparameter spaces (Tables 3 and 5) on the deep "
        "autoencoder, with as many trials for each method. Can be stopped and started again.",
    )
    trials = "per method, those already in its file included"
    cli.add_numbers(parser, {"trials": (40, trials)})
    cli.add_training_arguments(parser, DEFAULTS)
    parser.add_argument(
        "--results-dir",
        type=Path,
        default=RESULTS,
        metavar="DIR",
        help=f"where tuning_<method>.csv is, or goes (default: {shown(RESULTS)})",
    )
    parser.add_argument(
        "--tuned",
        type=Path,
        default=TUNED,
        metavar="FILE",
        help="JSON file of tuned values: the first trial is read from it, the best is written to "
        f"it (default: {shown(TUNED)})",
    )
    args = parser.parse_args(argv)
    cli.check_training_arguments(parser, args)
    return parser, args


def current_values(experiment: str, name: str, path: Path) -> Hyperparameters | None:
    """The tuned values so far, to start from; None where there are none in the search space."""
    try:
        values = load_hyperparameters(experiment, name, path)
    except TunedError as error:
        print(f"Starting {name} without tuned values: {error}", file=sys.stderr)
        return None
    if in_search_space(name, values):
        return values
    print(f"Starting {name} without its tuned values: not in the search space.", file=sys.stderr)
    return None


def main(argv: cli.Argv = None) -> int:
    """Run the command line; 130 after Ctrl-C, with the best values so far saved."""
    parser, args = parse_arguments(argv)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    settings = Settings(args.epochs, args.batch_size, args.seed)
    try:
        dataset = cli.load_images(args)
        # The search looks at the training loss alone, as the paper's.
        problem = autoencoder.make_problem(dataset)._replace(test=None)
        for name in dict.fromkeys(args.methods):
            options = cli.method_options(name, args)
            described = describe(dataset, settings, options)
            path = args.results_dir / f"tuning_{name}.csv"
            tuned = current_values(problem.name, name, args.tuned)
            starts = [*([tuned] if tuned else []), *METHODS[name].starts]
            try:
                tune(problem, name, args.trials, options, settings, described, path, starts)
            finally:
                save_best(problem.name, name, described, path, args.tuned)
    except KeyboardInterrupt:
        print("Interrupted; start it again to go on.", file=sys.stderr)
        return 130
    except (DataError, TrialsError, TunedError) as error:
        parser.error(str(error))
    return 0
