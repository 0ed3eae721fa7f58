"""`python -m veneer`, for launchers such as torchrun."""

from .cli.main import main

main()
