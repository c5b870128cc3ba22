"""Nothing of the user's is lost: what is replaced, where outputs may lie, who may write, what a run remembers."""

import dataclasses
import errno
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import yaml
from helpers import SPEC, stored

from tmjax import cli
from tmjax.checkpoints.hub import copy_companions
from tmjax.errors import InputError
from tmjax.files import atomic
from tmjax.files.atomic import atomic_directory
from tmjax.files.lock import OutputLock, command, lock_files
from tmjax.files.owned import RECORD
from tmjax.recipes.base import dump_recipe, read_recipe
from tmjax.recipes.merge import Recipe
from tmjax.runs.directory import RunDirectory
from tmjax.runs.hashes import sha256_checkpoint
from tmjax.runs.manifest import Manifest, read_manifest
from tmjax.transfer.recipe import build_recipe
from tools.make_checkpoint import make_checkpoint

KEY = {"recipe": "1"}
HOLDER = """
import sys, time
from pathlib import Path
from tmjax.files.lock import OutputLock, command
with command(["tmjax", "merge"]), OutputLock(Path(sys.argv[1])):
    print(1, flush=True)
    time.sleep(60)
"""


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    return make_checkpoint(tmp_path / "model", "llama", SPEC)


def run(capsys, *arguments: object) -> tuple[int, str]:
    code = cli.run([*map(str, arguments)])
    _, said = capsys.readouterr()
    assert "Traceback" not in said
    return code, said


def tree(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


# Locks.


def test_the_second_is_told_who_holds_an_output(tmp_path) -> None:
    out = tmp_path / "deep/er/run"
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(out)], stdout=subprocess.PIPE)
    try:
        assert holder.stdout.read(1) == b"1"
        for link in (out, tmp_path / "deep/../deep/er/run"):  # by whatever name
            with pytest.raises(InputError, match=rf"`tmjax merge` \(host .*, process {holder.pid}, since 20"):
                OutputLock(link)
    finally:
        holder.kill()
        holder.communicate()
    OutputLock(out).release()  # its death released it
    assert not lock_files(out)[0].exists()


def test_a_lock_is_counted_in_its_thread_and_refused_to_others(tmp_path) -> None:
    first, again, refused = OutputLock(tmp_path / "run"), OutputLock(tmp_path / "run"), []

    def other() -> None:
        try:
            OutputLock(tmp_path / "run")
        except InputError as error:
            refused.append(str(error))

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert len(refused) == 1
    first.release()
    first.release()
    assert lock_files(tmp_path / "run")[0].exists()
    again.release()
    assert list(tmp_path.iterdir()) == []


def test_folders_made_for_a_lock_go_with_it_and_a_command_leaves_none(tmp_path) -> None:
    with pytest.raises(InputError), command(["x"]):
        OutputLock(tmp_path / "a/b/run")
        raise InputError("refused")
    assert list(tmp_path.iterdir()) == []


