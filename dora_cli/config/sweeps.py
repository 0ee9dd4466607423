"""What Hydra's own keys of a sweep offer: launchers (``hydra/launcher``) and sweepers (``hydra/sweeper``).

Names and options are those of Hydra's plugins for joblib, submitit and optuna, as far as they mean something where each
job is a command line. The plugins themselves are not used: they run a job inside their own process, by a pickled
function, and the one for optuna asks for a version before 3. Help reads this file: it imports nothing slow.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dora_cli.config.schema import key


@dataclass
class Basic:
    """one job after the other, in this terminal"""

    nproc_per_node: int = key(1, "processes a job: above 1 it is started by torchrun, on one machine", low=1)


@dataclass
class Joblib(Basic):
    """several jobs at once on this machine"""

    n_jobs: int = key(-1, "jobs at once; -1: one a core, -2: all cores but one")


@dataclass
class SubmititLocal(Basic):
    """all jobs at once on this machine, as a cluster would run them: a rehearsal for submitit_slurm"""

    timeout_min: int = key(60, "minutes before a job is asked to save, and begun anew from there", low=1)
    signal_delay_s: int = key(120, "seconds between that and its end", low=1)
    max_num_timeout: int = key(3, "times that a job is begun anew", low=0)
    gpus_per_node: int | None = key(None, "GPUs a job", low=0)


@dataclass
class SubmititSlurm(SubmititLocal):
    """an array of Slurm jobs"""

    name: str | None = key("dora-train", "of the Slurm jobs")
    partition: str | None = key(None, "sbatch --partition")
    account: str | None = key(None, "sbatch --account")
    qos: str | None = key(None, "sbatch --qos")
    constraint: str | None = key(None, "sbatch --constraint")
    exclude: str | None = key(None, "sbatch --exclude")
    gres: str | None = key(None, "sbatch --gres")
    comment: str | None = key(None, "sbatch --comment")
    cpus_per_task: int | None = key(None, "CPU cores a job", low=1)
    mem_gb: float | None = key(None, "memory a job", above=0)
    array_parallelism: int = key(256, "jobs at once", low=1)
    setup: list[str] = key([], "commands before the job, e.g. ['module load cuda']")
    additional_parameters: dict[str, Any] = key({}, "further options of sbatch, e.g. {mail-type: END}")


@dataclass
class Product:
    """every combination of the values"""


@dataclass
class Sampler:
    seed: int = key(1, "of the proposals", low=0)


@dataclass
class Optuna:
    """trials that Optuna proposes, from what earlier ones came to"""

    n_trials: int = key(20, "trials in all", low=1)
    n_jobs: int | None = key(None, "trials proposed at a time; null: the launcher's n_jobs, or 1", low=1)
    direction: str | None = key(None, "of the main metric; null: as it is meant", choices=("maximize", "minimize"))
    sampler: Sampler = field(default_factory=Sampler)


LAUNCHERS: dict[str, type[Basic]] = {
    "basic": Basic,
    "joblib": Joblib,
    "submitit_local": SubmititLocal,
    "submitit_slurm": SubmititSlurm,
}
SWEEPERS: dict[str, type] = {"basic": Product, "optuna": Optuna}
SAMPLERS = {"tpe": "TPESampler", "random": "RandomSampler", "qmc": "QMCSampler"}  # names of ``optuna.samplers``
GROUPS: dict[str, Mapping[str, Any]] = {
    "hydra/launcher": LAUNCHERS,
    "hydra/sweeper": SWEEPERS,
    "hydra/sweeper/sampler": SAMPLERS,
}
