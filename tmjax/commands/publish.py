"""`tmjax publish`: the result of a finished run on the Hugging Face hub, in one commit.

Only files that the run wrote are uploaded, and only a repository that is empty or that tmjax wrote is written to.
"""

import json
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tmjax
from tmjax.checkpoints.formats.adapter import ADAPTER_CONFIG
from tmjax.checkpoints.hub import CONFIG_NAME, README
from tmjax.checkpoints.parents import Parent
from tmjax.commands.callbacks import Progress, Warn, quiet, silent
from tmjax.errors import InputError
from tmjax.files.jsonfile import read_json
from tmjax.files.lock import OutputLock
from tmjax.files.owned import walk
from tmjax.report.card_parts import adapter_card, licence_warning
from tmjax.runs.manifest import Manifest
from tmjax.runs.provenance import (
    MERGED,
    PROVENANCE,
    lora_files,
    require_finished,
    result_files,
    result_run,
    sha256_file,
)

#: The file that tells the form of a result, in words for an error.
_FORMS = {CONFIG_NAME: "a model", ADAPTER_CONFIG: "a LoRA"}
#: Names of files of weights, which go when a later result has them in other files.
_WEIGHTS = (".safetensors", ".safetensors.index.json")


@dataclass(frozen=True)
class Repository:
    """A model repository of the hub that may be written to.

    Attributes:
        name: Owner and name.
        public: Whether everybody sees it.
        exists: Whether the hub has it.
        files: Names of the files in it.
    """

    name: str
    public: bool
    exists: bool
    files: tuple[str, ...] = ()


@dataclass(frozen=True)
class Upload:
    """What is uploaded of a run: the bytes or the place of every file, by its name in the repository."""

    run: Path
    files: Mapping[str, Path | bytes]

    def sizes(self) -> dict[str, int]:
        """Returns the sizes of the files in bytes."""
        items = self.files.items()
        return {name: len(file) if isinstance(file, bytes) else file.stat().st_size for name, file in items}


@dataclass(frozen=True)
class Published:
    """The upload of a result, or the plan of one.

    Attributes:
        repository: Owner and name of the repository.
        public: Whether everybody sees it.
        files: Sizes in bytes of the uploaded files, by name.
        commit: Address of the commit; None if nothing was uploaded.
    """

    repository: str
    public: bool
    files: dict[str, int]
    commit: str | None = None


def find_repository(name: str, *, public: bool = False, warn: Warn = silent) -> Repository:
    """Asks the hub whether a result can be written to a repository; nothing is changed.

    Args:
        name: Owner and name; of a name alone the owner is the account of the token.
        public: Whether everybody is to see it.
        warn: Called with what the user should know.

    Returns:
        The repository as the hub has it.

    Raises:
        InputError: The name is wrong, there is no token, the hub refuses, or the repository holds something else.
    """
    from huggingface_hub.errors import RepositoryNotFoundError

    _require_name(name)
    with _one_line(name) as api:
        name = name if "/" in name else f"{api.whoami()['name']}/{name}"
        try:
            info = api.repo_info(name)
        except RepositoryNotFoundError:
            return Repository(name, public, exists=False)
        files = tuple(each.rfilename for each in info.siblings or ())
    if set(files) - {".gitattributes"} and PROVENANCE not in files:
        raise InputError(f"the repository {name} exists and was not written by tmjax; choose another name")
    if not info.private and not public:
        raise InputError(f"the repository {name} is public; pass --public, or make it private on the hub first")
    if info.private and public:
        warn(f"the repository {name} is private and stays so; its settings on the hub make it public")
    return Repository(name, not info.private, exists=True, files=files)


def plan_upload(run: Path, *, lora: bool = False, warn: Warn = silent) -> Upload:
    """Checks a run and lists what would be uploaded; the hub is not asked.

    Args:
        run: Run directory of a finished merge or adaptation.
        lora: Whether the LoRA of the result is meant.
        warn: Called with what the user should know: licences, files that stay here.

    Returns:
        The plan.

    Raises:
        InputError: The run is not finished or damaged, or has no LoRA.
    """
    manifest = require_finished(run)
    record = read_json(run / MERGED / PROVENANCE)
    manifest = require_finished(run, record.get("parents") or {})
    parents = {which: Parent.from_json(values) for which, values in record["parents"].items()}
    line = licence_warning(parents)
    if line is not None:
        warn(line)
    if lora:
        return _plan_of_lora(run, manifest, record, parents, warn)
    names = [name.removeprefix(f"{MERGED}/") for name in result_files(manifest)]
    others = sorted(set(walk(run / MERGED)) - set(names))
    if others:
        warn(f"{run / MERGED} holds what tmjax did not write, which is not uploaded: {', '.join(others)}")
    return Upload(run, {name: run / MERGED / name for name in names})


def _plan_of_lora(
    run: Path, manifest: Manifest, record: Mapping[str, Any], parents: Mapping[str, Parent], warn: Warn
) -> Upload:
    """Plans the upload of a LoRA, with a card and a record of its own."""
    files = lora_files(run, manifest)
    facts = manifest.to_json({"lora"})["lora"]
    target = parents["target"]
    if target.hub_id is None:
        warn(f"the adapter names {target.name} as its base model, which is not known to be on the hub")
    card = adapter_card((run / MERGED / README).read_text(encoding="utf-8"), parents, facts)
    own = {**record, "files": {file.name: sha256_file(file) for file in files}, "lora": facts}
    texts = {README: card, PROVENANCE: json.dumps(own, indent=2, ensure_ascii=False) + "\n"}
    return Upload(run, {file.name: file for file in files} | {name: text.encode() for name, text in texts.items()})


