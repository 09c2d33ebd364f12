"""What the user chose: flags, the key=value command line, config files, and their resolution. Pure."""
