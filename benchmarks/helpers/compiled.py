"""What stands in the text of a compiled program."""

import re

COLLECTIVES = "all-reduce", "all-gather", "all-to-all", "collective-permute", "reduce-scatter"


def computations(text: str) -> dict[str, str]:
    """The bodies of a program's computations."""
    found = re.split(r"^(?:ENTRY )?%?([\w.-]+) \(.*\{$", text, flags=re.MULTILINE)
    return dict(zip(found[1::2], found[2::2], strict=True))


def loops(text: str) -> int:
    return len(re.findall(r"\bwhile\(", text))


def collectives(text: str) -> dict[str, int]:
    """How many of each kind there are."""
    return {name: len(re.findall(rf"\b{name}(?:-start)?\(", text)) for name in COLLECTIVES}


def inside_loops(text: str) -> str:
    """What the bodies of loops run, and what these call."""
    bodies = computations(text)
    reached: set[str] = set()
    waiting = re.findall(r"\bbody=%?([\w.-]+)", text)
    while waiting:
        name = waiting.pop()
        if name not in reached:
            reached.add(name)
            waiting += [each for each in re.findall(r"%([\w.-]+)", bodies[name]) if each in bodies]
    return "\n".join(bodies[name] for name in sorted(reached))


NO_WORK = {"parameter", "get-tuple-element", "tuple", "constant", "bitcast", "after-all", "partition-id"}


def kernels_in_loops(text: str) -> list[int]:
    """For every loop, the number of instructions of its body that a device runs, loops inside it not counted."""
    bodies = computations(text)
    instruction = re.compile(r"^\s+(?:ROOT )?%?[\w.-]+ = (?:\(.*?\)(?:\{.*?\})?|\S+) ([\w-]+)\(", re.MULTILINE)

    def count(name):
        return sum(each not in NO_WORK for each in instruction.findall(bodies[name]))

    return [count(name) for name in re.findall(r"\bbody=%?([\w.-]+)", text)]
