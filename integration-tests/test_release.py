"""A release changes the version and the changelog of one package, or says in one sentence why it does not."""

import re
import shutil
import sys
import tomllib
import zipfile
from datetime import date
from pathlib import Path

import pytest
from packaging.version import Version
from release import changelog
from release.__main__ import main
from release.package import needed_by, packages
from release.plan import git, make_plan

ROOT = Path(__file__).parents[1]
DAY = date(2026, 11, 26)

INIT = '"""A package."""\n\n__version__ = "VERSION"\n'
PYPROJECT = """
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "NAME"
dynamic = ["version"]
description = "A package."
readme = "README.md"
requires-python = ">=3.11"
license = "Apache-2.0"
dependencies = [DEPENDENCIES]

[tool.hatch.version]
path = "src/MODULE/__init__.py"

[tool.hatch.build.targets.wheel]
packages = ["src/MODULE"]
"""
CHANGES = "# Changelog\n\n## Unreleased\n\n- Something new.\n\n## 0.2.0 (2026-01-31)\n\n- Something old.\n"


def _commit(root: Path) -> None:
    git(root, "add", "--all")
    git(root, "-c", "user.name=t", "-c", "user.email=t@t.example", "commit", "--quiet", "--message", "all of it")


def _package(root: Path, name: str, version: str, *dependencies: str) -> None:
    module = name.replace("-", "_")
    folder = root / "packages" / name
    (folder / "src" / module).mkdir(parents=True)
    (folder / "src" / module / "__init__.py").write_text(INIT.replace("VERSION", version))
    listed = ", ".join(f'"{one}"' for one in dependencies)
    text = PYPROJECT.replace("NAME", name).replace("MODULE", module).replace("DEPENDENCIES", listed)
    (folder / "pyproject.toml").write_text(text)
    (folder / "README.md").write_text(f"# {name}\n")
    (folder / "CHANGELOG.md").write_text(CHANGES)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """Two packages, of which ``up`` needs ``low``."""
    root = tmp_path / "repository"
    _package(root, "low", "0.2.0")
    _package(root, "up", "0.2.0", "low>=0.2,<0.3")
    (root / "LICENSE").write_text("Do what you like.\n")
    (root / ".gitignore").write_text("dist/\n")
    git(root.parent, "init", "--quiet", str(root))
    _commit(root)
    return root


def test_the_next_version_goes_into_the_package_and_its_changelog(repository):
    plan = make_plan(repository, "up", None, DAY)
    assert plan.version == Version("0.2.1")
    assert plan.tag == "up-v0.2.1"
    assert plan.changes == "- Something new."
    assert plan.edits == {
        repository / "packages/up/src/up/__init__.py": INIT.replace("VERSION", "0.2.1"),
        repository / "packages/up/CHANGELOG.md": (
            "# Changelog\n\n## Unreleased\n\n## 0.2.1 (2026-11-26)\n\n- Something new.\n\n"
            "## 0.2.0 (2026-01-31)\n\n- Something old.\n"
        ),
    }
    assert [one.name for one in plan.siblings] == ["low"]
    assert plan.unreleased == []
    assert git(repository, "status", "--porcelain") == ""


def test_a_version_that_was_never_released_is_the_first(repository):
    file = repository / "packages/low/CHANGELOG.md"
    file.write_text("# Changelog\n\n## Unreleased\n\n- Everything.\n")
    _commit(repository)
    assert make_plan(repository, "low", None, DAY).version == Version("0.2.0")
    assert [one.name for one in make_plan(repository, "up", None, DAY).unreleased] == ["low"]


def test_versions_are_compared_as_versions(repository):
    assert make_plan(repository, "up", "0.10.0", DAY).version > make_plan(repository, "up", "0.9.0", DAY).version
    assert make_plan(repository, "up", "0.3.0rc1", DAY).version == Version("0.3.0rc1")


def _edit(name: str, old: str, new: str):
    def edit(root: Path) -> None:
        file = root / "packages" / name
        text = file.read_text()
        assert old in text
        file.write_text(text.replace(old, new))
        _commit(root)

    return edit


def _dirty(root: Path) -> None:
    (root / "packages/up/new-file").write_text("not committed")


