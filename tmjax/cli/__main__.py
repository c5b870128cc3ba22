"""`python -m tmjax.cli`: the command line without the handling of Ctrl-C from the start, see `tmjax.__main__`."""

from tmjax.cli.application import main

if __name__ == "__main__":
    main()
