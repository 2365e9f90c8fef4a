"""Commands: each is a frozen dataclass whose fields are its options, whose docstring is its help, and whose `run` acts.

    decu GROUP [COMMAND] --help         (python -m ldm GROUP [COMMAND] under torchrun)

In Python a command is a value: `Gather(path="logs", ensemble_comps=5).run()`. The module of a command is imported when
the command is named, and it imports torch when the command runs.
"""

from ldm.commands.line import COMMANDS, Entry, load_command, main, run_as_script, run_command

__all__ = ["COMMANDS", "Entry", "load_command", "main", "run_as_script", "run_command"]
