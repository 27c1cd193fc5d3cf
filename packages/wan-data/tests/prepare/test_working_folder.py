"""Commands run in a folder of downloaded clips, which may hold Python files: nothing there is imported."""

import sys
from pathlib import Path

import pytest

from wan_model.testing.processes import Job

# As pip writes it: unlike python -c and python -m, it is started from a folder that is not the working folder.
CONSOLE_SCRIPT = "import sys\nfrom wan_data.cli import main\nif __name__ == '__main__':\n    sys.exit(main())\n"
HIJACK = "open({marker!r}, 'a').write(__name__ + ' ')\n"


@pytest.fixture
def hijacked(clip, tmp_path):
    """A folder of clips with a module of every name that a process imports early."""
    folder, marker = tmp_path / "clips", tmp_path / "imported"
    for index in range(2):
        clip(folder / f"{index}.mkv", range(20 * index, 20 * index + 9))
        (folder / f"{index}.txt").write_text("A clip.")
    for name in {*sys.stdlib_module_names, "av", "diffusers", "numpy", "torch", "wan_data", "wan_model"}:
        (folder / f"{name}.py").write_text(HIJACK.format(marker=str(marker)))
    return folder, marker


def test_no_process_of_prepare_imports_from_the_working_folder(hijacked, tiny_model, tmp_path):
    folder, marker = hijacked
    script, place = tmp_path / "bin" / "wan-data", tmp_path / "place"
    place.mkdir()
    script.parent.mkdir()
    script.write_text(CONSOLE_SCRIPT)
    options = ["--area", "1536", "--frames", "9", "--num-decoders", "1", "--device", "cpu", "--num-processes", "2"]
    command = [sys.executable, script, "prepare", "--video-folder", ".", "--output-folder", place / "out"]
    job = Job.start([*map(str, command), "--model", str(tiny_model), *options], place, cwd=folder, PYTHONSAFEPATH="")
    try:
        code = job.code(300.0)
    finally:
        job.end()
    assert not marker.exists(), f"imported from the working folder: {Path(marker).read_text()}"
    assert code == 0, job.errors.read_text()
