"""`python -m effv2`: the console script."""

from effv2.cli.main import main

if __name__ == "__main__":
    main(prog_name="effv2")
