"""The commands of `ltxkern`, one file each: `add_parser(subparsers)` declares the options, `run(arguments)` does the work."""
