"""Tasks of EleutherAI's lm-evaluation-harness on a model. Needs the extra `lm-eval`.

evaluate       runs tasks by name, from the harness and from folders of one's own
table          the scores of an evaluation, one row each
"""

import contextlib
import difflib
import functools
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitnet_jax.errors import UserError
from bitnet_jax.evaluation.harness import need

_BOOTSTRAPS = 1000
"""Resamples for the standard errors of metrics that are no means."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Score:
    """One row of an evaluation's table: a metric of a task."""

    task: str
    metric: str
    filter: str
    value: float
    stderr: float | None
    """Standard error of the value; None where the harness has none."""
    shots: int | None
    """Examples before each question; None for a group of tasks."""
    examples: int | None
    """How many were scored; None for a group of tasks."""


def evaluate(
    model: Any,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    num_fewshot: int | None = None,
    include_path: Path | None = None,
    chat: bool = False,
) -> dict[str, Any]:
    """What `lm_eval.simple_evaluate` returns for a `harness_model`, without samples.

    Args:
        model: from `harness_model`.
        tasks: names of tasks, groups and tags, patterns of them (`mmlu_*`), or paths of YAML files.
        limit: examples of each task at most.
        num_fewshot: examples before each question; None is what a task says, or none.
        include_path: folder with tasks of one's own. Where it has all `tasks`, the harness's own thousands are not looked through.
        chat: whether the chat template stands around the questions.

    Raises:
        UserError: a value is out of range, a task is unknown or runs what a model writes, its data set cannot be read, or it has not
            enough examples for `num_fewshot`.
    """
    need()
    if not tasks:
        raise UserError("tasks is empty: must have at least one task")
    if limit is not None and limit < 1:
        raise UserError(f"limit={limit} must be at least 1")
    if num_fewshot is not None and num_fewshot < 0:
        raise UserError(f"num_fewshot={num_fewshot} must be at least 0")
    if include_path is not None and not include_path.is_dir():
        raise UserError(f"include_path={include_path} must be a folder")
    from lm_eval import simple_evaluate

    manager, names = _find(list(dict.fromkeys(tasks)), include_path)
    with _one_process():
        found = simple_evaluate(
            model,
            tasks=names,
            limit=limit,
            num_fewshot=num_fewshot,
            task_manager=manager,
            bootstrap_iters=_BOOTSTRAPS,
            log_samples=False,
            apply_chat_template=chat,
        )
    assert found is not None
    for task, shots in found["n-shot"].items():
        if num_fewshot is not None and shots != num_fewshot and task in found["results"] and task not in found.get("groups", {}):
            logger.warning("%s has %s examples before each question, as it says itself, and not %d", task, shots, num_fewshot)
    return dict(found)


def table(found: Mapping[str, Any]) -> list[Score]:
    """The scores in what `evaluate` returned, in its order."""
    rows = []
    for task, metrics in found["results"].items():
        for key, value in metrics.items():
            metric, _, kind = key.partition(",")
            if not kind or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            stderr = metrics.get(f"{metric}_stderr,{kind}")
            shots = found["n-shot"].get(task)
            rows.append(
                Score(
                    task=task,
                    metric=metric,
                    filter=kind,
                    value=float(value),
                    stderr=float(stderr) if isinstance(stderr, int | float) else None,
                    shots=shots if isinstance(shots, int) else None,
                    examples=found["n-samples"].get(task, {}).get("effective"),
                )
            )
    return rows


def _find(tasks: list[str], include_path: Path | None) -> tuple[Any, list[str]]:
    """The harness's task manager, and the names that `tasks` stand for."""
    kind = _manager_class()
    if include_path is not None:
        manager = kind(include_path=str(include_path), include_defaults=False)
        found = [_matches(manager, task) for task in tasks]
        if all(found):
            return manager, list(dict.fromkeys(name for names in found for name in names))
    manager = kind(include_path=None if include_path is None else str(include_path))
    names: list[str] = []
    for task in tasks:
        matches = _matches(manager, task)
        if not matches:
            near = difflib.get_close_matches(task, manager.all_tasks, n=3)
            hint = f"; near it are {', '.join(near)}" if near else ""
            raise UserError(f"task {task!r} is unknown: must be a task, group or tag of lm-eval or of include_path, or a YAML file{hint}")
        names += matches
    return manager, list(dict.fromkeys(names))


def _matches(manager: Any, task: str) -> list[str]:
    return [task] if Path(task).suffix in (".yaml", ".yml") and Path(task).is_file() else manager.match_tasks([task])


@functools.cache
def _manager_class() -> type:
    from lm_eval.tasks import TaskManager

    class Manager(TaskManager):
        """Says in one line what is wrong with a task, whichever of the libraries under the harness finds it."""

        def load(self, task_list: Any) -> Any:
            try:
                found = super().load(task_list)
            except Exception as error:
                reason = " ".join(str(error).split()) or type(error).__name__
                raise UserError(f"a task of {', '.join(task_list)} cannot be loaded: {reason}") from error
            for name, task in found["tasks"].items():
                if getattr(task, "UNSAFE_CODE", False):
                    raise UserError(f"task {name} runs programs that the model writes: that is not done here")
                if getattr(task, "MULTIMODAL", False):
                    raise UserError(f"task {name} has more than text: these models read text alone")
                task.build_all_requests = functools.partial(_build, name, task.build_all_requests)
            return found

    return Manager


def _build(name: str, build: Callable[..., None], **options: Any) -> None:
    """Makes a task's requests. Templates, few-shot samplers and data sets raise whatever they like there."""
    try:
        build(**options)
    except UserError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"the requests of task {name} cannot be made: {reason}") from error


@contextlib.contextmanager
def _one_process() -> Iterator[None]:
    """Keeps the harness from forking processes for its resamples: a fork of a process in which JAX runs may hang."""
    before = os.environ.get("DISABLE_MULTIPROC")
    os.environ["DISABLE_MULTIPROC"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["DISABLE_MULTIPROC"]
        else:
            os.environ["DISABLE_MULTIPROC"] = before
