"""Commands: argv into a configuration, one function called, exceptions into exit codes."""