def test_whoever_waited_for_a_deleted_lock_file_does_not_hold_it(tmp_path, monkeypatch) -> None:
    """The file is deleted between opening and locking it: the lock of the old one is worth nothing."""
    import fcntl

    file, flock, calls = lock_files(tmp_path / "run")[0], fcntl.flock, []

    def late(descriptor: int, operation: int) -> None:
        if not calls:
            file.unlink()
        calls.append(descriptor)
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    with OutputLock(tmp_path / "run"):
        assert len(calls) == 2 and file.exists()
        assert os.fstat(calls[-1]).st_ino == file.stat().st_ino


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch) -> None:
    import fcntl

    def unsupported(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with pytest.warns(UserWarning, match="has no locks"), OutputLock(tmp_path / "run"):
        pass


# What is replaced.


def test_overwrite_replaces_only_what_tmjax_wrote(checkpoint, tmp_path, capsys) -> None:
    out = tmp_path / "out"
    convert = ["convert", checkpoint, out, "--to", "hf"]
    assert run(capsys, *convert)[0] == 0
    (out / "notes.txt").write_text("mine")
    code, said = run(capsys, *convert, "--overwrite")
    assert code == 2 and "(notes.txt)" in said and (out / "notes.txt").read_text() == "mine"
    (out / "notes.txt").unlink()
    (out / "config.json").write_text((out / "config.json").read_text() + " ")
    code, said = run(capsys, *convert, "--overwrite")
    assert code == 2 and "(config.json)" in said  # changed by hand
    assert run(capsys, "convert", checkpoint, tmp_path / "again", "--to", "hf")[0] == 0
    assert run(capsys, "convert", checkpoint, tmp_path / "again", "--to", "hf", "--overwrite")[0] == 0
    assert stored(tmp_path / "again") == stored(checkpoint)
    code, said = run(capsys, "convert", tmp_path / "again", checkpoint.parent, "--to", "hf", "--overwrite")
    assert code == 2 and "inside the output" in said


@pytest.mark.parametrize("extra", [[], ["--overwrite"]])
def test_the_users_directory_survives_every_command(checkpoint, texts, tmp_path, capsys, extra) -> None:
    keep = tmp_path / "keep"
    theirs = keep / "model"
    shutil.copytree(checkpoint, theirs)
    (keep / "thesis.tex").write_text("years of work")
    before = tree(keep)
    for arguments in (
        ["convert", keep / "model", keep, "--to", "hf"],
        ["convert", keep / "model", keep / "model", "--to", "hf"],
        ["convert", keep / "model", keep / "model/hf", "--to", "hf"],
        ["convert", checkpoint, keep, "--to", "orbax"],
        ["evaluate", keep / "model", "--texts", texts["test"], "--out", keep],
        ["evaluate", checkpoint, "--texts", texts["test"], "--out", keep],
        ["evaluate", checkpoint, "--texts", keep / "thesis.tex", "--out", keep],
        ["merge", "--source", keep / "model", "--target", checkpoint, "--texts", texts["test"], "--out", keep],
        ["merge", "--source", checkpoint, "--target", theirs, "--texts", texts["test"], "--out", theirs / "x"],
        ["adapt", "--target", keep / "model", "--texts", texts["test"], "--out", keep, "--mode", "sft"],
        ["sweep", "--source", checkpoint, "--target", keep / "model", "--texts", texts["test"], "--valid",
         texts["valid"], "--grid", "alpha=0,0.1", "--out", keep],
        ["solvers", "--source", checkpoint, "--target", keep / "model", "--texts", texts["test"], "--out", keep],
    ):  # fmt: skip
        code, said = run(capsys, *arguments, *extra)
        assert code == 2 and said.count("tmjax: error:") == 1, (arguments, said)
        assert tree(keep) == before, arguments
    assert sorted(file.name for file in tmp_path.iterdir()) == ["keep", "model"]


def small_run(path: Path, key: dict[str, str] = KEY, *, overwrite: bool = False, content: str = "x") -> RunDirectory:
    header = Manifest(tmjax="0", seed=0, inputs={}, key=key, mesh={}, devices=1, platform="cpu")
    started = RunDirectory.start(path, "a: 1\n", header, overwrite=overwrite)

    def write(partial: Path) -> None:
        (partial / "sub").mkdir()
        (partial / "sub/weights").write_text(content)

    started.stage("fuse", content, "merged", write)
    started.stage("card", content, "merged/README.md", lambda partial: partial.write_text(content) and None)
    return started


def test_overwriting_a_run_leaves_what_is_not_the_runs(tmp_path) -> None:
    out = tmp_path / "run"
    small_run(out).close()
    small_run(out, {"recipe": "2"}, overwrite=True, content="y").close()
    assert (out / "merged/sub/weights").read_text() == "y"
    for mine in ("notes.txt", "merged/model.gguf", "merge/notes.txt", "plots/mine.png", "mine.partial"):
        (out / mine).parent.mkdir(exist_ok=True)
        (out / mine).write_text("mine")
        before = tree(out)
        with pytest.raises(InputError, match=mine.replace(".", r"\.")):
            small_run(out, {"recipe": "3"}, overwrite=True)
        assert tree(out) == before
        (out / mine).unlink()
    small_run(out, {"recipe": "3"}, overwrite=True, content="z").close()
    assert read_manifest(out)["key"] == {"recipe": "3"} and "unfinished" not in read_manifest(out)


def test_a_stage_that_is_made_again_leaves_what_is_not_its(tmp_path) -> None:
    out = tmp_path / "run"
    small_run(out).close()
    (out / "merged/model.gguf").write_text("mine")
    with pytest.raises(InputError, match=r"merged/model\.gguf"):
        small_run(out, content="other")
    assert (out / "merged/model.gguf").read_text() == "mine" and (out / "merged/sub/weights").read_text() == "x"
    (out / "mine.partial").write_text("mine")
    (out / "merged/model.gguf").unlink()
    again = small_run(out, content="other")

    def late(partial: Path) -> None:
        (out / "merged/late").write_text("mine")  # while the stage runs
        (partial / "weights").write_text("third")

    again.stage("fuse", "third", "merged", late)
    assert tree(out / "merged") == {"late": b"mine", "weights": b"third"}
    assert (out / "mine.partial").read_text() == "mine"


def test_an_edited_card_is_kept(tmp_path) -> None:
    out = tmp_path / "run"
    small_run(out).close()
    (out / "merged/README.md").write_text("my own words")
    small_run(out).close()  # nothing has changed
    assert tree(out / "merged") == {"sub/weights": b"x", "README.md": b"my own words"}
    for refused in ({"key": KEY}, {"key": {"recipe": "2"}, "overwrite": True}):
        with pytest.raises(InputError, match=r"README\.md"):
            small_run(out, content="other", **refused)
    again = small_run(out)
    again.stage("card", "other", "merged/README.md", lambda partial: partial.write_text("new facts") and None)
    assert tree(out / "merged") == {"sub/weights": b"x", "README.md": b"new facts", "README.md.old": b"my own words"}


@pytest.mark.parametrize("moment", ["before", "between", "after"])
def test_a_run_killed_while_a_stage_is_put_in_place_goes_on(tmp_path, monkeypatch, moment) -> None:
    """As if the process had died before or after the rename, or between deleting the old output and renaming."""
    out = tmp_path / "run"
    small_run(out).close()

    class Killed(BaseException):
        pass

    replace = os.replace

    def killed(old: Path, new: Path) -> None:
        if Path(new) != out / "merged":
            return replace(old, new)
        if moment == "before":
            (out / "merged/sub").mkdir(parents=True)
            (out / "merged/sub/weights").write_text("x")
        if moment == "after":
            replace(old, new)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(Killed):
            small_run(out, content="new")
    small_run(out, content="third").close()
    assert tree(out / "merged") == {"sub/weights": b"third", "README.md": b"third"}
    assert not list(out.rglob("*.partial"))


def test_a_conversion_killed_at_any_write_goes_on(checkpoint, tmp_path, monkeypatch) -> None:
    """Every rename of an overwriting conversion fails once; the next one succeeds, and nothing is left over."""
    out, replace, rename = tmp_path / "there/out", os.replace, os.rename

    class Killed(BaseException):
        pass

    for at in range(4):
        with atomic_directory(out, overwrite=True) as partial:
            (partial / "old").write_text("old")
        count = iter(range(10))

        def killed(old: Path, new: Path, count=count, at=at) -> None:
            if next(count) == at:
                raise Killed
            replace(old, new)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", killed)
            patch.setattr(os, "rename", killed)
            patch.setattr(atomic, "_discard", lambda partial: None)  # a dead process clears nothing away
            try:
                with atomic_directory(out, overwrite=True) as partial:
                    (partial / "new").write_text("new")
            except (Killed, FileExistsError):
                pass
        with atomic_directory(out, overwrite=True) as partial:
            (partial / "newer").write_text("newer")
        assert sorted(tree(out)) == [RECORD, "newer"]
        assert [file.name for file in out.parent.iterdir()] == ["out"]
    assert rename is os.rename


# Where outputs may lie.


def test_the_working_directory_as_output(checkpoint, texts, llama_dir, tmp_path, capsys, monkeypatch) -> None:
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    assert run(capsys, "convert", checkpoint, ".", "--to", "hf")[0] == 0
    assert stored(Path()) == stored(checkpoint) and os.path.samefile(".", here)
    assert run(capsys, "convert", checkpoint, ".", "--to", "hf")[0] == 2
    assert run(capsys, "convert", checkpoint, ".", "--to", "orbax", "--overwrite")[0] == 0
    assert not Path("model.safetensors").exists() and Path("tmjax.json").exists()
    Path("mine").write_text("mine")
    code, said = run(capsys, "convert", checkpoint, ".", "--to", "hf", "--overwrite")
    assert code == 2 and "(mine)" in said
    empty = tmp_path / "empty"
    empty.mkdir()
    monkeypatch.chdir(empty)
    assert run(capsys, "evaluate", llama_dir, "--texts", texts["valid"], "--out", ".")[0] == 0
    assert sorted(tree(empty)) == [RECORD, "results.json", "scores.npz"]


def test_places_that_are_no_outputs(checkpoint, tmp_path, capsys) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for out, said in (
        (tmp_path / "file", "file is a file"),
        (tmp_path / "file/below", "is not a directory"),
        (tmp_path / "dangling", "which does not exist"),
        (tmp_path / "out.partial", "names that end in .partial"),
        ("/", "output"),
    ):
        for command_line in (
            ["convert", checkpoint, out, "--to", "hf"],
            ["evaluate", checkpoint, "--texts", "x", "--out", out],
        ):
            for extra in ([], ["--overwrite"]):
                code, error = run(capsys, *command_line, *extra)
                assert code == 2 and said in error and error.count("\n") == 1, error
    assert (tmp_path / "file").read_text() == "mine" and (tmp_path / "dangling").is_symlink()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["dangling", "file", "model"]


def test_links_names_and_parents_of_outputs(checkpoint, tmp_path, capsys) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    for out in (tmp_path / "link", tmp_path / "new/deep/out", tmp_path / "mit Leerzeichen é 日本"):
        assert run(capsys, "convert", checkpoint, out, "--to", "hf")[0] == 0
        assert run(capsys, "convert", checkpoint, out, "--to", "hf", "--overwrite")[0] == 0
        assert stored(out) == stored(checkpoint)
    assert (tmp_path / "link").is_symlink()
    assert not list(tmp_path.rglob("*.partial")) and not list(tmp_path.rglob("*lock")) and not list(tmp_path.glob(".*"))


def test_a_directory_that_only_looks_unfinished_is_not_deleted(checkpoint, tmp_path, capsys) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial/mine").write_text("mine")
    code, said = run(capsys, "convert", checkpoint, tmp_path / "out", "--to", "hf")
    assert code == 2 and "out.partial" in said and (tmp_path / "out.partial/mine").read_text() == "mine"


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is read-only to root")
def test_read_only_places(checkpoint, tmp_path, capsys) -> None:
    (tmp_path / "closed").mkdir(mode=0o500)
    code, said = run(capsys, "convert", checkpoint, tmp_path / "closed/out", "--to", "hf")
    assert code == 2 and "cannot write to" in said


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.ENOSPC])
def test_a_place_that_cannot_be_written_to_is_said_in_one_line(
    checkpoint, tmp_path, capsys, monkeypatch, number
) -> None:
    def refused(*_: object, **__: object) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "open", refused)
    code, said = run(capsys, "convert", checkpoint, tmp_path / "new/out", "--to", "hf")
    assert code == 2 and f"out: {os.strerror(number)}" in said and said.count("\n") == 1
    assert [file.name for file in tmp_path.iterdir()] == ["model"]


