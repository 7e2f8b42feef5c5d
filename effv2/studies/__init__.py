"""Studies: their plans, their queue of trials, and the engine that runs them."""
