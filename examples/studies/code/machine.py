"""A stack machine whose instructions are single characters.

    0 to 9    push the digit             + - *    pop two, push lower OP upper
    x y       push the input             A B C D  pop into the register
    a b c d   push the register

The output of a program is the value left on the stack; there must be exactly one.
"""

from collections.abc import Callable, Mapping

OPERATORS: Mapping[str, Callable[[int, int], int]] = {
    "+": lambda lower, upper: lower + upper,
    "-": lambda lower, upper: lower - upper,
    "*": lambda lower, upper: lower * upper,
}
DIGITS, INPUTS, REGISTERS = "0123456789", "xy", "abcd"


class Fault(Exception):
    """Raised if a program cannot run; the message names the instruction, counted from 1."""


def run(program: str, inputs: Mapping[str, int]) -> int:
    """Returns the output of a program for the values of x and y.

    Raises:
        Fault: If there is an unknown instruction, an empty stack, an unwritten register, or not one value left.
    """
    stack: list[int] = []
    known = dict(inputs)

    def pop() -> int:
        if not stack:
            raise Fault(f"{place}: the stack is empty")
        return stack.pop()

    for number, instruction in enumerate(program, 1):
        place = f"instruction {number}, {instruction!r}"
        if instruction in OPERATORS:
            upper, lower = pop(), pop()
            stack.append(OPERATORS[instruction](lower, upper))
        elif instruction in DIGITS:
            stack.append(int(instruction))
        elif instruction.lower() in REGISTERS and instruction.isupper():
            known[instruction.lower()] = pop()
        elif instruction in known:
            stack.append(known[instruction])
        else:
            raise Fault(f"{place}: unknown instruction, or a register that was not written")
    if len(stack) != 1:
        raise Fault(f"the program leaves {len(stack)} values instead of one")
    return stack[0]