def test_a_full_disk_in_the_middle_leaves_nothing_and_the_old_output(checkpoint, tmp_path, capsys, monkeypatch) -> None:
    from tmjax.checkpoints import copying as module

    assert run(capsys, "convert", checkpoint, tmp_path / "out", "--to", "hf")[0] == 0
    before = tree(tmp_path / "out")

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "out.partial/model.safetensors"))

    monkeypatch.setattr(module, "write_tensors", full)
    code, said = run(capsys, "convert", checkpoint, tmp_path / "out", "--to", "hf", "--overwrite")
    assert code == 2 and "No space left on device" in said and said.count("\n") == 1
    assert tree(tmp_path / "out") == before and sorted(f.name for f in tmp_path.iterdir()) == ["model", "out"]


def test_a_plot_replaces_no_file_of_the_users(tmp_path) -> None:
    from tmjax.commands.compare import write_plot
    from tmjax.report.plots import new_figure, png_bytes

    file = tmp_path / "plots/x.png"
    with write_plot(file, overwrite=False):
        assert lock_files(file)[0].exists()
    file.parent.mkdir()
    file.write_bytes(b"\x89PNG mine")
    for overwrite, said in ((False, "pass --overwrite"), (True, "no plot that tmjax wrote")):
        with pytest.raises(InputError, match=said), write_plot(file, overwrite=overwrite):
            pass
    file.write_bytes(png_bytes(new_figure(1, 1, 1, 1)[0]))
    with write_plot(file, overwrite=True):
        pass


