"""The few PTX instructions of the Hopper kernels' inline assembly, on 32 lanes of a warp, in numpy."""

import re

import numpy as np

LANES = 32
TYPES = {"f16": np.float16}


def run(text, outs, inputs):
    """The outputs `[outs, 32]` of inline assembly: registers of 32 bits of every lane, as uint32. Inputs likewise."""
    registers = {f"${outs + index}": np.asarray(values).view(np.uint32) for index, values in enumerate(inputs)}
    for instruction in re.sub(r"\.reg[^;]*;", "", text).strip("{} ").split(";"):
        if instruction.strip():
            _step(instruction.strip(), registers)
    return [registers[f"${index}"] for index in range(outs)]


def pair(low, high):
    """Two 16-bit values of every lane in 32 bits."""
    low, high = (np.asarray(value).view(np.uint16).astype(np.uint32) for value in (low, high))
    return low | high << np.uint32(16)


def halves(register):
    """The two fp16 values of every lane, `[32, 2]`."""
    return np.stack([register & np.uint32(0xFFFF), register >> np.uint32(16)], -1).astype(np.uint16).view(np.float16)


def _step(instruction, registers):
    name, rest = instruction.split(" ", 1)
    operands = re.findall(r"\{[^}]*\}|[^,\s]+", rest)

    def get(operand):
        if operand.startswith("0f"):
            return np.full(LANES, int(operand[2:], 16), np.uint32)
        if operand.isdigit():
            return np.full(LANES, int(operand), np.uint32)
        return registers[operand]

    def floats(operand):
        return get(operand).view(np.float32)

    def put(value):
        registers[operands[0]] = np.asarray(value)

    def put_float(value):
        put(value.astype(np.float32).view(np.uint32))

    kind = name.split(".")[0]
    if kind == "mov":
        put(get(operands[1]).copy())
    elif kind == "tanh":
        put_float(np.tanh(floats(operands[1])))
    elif kind == "fma":
        a, b, c = (floats(operand).astype(np.float64) for operand in operands[1:])
        put_float(a * b + c)
    elif kind in ("add", "mul", "max"):
        a, b = (floats(operand) for operand in operands[1:])
        put_float({"add": np.add, "mul": np.multiply, "max": np.maximum}[kind](a, b))
    elif kind == "and":
        put(get(operands[1]) & get(operands[2]))
    elif kind == "cvt":
        high, low = (floats(operand).astype(np.float16) for operand in operands[1:])
        put(pair(low, high))
    elif kind == "setp":
        put(get(operands[1]) != get(operands[2]))
    elif kind == "selp":
        put(np.where(registers[operands[3]], get(operands[1]), get(operands[2])))
    elif kind == "shfl":
        _shuffle(name, operands, get, registers)
    elif kind == "movmatrix":
        rows = halves(get(operands[1])).reshape(8, 8)
        put(pair(*rows.T.reshape(LANES, 2).T.copy()))
    elif kind == "mma":
        _multiply(name, operands, registers)
    else:
        raise NotImplementedError(instruction)


def _shuffle(name, operands, get, registers):
    """Without segments: the whole warp. A lane without another one keeps its own value, and the predicate is false."""
    target, _, predicate = operands[0].partition("|")
    assert operands[3] in ("0", "31"), "a segment"
    lanes = np.arange(LANES)
    source = lanes + int(operands[2]) * (-1 if ".up." in name else 1)
    inside = (source >= 0) & (source < LANES)
    registers[target] = get(operands[1])[np.where(inside, source, lanes)]
    if predicate:
        registers[predicate] = inside


def _multiply(name, operands, registers):
    d, a, b, c = ([register.strip() for register in operand.strip("{}").split(",")] for operand in operands)
    depth = 8 * len(b)
    left, right, sums = np.zeros((16, depth)), np.zeros((depth, 8)), np.zeros((16, 8))
    row, column = np.arange(LANES) // 4, np.arange(LANES) % 4 * 2
    for index, register in enumerate(a):
        for bit in range(2):
            left[row + 8 * (index % 2), column + bit + 8 * (index // 2)] = halves(registers[register])[:, bit]
    for index, register in enumerate(b):
        for bit in range(2):
            right[column + bit + 8 * index, row] = halves(registers[register])[:, bit]
    for index, register in enumerate(c):
        sums[row + 8 * (index // 2), column + index % 2] = registers[register].view(np.float32)
    sums += left @ right
    for index, register in enumerate(d):
        registers[register] = sums[row + 8 * (index // 2), column + index % 2].astype(np.float32).view(np.uint32)
