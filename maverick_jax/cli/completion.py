"""Print a script that lets the Tab key complete `maverick`: its commands, its options, the names of files. The shell must
read it when it starts.

examples:
  maverick completion bash >> ~/.bashrc
  maverick completion zsh >> ~/.zshrc
  maverick completion fish > ~/.config/fish/completions/maverick.fish
  maverick completion tcsh >> ~/.tcshrc
"""

import argparse

SHELLS = ("bash", "zsh", "fish", "tcsh")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", metavar="SHELL", choices=SHELLS, help=", ".join(SHELLS))


def run(args: argparse.Namespace) -> int:
    from argcomplete.shell_integration import shellcode

    print(shellcode(["maverick"], shell=args.shell))  # which asks `maverick` itself: see main.complete_words
    return 0
