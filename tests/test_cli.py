"""How a script ends: by its own result, by an error a user can act on, by an interrupt."""

from __future__ import annotations

import pytest

from ldm.cli import run_script


def test_errors_and_interrupts_end_a_script_without_a_traceback(capsys):
    def failing(error):
        def main():
            raise error

        return main

    run_script(lambda: None)
    with pytest.raises(SystemExit) as stop:
        run_script(failing(ValueError("expected 1, got 2")))
    assert stop.value.code == "error: expected 1, got 2"
    with pytest.raises(SystemExit) as stop:
        run_script(failing(KeyboardInterrupt()))
    assert stop.value.code == 130 and capsys.readouterr().err == "interrupted\n"
    with pytest.raises(KeyError):
        run_script(failing(KeyError("a fault of ours")))
