"""Entry point of MLproject: `ablate`."""

from effv2.cli.ablate import ablate

if __name__ == "__main__":
    ablate()
