"""Epistemic uncertainty per pixel: `decu uncertainty pixels`, with DECU's options (--help)."""

from ldm.commands import run_as_script

if __name__ == "__main__":
    run_as_script("uncertainty pixels")
