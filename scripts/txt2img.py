"""Pictures of prompts: `decu sample model`, with the options of txt2img.py (see ldm/commands/txt2img.py)."""

from ldm.commands.txt2img import run_txt2img

if __name__ == "__main__":
    run_txt2img()