def upload(plan: Upload, repository: Repository, *, progress: Progress = quiet, warn: Warn = silent) -> Published:
    """Uploads a result in one commit; the repository is created if the hub does not have it.

    Args:
        plan: What is uploaded.
        repository: Where to.
        progress: Called at the beginning and at the end; on a terminal huggingface_hub shows bars of its own.
        warn: Called with what the hub says about the model card.

    Returns:
        The upload.

    Raises:
        InputError: The hub refuses, or cannot be reached, or the repository holds a result of the other form; it is
            then as it was.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    for name, form in _FORMS.items():
        if name in repository.files and name not in plan.files:
            raise InputError(f"the repository {repository.name} holds {form}; choose another name")
    stale = [name for name in repository.files if name.endswith(_WEIGHTS) and name not in plan.files]
    progress("publish", 0, 0)
    with OutputLock(plan.run), _bars_on_terminals(), _one_line(repository.name) as api:
        if not repository.exists:
            api.create_repo(repository.name, private=not repository.public)
        operations: list[Any] = [
            CommitOperationAdd(name, file if isinstance(file, bytes) else str(file))
            for name, file in plan.files.items()
        ]
        operations += [CommitOperationDelete(name) for name in stale]
        message = f"Upload a result of tmjax {tmjax.__version__}"
        with warnings.catch_warnings(record=True) as noted:
            warnings.simplefilter("always")
            commit = api.create_commit(repository.name, operations, commit_message=message)
    for each in noted:
        if each.category is UserWarning:
            warn(str(each.message))
    progress("publish", 1, 0)
    return Published(repository.name, repository.public, plan.sizes(), str(commit.commit_url))


def publish(
    run: str | Path,
    repository: str,
    *,
    lora: bool = False,
    public: bool = False,
    dry_run: bool = False,
    progress: Progress = quiet,
    warn: Warn = silent,
) -> Published:
    """Publishes the result of a finished run on the Hugging Face hub.

    Args:
        run: Run directory of a finished merge or adaptation; of a run of several steps the last of these is meant.
        repository: Owner and name of the repository; of a name alone the owner is the account of the token.
        lora: Whether the LoRA of the result is published, not the result.
        public: Whether everybody is to see it; otherwise a new repository is private.
        dry_run: Whether files and sizes are listed and the hub is not asked.
        progress: Called at the beginning and at the end of the upload.
        warn: Called with what the user should know.

    Returns:
        The uploaded files and the commit.

    Raises:
        InputError: The run is not finished, there is no token, the repository is another's, or the hub refuses.
    """
    run = result_run(Path(run))
    _require_name(repository)
    plan = plan_upload(run, lora=lora, warn=warn)
    if dry_run:
        return Published(repository, public, plan.sizes())
    return upload(plan, find_repository(repository, public=public, warn=warn), progress=progress, warn=warn)


def _require_name(name: str) -> None:
    """Raises InputError for a name that no repository can have."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise InputError(f"{name!r} is no name of a repository, such as OWNER/MODEL: {_first(error)}") from None


@contextmanager
def _bars_on_terminals() -> Iterator[None]:
    """Switches the bars of huggingface_hub off for the block where standard error is no terminal."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if sys.stderr.isatty() or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


@contextmanager
def _one_line(name: str) -> Iterator[Any]:
    """Gives the client of the hub; its errors, and those of the network, become one line about a repository."""
    import huggingface_hub
    import huggingface_hub.errors as hub_errors

    token = huggingface_hub.get_token()
    if token is None:
        raise InputError("no token of the hub: `hf auth login` stores one, or set HF_TOKEN")
    try:
        yield huggingface_hub.HfApi(token=token, library_name="tmjax", library_version=tmjax.__version__)
    except InputError:
        raise
    except hub_errors.HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        advice = _ADVICE.get(status, "")
        raise InputError(f"the hub refuses {name}: {_reason(error)}{advice}") from None
    except hub_errors.OfflineModeIsEnabled:
        raise InputError("HF_HUB_OFFLINE is set; unset it to publish") from None
    except (ValueError, RuntimeError) as error:
        cause = error.__cause__ if isinstance(error.__cause__, hub_errors.HfHubHTTPError) else None
        raise InputError(f"the hub refuses {name}: {_first(error) if cause is None else _reason(cause)}") from None
    except Exception as error:  # network libraries raise their own types, which huggingface_hub does not wrap
        if isinstance(error, OSError) and error.filename:
            raise
        raise InputError(f"the hub could not be reached: {type(error).__name__}; try again later") from None


_ADVICE: Mapping[int | None, str] = {
    401: "; the token is not valid: `hf auth login` stores another",
    403: "; the token needs write access to that owner",
    409: "; choose another name",
}


def _reason(error: Any) -> str:
    """The server's own words, or the status."""
    status = getattr(error.response, "status_code", "")
    return f"{error.server_message or 'no reason given'} (status {status})"


def _first(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
