"""Publishing: the uploaded files are those of the run, and everything that forbids an upload is one line."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from hub_stub import TOKEN, Hub, Repo, serve

import tmjax
from tmjax import cli
from tmjax.checkpoints.load import load_model
from tmjax.checkpoints.parents import Parent, card_metadata, read_parent
from tmjax.report.card_parts import licence_warning, metadata_block
from tmjax.runs.hashes import sha256_checkpoint
from tmjax.runs.manifest import read_manifest


@pytest.fixture
def hub(monkeypatch) -> Iterator[Hub]:
    """An empty hub at the address that huggingface_hub has for the real one, and a token for it."""
    with serve() as hub:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub


def publish(capsys, *words: object, code: int = 0) -> str:
    """Runs `tmjax publish`; returns standard output, or the one line of an error."""
    capsys.readouterr()
    assert cli.run(["publish", *map(str, words)]) == code
    captured = capsys.readouterr()
    if code:
        *others, error = captured.err.splitlines()
        assert error.startswith("tmjax: error:") and not captured.out
        known = ("tmjax: warning: the licence", "tmjax: warning: the adapter names", "tmjax: publish")
        assert len(others) <= 2 and all(line.startswith(known) for line in others)
        return error
    return captured.out


def files_of(run: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (run / "merged").iterdir()}


def test_the_uploaded_files_are_those_of_the_run(plain, hub, capsys) -> None:
    printed = json.loads(publish(capsys, plain, "me/swahili", "--json"))
    repo, own = hub.repos["me/swahili"], files_of(plain)
    assert {"model.safetensors", "config.json", "tokenizer.json", "README.md", "tmjax.json"} <= own.keys()
    assert {name: data for name, data in repo.files.items() if name != ".gitattributes"} == own
    assert repo.private and len(repo.commits) == 1 and len(hub.large) == 2  # weights and tokenizer
    assert printed["files"] == {name: len(data) for name, data in own.items()} and printed["public"] is False
    assert printed["commit"].startswith(f"{hub.url}/me/swahili/commit/")
    # A second result replaces the first, and weights in other files go.
    repo.files |= {"model-00001-of-00002.safetensors": b"", "notes.md": b""}
    publish(capsys, plain, "swahili")  # of the account of the token
    assert {*own, "notes.md", ".gitattributes"} == set(repo.files) and len(repo.commits) == 2


def test_a_dry_run_lists_files_and_asks_nothing(plain, hub, capsys, monkeypatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    printed = json.loads(publish(capsys, plain, "me/swahili", "--dry-run", "--json"))
    assert printed["files"] == {name: len(data) for name, data in files_of(plain).items()}
    assert printed["commit"] is None and not hub.requests
    shown = publish(capsys, plain, "me/swahili", "--dry-run")
    assert "model.safetensors" in shown and "would go to me/swahili (private); nothing was uploaded" in shown


def test_public_is_asked_for(plain, hub, capsys) -> None:
    publish(capsys, plain, "me/open", "--public")
    assert not hub.repos["me/open"].private
    assert "is public; pass --public" in publish(capsys, plain, "me/open", code=2)
    assert len(hub.repos["me/open"].commits) == 1


def test_a_run_publishes_its_result(plain, flags, recipe_file, hub, tmp_path, capsys) -> None:
    """The same command once more: every stage is reused, so that only the upload is left."""
    run = tmp_path / "run"
    shutil.copytree(plain, run)  # the manifest changes, and other files of tests compare with `plain`
    words = ["merge", recipe_file, *flags, "--out", str(run), "--push-to-hub", "me/merged", "--json"]
    assert cli.run(words) == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert result["published"]["repository"] == "me/merged"
    assert all(stage["reused"] for stage in result["stages"].values())
    assert captured.err.count("warning: the licence of target") == 1
    assert {name: hub.repos["me/merged"].files.get(name) for name in files_of(run)} == files_of(run)
    # A repository that cannot be written to is refused before the run begins.
    assert cli.run([*words[:-2], "you/merged.git", "--json"]) == 2
    hub.repos["you/model"] = Repo(files={"model.safetensors": b"theirs"})
    fresh = [*words[:-5], "--out", str(tmp_path / "never"), "--push-to-hub", "you/model"]
    assert cli.run(fresh) == 2 and not (tmp_path / "never").exists()
    assert "was not written by tmjax" in capsys.readouterr().err
    assert cli.run(["merge", recipe_file, *flags, "--out", str(run), "--public"]) == 2


def test_faults_are_one_line(plain, hub, capsys, monkeypatch, tmp_path) -> None:
    def fault(repository: str = "me/x", run: Path = plain) -> str:
        return publish(capsys, run, repository, code=2)

    hub.repos["me/other"] = Repo(files={"pytorch_model.bin": b"theirs"})
    assert "me/other exists and was not written by tmjax" in fault("me/other")
    assert hub.repos["me/other"].files == {"pytorch_model.bin": b"theirs"}
    assert "is no name of a repository" in fault("a/b/c")
    said = fault("you/new")
    assert "You don't have the rights" in said and "needs write access" in said
    hub.refused = {"/commit/": 403}
    assert "the stub does not want to (status 403)" in fault()
    hub.refused = {"/large/": 400}
    assert "the hub refuses me/x" in fault() and not hub.repos["me/x"].commits
    hub.refused = {}
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    assert "the token is not valid" in fault()
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    assert "no token of the hub" in fault()
    monkeypatch.setattr("huggingface_hub.get_token", lambda: TOKEN)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    assert "the hub could not be reached" in fault()
    assert "is not a run of tmjax" in fault(run=tmp_path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda m: m["outputs"].pop("provenance"), "is not finished"),
        (lambda m: m.update(unfinished={"output": "merged", "files": []}), "is not finished"),
        (lambda m: m["outputs"]["fuse"].update(key="0" * 64), "newer than its tmjax.json"),
        (lambda m: m["outputs"].pop("fuse"), "has no result"),
        (lambda m: m["outputs"]["fuse"]["files"].update({"merged/config.json": 1}), "config.json is damaged"),
        (lambda m: m["outputs"]["fuse"]["files"].update({"merged/gone": 1}), "gone is missing"),
    ],
)
def test_only_finished_runs(plain, tmp_path, capsys, change, said) -> None:
    manifest = read_manifest(plain)
    change(manifest)
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    (tmp_path / "merged").symlink_to(plain / "merged")
    assert said in publish(capsys, tmp_path, "me/x", "--dry-run", code=2)


def test_own_process_and_files_of_the_user(plain, tmp_path) -> None:
    """As a user calls it: the address of the hub is in the environment. Files that the run did not write stay."""
    run = tmp_path / "run"
    shutil.copytree(plain, run)
    (run / "merged/notes.txt").write_text("mine")
    (run / "merged/README.md").write_text("my own words")
    with serve() as hub:
        environment = {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1", "HOME": str(tmp_path)}
        command = [sys.executable, "-m", "tmjax.cli", "publish", str(run), "me/x"]
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
            cwd=Path(tmjax.__file__).parents[1],
            env=environment,
        )
        assert done.returncode == 0, done.stderr
        assert "holds what tmjax did not write, which is not uploaded: notes.txt" in done.stderr
        files = hub.repos["me/x"].files
        assert "notes.txt" not in files and files["README.md"] == b"my own words"
        assert files["model.safetensors"] == (plain / "merged/model.safetensors").read_bytes()


def test_a_lora_has_a_repository_of_its_own(plain, flags, recipe_file, hub, tmp_path, capsys) -> None:
    run = tmp_path / "run"
    shutil.copytree(plain, run)
    assert "has no LoRA of its result" in publish(capsys, run, "me/lora", "--lora", code=2)
    recipe = yaml.safe_load(Path(recipe_file).read_text()) | {"export": {"lora": 4}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    command = ["merge", str(tmp_path / "recipe.yaml"), *flags, "--out", str(run)]
    assert cli.run(command) == 0
    printed = json.loads(publish(capsys, run, "me/lora", "--lora", "--dry-run", "--json"))
    publish(capsys, run, "me/lora", "--lora")
    files = {name: data for name, data in hub.repos["me/lora"].files.items() if name != ".gitattributes"}
    assert printed["files"] == {name: len(data) for name, data in files.items()}
    own = {path.name: path.read_bytes() for path in (run / "lora").iterdir()}
    assert len(own) == 2 and {name: files[name] for name in own} == own
    (tmp_path / "card.md").write_bytes(files["README.md"])
    metadata = card_metadata(tmp_path / "card.md")
    assert metadata["base_model_relation"] == "adapter" and metadata["library_name"] == "peft"
    assert files["README.md"].count(b"\n---\n") == 1 and b"A PEFT adapter of rank 4" in files["README.md"]
    record = json.loads(files["tmjax.json"])
    assert record["files"].keys() == own.keys() and record["lora"]["rank"] == 4
    # Neither replaces the other.
    assert "holds a LoRA; choose another name" in publish(capsys, run, "me/lora", code=2)
    publish(capsys, run, "me/model")
    assert "holds a model; choose another name" in publish(capsys, run, "me/model", "--lora", code=2)
    assert "model.safetensors" in hub.repos["me/model"].files
    (run / "lora/adapter_config.json").unlink()
    assert "adapter_config.json is missing or damaged" in publish(capsys, run, "me/lora", "--lora", code=2)


# The card and the record.


def test_the_record_beside_the_weights(plain, qwen2_dir, tmp_path) -> None:
    record, manifest = json.loads((plain / "merged/tmjax.json").read_text()), read_manifest(plain)
    assert record["tmjax"] == tmjax.__version__ and record["inputs"] == manifest["inputs"]
    assert record["recipe_sha256"] == manifest["key"]["recipe"] and record["commands"] == manifest["commands"]
    assert record["recipe"]["source"] and "out" not in record["recipe"] and "places" not in record["recipe"]
    assert record["parents"]["target"]["name"] == str(qwen2_dir)
    assert set(record["files"]) == files_of(plain).keys() - {"README.md", "tmjax.json"}
    # It is no part of the checkpoint.
    copy = tmp_path / "copy"
    shutil.copytree(plain / "merged", copy)
    (copy / "tmjax.json").unlink()
    assert sha256_checkpoint(copy) == sha256_checkpoint(plain / "merged")
    assert load_model(plain / "merged").notes == load_model(copy).notes


def test_the_card_names_command_and_recipe(plain) -> None:
    card = (plain / "merged/README.md").read_text()
    (command,) = read_manifest(plain)["commands"]
    assert command.startswith("tmjax merge ") and command.endswith("--out run") and f"\n{command}\n" in card
    metadata = card_metadata(plain / "merged/README.md")
    assert metadata == {"base_model_relation": "merge", "library_name": "transformers", "tags": ["merge", "tmjax"]}
    assert "| merged |" in card and "## Licences" in card and "is not known" in card and str(plain.parent) not in card


def parent(folder: Path, name: str, **metadata: object) -> Parent:
    """A checkpoint in the hub's cache, with this metadata."""
    place = folder / f"models--{name.replace('/', '--')}/snapshots/0"
    place.mkdir(parents=True)
    (place / "README.md").write_text(f"---\n{yaml.safe_dump(metadata)}---\n# A model\n")
    (place / "config.json").write_text("{}")
    return read_parent(str(place), str(place))


