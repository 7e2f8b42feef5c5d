"""Settings: one frozen schema, the layers that it is built from, and the YAML files that hold them."""