REFUSALS = {
    "a package that is none": (None, ["middle"], "no package 'middle'; expected one of low, up"),
    "a tree with changes": (_dirty, ["up"], r"working tree has changes \(packages/up/new-file\)"),
    "the released version": (None, ["up", "--version", "0.2.0"], "0.2.0 is not newer than 0.2.0"),
    "an older version": (None, ["up", "--version", "0.1.9"], "0.1.9 is not newer than 0.2.0"),
    "a version below the package's": (
        _edit("up/src/up/__init__.py", "0.2.0", "0.4.0"),
        ["up", "--version", "0.3.0"],
        "0.3.0 is lower than __version__, 0.4.0",
    ),
    "what is no version": (None, ["up", "--version", "next"], "'next' is no version"),
    "a local version": (None, ["up", "--version", "0.3.0+mine"], "has a local part"),
    "a version whose tag exists": (
        lambda root: git(root, "tag", "up-v0.3.0"),
        ["up", "--version", "0.3.0"],
        "tag up-v0.3.0 exists",
    ),
    "no changes": (_edit("up/CHANGELOG.md", "- Something new.\n\n", ""), ["up"], "section '## Unreleased' is empty"),
    "no section of changes": (
        _edit("up/CHANGELOG.md", "## Unreleased\n\n- Something new.\n\n", ""),
        ["up"],
        "no section '## Unreleased'",
    ),
    "a heading without a date": (
        _edit("up/CHANGELOG.md", "0.2.0 (2026-01-31)", "0.2.0"),
        ["up"],
        "heading '0.2.0' is neither",
    ),
    "a dependency that does not exist yet": (
        _edit("up/pyproject.toml", "low>=0.2,<0.3", "low>=0.5"),
        ["up"],
        "up requires low>=0.5, but low is 0.2.0",
    ),
    "a version that a dependent does not accept": (
        None,
        ["low", "--version", "0.3.0"],
        "up requires low<0.3,>=0.2, which 0.3.0 is not",
    ),
    "a version in two places": (
        _edit("up/pyproject.toml", 'dynamic = ["version"]', 'version = "0.2.0"'),
        ["up"],
        "gives a version too",
    ),
    "two lines of a version": (
        _edit("up/src/up/__init__.py", "__version__", '__version__ = "0.1.0"\n__version__'),
        ["up"],
        "has 2 lines such as",
    ),
}


@pytest.mark.parametrize("refusal", REFUSALS)
def test_a_refusal_is_a_sentence_and_changes_nothing(refusal, repository):
    spoil, arguments, sentence = REFUSALS[refusal]
    if spoil is not None:
        spoil(repository)
    before = git(repository, "status", "--porcelain"), git(repository, "diff")
    with pytest.raises(SystemExit, match=sentence) as stopped:
        main(arguments, repository)
    text = str(stopped.value.code)
    assert text.endswith(".")
    assert "\n" not in text
    assert (git(repository, "status", "--porcelain"), git(repository, "diff")) == before
    assert not (repository / "dist").exists()


def test_a_dry_run_shows_the_changes_and_makes_none(repository, capsys):
    main(["up", "--version", "0.3.0", "--dry-run"], repository)
    printed = capsys.readouterr().out
    assert "up 0.3.0" in printed
    assert "- Something new." in printed
    assert "changes packages/up/src/up/__init__.py, packages/up/CHANGELOG.md." in printed
    assert "first" not in printed
    assert git(repository, "status", "--porcelain") == ""
    assert not (repository / "dist").exists()


def test_a_dry_run_of_a_first_release_names_only_what_changes_and_what_comes_first(repository, capsys):
    for name in ("low", "up"):
        (repository / f"packages/{name}/CHANGELOG.md").write_text("# Changelog\n\n## Unreleased\n\n- Everything.\n")
    _commit(repository)
    main(["up", "--dry-run"], repository)
    printed = capsys.readouterr().out
    assert "up 0.2.0 changes packages/up/CHANGELOG.md." in printed
    assert "Release low 0.2.0 first" in printed


def test_a_changelog_keeps_every_section():
    text = changelog.with_release(CHANGES, Version("1.0"), DAY)
    assert changelog.sections(text) == {
        "Unreleased": "",
        "1.0 (2026-11-26)": "- Something new.",
        "0.2.0 (2026-01-31)": "- Something old.",
    }
    assert changelog.released(text) == [Version("1.0"), Version("0.2.0")]


def test_a_wheel_that_does_not_import_is_no_release(repository, capfd):
    _edit("low/src/low/__init__.py", '"""A package."""', "import a_module_that_is_missing")(repository)
    with pytest.raises(SystemExit, match=r"smoke.py low 0.2.1 ended with status 1"):
        main(["low", "--offline"], repository)
    assert "a_module_that_is_missing" in capfd.readouterr().err
    assert git(repository, "status", "--porcelain") == ""
    assert not (repository / "dist").exists()


