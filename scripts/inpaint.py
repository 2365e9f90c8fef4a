"""Pictures with holes, filled in: `decu sample inpaint`, with latent-diffusion's options (--help)."""

from ldm.commands import run_as_script

if __name__ == "__main__":
    run_as_script("sample inpaint")
