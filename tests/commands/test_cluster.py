"""Commands for a cluster are commands that the scripts take, one for each component or job."""

import shlex
import subprocess

import pytest

from ldm.commands.cluster import SHARED_COMMANDS, ClusterJobs, ClusterShare, ClusterTrain
from ldm.commands.line import COMMANDS, load_command, parse
from ldm.commands.train import Train
from ldm.settings import Training
from tests.cli import call

TRAIN = [
    "--members",
    "3",
    "--seed",
    "7",
    "--base",
    "a.yaml",
    "--ensemble_name",
    "b",
    "data.params.batch_size=4",
]
SHARE = ["--jobs", "2", "--", "get_unc_synsets.py", "--path", "an ensemble", "--n", "4"]


def test_one_training_a_component():
    lines = call("cluster train", [*TRAIN, "--gpus", "2"])
    for member, line in enumerate(lines):
        python, script, *words = shlex.split(line)
        command = parse(load_command("train"), words, "")
        assert (python, script) == ("python", "main.py")
        expected = Training(
            base=("a.yaml",),
            gpus="2",
            start_from_pretrained=True,
            component=member,
            seed=7 + member,
            ensemble_name="b",
            changes=("data.params.batch_size=4",),
        )
        assert command == Train(expected, train=True)
    assert len(lines) == 3


def test_jobs_share_the_work_of_a_script():
    lines = call("cluster share", SHARE)
    for rank, line in enumerate(lines):
        *environment, python, script, path, folder, n, four = shlex.split(line)
        assert environment == [f"RANK={rank}", "WORLD_SIZE=2"] and (python, script) == ("python", "get_unc_synsets.py")
        command = parse(load_command("uncertainty classes"), [path, folder, n, four], "")
        assert command.ensemble.path == "an ensemble" and command.n == 4


def test_the_array_runs_the_line_of_its_task(tmp_path):
    """The text runs under bash; an `srun` of its own prints what it was called with."""
    script, tools = tmp_path / "jobs.sh", tmp_path / "bin"
    call("cluster share", ["--slurm", script, "--cpus", "3", *SHARE])
    assert "#SBATCH --array=0-1" in script.read_text() and "--requeue" in script.read_text()
    assert "#SBATCH --gpus=1\n#SBATCH --time" in script.read_text()
    tools.mkdir()
    (tools / "srun").write_text('#!/bin/sh\necho "$RANK/$WORLD_SIZE $SRUN_CPUS_PER_TASK $*"\n')
    (tools / "srun").chmod(0o755)
    environment = {"PATH": f"{tools}:/usr/bin:/bin", "SLURM_ARRAY_TASK_ID": "1"}
    done = subprocess.run(["bash", str(script)], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout == "1/2 3 python get_unc_synsets.py --path an ensemble --n 4\n"
    with pytest.raises(FileExistsError):
        call("cluster share", ["--slurm", script, *SHARE])


def test_trainings_of_an_array_are_steps_that_slurm_can_signal(tmp_path):
    """Without srun the signal before the end of a job's time would not reach Python."""
    script = tmp_path / "components.sh"
    lines = call("cluster train", [*TRAIN, "--gpus", "0", "--slurm", script])
    assert all(
        line.startswith("srun python main.py") and f"{number}) {line} ;;" in script.read_text()
        for number, line in enumerate(lines)
    )
    assert "--signal=USR1@90" in script.read_text() and "#SBATCH --gpus" not in script.read_text()
    assert "Afterwards: python save_ensemble.py" in script.read_text()


def test_commands_share_their_work_as_scripts_do():
    words = ["data", "latents", "--base", "x.yaml", "data.params.latent_cache=y", "--seed", "3", "--logdir", "z"]
    lines = call("cluster share", ["--jobs", "2", "--", *words])
    assert lines[1] == f"RANK=1 WORLD_SIZE=2 python -m ldm {' '.join(words)}"
    for name in SHARED_COMMANDS:
        assert name in COMMANDS


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: ClusterTrain("b").run(), "--base"),
        (lambda: ClusterShare(command=("sample_model.py",)).run(), "shares its work"),
        (lambda: ClusterShare().add_words(["--members", "3", "--", "get_unc_synsets.py"]), "unknown options"),
        (lambda: ClusterTrain("b", members=0), "at least one job"),
        (lambda: ClusterShare(count=0), "at least one job"),
        (lambda: ClusterShare(jobs=ClusterJobs(gpus=2)), "--gpus 2 is of the jobs that --slurm FILE asks for"),
        (lambda: ClusterTrain("../x", training_words=("--base", "a.yaml")).run(), "holds no path"),
        (lambda: ClusterTrain(" ", training_words=("--base", "a.yaml")).run(), "give a name"),
        (lambda: ClusterTrain("b", training_words=("--base", "a", "--component", "3")).run(), "that of each line"),
    ],
)
def test_errors_say_what_is_wrong(make, match):
    with pytest.raises(ValueError, match=match):
        make()


@pytest.mark.parametrize(
    "words",
    [
        ["cluster train", *TRAIN, "--max_stepz", "3"],
        ["cluster train", *TRAIN, "--component", "all", "--members", "2"],
        ["cluster share", "--", "uncertainty", "classes", "--path", "x", "--stepz", "3"],
    ],
)
def test_words_that_the_jobs_would_end_with_are_refused_here(words, capsys):
    with pytest.raises((SystemExit, ValueError)):
        call(words[0], words[1:])
    assert "python" not in capsys.readouterr().out
