"""Entry point of MLproject: `train`."""

from effv2.cli.train import train

if __name__ == "__main__":
    train()
