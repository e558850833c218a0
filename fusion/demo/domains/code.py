"""Coding: small Python functions, judged by running them in a whitelist interpreter, and what a program prints."""

from __future__ import annotations

import ast
import operator
import re
from random import Random

from fusion.demo.task import Check, Task, counts
from fusion.demo.words import invented, words

LONGEST_SOURCE = 400
LARGEST_VALUE = 10**9
_OPERATIONS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}
FUNCTION_NAMES = words("change shift update compute step grow convert move score adjust count make")


class UnsafeCode(ValueError):
    """Code with anything in it but one function of `x` that returns an arithmetic expression."""


def call(source: str, name: str, x: int) -> int:
    """The value of `name(x)`, where `source` is one function with a single return of +, -, * over x and whole numbers.

    Nothing is executed: the syntax tree is walked, and every node that is not on the list raises UnsafeCode.
    """
    if len(source) > LONGEST_SOURCE:
        raise UnsafeCode("too long")
    try:
        body = ast.parse(source).body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as problem:
        raise UnsafeCode("not Python") from problem
    return _value(_returned(body, name), x)


def _returned(body: list[ast.stmt], name: str) -> ast.expr:
    match body:
        case [ast.FunctionDef(name=found, args=ast.arguments(posonlyargs=[], args=[ast.arg(arg="x", annotation=None)],
                              vararg=None, kwonlyargs=[], kwarg=None, defaults=[]), decorator_list=[], returns=None,
                              body=[ast.Return(value=ast.expr() as expression)])] if found == name:
            return expression
    raise UnsafeCode(f"not a single function {name}(x) with a return")


def _value(node: ast.expr, x: int) -> int:
    match node:
        case ast.Name(id="x"):
            return x
        case ast.Constant(value=int(number)) if not isinstance(number, bool):
            result = number
        case ast.BinOp(left=left, op=sign, right=right) if type(sign) in _OPERATIONS:
            result = _OPERATIONS[type(sign)](_value(left, x), _value(right, x))
        case _:
            raise UnsafeCode(f"{type(node).__name__} is not allowed")
    if abs(result) > LARGEST_VALUE:
        raise UnsafeCode("too large")
    return result


def code_block(answer: str) -> str:
    """The code of an answer: what stands between the fences, or from `def` on."""
    fenced = re.search(r"```(?:python)?\n(.*?)```", answer, re.DOTALL)
    return fenced.group(1) if fenced else answer[max(answer.find("def "), 0):]


def computes(name: str, expected: dict[int, int]) -> Check:
    """A check that the answer's function gives the expected value for each x."""
    def check(answer: str) -> bool:
        try:
            return all(call(code_block(answer), name, x) == value for x, value in expected.items())
        except UnsafeCode:
            return False
    return check


def function(rng: Random) -> Task:
    """Write a Python function of one variable."""
    name = rng.choice(FUNCTION_NAMES) if rng.random() < 0.7 else invented(rng)
    n = rng.randint(2, 30)
    sign, job = rng.choice((("+", "adds {n} to x"), ("-", "subtracts {n} from x"), ("*", "multiplies x by {n}")))
    ask = rng.choice(("Write a Python function {f} that {j}.", "Please code a function {f} that {j}.",
                      "I need a Python function called {f} that {j}.", "Define a function named {f} that {j}."))
    expected = {x: _OPERATIONS[{"+": ast.Add, "-": ast.Sub, "*": ast.Mult}[sign]](x, n) for x in (0, 1, 7)}
    answer = f"Here it is:\n```python\ndef {name}(x):\n    return x {sign} {n}\n```"
    return Task(ask.format(f=name, j=job.format(n=n)), answer, f"function {name} {sign} {n}",
                computes(name, expected), cased=True)


def _prints(code: str, result: int, rng: Random) -> Task:
    ask = rng.choice(("What does this Python code print?\n{c}", "What is the output of this code?\n{c}",
                      "Run this in your head. What is printed?\n{c}"))
    return Task(ask.format(c=code), f"It prints {result}.", f"prints {code}", counts(result), cased=True)


def item(rng: Random) -> Task:
    """Which element of a list is printed?"""
    values = rng.sample(range(1, 10), 3)
    place = rng.randrange(3)
    return _prints(f"a = {values}\nprint(a[{place}])", values[place], rng)


def variable(rng: Random) -> Task:
    """Follow the value of a variable through two lines."""
    first, second = rng.sample("abcnxyz", 2)
    x, y = rng.randint(1, 12), rng.randint(1, 9)
    return _prints(f"{first} = {x}\n{second} = {first} + {y}\nprint({second})", x + y, rng)


def extreme(rng: Random) -> Task:
    """What is the largest or smallest value of a list?"""
    values = rng.sample(range(1, 10), 3)
    call_name, result = rng.choice((("max", max(values)), ("min", min(values))))
    return _prints(f"print({call_name}({values}))", result, rng)
