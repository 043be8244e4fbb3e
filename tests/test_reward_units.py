"""Learning with rewards in other units: the example."""

import csv
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import reward_units


def test_each_factor_is_evaluated_at_each_step(tmp_path: Path) -> None:
    arguments = ["--factors", "1", "100", "--steps", "4", "--evaluations", "2", "--out", str(tmp_path)]
    with reward_units.main(arguments).open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["factor"], row["step"]) for row in rows] == [("1.0", "2"), ("1.0", "4"), ("100.0", "2"), ("100.0", "4")]
    # Nothing is learned in four steps: in the task's own unit, the untrained policies of one seed have one return.
    assert len({row["return"] for row in rows}) == 1


def test_fewer_steps_than_evaluations(tmp_path: Path) -> None:
    with reward_units.main(["--factors", "1", "--steps", "2", "--evaluations", "10", "--out", str(tmp_path)]).open() as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["1", "2"]
