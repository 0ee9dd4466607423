"""``-m``: which jobs, in which folders, and what becomes of failures and Ctrl-C. Jobs are small stand-ins here."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from dora_cli.cli import resweep
from dora_cli.cli import sweep as sweeps
from dora_cli.cli.resweep import configuration
from dora_cli.config.recipes import choices, recipes_dir
from dora_cli.errors import UserError

ROOT = Path(__file__).resolve().parents[2]

NO_UPLOAD = "push_to_hub is for one run: the jobs of -m would go into one repository, over each other"

pytestmark = pytest.mark.usefixtures("stand_in")


def test_jobs_are_all_combinations_in_order():
    jobs = sweeps.plan(["recipe=glue_sst2", "budget=0.1,r4", "train.epochs=1", "seed=range(1,3)"])
    assert [job.name for job in jobs] == [
        "budget=0.1,seed=1",
        "budget=0.1,seed=2",
        "budget=r4,seed=1",
        "budget=r4,seed=2",
    ]
    assert jobs[0].out == Path("runs/glue_sst2/sweep-budget-seed/budget=0.1,seed=1")
    assert jobs[0].overrides == [
        "recipe=glue_sst2",
        "train.epochs=1",
        "push_to_hub=null",
        "budget=0.1",
        "seed=1",
        "out=runs/glue_sst2/sweep-budget-seed/budget=0.1,seed=1",
    ]


def test_out_is_the_parent():
    jobs = sweeps.plan(["recipe=glue_sst2", "seed=1,2", "out=my runs/a,b"])
    assert [job.out for job in jobs] == [Path("my runs/a,b/seed=1"), Path("my runs/a,b/seed=2")]


def test_recipes_can_be_swept_over():
    jobs = sweeps.plan(["recipe=glue_sst2,glue_rte"])
    assert [job.out for job in jobs] == [
        Path("runs/sweep-recipe/recipe=glue_sst2"),
        Path("runs/sweep-recipe/recipe=glue_rte"),
    ]


def test_folder_names_are_safe():
    assert sweeps.folder_name(["data.path='/a b/c.csv'"]) == "data.path=_a_b_c.csv"
    assert sweeps.folder_name(["model.name=../../x"]) == "model.name=.._.._x"
    long = sweeps.folder_name(["adapter.targets=[" + "a," * 300 + "b]"])
    assert len(long) <= 150
    assert long != sweeps.folder_name(["adapter.targets=[" + "a," * 301 + "b]"])


def test_a_recipe_may_bring_its_ranges_and_the_command_line_wins():
    Path("mine.yaml").write_text("hydra:\n  sweeper:\n    params:\n      train.epochs: 1,2\n      seed: [1, 2]\n")
    assert len(sweeps.plan(["recipe=mine.yaml"])) == 4
    names = [job.name for job in sweeps.plan(["recipe=mine.yaml", "seed=5", "train.epochs=3,4"])]
    assert names == ["train.epochs=3", "train.epochs=4"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["recipe=glue_sst2"], "-m needs something to sweep over"),
        (["budget=0.1,0.2"], "no recipe is given"),
        (["recipe=glue_sst2", "method=dora,dorra"], "unknown method 'dorra'"),
        (["recipe=glue_sst2", "sed=1,2"], "unknown key 'sed'"),
        (["recipe=glue_sst2", "shedule.start=0.1,0.2"], "unknown key 'shedule.start'"),
        (["recipe=glue_sst2", "seed=1,1"], "two jobs of this sweep would share a folder"),
        (["recipe=glue_sst2", "toy", "seed=1,2"], "'toy' is not key=value"),
        (["recipe=glue_sst2", "++push_to_hub=me/x", "seed=1,2"], NO_UPLOAD),
        (["recipe=glue_sst2", "push_to_hub=me,you"], NO_UPLOAD),
    ],
)
def test_mistakes_are_said_before_any_job_starts(overrides, message):
    with pytest.raises(UserError) as caught:
        sweeps.sweep(overrides)
    assert caught.value.message == message
    assert os.listdir() in ([], ["mine.yaml"])


def test_a_recipe_that_uploads_is_refused_or_told_not_to():
    Path("mine.yaml").write_text("# @package _global_\npush_to_hub: me/x\n")
    with pytest.raises(UserError, match="is for one run") as caught:
        sweeps.plan(["recipe=mine.yaml", "seed=1,2"])
    assert str(caught.value.where).endswith("mine.yaml, line 2")
    jobs = sweeps.plan(["recipe=mine.yaml", "push_to_hub=null", "seed=1,2"])
    assert all("push_to_hub=null" in job.overrides for job in jobs)


def test_a_failed_job_does_not_end_the_sweep_and_the_worst_code_is_returned(capfd):
    assert sweeps.sweep(["recipe=glue_sst2", "seed=1,2,3,4", "out=s"]) == 1
    out = capfd.readouterr().out
    assert "sweep: job 4 of 4: seed=4" in out and "job says" in out
    assert out.splitlines()[-6:] == [
        "job     exit  metric",
        "seed=1     0  accuracy 0.9375",
        "seed=2     2",
        "seed=3     1",
        "seed=4     0  accuracy 0.9375",
        "folders: s",
    ]
    assert sorted(os.listdir("s")) == ["seed=1", "seed=2", "seed=3", "seed=4"]


def test_the_same_command_again_skips_what_is_finished_and_goes_on_with_the_rest(capfd):
    words = ["recipe=glue_sst2", "seed=1,3,4,5", "out=s"]
    assert sweeps.sweep(words) == 1
    Path("s/seed=5/summary.json").unlink()  # it was interrupted
    before = Path("s/seed=1/summary.json").stat().st_mtime_ns
    capfd.readouterr()
    assert sweeps.sweep(words) == 1
    out = capfd.readouterr().out
    assert "job 1 of 4: seed=1: finished before" in out and "job 3 of 4: seed=4: finished before" in out
    said = [line for line in out.splitlines() if line.startswith("job says")]
    assert len(said) == 2 and "'seed': '3'" in said[0] and "resume" not in said[0]
    assert "'seed': '5'" in said[1] and "'resume': 'true'" in said[1]
    assert Path("s/seed=1/summary.json").stat().st_mtime_ns == before
    assert sweeps.sweep([*words, "overwrite=true"]) == 1
    assert capfd.readouterr().out.count("job says") == 4
    assert sweeps.sweep(["recipe=glue_sst2", "seed=1,4", "out=s", "dry_run=true"]) == 0
    assert capfd.readouterr().out.splitlines()[-3:] == ["seed=1     0", "seed=4     0", "folders: s"]


@pytest.mark.parametrize(
    ("words", "does"),
    [
        ([], "resume"),
        (["++resume=false"], "start"),
        (["++overwrite=true"], "start"),
        (["dry_run=json"], "plan"),
        (["recipe=mine.yaml"], "start"),
    ],
)
def test_what_a_job_does_follows_from_its_whole_configuration(words, does, monkeypatch):
    monkeypatch.setattr(resweep, "configuration", configuration)
    source = choices("recipe", [recipes_dir()])["glue_rte"].read_text()
    Path("mine.yaml").write_text(source + "overwrite: true\n")
    assert resweep.action(Path("run"), words) == "start", "nothing there, nothing to compose"
    Path("run").mkdir()
    Path("run/config.yaml").touch()  # interrupted
    assert resweep.action(Path("run"), ["recipe=glue_rte", *words]) == does


def test_a_finished_run_of_another_configuration_is_an_error_of_its_job_and_stays(capfd):
    assert sweeps.sweep(["recipe=glue_sst2", "seed=1,4", "out=s"]) == 0
    before = Path("s/seed=1/config.yaml").read_text()
    Path("s/seed=4/config.yaml").write_text("{")
    assert sweeps.sweep(["recipe=glue_sst2", "train.epochs=9", "seed=1,4,5", "out=s", "train.log_every=2"]) == 2
    out, error = capfd.readouterr()
    assert "error: s/seed=1 holds a finished run of another configuration\n" in error
    assert (
        "s/seed=1/config.yaml: train.epochs: None → 9\n" in error and "error: s/seed=4/config.yaml is damaged" in error
    )
    assert out.splitlines()[-4:-1] == ["seed=1     2", "seed=4     2", "seed=5     0  accuracy 0.9375"]
    assert Path("s/seed=1/config.yaml").read_text() == before


def test_codes_of_success_and_of_mistakes_alone():
    assert sweeps.sweep(["recipe=glue_sst2", "seed=1,4", "out=a"]) == 0
    assert sweeps.sweep(["recipe=glue_sst2", "seed=1,2", "out=b"]) == 2


def test_a_job_that_is_killed_counts_as_a_failure(monkeypatch):
    monkeypatch.setattr(sweeps, "COMMAND", [sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"])
    assert sweeps.sweep(["recipe=glue_sst2", "seed=1,2"]) == 1


def test_config_dirs_reach_the_jobs(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(sweeps, "COMMAND", [sys.executable, "-c", "import sys; print(sys.argv[1:])"])
    (tmp_path / "own").mkdir()
    sweeps.sweep(["recipe=glue_sst2", "seed=1,2"], ["own"])
    assert "'--config-dir', 'own'" in capfd.readouterr().out


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_lets_the_running_job_save_and_ends_the_sweep(tmp_path, number, code):
    job = """
        import signal, sys, time
        def save(signum, frame):
            print("job saved", signum, flush=True); sys.exit(128 + signum)
        signal.signal(signal.SIGINT, save); signal.signal(signal.SIGTERM, save)
        print("ready", flush=True); time.sleep(30)
    """
    # A background job of a shell without job control inherits an ignored SIGINT: start as a terminal would.
    driver = f"""
        import signal, sys
        from dora_cli.cli import run, sweep
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sweep.COMMAND = [sys.executable, "-c", {textwrap.dedent(job)!r}]
        sys.exit(run.guard(sweep.sweep, ["recipe=glue_sst2", "seed=1,2,3"]))
    """
    parent = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(driver)],
        stdout=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    line = ""
    while "ready" not in line:
        line = parent.stdout.readline()
        assert line or parent.poll() is None
    start = time.monotonic()
    parent.send_signal(number)
    out, _ = parent.communicate(timeout=20)
    assert time.monotonic() - start < 10
    assert parent.returncode == code
    assert f"job saved {int(number)}" in out
    assert out.count("ready") == 0, "the second job must not start"
    assert f"seed=1   {code}" in out and "seed=2     -" in out
