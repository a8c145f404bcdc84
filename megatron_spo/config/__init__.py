"""The typed configuration: YAML and overrides in, one frozen `Config` out. Imports no torch."""
