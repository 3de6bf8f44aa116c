"""The `maverick` command: one small file per subcommand."""
