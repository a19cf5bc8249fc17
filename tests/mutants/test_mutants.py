"""The list of mutants fits the package as it is now; `run.py` beside this file runs the tests on them."""

from __future__ import annotations

import ast
import shutil

import pytest
from families import ROOT
from mutant_list import MUTANTS
from run import apply, runs


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mutant_changes_one_place_and_stays_a_program(mutant, tmp_path):
    path = tmp_path / mutant.file
    path.parent.mkdir(parents=True)
    shutil.copy(ROOT / "hf_specdec" / mutant.file, path)
    before = ast.dump(ast.parse(path.read_text(encoding="utf-8")))
    apply(mutant, tmp_path)
    assert ast.dump(ast.parse(path.read_text(encoding="utf-8"))) != before
    assert all((ROOT / "tests" / tests).exists() for tests in mutant.tests)
    assert runs(mutant)


def test_there_are_enough_of_them_and_no_two_are_called_the_same():
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS) >= 25


def test_a_text_that_is_not_there_once_is_an_error(tmp_path):
    mutant = MUTANTS[0]
    path = tmp_path / mutant.file
    path.parent.mkdir(parents=True)
    for text in ("", 2 * mutant.old):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match="must be there once"):
            apply(mutant, tmp_path)
