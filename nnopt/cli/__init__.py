"""The `nnopt` command."""