# What a recipe says, and what a run remembers.


def test_a_key_given_twice_is_refused_with_its_lines(tmp_path, capsys) -> None:
    file = tmp_path / "recipe.yaml"
    for text, said in (
        ("seed: 1\nalpha: 0.1\nseed: 2\n", "seed twice (lines 1 and 3)"),
        ("alignment:\n  epsilon: 1\n  cost: cosine\n  epsilon: 2\n", "epsilon twice (lines 2 and 4)"),
        ("{seed: 1, seed: 1}\n", "seed twice (lines 1 and 1)"),
    ):
        file.write_text(text)
        code, error = run(capsys, "merge", file)
        assert code == 2 and said in error
    file.write_text("a: &a {seed: 1}\nb:\n  <<: *a\n  seed: 2\n")
    assert read_recipe(file)["b"] == {"seed": 2}  # a merge key is meant to be overridden
    file.write_bytes("\ufeffseed: 3\n".encode())
    assert read_recipe(file) == {"seed": 3}


def test_every_companion_of_the_target_is_exported(checkpoint, tmp_path, capsys) -> None:
    names = ["additional_chat_templates/tools.jinja", "additional_chat_templates/rag.jinja", "chat_template.jinja",
             "vocab.txt", "spiece.model", "tekken.json", "processor_config.json", "generation_config.json"]  # fmt: skip
    before = sha256_checkpoint(checkpoint)
    for name in names:
        (checkpoint / name).parent.mkdir(exist_ok=True)
        (checkpoint / name).write_text(name)
        assert sha256_checkpoint(checkpoint) != before
        before = sha256_checkpoint(checkpoint)
    assert run(capsys, "convert", checkpoint, tmp_path / "orbax", "--to", "orbax")[0] == 0
    assert run(capsys, "convert", tmp_path / "orbax", tmp_path / "hf", "--to", "hf")[0] == 0
    assert {name: (tmp_path / "hf" / name).read_text() for name in names} == {name: name for name in names}
    (tmp_path / "bare").mkdir()
    (tmp_path / "empty").mkdir()
    copy_companions(tmp_path / "bare", tmp_path / "empty")
    assert list((tmp_path / "empty").iterdir()) == []


