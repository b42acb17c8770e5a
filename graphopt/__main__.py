"""`graphopt`, and `python -m graphopt`."""

from graphopt.supervision import supervised


def main() -> None:
    """The command, in a process of its own."""
    from graphopt.cli import main as command

    supervised(command)


if __name__ == "__main__":
    main()
