"""Pytest plugin: run Stable-Baselines3's tests with one of its algorithms replaced by one of this package.

Configured by environment variables, because it has to act before the tests are imported:

- ``CONFORMANCE_ALGO``: the class of ``sb3_rfm`` to put in,
- ``CONFORMANCE_AS``: the class of ``stable_baselines3`` that it replaces,
- ``CONFORMANCE_EXCEPTIONS``: the file of tests that are not run,
- ``CONFORMANCE_REPORT``: where to write the results, as JSON.
"""

import fnmatch
import inspect
import json
import os
import sys
from collections import defaultdict
from pathlib import Path
from types import CodeType
from typing import Any

import pytest
import stable_baselines3
from stable_baselines3.common.base_class import BaseAlgorithm

import sb3_rfm

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ALIAS = os.environ["CONFORMANCE_AS"]
ALGO: type[BaseAlgorithm] = getattr(sb3_rfm, os.environ["CONFORMANCE_ALGO"])

setattr(stable_baselines3, ALIAS, ALGO)


class Report:
    """Outcomes by test module."""

    def __init__(self) -> None:
        self.modules: dict[str, dict[str, Any]] = defaultdict(
            lambda: {"passed": 0, "failed": [], "skipped": [], "deselected": []}
        )
        self.stale: list[str] = []

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        exceptions = tomllib.loads(Path(os.environ["CONFORMANCE_EXCEPTIONS"]).read_text())
        rules = [rule for rule in exceptions["deselected"] if rule.get("as", ALIAS) == ALIAS]
        used = set()
        kept, dropped = [], []
        for item in items:
            if not concerns_algorithm(item):
                dropped.append(item)
                continue
            name = item.nodeid.rpartition("/")[2]
            rule = next((rule for rule in rules if fnmatch.fnmatchcase(name, pattern(rule["test"]))), None)
            if rule is None:
                kept.append(item)
                continue
            used.add(rule["test"])
            self.modules[module_of(name)]["deselected"].append([name, rule["reason"]])
            dropped.append(item)
        self.stale = [rule["test"] for rule in rules if rule["test"] not in used]
        items[:] = kept
        config.hook.pytest_deselected(items=dropped)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        name = report.nodeid.rpartition("/")[2]
        module = self.modules[module_of(name)]
        if report.failed:
            module["failed"].append([name, str(report.longrepr).strip().splitlines()[-1]])
        elif report.skipped:
            module["skipped"].append([name, str(report.longrepr[-1]).removeprefix("Skipped: ")])  # type: ignore[index]
        elif report.when == "call":
            module["passed"] += 1

    def pytest_sessionfinish(self) -> None:
        Path(os.environ["CONFORMANCE_REPORT"]).write_text(json.dumps({"modules": self.modules, "stale": self.stale}))


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Report())


def concerns_algorithm(item: pytest.Item) -> bool:
    """Whether a test exercises the replaced class: as its parameter, or by naming it where it has no such parameter."""
    parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
    classes = [value for value in parameters if inspect.isclass(value) and issubclass(value, BaseAlgorithm)]
    if classes:
        return ALGO in classes
    return ALIAS in names(item.function.__code__)  # type: ignore[attr-defined]


def names(code: CodeType) -> set[str]:
    """Global names used in a function and in the functions inside it."""
    found = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            found |= names(constant)
    return found


def pattern(test: str) -> str:
    """The glob of a rule: ``{algo}`` stands for the algorithm's name, brackets stand for themselves."""
    return test.replace("{algo}", ALGO.__name__).replace("[", "[[]")


def module_of(name: str) -> str:
    return name.partition("::")[0].removesuffix(".py")
