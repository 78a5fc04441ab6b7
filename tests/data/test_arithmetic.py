"""The bundled arithmetic data: made again byte for byte, right where it says so, wrong in one known line elsewhere."""

import importlib.util
import json
import re
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

FOLDER = Path(__file__).parents[2] / "data/arithmetic"
FILES = sorted(file.relative_to(FOLDER).as_posix() for file in FOLDER.glob("*/*.jsonl"))
EQUATION = re.compile(r"(\d+)((?: [-+*] \d+)+) = (\d+)")


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate_arithmetic", FOLDER / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def rows(file: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (FOLDER / file).read_text().splitlines()]


def text(row: dict[str, Any], column: str) -> str:
    (message,) = row[column]
    assert message["role"] == ("user" if column == "prompt" else "assistant")
    return message["content"]


def expression(row: dict[str, Any]) -> str:
    found = re.search(r"\d+(?: [-+*] \d+)+", text(row, "prompt"))
    assert found is not None
    return found[0]


def canonical(shown: str) -> str:
    """Independent of the generator: a multiset of operands for each operator, in the order in which they act."""
    if "*" in shown:
        product, *last = re.split(r" (?=[-+])", shown)
        return str(sorted(map(int, product.split(" * ")))) + "".join(last)
    signed = re.findall(r"([-+]?) ?(\d+)", shown)
    return str(sorted((sign == "-", int(number)) for sign, number in signed))


def value(shown: str) -> int:
    """The value of an expression of products of two numbers, sums and differences."""
    total, sign = 0, 1
    for term in re.split(r" ([-+]) ", shown):
        if term in "+-":
            sign = 1 if term == "+" else -1
            continue
        product = 1
        for factor in term.split(" * "):
            product *= int(factor)
        total += sign * product
    return total


def lines(solution: str) -> tuple[list[str], int]:
    *equations, last = solution.split("\n")
    assert last.startswith("Answer: ")
    return equations, int(last.removeprefix("Answer: "))


def test_the_committed_files_are_what_the_generator_makes(tmp_path: Path) -> None:
    command = [sys.executable, str(FOLDER / "generate.py"), "--output", str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True)
    made = sorted(file.relative_to(tmp_path).as_posix() for file in tmp_path.glob("*/*.jsonl"))
    assert made == FILES
    assert [f for f in FILES if (tmp_path / f).read_bytes() != (FOLDER / f).read_bytes()] == []
    assert sum((FOLDER / f).stat().st_size for f in FILES) < 5_000_000


def test_splits_share_no_problem_under_any_order_or_wording() -> None:
    seen: dict[str, set[str]] = {"train": set(), "validation": set(), "test": set()}
    for file in FILES:
        seen[Path(file).stem] |= {canonical(expression(row)) for row in rows(file)}
    assert len(seen["train"]) > 4000
    assert not seen["train"] & seen["validation"]
    assert not seen["train"] & seen["test"]
    assert not seen["validation"] & seen["test"]


@pytest.mark.parametrize(
    ("shown", "other"), [("47 + 85", "85 + 47"), ("23 + 45 + 67", "67 + 23 + 45"), ("6 * 47", "47 * 6")]
)
def test_order_of_operands_does_not_change_the_canonical_form(shown: str, other: str) -> None:
    assert canonical(shown) == canonical(other)


@pytest.mark.parametrize("file", [f for f in FILES if not f.endswith("train.jsonl")])
def test_held_out_files_ask_each_problem_once(file: str) -> None:
    asked = [canonical(expression(row)) for row in rows(file)]
    assert len(set(asked)) == len(asked)


