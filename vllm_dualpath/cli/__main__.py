"""``python -m vllm_dualpath.cli``: how launched processes start each other, whatever the PATH."""

from vllm_dualpath.cli.main import main

main()
