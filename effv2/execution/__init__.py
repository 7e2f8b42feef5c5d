"""Where and how the network is computed, without changing its results beyond rounding."""
