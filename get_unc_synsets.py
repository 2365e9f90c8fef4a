"""Epistemic uncertainty per class: `decu uncertainty classes`, with DECU's options (--help)."""

from ldm.commands import run_as_script

if __name__ == "__main__":
    run_as_script("uncertainty classes")