def test_json_and_tables_on_a_stream_of_ascii(checkpoint, llama_dir, tmp_path) -> None:
    text = tmp_path / "été.txt"
    text.write_text("maji ya mto\n")
    (tmp_path / "modèle").symlink_to(llama_dir)
    for extra in (["--json"], []):
        arguments = [sys.executable, "-m", "tmjax", "evaluate", tmp_path / "modèle", "--texts", text, *extra]
        environment = os.environ | {"PYTHONIOENCODING": "ascii", "LC_ALL": "C"}
        done = subprocess.run(arguments, capture_output=True, env=environment, check=False)
        assert done.returncode == 0, done.stderr
        done.stdout.decode("ascii")
        if extra:
            assert str(tmp_path / "modèle") in json.loads(done.stdout)["evaluation"]


@pytest.fixture(scope="module")
def project(llama_dir, tmp_path_factory) -> Path:
    """A folder with a run whose recipe names everything relative to it."""
    folder = tmp_path_factory.mktemp("project")
    vocab = json.loads((llama_dir / "config.json").read_text())["vocab_size"]
    spec = dataclasses.replace(SPEC, vocab=vocab, layers=1, tied_embeddings=True)
    for name, seed in (("source", 1), ("target", 2)):
        make_checkpoint(folder / "models" / name, "llama", spec, tokenizer=llama_dir, seed=seed)
    (folder / "texts.txt").write_text("\n".join(f"neno {number} maji ya mto" for number in range(6)))
    told = {"source": "models/source", "target": "models/target", "texts": "texts.txt", "out": "runs/one"}
    told |= {"preset": "barycentric", "alpha": 0.1, "operators": [{"transport": {"roles": ["o"]}}]}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(told))
    before = Path.cwd()
    os.chdir(folder)
    try:
        assert cli.run(["merge", "recipe.yaml"]) == 0
    finally:
        os.chdir(before)
    return folder