def test_metadata_of_both_parents(tmp_path) -> None:
    target = parent(tmp_path, "a/target", license="apache-2.0", language="sw")
    source = parent(tmp_path, "b/source", license="apache-2.0", language=["en", "sw"])
    values = yaml.safe_load(metadata_block({"target": target, "source": source}).strip("-"))
    assert values["base_model"] == ["a/target", "b/source"] and values["base_model_relation"] == "merge"
    assert values["license"] == "apache-2.0" and values["language"] == ["sw", "en"]
    assert licence_warning({"target": target, "source": source}) is None
    alone = yaml.safe_load(metadata_block({"target": target}).strip("-"))
    assert alone["base_model_relation"] == "finetune" and alone["tags"] == ["tmjax"]


def test_licences_that_differ_or_are_missing(tmp_path) -> None:
    free = parent(tmp_path, "a/free", license="apache-2.0")
    link = "https://example.org/licence"
    other = parent(tmp_path, "b/other", license="other", license_name="house", license_link=link)
    values = yaml.safe_load(metadata_block({"target": free, "source": other}).strip("-"))
    assert values["license"] == "other" and values["license_name"] == "apache-2.0-and-house"
    assert "differ" in licence_warning({"target": free, "source": other})
    same = yaml.safe_load(metadata_block({"target": other, "source": other}).strip("-"))
    assert same["license_name"] == "house" and same["license_link"] == link
    unknown = parent(tmp_path, "c/unknown")
    assert "license" not in yaml.safe_load(metadata_block({"target": free, "source": unknown}).strip("-"))
    line = licence_warning({"target": free, "source": unknown})
    assert "the licence of source" in line and "is not known" in line and "\n" not in line
    # Nothing is guessed: what cannot be read, or is no text, is not known.
    assert parent(tmp_path, "d/odd", license=3).licence is None
    (tmp_path / "broken.md").write_text("---\na: [\n---\n")
    assert card_metadata(tmp_path / "broken.md") == {} == card_metadata(tmp_path / "none.md")
    place = tmp_path / "local"
    place.mkdir()
    (place / "config.json").write_text('{"license": "mit"}')
    assert read_parent("local", str(place)) == Parent("local", None, "mit")