@pytest.mark.parametrize(
    ("during", "sentence"),
    [
        (lambda root: (root / "packages/low/CHANGELOG.md").write_text("my edit"), "working tree has changes"),
        (_edit("low/src/low/__init__.py", '"""A package."""', '"""Better."""'), "commit was made during the build"),
    ],
    ids=["edit", "commit"],
)
def test_what_is_changed_during_the_build_is_kept(during, sentence, repository, monkeypatch):
    def build(plan, build):
        during(repository)
        return []

    monkeypatch.setattr("release.__main__.make", build)
    with pytest.raises(SystemExit, match=sentence):
        main(["low", "--offline"], repository)
    assert not (repository / "dist").exists()
    assert "0.2.1" not in (repository / "packages/low/src/low/__init__.py").read_text()
    assert "0.2.1" not in (repository / "packages/low/CHANGELOG.md").read_text()


def test_packages_of_this_repository_are_in_order():
    every = packages(ROOT)
    assert set(every) == {"wan-model", "wan-data", "wan-train", "wan-infer"}
    assert [one.name for one in needed_by(every["wan-train"], every)] == ["wan-model", "wan-data"]
    assert [one.name for one in needed_by(every["wan-infer"], every)] == ["wan-model"]
    for package in every.values():
        assert changelog.released(package.changelog.read_text(encoding="utf-8")) is not None
        for requirement in package.requirements_on(set(every)):
            assert requirement.specifier.contains(every[requirement.name].version), f"{package.name}: {requirement}"
        bounded = {requirement.name for requirement in package.requirements_on(set(every)) if requirement.specifier}
        assert bounded == {one.name for one in needed_by(package, every)}, package.name


def test_all_packages_show_their_readme_on_an_index_in_the_same_way():
    settings = [
        tomllib.loads((ROOT / "packages" / name / "pyproject.toml").read_text())["tool"]["hatch"]["metadata"]
        for name in packages(ROOT)
    ]
    assert settings == settings[:1] * 4


def test_wan_infer_is_built_and_tried(tmp_path, capfd):
    root = tmp_path / "repository"
    tracked_or_new = ["--cached", "--others", "--exclude-standard"]
    needed = ["packages/wan-infer", "packages/wan-model", "LICENSE", ".gitignore"]
    for name in git(ROOT, "ls-files", "-z", *tracked_or_new, *needed).split("\0"):
        if name and (ROOT / name).is_file():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, root / name)
    git(root, "init", "--quiet")
    history = root / "packages/wan-infer/CHANGELOG.md"
    history.write_text("# Changelog of wan-infer\n\n## Unreleased\n\n- A change.\n")
    _commit(root)

    main(["wan-infer", "--version", "7.8.9", "--offline"], root)
    printed = capfd.readouterr().out
    # Its description, which a package index shows, leads to no file beside the README, and is all of it.
    (wheel,) = (root / "dist/wan-infer-7.8.9").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        description = archive.read("wan_infer-7.8.9.dist-info/METADATA").decode().partition("\n\n")[2]
    assert [link for link in re.findall(r"\]\(([^)]*)\)", description) if not link.startswith("https://")] == []
    readme = (root / "packages" / "wan-infer" / "README.md").read_text()
    assert len(description.splitlines()) == len(readme.splitlines())
    assert "wan-infer 7.8.9 imports from its wheel, and so do wan-infer --help and --version." in printed
    assert "git tag -a wan-infer-v7.8.9" in printed
    assert "Release wan-model" in printed
    (upload,) = re.findall(r"- Upload: (\S+) -m twine upload dist/wan-infer-7\.8\.9/\*", printed)
    assert (root / upload).samefile(sys.executable)
    built = sorted(path.name for path in (root / "dist/wan-infer-7.8.9").iterdir())
    assert built == ["wan_infer-7.8.9-py3-none-any.whl", "wan_infer-7.8.9.tar.gz"]
    changed = git(root, "status", "--porcelain").split()[1::2]
    assert changed == ["packages/wan-infer/CHANGELOG.md", "packages/wan-infer/src/wan_infer/__init__.py"]
    assert packages(root)["wan-infer"].version == Version("7.8.9")
    assert changelog.released(history.read_text()) == [Version("7.8.9")]
