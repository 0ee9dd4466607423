"""Hydra's launchers, each with two or three small jobs: joblib's threads, submitit's own processes, a feigned Slurm."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from importlib.util import find_spec
from pathlib import Path

import pytest

from dora_cli.cli import launchers, sweep
from dora_cli.config.launching import take
from dora_cli.config.sweeps import Basic, SubmititSlurm
from dora_cli.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
needs_submitit = pytest.mark.skipif(find_spec("submitit") is None, reason="submitit is an extra")
LAUNCHERS = [
    pytest.param(["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"], id="joblib"),
    pytest.param(["hydra/launcher=submitit_local"], id="submitit", marks=needs_submitit),
]
# Ends well only if the other one runs at the same time.
MEETING = """
import os, sys, time
given = dict(word.split("=", 1) for word in sys.argv[1:] if "=" in word)
open("here-" + given["seed"], "w").close()
for _ in range(200):
    if os.path.exists("here-" + {"1": "2", "2": "1"}[given["seed"]]):
        print("met", flush=True)
        sys.exit(int(given["seed"]) - 1)
    time.sleep(0.05)
sys.exit(9)
"""
# Saves on the first signal. OVER: it first tells who runs it what a cluster tells a job whose time is over.
SAVING = """
import os, signal, sys, time
def save(number, frame):
    print("saved", flush=True)
    sys.exit(128 + number)
for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"):
    signal.signal(getattr(signal, name), save)
print("ready", flush=True)
if "resume=true" not in sys.argv:
    time.sleep(30)
"""
OVER = SAVING.replace("time.sleep(30)", "os.kill(os.getppid(), signal.SIGUSR1); time.sleep(30)")


def feign(monkeypatch: pytest.MonkeyPatch, job: str) -> None:
    monkeypatch.setattr(sweep, "COMMAND", [sys.executable, "-c", job])


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_jobs_run_at_once_and_what_they_say_is_kept(launcher, stand_in, monkeypatch, capfd):
    feign(monkeypatch, MEETING)
    assert sweep.sweep(["recipe=glue_sst2", "seed=1,2", "out=s", *launcher]) == 1
    out = capfd.readouterr().out
    assert out.splitlines()[-4:] == ["job     exit  metric", "seed=1     0", "seed=2     1", "folders: s"]
    assert "sweep: job 1 of 2: seed=1  (see s/.sweep/seed=1.log)" in out
    assert "sweep: seed=2 ended: 1\n  met\n" in out, "the end of what a failed job said"
    assert Path("s/.sweep/seed=1.log").read_text() == "met\n"


@pytest.mark.covering(1)
@pytest.mark.parametrize("launcher", LAUNCHERS)
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_lets_every_job_save_and_begins_no_more(launcher, number, code, tmp_path):
    driver = f"""
        import signal, sys
        from dora_cli.cli import run, sweep
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sweep.COMMAND = [sys.executable, "-c", {SAVING!r}]
        sys.exit(run.guard(sweep.sweep, ["recipe=glue_sst2", "seed=1,2,3", "out=s", *{launcher}]))
    """
    parent = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(driver)],
        stdout=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
    )
    together = 2 if "joblib" in launcher[0] else 3

    def logs() -> list[str]:
        return [path.read_text() for path in sorted((tmp_path / "s/.sweep").glob("*.log"))]

    while logs().count("ready\n") < together:
        assert parent.poll() is None
        time.sleep(0.05)
    parent.send_signal(number)
    out, _ = parent.communicate(timeout=20)
    assert parent.returncode == code
    assert logs() == ["ready\nsaved\n"] * together, "nobody is signalled twice, and nobody is left"
    assert ("seed=3     -" in out) == (together == 2)


@needs_submitit
def test_a_job_whose_time_is_over_saves_and_is_begun_again_with_resume(stand_in, monkeypatch, capfd):
    feign(monkeypatch, OVER)
    assert sweep.sweep(["recipe=glue_sst2", "seed=choice(1)", "out=s", "hydra/launcher=submitit_local"]) == 0
    assert Path("s/.sweep/seed=1.log").read_text() == "ready\nsaved\nready\n"


@needs_submitit
def test_slurm_gets_one_array_with_the_options_as_typed(stand_in, tmp_path, monkeypatch, capfd):
    """Stand-ins for Slurm's commands keep the batch file, and run it once for each job of the array."""
    commands = {
        "sbatch": """
            cp "$1" batch.sh
            for i in 0 1; do
                SLURM_JOB_ID=7$i SLURM_ARRAY_JOB_ID=7 SLURM_ARRAY_TASK_ID=$i bash batch.sh >log$i 2>&1 &
            done
            echo Submitted batch job 7""",
        "srun": 'while [ "$1" != --error ]; do shift; done; shift 2; exec "$@"',
        "sacct": "",
    }
    for name, text in commands.items():
        file = tmp_path / "bin" / name
        file.parent.mkdir(exist_ok=True)
        file.write_text("#!/bin/bash\n" + textwrap.dedent(text) + "\n")
        file.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setitem(launchers.LOOK_EVERY, "slurm", 0.1)
    asked = ["partition=gpu", "gpus_per_node=2", "timeout_min=30", "mem_gb=64"]
    asked.append("additional_parameters={mail-type: END}")
    words = ["recipe=glue_sst2", "seed=1,3", "out=s", "hydra/launcher=submitit_slurm"]
    assert sweep.sweep([*words, *(f"hydra.launcher.{option}" for option in asked)]) == 1
    assert "seed=1     0  accuracy 0.9375\nseed=3     1\n" in capfd.readouterr().out
    lines = {line.removeprefix("#SBATCH --") for line in Path("batch.sh").read_text().splitlines()}
    assert lines > {"partition=gpu", "gpus-per-node=2", "time=30", "mem=64GB", "mail-type=END", "array=0-1%2"}
    assert lines > {"signal=USR1@120", "job-name=dora-train"}


