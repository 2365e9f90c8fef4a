"""A grid of samples of an ensemble's members: `decu sample members`, with DECU's options (--help)."""

from ldm.commands import run_as_script

if __name__ == "__main__":
    run_as_script("sample members")