def test_a_run_finds_its_inputs_from_another_directory(project, tmp_path, monkeypatch, capsys) -> None:
    run_dir = project / "runs/one"
    recipe = build_recipe(read_recipe(run_dir / "recipe.yaml"))
    assert (recipe.source, recipe.texts) == ("models/source", "texts.txt")  # as given
    assert recipe.places["models/source"] == str(project / "models/source")
    assert "places" not in (run_dir / "merged/README.md").read_text()
    assert str(project) not in (run_dir / "report.html").read_text()
    # A folder of the same names elsewhere is not the run's.
    shutil.copytree(project / "models/source", tmp_path / "models/source")
    shutil.copytree(project / "models/source", tmp_path / "models/target")
    monkeypatch.chdir(tmp_path)
    (run_dir / "samples.json").unlink()
    assert run(capsys, "report", run_dir)[0] == 0
    code, said = run(capsys, "fuse", run_dir)
    assert code == 0 and "warning" not in said
    manifest = read_manifest(run_dir)
    assert manifest["stages"]["fuse"]["reused"] and manifest["inputs"]["source"]["path"] == "models/source"
    again = ["merge", run_dir / "recipe.yaml", "--out", tmp_path / "two"]
    assert run(capsys, *again)[0] == 0
    assert stored(tmp_path / "two/merged") == stored(run_dir / "merged")


def test_every_command_is_told_who_holds_its_output(project, checkpoint, texts, tmp_path, capsys) -> None:
    out, run_dir, models = tmp_path / "out", project / "runs/one", project / "models"
    pair = ["--source", models / "source", "--target", models / "target", "--texts", texts["calibration"]]
    commands = {
        "merge": [*pair, "--alpha", 0.1],
        "align": pair,
        "sweep": [*pair, "--valid", texts["valid"], "--grid", "alpha=0,0.1"],
        "solvers": pair,
        "adapt": ["--target", models / "target", "--texts", texts["calibration"], "--mode", "sft"],
        "evaluate": [checkpoint, "--texts", texts["test"]],
    }
    lines = [[name, *rest, "--out", out] for name, rest in commands.items()]
    lines += [["convert", checkpoint, out, "--to", "hf"], ["fuse", run_dir], ["report", run_dir]]
    lines += [["compare", run_dir, "--plot", out]]
    code = HOLDER.replace(
        "OutputLock(Path(sys.argv[1]))", "OutputLock(Path(sys.argv[1])), OutputLock(Path(sys.argv[2]))"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, str(out), str(run_dir)], stdout=subprocess.PIPE)
    before = tree(run_dir)
    try:
        assert holder.stdout.read(1) == b"1"
        for arguments in lines:
            status, said = run(capsys, *arguments, *([] if arguments[0] in ("report", "fuse") else ["--overwrite"]))
            assert status == 2 and said.count("tmjax: error:") == 1, (arguments, said)
            assert f"process {holder.pid}," in said and "is being written by" in said, (arguments, said)
    finally:
        holder.kill()
        holder.communicate()
    assert tree(run_dir) == before and not out.exists()


def test_what_was_moved_is_found_or_missed_in_one_line(project, tmp_path, monkeypatch, capsys) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(project, moved)
    file = moved / "runs/one/recipe.yaml"
    told = yaml.safe_load(file.read_text())
    told["places"] = {name: f"/gone/{name}" for name in told["places"]}
    file.write_text(yaml.safe_dump(told, sort_keys=False))
    monkeypatch.chdir("/")
    code, said = run(capsys, "fuse", moved / "runs/one")
    assert code == 0 and said.count("warning") == 3
    assert f"source models/source is no longer at /gone/models/source: {moved / 'models/source'} is taken" in said
    assert read_manifest(moved / "runs/one")["stages"]["fuse"]["reused"]
    file.write_text(yaml.safe_dump(told, sort_keys=False))
    shutil.rmtree(moved / "models/target")
    code, said = run(capsys, "fuse", moved / "runs/one")
    assert code == 2 and said.count("error") == 1
    assert "target models/target is neither here nor where it was (/gone/models/target)" in said


def test_places_are_no_part_of_what_is_dumped_without_them() -> None:
    recipe = Recipe(source="a", target="b", texts="c", out="d")
    assert "places" not in dump_recipe(recipe) and recipe.place("a") == "a" and recipe.moved() == []
