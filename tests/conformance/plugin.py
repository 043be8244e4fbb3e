"""Pytest plugin: run Stable-Baselines3's tests with one of its algorithms replaced by one of this package.

Configured by environment variables, because it has to act before the tests are imported:

- ``CONFORMANCE_ALGO``: the class of ``sb3_rfm`` to put in,
- ``CONFORMANCE_AS``: the class of ``stable_baselines3`` that it replaces,
- ``CONFORMANCE_EXCEPTIONS``: the file of tests that are not run, or with other arguments,
- ``CONFORMANCE_REPORT``: where to write the results, as JSON.
"""

import fnmatch
import functools
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
            lambda: {"passed": 0, "failed": [], "skipped": [], "deselected": [], "with_arguments": []}
        )
        self.stale: list[str] = []

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        rules, changes = rules_of("deselected"), rules_of("with_arguments")
        used = set()
        kept, dropped = [], []
        for item in items:
            if not concerns_algorithm(item):
                dropped.append(item)
                continue
            name = item.nodeid.rpartition("/")[2]
            if (rule := matching(changes, name)) is not None:
                used.add(rule["test"])
                self.modules[module_of(name)]["with_arguments"].append([name, rule["reason"]])
            rule = matching(rules, name)
            if rule is None:
                kept.append(item)
                continue
            used.add(rule["test"])
            self.modules[module_of(name)]["deselected"].append([name, rule["reason"]])
            dropped.append(item)
        self.stale = [rule["test"] for rule in rules + changes if rule["test"] not in used]
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


@pytest.fixture(autouse=True)
def arguments_of_exception(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the algorithm take the arguments that the exceptions name for this test, where the test passes none of its own."""
    rule = matching(rules_of("with_arguments"), request.node.nodeid.rpartition("/")[2])
    if rule is not None:
        default = ALGO.__init__

        @functools.wraps(default)
        def init(self: BaseAlgorithm, *args: Any, **kwargs: Any) -> None:
            default(self, *args, **rule["arguments"] | kwargs)

        monkeypatch.setattr(ALGO, "__init__", init)


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


def rules_of(kind: str) -> list[dict[str, Any]]:
    """The exceptions of one kind that hold for the replaced class."""
    exceptions = tomllib.loads(Path(os.environ["CONFORMANCE_EXCEPTIONS"]).read_text())
    return [rule for rule in exceptions[kind] if rule.get("as", ALIAS) == ALIAS]


def matching(rules: list[dict[str, Any]], name: str) -> dict[str, Any] | None:
    """The first rule that a test's name matches."""
    return next((rule for rule in rules if fnmatch.fnmatchcase(name, pattern(rule["test"]))), None)


def pattern(test: str) -> str:
    """The glob of a rule: ``{algo}`` stands for the algorithm's name, brackets stand for themselves."""
    return test.replace("{algo}", ALGO.__name__).replace("[", "[[]")


def module_of(name: str) -> str:
    return name.partition("::")[0].removesuffix(".py")
