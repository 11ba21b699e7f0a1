"""The doors of the command line: parse, call, print."""
