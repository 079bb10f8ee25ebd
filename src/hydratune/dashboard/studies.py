"""All studies under a folder as one Optuna storage, for optuna-dashboard: looked at, never changed but for notes.

Each study stays where it is, in its journal or database. Studies are numbered 1, 2, … and trial `n` of study `s` has the id
`s * 1_000_000 + n`, so that an id tells both. Every finished trial's curves appear as an artifact and every trial has a note
that leads to its run; both are made up when they are read, so that nothing is written to a study that others work on.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import re
import threading
import time
from collections.abc import Callable, Container, Sequence
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import quote

from optuna.distributions import BaseDistribution
from optuna.storages import BaseStorage, get_storage
from optuna.study import StudyDirection
from optuna.study._frozen import FrozenStudy
from optuna.trial import FrozenTrial, TrialState

from hydratune.dashboard import places as on_disk
from hydratune.dashboard.drawn import drawn
from hydratune.dashboard.library import below
from hydratune.dashboard.places import Place
from hydratune.dashboard.questions import PATIENCE, NoAnswer, Question
from hydratune.runs import find_studies
from hydratune.sweep.storage import open_storage

TRIALS = 1_000_000  # ids of a study's trials
_LOOK = 2.0  # seconds between two looks for new studies
_OF_TRIAL = re.compile(r"dashboard:(artifacts:)?(\d+):")  # attributes of a study that are about one trial


class ReadOnly(RuntimeError):
    """The dashboard does not change studies."""


class Studies(BaseStorage):
    """The studies below a folder, new ones as they appear.

    Attributes:
        unreadable: folder → why its study does not open.
    """

    def __init__(self, home: Path):
        self._home = home
        self._places: dict[Path, Place] = {}
        self._lock, self._looked = threading.RLock(), float("-inf")
        self._opening: dict[Path, Question] = {}
        self.unreadable: dict[Path, str] = {}

    def places(self) -> list[Place]:
        """Every study, in the order in which they were found: by age at first."""
        with self._lock:
            if time.monotonic() - self._looked > _LOOK:
                self._look()
                self._looked = time.monotonic()
            return list(self._places.values())

    def _look(self) -> None:
        found = find_studies(self._home)
        for folder, place in list(self._places.items()):
            if folder not in found or place.uid != on_disk.uid(folder):
                del self._places[folder]
        for folder in set(self.unreadable) - set(found):
            del self.unreadable[folder]
            self._opening.pop(folder, None)
        new = sorted(set(found) - set(self._places), key=on_disk.age)
        end = time.monotonic() + PATIENCE  # of all together: each is opened in a thread of its own
        for folder in new:
            self._begin(folder)
        for folder in new:
            # what did not open before is looked for again, but not waited for
            left = 0.0 if folder in self.unreadable else max(0.0, end - time.monotonic())
            try:
                self._open(folder, left)
                self.unreadable.pop(folder, None)
            except NoAnswer as error:
                self.unreadable.setdefault(folder, str(error))  # what was wrong before tells more
            except Exception as error:  # of a driver, many kinds
                self._opening.pop(folder, None)
                text = str(error.args[0] if error.args else error) or type(error).__name__
                self.unreadable[folder] = text.splitlines()[0]

    def _begin(self, folder: Path) -> None:
        """Have a study on a server opened, which may take minutes."""
        with contextlib.suppress(KeyError):  # told by `_open`
            if folder not in self._opening and on_disk.is_remote(on_disk.where(folder)):
                self._opening[folder] = Question(lambda: _storage(folder))

    def _open(self, folder: Path, seconds: float) -> None:
        question = self._opening.get(folder)
        storage, study = question.answer(seconds) if question else _storage(folder)
        self._opening.pop(folder, None)
        name = on_disk.name(folder)
        taken = {place.name for place in self._places.values()}
        shown = f"{name} ({folder.relative_to(self._home)})" if name in taken else name
        number = 1 + max((place.number for place in self._places.values()), default=0)
        remote = question is not None
        self._places[folder] = Place(folder, number, shown, on_disk.uid(folder), storage, study, remote)

    def _place(self, study_id: int) -> Place:
        for place in self.places():
            if place.number == study_id:
                return place
        raise KeyError(f"there is no study {study_id}")

    def folder(self, study_id: int) -> Path:
        return self._place(study_id).folder

    def _trials(self, place: Place) -> list[FrozenTrial]:
        """Trials with their ids here and their artifacts; those that have ended are copied once."""
        with place.lock:
            result = []
            for trial in place.ask("get_all_trials", place.study, deepcopy=False):
                if trial.number in place.finished:
                    result.append(place.finished[trial.number])
                    continue
                ended = trial.state.is_finished()
                mine = copy.copy(trial) if ended else copy.deepcopy(trial)
                mine._trial_id = place.number * TRIALS + trial.number
                mine._system_attrs = {**trial._system_attrs, **self._artifacts(place, trial)}
                if ended:
                    place.finished[trial.number] = mine
                result.append(mine)
            return result

    def _artifacts(self, place: Place, trial: FrozenTrial) -> dict[str, Any]:
        if (
            not trial.state.is_finished()
            or not (place.folder / str(trial.number) / "metrics.jsonl").is_file()
        ):
            return {}
        known = f"{place.number:x}-{trial.number:x}"
        facts = {"artifact_id": known, "filename": "curves.png", "mimetype": "image/png", "encoding": None}
        return {f"artifacts:{known}": json.dumps(facts)}

    def _attributes(self, place: Place, attributes: dict[str, Any]) -> dict[str, Any]:
        """A study's attributes with the trials' ids here, and a note for each trial that has none."""
        ids = {t._trial_id: t.number for t in place.ask("get_all_trials", place.study, deepcopy=False)}
        result = {
            _with_trial(key, lambda i: place.number * TRIALS + ids.get(i, i)): value
            for key, value in attributes.items()
        }
        if objectives := on_disk.facts(place.folder).get("objectives"):
            result.setdefault("study:metric_names", objectives)
        for number in ids.values():
            trial = place.number * TRIALS + number
            if f"dashboard:{trial}:note_ver" not in result:
                result[f"dashboard:{trial}:note_ver"] = 0
                result[f"dashboard:{trial}:note_str:0"] = self._note(place, number)
        if "dashboard:note_ver" not in result:
            link = self.link(place.folder)
            result["dashboard:note_ver"] = 0
            result["dashboard:note_str:0"] = (
                f"[All runs of this study]({self.runs_link(place.folder)}) · [report](/runs/{link}report.html) · [files](/runs/{link})\n\n"
                f"Directory: `{place.folder}`"
            )
        return result

    def _note(self, place: Place, number: int) -> str:
        run = place.folder / str(number)
        link = self.link(run)
        return (
            f"[Curves, settings and samples](/?run={link[:-1]}) · [report](/runs/{link}report.html) · "
            f"[files](/runs/{link})\n\nRun directory: `{run}`"
        )

    def link(self, folder: Path) -> str:
        """A folder's path below ours for an address, with a slash at its end; empty for ours itself."""
        return quote(self._below(folder))

    def runs_link(self, folder: Path) -> str:
        """The address of our page with the runs of a study."""
        return below(self._below(folder))

    def _below(self, folder: Path) -> str:
        return "" if folder == self._home else f"{folder.relative_to(self._home)}/"

    # What optuna-dashboard and optuna.load_study read

    def get_all_studies(self) -> list[FrozenStudy]:
        found = []
        for place in self.places():
            try:
                with place.lock:
                    (study,) = [s for s in place.ask("get_all_studies") if s._study_id == place.study]
                    study = copy.copy(study)
                    study.study_name, study._study_id = place.name, place.number
                    study.system_attrs = self._attributes(place, study.system_attrs)
                found.append(study)
            except (
                Exception
            ):  # of a driver, many kinds: a database that has gone must not hide the other studies
                continue
        return found

    def get_study_id_from_name(self, study_name: str) -> int:
        for place in self.places():
            if place.name == study_name:
                return place.number
        raise KeyError(study_name)

    def get_study_name_from_id(self, study_id: int) -> str:
        return self._place(study_id).name

    def get_study_directions(self, study_id: int) -> list[StudyDirection]:
        place = self._place(study_id)
        with place.lock:
            return place.ask("get_study_directions", place.study)

    def get_study_user_attrs(self, study_id: int) -> dict[str, Any]:
        place = self._place(study_id)
        with place.lock:
            return place.ask("get_study_user_attrs", place.study)

    def get_study_system_attrs(self, study_id: int) -> dict[str, Any]:
        place = self._place(study_id)
        with place.lock:
            return self._attributes(place, place.ask("get_study_system_attrs", place.study))

    def get_all_trials(
        self, study_id: int, deepcopy: bool = True, states: Container[TrialState] | None = None
    ) -> list[FrozenTrial]:
        trials = [t for t in self._trials(self._place(study_id)) if states is None or t.state in states]
        return copy.deepcopy(trials) if deepcopy else trials

    def get_trial(self, trial_id: int) -> FrozenTrial:
        study, number = divmod(trial_id, TRIALS)
        trials = self._trials(self._place(study))
        if number >= len(trials):
            raise KeyError(f"there is no trial {trial_id}")
        return copy.deepcopy(trials[number])

    # What may be written: the notes of people

    def set_study_system_attr(self, study_id: int, key: str, value: Any) -> None:
        place = self._place(study_id)
        if not re.fullmatch(r"dashboard:(\d+:)?note_(ver|str:\d+)", key):
            raise ReadOnly(key)
        with place.lock:
            own = {t.number: t._trial_id for t in place.ask("get_all_trials", place.study, deepcopy=False)}
            place.ask(
                "set_study_system_attr", place.study, _with_trial(key, lambda i: own[i % TRIALS]), value
            )

    def create_new_study(self, directions: Sequence[StudyDirection], study_name: str | None = None) -> int:
        raise ReadOnly("create_new_study")

    def delete_study(self, study_id: int) -> None:
        raise ReadOnly("delete_study")

    def set_study_user_attr(self, study_id: int, key: str, value: Any) -> None:
        raise ReadOnly("set_study_user_attr")

    def create_new_trial(self, study_id: int, template_trial: FrozenTrial | None = None) -> int:
        raise ReadOnly("create_new_trial")

    def set_trial_param(
        self, trial_id: int, param_name: str, param_value_internal: float, distribution: BaseDistribution
    ) -> None:
        raise ReadOnly("set_trial_param")

    def set_trial_state_values(
        self, trial_id: int, state: TrialState, values: Sequence[float] | None = None
    ) -> bool:
        raise ReadOnly("set_trial_state_values")

    def set_trial_intermediate_value(self, trial_id: int, step: int, intermediate_value: float) -> None:
        raise ReadOnly("set_trial_intermediate_value")

    def set_trial_user_attr(self, trial_id: int, key: str, value: Any) -> None:
        raise ReadOnly("set_trial_user_attr")

    def set_trial_system_attr(self, trial_id: int, key: str, value: Any) -> None:
        raise ReadOnly("set_trial_system_attr")


