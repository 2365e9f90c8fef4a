"""`python -m ldm` is `decu`: the command line, for torchrun and for machines without the entry point."""

from ldm.commands import main

if __name__ == "__main__":
    main()
