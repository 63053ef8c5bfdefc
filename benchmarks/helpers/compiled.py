"""What stands in the text of a compiled program."""

import math
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


BYTES = {"pred": 1, "bf16": 2, "c64": 8, "c128": 16}
INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.-]+) = (\(.*?\)|\S+) ([\w-]+)\((.*?)\)(.*)$", re.MULTILINE)


def size_of(type_: str) -> int:
    """The bytes of a type's arrays that lie in a device's main memory, not in that of one of its cores."""

    def one(dtype, shape, layout):
        width = BYTES.get(dtype) or int(re.sub(r"\D", "", dtype)[:2] or 8) // 8
        return 0 if "S(" in layout else width * math.prod(map(int, filter(None, shape.split(","))))

    return sum(one(*each) for each in re.findall(r"\b([a-z]+\d*[a-z\d]*)\[([\d,]*)\](\{[^}]*\})?", type_))


def work(text: str) -> tuple[int, int]:
    """How many instructions a device runs, and the bytes that they read and write; those of a loop as often as it runs.
    Of an array that is cut or updated, the part counts.
    """
    bodies = {name: INSTRUCTION.findall(body) for name, body in computations(text).items()}

    def operands(arguments):
        return re.findall(r"%([\w.-]+)", arguments)

    def read(types, name, called, place):
        """What a fusion reads of its operand at a place."""
        inside = bodies[called]
        own = next(each for _, each, _, kind, given, _ in inside if kind == "parameter" and given == str(place))
        uses = [(kind, type_, operands(given)) for _, _, type_, kind, given, _ in inside if own in operands(given)]
        parts = [
            size_of(type_) if kind == "dynamic-slice" else 0 for kind, type_, given in uses if cut(kind, given, own)
        ]
        return min(sum(parts), size_of(types[name])) if len(parts) == len(uses) else size_of(types[name])

    def cut(kind, given, own):
        return kind in ("dynamic-slice", "dynamic-update-slice") and given[0] == own

    def written(type_, called):
        """What a fusion writes."""
        types = {each: own for _, each, own, *_ in bodies[called]}
        updates = [
            (size_of(own), size_of(types[operands(given)[1]]))
            for _, _, own, kind, given, _ in bodies[called]
            if kind == "dynamic-update-slice"
        ]
        return size_of(type_) - sum(whole - part for whole, part in updates)

    def steps(loop):
        if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop):
            return int(known[1])
        condition = re.search(r"condition=%?([\w.-]+)", loop)[1]
        (limit,) = [int(given) for *_, kind, given, _ in bodies[condition] if kind == "constant"]
        return limit

    def moved(types, type_, kind, given, rest):
        if kind == "fusion":
            called = re.search(r"calls=%?([\w.-]+)", rest)[1]
            reads = [read(types, each, called, k) for k, each in enumerate(operands(given))]
            return written(type_, called) + sum(reads)
        if kind == "dynamic-slice":
            return 2 * size_of(type_)
        if kind == "dynamic-update-slice":
            return 2 * size_of(types[operands(given)[1]])
        return size_of(type_) + sum(size_of(types[each]) for each in operands(given))

    def count(name):
        types = {each: type_ for _, each, type_, *_ in bodies[name]}
        found = []
        for _, _, type_, kind, given, rest in bodies[name]:
            if kind == "while":
                instructions, size = count(re.search(r"body=%?([\w.-]+)", rest)[1])
                found.append((steps(rest) * instructions, steps(rest) * size))
            elif kind not in NO_WORK:
                found.append((1, moved(types, type_, kind, given, rest)))
        return tuple(map(sum, zip(*found, strict=True))) or (0, 0)

    return count(re.search(r"^ENTRY %?([\w.-]+)", text, re.MULTILINE)[1])
