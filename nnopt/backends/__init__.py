"""Places that compile, run and time networks."""