class Curves:
    """Optuna's artifact store of the trials' `curves.png`, where the trials have them; drawn when they are missing."""

    def __init__(self, studies: Studies):
        self._studies = studies

    def open_reader(self, artifact_id: str) -> BinaryIO:
        from optuna.artifacts.exceptions import ArtifactNotFound

        study, _, number = artifact_id.partition("-")
        try:
            run = self._studies.folder(int(study, 16)) / str(int(number, 16))
            if (run / "curves.png").is_file():
                return (run / "curves.png").open("rb")
            content = drawn(run / "curves.png")
        except (KeyError, ValueError, OSError) as error:
            raise ArtifactNotFound(artifact_id) from error
        if content is None:
            raise ArtifactNotFound(artifact_id)
        return io.BytesIO(content)

    def write(self, artifact_id: str, content_body: BinaryIO) -> None:
        raise ReadOnly("write")

    def remove(self, artifact_id: str) -> None:
        raise ReadOnly("remove")


def _storage(folder: Path) -> tuple[BaseStorage, int]:
    """Where a study is kept, and its id there; a database gets a cache.

    Raises:
        Exception: it does not open, or does not hold the study.
    """
    storage = get_storage(open_storage(on_disk.where(folder), create=False))
    name, studies = on_disk.name(folder), storage.get_all_studies()
    mine = [s for s in studies if s.study_name == name] or (studies if len(studies) == 1 else [])
    if not mine:
        raise KeyError(f"its storage holds no study {name!r}")
    return storage, mine[0]._study_id


def _with_trial(key: str, number: Callable[[int], int]) -> str:
    """An attribute's key with another trial in it."""
    return _OF_TRIAL.sub(lambda m: f"dashboard:{m[1] or ''}{number(int(m[2]))}:", key, count=1)
