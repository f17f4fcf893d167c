"""The entry of the command: ``vllm-vlora`` and ``python -m vllm_vlora.tools``."""

import signal


def main() -> None:
    """Run the command line; Ctrl-C while it is still being put together ends it without a word."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from vllm_vlora.tools.cli import main as run

    run()


if __name__ == "__main__":
    main()