def test_a_finished_job_is_not_begun_again(stand_in, capfd):
    assert sweep.sweep(["recipe=glue_sst2", "seed=1,4", "out=s"]) == 0
    capfd.readouterr()
    assert sweep.sweep(["recipe=glue_sst2", "seed=1,4,3", "out=s"]) == 1
    out = capfd.readouterr().out
    assert "job 1 of 3: seed=1: finished before" in out and out.count("job says") == 1
    assert "seed=4     0  accuracy 0.9375\nseed=3     1\n" in out


def test_several_processes_a_job_are_torchruns():
    words = ["python", "-m", "dora_cli.cli.train", "recipe=x"]
    assert launchers.with_processes(words, Basic()) == words
    assert launchers.with_processes(words, Basic(nproc_per_node=4)) == [
        *["python", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=4"],
        *["-m", "dora_cli.cli.train", "recipe=x"],
    ]


def test_hydras_own_keys_are_taken_out_and_typed():
    words = ["hydra/launcher=submitit_slurm", "hydra.launcher.setup=[module load cuda]", "hydra.launcher.mem_gb=3"]
    launching, rest = take(["seed=1,2", *words, "budget=0.1"])
    assert rest == ["seed=1,2", "budget=0.1"]
    assert launching.options == SubmititSlurm(setup=["module load cuda"], mem_gb=3)
    assert launching.search is None


@pytest.mark.parametrize(
    ("words", "message", "hint"),
    [
        (["hydra/launcher=jolib"], "unknown hydra/launcher 'jolib'", "did you mean 'joblib'?"),
        (["hydra/launchr=joblib"], "unknown key 'hydra/launchr'", "did you mean 'hydra/launcher'"),
        (
            ["hydra.launcher.n_jobs=2"],
            "hydra/launcher=basic does not read hydra.launcher.n_jobs",
            "hydra/launcher=joblib",
        ),
        (["hydra/launcher=joblib", "hydra.launcher.n_job=2"], "unknown key 'hydra.launcher.n_job'", "n_jobs"),
        (["hydra/launcher=joblib", "hydra.launcher.n_jobs=x"], "hydra.launcher.n_jobs=x is not a whole number", None),
        (["hydra/launcher=joblib", "hydra.launcher.n_jobs=0"], "hydra.launcher.n_jobs=0 runs nothing", "-1"),
        (["hydra/sweeper/sampler=tpe"], "hydra/sweeper/sampler is optuna's", "hydra/sweeper=optuna"),
        (["hydra/sweeper=optuna", "hydra.sweeper.n_trials=0"], "hydra.sweeper.n_trials=0 is out of range", "1 or more"),
    ],
)
def test_mistakes_are_named(words, message, hint, stand_in):
    with pytest.raises(UserError) as caught:
        sweep.sweep(["recipe=glue_sst2", "seed=1,2", *words])
    assert caught.value.message == message
    assert (hint or "") in (caught.value.hint or "")


@pytest.mark.parametrize(
    ("words", "package"),
    [
        ("hydra/launcher=joblib", "joblib"),
        ("hydra/launcher=submitit_local", "submitit"),
        ("hydra/sweeper=optuna", "optuna"),
    ],
)
def test_a_missing_package_is_named_with_its_extra(words, package, stand_in, monkeypatch):
    monkeypatch.setattr(launchers, "find_spec", lambda name: None)
    with pytest.raises(UserError) as caught:
        sweep.sweep(["recipe=glue_sst2", "seed=1,2", words])
    assert caught.value.message == f"{words} needs the package {package}"
    assert caught.value.hint == f"pip install 'dora-cli[{package}]'"
    assert not os.listdir()
