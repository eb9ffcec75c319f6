"""Released weights: which `architecture.tag` has some, where they lie, and how they come here whole.

A release is a record `mdeq/weights/NAME.json`, which tools/publish.py makes. Small weights lie beside their record and
need no network; larger ones do so in bfloat16, as `NAME.bf16.safetensors`, which installed packages lack. What is not
there comes from the Hub, by commit, and counts only with the sha256 of the record.
"""

import dataclasses
import errno
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import constants, get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from timm.models import PretrainedCfg, resolve_pretrained_cfg

DEFAULT_ORG = "mdeq-vision"
HUB_ORG = os.environ.get("MDEQ_HUB_ORG") or DEFAULT_ORG
"""Organisation on the Hub that holds the released weights; the environment variable `MDEQ_HUB_ORG` names another."""

FOLDER = Path(__file__).parent.parent / "weights"
FILENAME = "model.safetensors"
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class WeightsError(RuntimeError):
    """Raised where weights are missing or cannot be loaded; the message says what to do."""


@dataclass(frozen=True, kw_only=True)
class Release:
    """Weights of one `architecture.tag`.

    Attributes:
        name: `architecture.tag`, also the name of the repository.
        sha256: of the weights file, in hex.
        size: of the weights file, in bytes.
        revision: commit that holds it on the Hub; None as long as it is not published.
        metrics: what the weights reached, by name.
        config: the config.json that is published with them.
        card: what the model card is made from.
        folder: where the record is.
    """

    name: str
    sha256: str
    size: int
    revision: str | None = None
    metrics: Mapping[str, float] = dataclasses.field(default_factory=dict)
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    card: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    folder: Path = FOLDER

    @classmethod
    def read(cls, path: Path) -> "Release":
        """Return the release of a record."""
        return cls(name=path.stem, folder=path.parent, **json.loads(path.read_text(encoding="utf-8")))

    @property
    def repo(self) -> str:
        """The repository on the Hub."""
        return f"{HUB_ORG}/{self.name}"

    @property
    def shipped(self) -> Path:
        """Where the weights are if they came with the package, or with its repository (those in bfloat16)."""
        kept = self.folder / f"{self.name}.bf16.safetensors"
        return kept if kept.is_file() else self.folder / f"{self.name}.safetensors"

    @property
    def cfg(self) -> dict[str, Any]:
        """What timm's cfg of this tag has beside the architecture's own entries."""
        known = {field.name for field in dataclasses.fields(PretrainedCfg)} - {"architecture", "tag"}
        found = {**self.config.get("pretrained_cfg", {}), **self.config}
        entries = {key: found[key] for key in known & found.keys()}
        as_timm = {key: tuple(value) if isinstance(value, list) else value for key, value in entries.items()}
        return {**as_timm, "hf_hub_id": self.repo}

    @property
    def model_args(self) -> dict[str, Any]:
        """The arguments of the model, its solver that of the evaluation; channels and classes are timm's business."""
        args = self.config.get("model_args", {})
        return {key: value for key, value in args.items() if key not in ("in_chans", "num_classes")}


RELEASES: Mapping[str, Release] = {path.stem: Release.read(path) for path in sorted(FOLDER.glob("*.json"))}
"""Every release by its name."""


