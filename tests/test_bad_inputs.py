"""Each bad input is refused with an error that says what was wrong, and the table of the documentation says the same."""

from pathlib import Path

import pytest
from bad_inputs import CASES, Case, Files, row

TABLE = Path(__file__).parents[1] / "docs" / "results" / "bad_inputs.txt"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(tmp_path_factory.mktemp("files"))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES, ids=[case.title for case in CASES])
def test_bad_inputs_are_refused(case: Case, files: Files) -> None:
    with pytest.raises(case.error) as refused:
        case.do(files)
    assert case.says in str(refused.value)
    assert not (files / "boom").exists(), "code of the file was run"
    assert row(case, files) in TABLE.read_text().splitlines()


def test_every_documented_input_is_tried() -> None:
    assert len(TABLE.read_text().splitlines()) == len(CASES) + 2