@pytest.mark.parametrize("file", FILES)
def test_levels_come_in_turn(file: str) -> None:
    levels = {"mixed": [1, 2, 3, 4], "sums": [1], "easy_sums": [0]}.get(file.split("/")[0], [1, 2, 3, 4, 5])
    assert [row["level"] for row in rows(file)] == levels * (len(rows(file)) // len(levels))


@pytest.mark.parametrize("file", [f for f in FILES if f.startswith(("problems", "sums", "easy_sums"))])
def test_answers_are_right(file: str) -> None:
    assert [row["answer"] for row in rows(file)] == [str(value(expression(row))) for row in rows(file)]


@pytest.mark.parametrize("file", [f for f in FILES if f.startswith("sft")])
def test_solutions_are_right_line_by_line(file: str) -> None:
    for row in rows(file):
        equations, answer = lines(text(row, "completion"))
        assert answer == value(expression(row))
        for equation in equations:
            assert EQUATION.fullmatch(equation), equation
            left, right = equation.split(" = ")
            assert value(left) == int(right)


def test_solutions_of_mixed_quality_forget_a_carry_more_often_than_not() -> None:
    right = forgetful = 0
    for row in rows("mixed/train.jsonl"):
        equations, answer = lines(text(row, "completion"))
        false = [e for e in equations if value(e.split(" = ")[0]) != int(e.split(" = ")[1])]
        assert (answer == value(expression(row))) == (not false) == (row["error"] is None)
        sums = [e for e in equations if "*" not in e]
        with_carry = [e for e in sums if sum(int(n) % 10 for n in _operands(e)) >= 10]
        if row["error"]:
            left, shown = with_carry[0].split(" = ")
            ones = sum(int(n) % 10 for n in _operands(with_carry[0]))
            assert false == [with_carry[0]]
            assert value(left) - int(shown) == ones // 10 * 10
            forgetful += 1
        else:
            right += bool(with_carry)
    assert 0.57 < forgetful / (forgetful + right) < 0.63


@pytest.mark.parametrize("file", [f for f in FILES if f.startswith("pairs")])
def test_a_rejected_solution_has_one_wrong_line_and_carries_its_result_on(file: str, generator: ModuleType) -> None:
    for row in rows(file):
        right, answer = lines(text(row, "chosen"))
        wrong, wrong_answer = lines(text(row, "rejected"))
        at = row["wrong_step"] - 1
        assert answer == value(expression(row)) != wrong_answer
        assert len(right) == len(wrong)
        assert "-" not in re.sub(r" - ", " ", text(row, "rejected")), "no negative number"
        assert wrong[:at] == right[:at]
        assert wrong[at] != right[at]
        assert int(wrong[-1].split(" = ")[1]) == wrong_answer
        false = [index for index, line in enumerate(wrong) if value(line.split(" = ")[0]) != int(line.split(" = ")[1])]
        assert false == ([] if row["error"] == "misread_number" else [at])
        # From the wrong line on, each line is the right one with every use of the wrong result replaced by it.
        results = {line.split(" = ")[1]: new.split(" = ")[1] for line, new in zip(right, wrong, strict=True)}
        for index in range(at + 1, len(wrong)):
            operands = zip(_operands(right[index]), _operands(wrong[index]), strict=True)
            assert all(old == new or results.get(old) == new for old, new in operands)


def _operands(equation: str) -> list[str]:
    return re.findall(r"\d+", equation.split(" = ")[0])


def test_every_kind_of_error_in_every_position_is_there() -> None:
    pairs = rows("pairs/train.jsonl")
    kinds = {"off_by_one", "off_by_ten", "swapped_digits", "misread_number", "forgotten_carry"}
    assert {row["error"] for row in pairs} == kinds
    assert {row["wrong_step"] for row in pairs} == {1, 2, 3, 4}


def test_the_readme_states_the_counts() -> None:
    readme = (FOLDER / "README.md").read_text()
    for table in ("problems", "sums", "easy_sums", "sft", "mixed", "pairs"):
        counts = [
            f"{len(rows(f))}" for f in (f"{table}/{s}.jsonl" for s in ("train", "validation", "test")) if f in FILES
        ]
        found = re.search(rf"\| `{table}/`(?: \(level \d\))? \|([\d |]+)\| `prompt`", readme)
        assert found is not None
        assert found[1].replace("|", " ").split() == counts


def test_a_split_that_has_too_few_problems_is_an_error_and_not_an_endless_search(generator: ModuleType) -> None:
    with pytest.raises(ValueError, match="too few"):
        generator.fresh(lambda draw: generator.Problem(1, "k", "1 + 1", "1+1", ()), "test", {"1+1"}, generator.Draw(0))


def test_answers_are_whole_and_not_negative() -> None:
    tables = ("problems", "sums", "easy_sums")
    answers = [Fraction(row["answer"]) for file in FILES if file.startswith(tables) for row in rows(file)]
    assert min(answers) >= 0
    assert all(answer.denominator == 1 for answer in answers)
