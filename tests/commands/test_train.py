"""`decu train` and `python main.py`: what its words say, in every published spelling, and what it refuses."""

import subprocess
import sys
from pathlib import Path

import pytest

import main
from ldm.commands.line import load_command, parse
from ldm.commands.train import Train
from ldm.settings import Training

ROOT = Path(__file__).parent.parent.parent
DIGITS = ("x.yaml",)


def read(words):
    return parse(load_command("train"), words.split(), "main.py")


def test_decus_own_command_is_read_word_for_word():
    command = read(
        "--base configs/latent-diffusion/cin256-v2.yaml -t --gpus 0, --scale_lr False --start_from_pretrained "
        "--logdir /path/to/storelogs  --seed 1 --component 1 --ensemble_name bootstrapped "
        "--overwrite_data_root ./imagenet_data"
    )
    training = Training(
        base=("configs/latent-diffusion/cin256-v2.yaml",),
        gpus="0,",
        scale_lr=False,
        start_from_pretrained=True,
        logdir="/path/to/storelogs",
        seed=1,
        component=1,
        ensemble_name="bootstrapped",
        overwrite_data_root="./imagenet_data",
    )
    assert command == Train(training, train=True)


def test_latent_diffusions_short_names():
    short = read("-b a.yaml b.yaml -n run -t True -p flows -d -s 5 -f _x -l logs/y --no-test --gpus 0,1")
    long = read(
        "--base a.yaml b.yaml --name run --train --project flows --debug True --seed=5 --postfix _x "
        "--logdir logs/y --no-test yes --gpus=0,1"
    )
    training = Training(
        ("a.yaml", "b.yaml"),
        name="run",
        project="flows",
        debug=True,
        seed=5,
        postfix="_x",
        logdir="logs/y",
        test=False,
        gpus="0,1",
    )
    assert short == long == Train(training, train=True)
    assert read("-r logs/run --epoch 3") == Train(Training(resume="logs/run", epoch=3))


@pytest.mark.parametrize(
    ("words", "train", "scale"),
    [
        ("-t", True, True),
        ("-t True --scale_lr True", True, True),
        ("--train=true --scale_lr=False", True, False),
        ("-t 1 --scale_lr no", True, False),
        ("-t False --scale_lr", False, True),
        ("--no-train --no_scale_lr", False, False),
        ("--no-train False --no-scale-lr True", True, False),
    ],
)
def test_switches_with_and_without_a_value(words, train, scale):
    command = read(f"--base x.yaml {words}")
    assert (command.train, command.training.scale_lr) == (train, scale)


def test_words_of_the_trainer_and_of_the_config():
    command = read(
        "--base x.yaml model.params.timesteps=3 --max_steps 8 -t data.params.batch_size=2 --precision=bf16-mixed "
        "--limit_val_batches 0.5 --max_epochs -1 --plugins= lightning=null --component all --start_from_pretrained "
        "a.b=c --ensemble_name e"
    )
    assert command.train and command.training.base == DIGITS and command.training.member_count == 5
    assert command.training.trainer == {
        "max_steps": 8,
        "precision": "bf16-mixed",
        "limit_val_batches": 0.5,
        "max_epochs": -1,
        "plugins": [],
    }
    assert sorted(command.training.changes) == [
        "a.b=c",
        "data.params.batch_size=2",
        "lightning=null",
        "model.params.timesteps=3",
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--base x.yaml --maxsteps 3", "unknown option '--maxsteps'"),
        ("--base x.yaml --start_from --max_steps 3", "unknown option '--start_from'"),
        ("--base x.yaml -t True word", "unknown option 'word'"),
        ("--name a --resume b", "cannot be given together"),
        ("", "give a config"),
        ("--base x.yaml --epoch 3", "--resume"),
        ("--base x.yaml --max_steps", "--max_steps needs a value"),
        ("--base x.yaml --component all", "needs --start_from_pretrained"),
        ("--base x.yaml --component -1", "--component takes a number from 0, or all"),
        ("--base x.yaml --component some", "--component"),
        ("--base x.yaml --members 3", "--members goes with --component all"),
        ("--base x.yaml --seed one", "--seed"),
    ],
)
def test_words_it_does_not_know_are_errors(words, message, capsys):
    with pytest.raises(SystemExit) as ended:
        read(words)
    assert ended.value.code == 2
    assert message in " ".join(capsys.readouterr().err.replace("│", " ").split())


def test_what_released_configs_name_is_there():
    for name in main.EXPORTS:
        assert getattr(main, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        main.nothing  # noqa: B018


def test_help_imports_neither_torch_nor_lightning():
    program = "import runpy, sys; sys.argv = ['main.py', '--help']\ntry: runpy.run_path('main.py', run_name='__main__')"
    program += "\nexcept SystemExit as end: print(end.code, sorted({'torch', 'pytorch_lightning'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.splitlines()[-1] == "0 []"
    assert "Ctrl-C" in done.stdout and "(default: None)" not in done.stdout
