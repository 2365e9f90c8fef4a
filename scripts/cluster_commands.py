"""Print the commands that spread an ensemble over the jobs of a cluster: components, latents, uncertainty, samples.

Examples:
  python scripts/cluster_commands.py train --members 5 --base configs/latent-diffusion/cin256-v2.yaml \\
      --logdir logs --ensemble_name bootstrapped
  python scripts/cluster_commands.py train --members 5 --slurm components.sh --base ... --ensemble_name bootstrapped
  python scripts/cluster_commands.py share --jobs 8 --slurm classes.sh -- get_unc_synsets.py --path ENSEMBLE
  sbatch components.sh
  python scripts/cluster_commands.py share --jobs 8 -- scripts/cache_latents.py --base ... data.params.latent_cache=DIR

`train` gives one line for each component: main.py with its --component and --seed, and the line that gathers them.
`share` gives one line for each job of a script that shares its work; started again it continues. With --slurm FILE the
lines go into a job array whose tasks, trainings too, save before their time is over, are requeued and continue. Submit
it from this folder with the environment active; what a cluster wants goes before the file: sbatch --partition=P FILE.
"""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from ldm.cli import HelpFormatter, run_script
from ldm.util import atomic_write

SHARED = (
    "get_unc_synsets.py",
    "scripts/sample_diffusion.py",
    "scripts/cache_latents.py",
    "scripts/fit_laplace.py",
    "scripts/sample_laplace.py",
    "scripts/exposure_bias.py",
    "scripts/evaluate.py",
)
ARRAY = """#!/usr/bin/env bash
#SBATCH --job-name={name}
#SBATCH --array=0-{last}
#SBATCH --nodes=1 --ntasks=1
#SBATCH --cpus-per-task={cpus}
{gpus}#SBATCH --time={time}
#SBATCH --signal=USR1@90 --requeue --open-mode=append
#SBATCH --output={name}_%a.log
# {after}
set -euo pipefail
export SRUN_CPUS_PER_TASK={cpus}  # srun does not take the job's
{body}
"""


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    kinds = parser.add_subparsers(dest="kind", required=True)
    train = kinds.add_parser("train", help="one job a component", formatter_class=HelpFormatter)
    train.add_argument("--members", type=int, default=5, help="components")
    train.add_argument("--seed", type=int, default=0, help="seed of component 0; the next ones count on")
    train.add_argument("--logdir", default="logs", help="where run directories are made")
    train.add_argument("--ensemble_name", required=True, help="name of the ensemble")
    share = kinds.add_parser("share", help="jobs that share the work of one script", formatter_class=HelpFormatter)
    share.add_argument("--jobs", type=int, default=4, help="jobs")
    for kind in (train, share):
        kind.add_argument("--slurm", metavar="FILE", help="write a job array there instead of printing lines")
        kind.add_argument("--time", default="24:00:00", help="of a job of the array")
        kind.add_argument("--gpus", type=int, default=1, help="of a job")
        kind.add_argument("--cpus", type=int, default=8, help="of a job")
        kind.add_argument("--overwrite", action="store_true", help="replace the file of --slurm")
    share.add_argument("command", nargs=argparse.REMAINDER, help="after --: the script and its options")
    return parser


def starter(options: argparse.Namespace) -> list[str]:
    """How a line starts Python: in an array by srun, for SLURM signals steps, not what a batch script runs itself."""
    return ["srun", "python"] if options.slurm else ["python"]


def training(options: argparse.Namespace, rest: list[str]) -> tuple[list[str], str]:
    """(a command for each component, the command that gathers them)."""
    lines = []
    for member in range(options.members):
        words = [*starter(options), "main.py", "-t", "--gpus", f"{options.gpus}", "--start_from_pretrained", *rest]
        words += ["--logdir", options.logdir, "--ensemble_name", options.ensemble_name]
        lines.append(shlex.join([*words, "--component", str(member), "--seed", str(options.seed + member)]))
    gather = ["python", "save_ensemble.py", "--path", options.logdir, "--ensemble_name", options.ensemble_name]
    return lines, shlex.join([*gather, "--ensemble_comps", str(options.members)])


def sharing(options: argparse.Namespace) -> tuple[list[str], str]:
    """(a command for each job, what to know of them).

    Raises:
        ValueError: if the script does not share its work.
    """
    words = [word for word in options.command if word != "--"]
    if not words or words[0] not in SHARED:
        raise ValueError(f"give a script that shares its work after --, one of {', '.join(SHARED)}; got {words[:1]}")
    command = shlex.join([*starter(options), *words])
    lines = [f"RANK={rank} WORLD_SIZE={options.jobs} {command}" for rank in range(options.jobs)]
    return lines, "the job that finishes last writes the results, or one more call of the command"


def array(lines: list[str], after: str, options: argparse.Namespace, name: str) -> str:
    """The text of a job array whose task k runs line k."""
    cases = "\n".join(f"    {number}) {line} ;;" for number, line in enumerate(lines))
    body = f'case "$SLURM_ARRAY_TASK_ID" in\n{cases}\nesac'
    gpus = f"#SBATCH --gpus={options.gpus}\n" if options.gpus else ""
    chosen = {"gpus": gpus, "cpus": options.cpus, "time": options.time}
    return ARRAY.format(name=name, last=len(lines) - 1, after=f"Afterwards: {after}", body=body, **chosen)


def main(argv: list[str] | None = None) -> list[str]:
    options, rest = get_parser().parse_known_args(argv)
    count = options.members if options.kind == "train" else options.jobs
    if count < 1:
        raise ValueError(f"expected at least one job, got {count}")
    if options.kind == "train" and not {"--base", "-b"} & set(rest):
        raise ValueError("name the training's config: --base FILE.yaml, and any other option of main.py")
    if options.kind == "share" and rest:
        raise ValueError(f"unknown options {rest}; the script's own go after --")
    lines, after = training(options, rest) if options.kind == "train" else sharing(options)
    if options.slurm:
        with atomic_write(options.slurm, options.overwrite) as partial:
            partial.write_text(array(lines, after, options, Path(options.slurm).stem))
        print(f"sbatch {options.slurm}\n# {after}")
    else:
        print("\n".join([*lines, f"# {after}"]))
    return lines


if __name__ == "__main__":
    run_script(main)
