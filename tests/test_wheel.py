"""The package as users get it: a wheel that works without the repository."""

import json
import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow


def run(*command: object, **options: object) -> str:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def files(repo, tmp_path_factory) -> list[Path]:
    """The wheel, and the source distribution that it was built from."""
    pytest.importorskip("build")
    pytest.importorskip("hatchling")
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, repo)
    return sorted(out.iterdir())


def test_the_files_pass_the_checks_of_the_package_index(files) -> None:
    pytest.importorskip("twine")
    assert [file.suffix for file in files] == [".whl", ".gz"]
    run(sys.executable, "-m", "twine", "check", "--strict", *files)


def test_a_merge_from_the_wheel_alone(files, flags, recipe_file, tmp_path) -> None:
    """In an environment that has the dependencies of this one, but neither the checkout nor an editable install."""
    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv/bin/python"
    (site,) = (tmp_path / "venv").glob("lib/*/site-packages")
    run(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index", files[0])
    # Lines of path files of another environment are not followed: an editable install of it is not seen.
    (site / "dependencies.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
    apart = {"cwd": tmp_path, "env": {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}}
    place = run(python, "-c", "import tmjax; print(tmjax.__file__)", **apart)
    assert Path(place.strip()).is_relative_to(site)
    command = ["merge", recipe_file, *flags, "--alpha", "0.05", "--out", tmp_path / "run", "--json"]
    manifest = json.loads(run(tmp_path / "venv/bin/tmjax", *command, **apart))
    assert manifest["evaluation"]["merged"]["bits_per_byte"] > 1
    assert (tmp_path / "run/merged/model.safetensors").is_file()
