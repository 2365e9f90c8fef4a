"""Commands for a cluster are commands that the scripts take, one for each component or job."""

import shlex
import subprocess

import pytest

from ldm.commands.line import load_command, parse
from ldm.commands.train import Train
from ldm.settings import Training
from scripts import cluster_commands

TRAIN = [
    "train",
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
SHARE = ["share", "--jobs", "2", "--", "get_unc_synsets.py", "--path", "an ensemble", "--n", "4"]


def test_one_training_a_component():
    lines = cluster_commands.main([*TRAIN, "--gpus", "2"])
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
    lines = cluster_commands.main(SHARE)
    for rank, line in enumerate(lines):
        *environment, python, script, path, folder, n, four = shlex.split(line)
        assert environment == [f"RANK={rank}", "WORLD_SIZE=2"] and (python, script) == ("python", "get_unc_synsets.py")
        command = parse(load_command("uncertainty classes"), [path, folder, n, four], "")
        assert command.ensemble.path == "an ensemble" and command.n == 4


def test_the_array_runs_the_line_of_its_task(tmp_path):
    """The text runs under bash; an `srun` of its own prints what it was called with."""
    script, tools = tmp_path / "jobs.sh", tmp_path / "bin"
    cluster_commands.main(["share", "--slurm", str(script), "--cpus", "3", *SHARE[1:]])
    assert "#SBATCH --array=0-1" in script.read_text() and "--requeue" in script.read_text()
    assert "#SBATCH --gpus=1\n#SBATCH --time" in script.read_text()
    tools.mkdir()
    (tools / "srun").write_text('#!/bin/sh\necho "$RANK/$WORLD_SIZE $SRUN_CPUS_PER_TASK $*"\n')
    (tools / "srun").chmod(0o755)
    environment = {"PATH": f"{tools}:/usr/bin:/bin", "SLURM_ARRAY_TASK_ID": "1"}
    done = subprocess.run(["bash", str(script)], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout == "1/2 3 python get_unc_synsets.py --path an ensemble --n 4\n"
    with pytest.raises(FileExistsError):
        cluster_commands.main(["share", "--slurm", str(script), *SHARE[1:]])


def test_trainings_of_an_array_are_steps_that_slurm_can_signal(tmp_path):
    """Without srun the signal before the end of a job's time would not reach Python."""
    script = tmp_path / "components.sh"
    lines = cluster_commands.main([*TRAIN, "--gpus", "0", "--slurm", str(script)])
    assert all(
        line.startswith("srun python main.py") and f"{number}) {line} ;;" in script.read_text()
        for number, line in enumerate(lines)
    )
    assert "--signal=USR1@90" in script.read_text() and "#SBATCH --gpus" not in script.read_text()
    assert "Afterwards: python save_ensemble.py" in script.read_text()


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (["train", "--ensemble_name", "b"], "--base"),
        (["share", "--", "sample_model.py"], "shares its work"),
        (["share", "--members", "3", "--", "get_unc_synsets.py"], "unknown options"),
        ([*TRAIN, "--members", "0"], "at least one job"),
    ],
)
def test_errors_say_what_is_wrong(words, match):
    with pytest.raises(ValueError, match=match):
        cluster_commands.main(words)
