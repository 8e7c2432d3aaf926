"""``python -m constrained_ops``: what is installed here (``info``), and the package at work (``demo``)."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import constrained_ops as co

from . import demo


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return "none"
    if isinstance(value, (list, tuple, set, frozenset)):
        return ", ".join(map(_value, value)) or "none"
    return str(value)


def _lines(facts: Mapping[str, Any], indent: str = "") -> list[str]:
    """One line per fact, values aligned; a mapping becomes a heading with its own facts indented below."""
    width = max((len(str(name)) for name, value in facts.items() if not isinstance(value, Mapping)), default=0)
    lines = []
    for name, value in facts.items():
        if isinstance(value, Mapping):
            lines += [f"{indent}{name}:", *(_lines(value, indent + "  ") or [f"{indent}  none"])]
        else:
            lines.append(f"{indent}{name!s:<{width}}  {_value(value)}")
    return lines


def _info(args: argparse.Namespace) -> int:
    print("\n".join(_lines(co.build_info())))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line (by default this process's) and return its exit status."""
    parser = argparse.ArgumentParser("python -m constrained_ops", description=co.__doc__)
    commands = parser.add_subparsers(title="commands")
    info = commands.add_parser("info", help="versions, compiled architectures and the backend of every device")
    info.set_defaults(run=_info)
    demo.add_parser(commands)
    args = parser.parse_args(argv)
    if "run" not in args:
        parser.print_help()
        return 0
    return int(args.run(args))


if __name__ == "__main__":
    sys.exit(main())