def with_releases(cfgs: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return cfgs by `architecture.untrained` with the tags of the released weights in place of `untrained`."""
    result = {}
    for name, cfg in cfgs.items():
        found = [r for r in RELEASES.values() if r.name.partition(".")[0] == name.partition(".")[0]]
        result.update({r.name: {**cfg, **r.cfg} for r in found} or {name: cfg})
    return result


def with_weights(variant: str, kwargs: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return an entrypoint's arguments with its released weights as a local file, and the arguments that these bring.

    Weights from elsewhere (a file, a folder, another repository) are left to timm.

    Args:
        variant: name of the architecture.
        kwargs: what the entrypoint was called with.

    Raises:
        WeightsError: if there are no weights, or they cannot be loaded.
    """
    overlay = dict(kwargs.get("pretrained_cfg_overlay") or {})
    cfg = resolve_pretrained_cfg(variant, kwargs.get("pretrained_cfg"), overlay)
    if cfg.source or cfg.state_dict or cfg.file or cfg.url:
        return dict(kwargs), {}
    name = f"{variant}.{cfg.tag}"
    release = RELEASES.get(name)
    if release is None or cfg.hf_hub_id != release.repo:
        if cfg.hf_hub_id:
            return dict(kwargs), {}
        there = f"there are weights for {', '.join(RELEASES)}" if RELEASES else "none have been released yet"
        raise WeightsError(f"no pretrained weights for {name}; {there}")
    overlay["file"] = str(local_file(release, kwargs.get("cache_dir")))
    return {**kwargs, "pretrained_cfg_overlay": overlay}, release.model_args


def local_file(release: Release, cache_dir: str | Path | None = None) -> Path:
    """Return the weights of a release as a file whose sha256 is right, from the package, the cache or the Hub.

    Args:
        release: which weights.
        cache_dir: the cache; None for that of huggingface_hub.

    Raises:
        WeightsError: if they cannot be loaded; a file that is not the right one does not stay in the cache.
    """
    if release.shipped.is_file():
        if sha256(release.shipped) != release.sha256:
            raise WeightsError(f"{release.shipped} is damaged; install mdeq-vision again")
        return release.shipped
    revision = release.revision if HUB_ORG == DEFAULT_ORG else None  # a commit of another organisation is another one
    place: dict[str, Any] = dict(repo_id=release.repo, filename=FILENAME, revision=revision, cache_dir=cache_dir)
    cached = try_to_load_from_cache(**place)
    if isinstance(cached, str):
        if sha256(Path(cached)) == release.sha256:
            return Path(cached)
        _remove(Path(cached))
    with hub_errors(release.repo, revision):
        # Without a connection this fails at once, while hf_hub_download tries for half a minute.
        get_hf_file_metadata(hf_hub_url(release.repo, FILENAME, revision=revision))
        path = Path(hf_hub_download(**place))
    found = sha256(path)
    if found != release.sha256:
        _remove(path)
        raise WeightsError(
            f"the file downloaded from {release.repo} is not the released one (sha256 {found[:12]}..., expected "
            f"{release.sha256[:12]}...) and was deleted; try again, and report it if it happens again"
        )
    return path


def hub_config(model_id: str) -> Path:
    """Return the config.json of a model `ORG/NAME[@REVISION]`, from the cache or the Hub.

    Raises:
        WeightsError: if it cannot be loaded; at once, where timm's own download tries for half a minute.
    """
    repo, _, revision = model_id.partition("@")
    place: dict[str, Any] = dict(repo_id=repo, filename="config.json", revision=revision or None)
    with hub_errors(repo, revision or None):
        cached = try_to_load_from_cache(**place)
        if not isinstance(cached, str):
            get_hf_file_metadata(hf_hub_url(**place))
        return Path(hf_hub_download(**place))


@contextmanager
def hub_errors(repo: str, revision: str | None = None) -> Iterator[None]:
    """Turn the errors of a conversation with the Hub into a `WeightsError` that says what to do."""
    try:
        yield
    except WeightsError:
        raise
    except Exception as error:  # which ones there are depends on the version of huggingface_hub and its HTTP library
        problem = _refusal(error, repo, revision or "main") or _trouble(error, repo)
        if problem is None:
            raise
        raise WeightsError(problem) from None


def _refusal(error: BaseException, repo: str, revision: str) -> str | None:
    """Return what the Hub refused and what to do, in one line; None for an error that is no answer of the Hub."""
    login = "log in with `hf auth login` or set HF_TOKEN"
    if isinstance(error, LocalEntryNotFoundError):
        return None
    if isinstance(error, HFValidationError):
        return f"{repo or 'an empty string'} is not a repository name on the Hub; expected ORG/NAME"
    if isinstance(error, GatedRepoError):
        return f"{repo} is gated: ask for access at {constants.ENDPOINT}/{repo}, then {login}"
    if isinstance(error, RepositoryNotFoundError):
        return f"there is no repository {repo} on the Hub, or it is private: check the name, or {login}"
    if isinstance(error, RevisionNotFoundError):
        return f"{repo} has no revision {revision}: name another one, or update mdeq-vision if it named this one"
    if isinstance(error, EntryNotFoundError):
        return f"{repo} has no {FILENAME} or no config.json at revision {revision}: it holds no timm model"
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        if status in (401, 403):
            return f"no permission for {repo}: {login}, with a token that allows this"
        return f"the Hub answered {status} for {repo}; try again later"
    return None


def _trouble(error: BaseException, repo: str) -> str | None:
    """Return what stands between here and the Hub and what to do, in one line; None for what has to do with neither."""
    if isinstance(error, LocalEntryNotFoundError) and error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, OfflineModeIsEnabled):
        return f"{repo} is not in the cache and HF_HUB_OFFLINE is set; unset it to download"
    if isinstance(error, OSError) and error.errno in _DISK_FULL:
        return f"no space left for {repo} in {constants.HF_HUB_CACHE}; make room, or set HF_HOME to another disk"
    if isinstance(error, PermissionError):
        return f"cannot write to {error.filename}; set HF_HOME to a folder you can write to"
    if "Consistency check failed" in str(error):
        return f"the download of {repo} was cut short; try again"
    library = type(error).__module__.partition(".")[0]
    if library in ("httpx", "httpx2", "requests") or isinstance(error, (ConnectionError, TimeoutError)):
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        return f"cannot reach {constants.ENDPOINT} for {repo} ({reason}); check the connection and try again"
    return None


def sha256(path: Path) -> str:
    """Return the sha256 of a file in hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def _remove(path: Path) -> None:
    """Remove a file and all that it links to: in the cache, a name that points to a blob."""
    while path.is_symlink():
        target = path.parent / path.readlink()
        path.unlink(missing_ok=True)
        path = target
    path.unlink(missing_ok=True)
