"""``python -m vllm_vlora.tools``."""

from vllm_vlora.tools.cli import main

main()
