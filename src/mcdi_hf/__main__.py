"""`python -m mcdi_hf` and `accelerate launch -m mcdi_hf` are the command `mcdi-hf`."""

from .commands.main import main


main()
