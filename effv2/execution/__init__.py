"""The device and the form of computation, without changes of results beyond rounding."""
