"""Commands: options to configuration to one call. Heavy packages are imported inside the commands."""
