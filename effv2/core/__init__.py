"""What every package uses: errors, paths, processes, signals, randomness, provenance. Knows no options, no terminal."""
