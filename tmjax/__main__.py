"""The process `tmjax` and `python -m tmjax`: before anything is loaded it sees to it that Ctrl-C is one line."""

from tmjax import interrupt


def main() -> None:
    """Console script."""
    interrupt.from_the_start()
    from tmjax.cli import main as run

    run()


if __name__ == "__main__":
    main()
