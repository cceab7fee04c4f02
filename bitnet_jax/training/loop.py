"""The training loop: compile once, dispatch a step, fetch the numbers of the one before, log, evaluate, save, resume."""

import contextlib
import logging
import signal
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from bitnet_jax import costs
from bitnet_jax.config import Linear, NonFinite, TrainConfig
from bitnet_jax.errors import RunError, UserError
from bitnet_jax.training import codes, distributed, run_directory, sharding
from bitnet_jax.training.checkpoints import Checkpoints, Warn, read_state
from bitnet_jax.training.logs import Line, Logs
from bitnet_jax.training.optimizer import Optimizer, Params, copies, make_optimizer
from bitnet_jax.training.report import Quiet, Reporter, RunStart
from bitnet_jax.training.signals import StopRequest
from bitnet_jax.training.stall import Timely
from bitnet_jax.training.step import Apply, Batch, StepMetrics, TrainState, compile_step, device_memory, init_state, step_memory
from bitnet_jax.transformer import Output, Transformer


class Data(Protocol):
    """An endless iterator over batches that can be put back where it was."""

    def __next__(self) -> Batch:
        """The next batch, of [batch_size, seq_len]; in a run of several processes, the rows of this one (`sharding.rows`)."""
        ...

    def get_state(self) -> Any:
        """Where the iterator stands, as JSON values."""
        ...

    def set_state(self, state: Any) -> None:
        """Puts the iterator where `get_state` found it."""
        ...


_warn = logging.getLogger("bitnet_jax").warning
Evaluate = Callable[[Params], Mapping[str, float]]
"""Parameters → numbers to log, such as {"validation_loss": 3.2}."""


@dataclass(frozen=True)
class Summary:
    """How a run, or this start of it, ended.

    Attributes:
        directory: the run's folder.
        step: steps done.
        first_step: steps done before this start.
        loss: cross entropy of the last step in nats per token; None where this start did no step.
        evaluation: the last evaluation of this start, empty where there was none.
        tokens_per_second: median over the log intervals without the first, evaluation and saving left out; None before the second log.
        compile_seconds: compiling the step.
        save_seconds: time the loop stood still for checkpoints.
        seconds: everything.
        non_finite: steps whose loss or gradient was not finite, over the whole run.
        stopped_by: the signal that came, after which everything was saved; None where none came.
    """

    directory: Path
    step: int
    first_step: int
    loss: float | None
    evaluation: dict[str, float]
    tokens_per_second: float | None
    compile_seconds: float
    save_seconds: float
    seconds: float
    non_finite: int
    stopped_by: str | None


def train(
    config: TrainConfig,
    directory: Path,
    data: Data,
    *,
    files: Mapping[str, str] | None = None,
    provenance: Mapping[str, Any] | None = None,
    evaluate: Evaluate | None = None,
    reporter: Reporter | None = None,
    resume: bool = True,
    last_step: int | None = None,
    profile: range | None = None,
) -> Summary:
    """Trains the model of `config` in `directory`, from the newest whole checkpoint there if it has one.

    A run that was interrupted at any moment, killed while it was saving too, goes on with the numbers of a run never stopped, bit
    for bit, on the same machine and versions. The first SIGTERM or SIGINT ends it after the step under way, with a checkpoint.

    Args:
        config: the run. Everything but `output` must be what the run in `directory` was begun with.
        directory: a new or empty folder, or a run's.
        data: at its beginning; put where the checkpoint says if there is one.
        files: texts to keep in the run's folder under their names, such as tokenizer.json.
        provenance: more entries for provenance.json, such as where the text came from.
        evaluate: called with the parameters every `output.eval_every` steps and at the end.
        reporter: is told what happens; None passes warnings to `logging`.
        resume: False refuses a folder that holds a run.
        last_step: the step after which this start evaluates, saves and returns; None is the run's last.
        profile: steps of which a trace is written to the folder `profile`, for xprof and TensorBoard.

    The devices of all processes that have joined (`distributed.join`) form the mesh of `config.mesh`. Every process calls this with the
    same arguments, but for `data`; the folder is one that all of them see.

    Raises:
        UserError: `directory` is not a run's, is in use, differs in its configuration or has only damaged checkpoints, the mesh does not
            fit the devices or the run, or a batch does not fit the configuration.
        RunError: the disk is full, too many steps were not finite, or another process was lost; the last good checkpoint is kept.
    """
    reporter = Quiet() if reporter is None else reporter
    begun = time.perf_counter()
    optimizer = make_optimizer(config.optimizer, config.steps)
    try:
        mesh = sharding.make_mesh(config.mesh)
        sharding.check(config, sharding.sizes(config.mesh, jax.device_count()))
        with contextlib.ExitStack() as held, sharding.inside(mesh):
            distributed.led(lambda: held.enter_context(run_directory.claim(directory)))
            stop = held.enter_context(StopRequest())
            distributed.led(lambda: run_directory.enter(directory, config, files or {}, resume))
            checkpoints = held.enter_context(Checkpoints(directory / run_directory.CHECKPOINTS, config.output.keep_checkpoints))
            _check_memory(config)
            target = sharding.place(jax.eval_shape(lambda: init_run(config, optimizer)), mesh)
            restored = checkpoints.restore(target, reporter.warned)
            if restored is None:
                places = None if mesh is None else sharding.shardings(target)
                state, first = jax.jit(lambda: init_run(config, optimizer), out_shardings=places)(), 0
                if run_directory.has_log(directory):
                    reporter.warned(f"{directory} has a log and no checkpoint: the run begins anew at step 0, and the log with it")
            else:
                state, first = restored.state, restored.step
                data.set_state(restored.data)
            distributed.led(lambda: run_directory.record_start(directory, config, first, provenance or {}))
            parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
            reporter.started(RunStart(config, directory, first, parameters, jax.devices()[0].device_kind))
            if mesh is not None:
                for path in sharding.uncut(target.params, mesh):
                    rule = f"no size of it is a multiple of fsdp={mesh.shape['fsdp']}"
                    reporter.warned(f"parameter {path} lies whole on every device: {rule}")
            logs = held.enter_context(Logs(directory, config, first)) if distributed.leads() else None
            timely = Timely(data, config.data.stall_timeout, f"source={config.data.source}")
            held.callback(timely.close)
            run = _Run(config, timely, mesh, optimizer, evaluate, reporter, stop, checkpoints, logs, first)
            run.non_finite = int(state.non_finite)
            run.last = min(config.steps, config.steps if last_step is None else last_step)
            run.profiled = range(0) if profile is None else profile
            if profile is not None and not range(max(profile.start, first + 1), min(profile.stop, run.last + 1)):
                reporter.warned(
                    f"no trace: profile={profile.start}:{profile.stop} has none of this start's steps {first + 1} to {run.last}"
                )
            if first < run.last:
                run.go(state)
            run.wait()
            return run.summary(directory, time.perf_counter() - begun)
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1:
            raise
        raise distributed.lost(error) from error
    finally:
        reporter.closed()


class _Pending(NamedTuple):
    """A dispatched step whose numbers are still on the device; `counts` where it is to be logged, `signal` of any process if there are
    several."""

    step: int
    metrics: StepMetrics
    counts: list[tuple[str, codes.CodeCounts]] | None
    signal: jax.Array | None


def median_pace(paces: Sequence[float]) -> float | None:
    """Median of the paces of log intervals without the first, in which caches are cold; that one where there is no other."""
    return statistics.median(paces[1:] or paces) if paces else None


@dataclass
class _Clock:
    """Paces of log intervals, without the time that evaluation and saving take."""

    tokens_per_step: int
    step: int
    mark: float = 0.0
    paces: list[float] = field(default_factory=list)

    def start(self) -> None:
        """Begins the first lap."""
        self.mark = time.perf_counter()

    def lap(self, step: int) -> float | None:
        """Tokens per second since the last lap."""
        now = time.perf_counter()
        elapsed, steps = now - self.mark, step - self.step
        self.mark, self.step = now, step
        if steps <= 0 or elapsed <= 0:
            return None
        self.paces.append(steps * self.tokens_per_step / elapsed)
        return self.paces[-1]

    def pause(self, seconds: float) -> None:
        """Leaves `seconds` out of the lap under way."""
        self.mark += seconds

    @property
    def median(self) -> float | None:
        """Median pace without the first lap, in which caches are cold; the only one where there is but one."""
        return median_pace(self.paces)


class _Run:
    """One start of a run, from `first` steps on."""

    def __init__(
        self,
        config: TrainConfig,
        data: Timely,
        mesh: Mesh | None,
        optimizer: Optimizer,
        evaluate: Evaluate | None,
        reporter: Reporter,
        stop: StopRequest,
        checkpoints: Checkpoints,
        logs: Logs | None,
        first: int,
    ) -> None:
        self.config, self.data, self.optimizer, self.evaluate = config, data, optimizer, evaluate
        self.mesh, self.rows = mesh, sharding.rows(mesh, config.batch_size)
        self.alone = jax.process_count() == 1
        self.agreed: signal.Signals | None = None
        self.reporter, self.stop, self.checkpoints, self.logs = reporter, stop, checkpoints, logs
        self.first = self.step = first
        self.last = config.steps
        self.profiled = range(0)
        self.saved: int | None = None
        self.loss: float | None = None
        self.evaluation: dict[str, float] = {}
        self.non_finite = 0
        self.earlier_codes: codes.Codes | None = None
        self.compile_seconds = self.save_seconds = 0.0
        self.clock = _Clock(config.batch_size * config.data.seq_len, first)
        peak = costs.peak_flops(jax.devices()[0].device_kind)
        self.peak_flops = None if peak is None else peak * jax.device_count()
        self.flops_per_token = costs.train_flops(config.model, config.data.seq_len)

    def go(self, state: TrainState) -> None:
        """Does the steps that are left, or those until a signal comes."""
        config, output = self.config, self.config.output
        begun = time.perf_counter()
        compiled = partial(compile_step, config, model_apply(config), self.optimizer, state, batch_spec(config, self.mesh))
        warm = config.optimizer.quant_warmup_steps if config.model.linear is Linear.BIT else 0
        train_step, warming_step = compiled(), compiled(warming=True) if self.first + 1 < warm else None
        self.compile_seconds = time.perf_counter() - begun
        self.reporter.compiled(self.compile_seconds, step_memory(train_step))
        if self.first % output.log_every == 0:  # else the codes of the last log are gone, and the first count of flips is null
            self.earlier_codes = codes.snapshot(state.params, config.model)
        self.clock.start()

        pending: _Pending | None = None
        tracing = False
        while self.step < self.last and self.stopping is None:
            if not tracing and self.step + 1 in self.profiled:
                jax.profiler.start_trace(str(self.checkpoints.directory.parent / run_directory.PROFILE))
                tracing = True
            do = train_step if warming_step is None or self.step + 1 >= warm else warming_step
            state, metrics = do(state, self._batch())
            self.step += 1
            done = self.step == self.last
            caught = None if self.alone else distributed.everywhere(int(self.stop.signal or 0))
            counts = self._count_codes(state) if done or self.step % output.log_every == 0 else None
            dispatched = _Pending(self.step, metrics, counts, caught)
            self.reporter.advanced(self.step)
            if pending is not None:
                self._settle(pending)
            pending = dispatched
            if tracing and self.step + 1 not in self.profiled:
                jax.block_until_ready(state)
                jax.profiler.stop_trace()
                tracing = False

            evaluating = self.evaluate is not None and (done or (output.eval_every > 0 and self.step % output.eval_every == 0))
            saving = done or self.step % output.checkpoint_every == 0
            if evaluating or saving:  # what a checkpoint covers must be in the log before it is written
                self._settle(pending)
                pending = None
            if evaluating:
                self._evaluate(state)
            if saving:
                self._save(state)
        if pending is not None:
            self._settle(pending)
        if tracing:
            jax.profiler.stop_trace()
        if self.stopped_by is not None:
            if self.step not in (self.saved, self.first):
                self._save(state)
            self.reporter.warned(f"{self.stopped_by}: stopping after step {self.step} of {config.steps}")

    def wait(self) -> None:
        """Returns when the last checkpoint is on disk."""
        begun = time.perf_counter()
        self.checkpoints.wait()
        self.save_seconds += time.perf_counter() - begun

    @property
    def stopping(self) -> signal.Signals | None:
        """The signal after which no step is begun: one that came to this process, or among several one that all know of."""
        return self.stop.signal if self.alone else self.agreed

    @property
    def stopped_by(self) -> str | None:
        """The signal that came during this start, in its last evaluation or save too: whoever sent it wants nothing begun after it."""
        return self.stopping.name if self.stopping is not None else None

    def summary(self, directory: Path, seconds: float) -> Summary:
        return Summary(
            directory=directory,
            step=self.step,
            first_step=self.first,
            loss=self.loss,
            evaluation=self.evaluation,
            tokens_per_second=self.clock.median,
            compile_seconds=self.compile_seconds,
            save_seconds=self.save_seconds,
            seconds=seconds,
            non_finite=self.non_finite,
            stopped_by=self.stopped_by,
        )

    def _batch(self) -> dict[str, jax.Array]:
        try:
            batch = next(self.data)
        except StopIteration:
            raise RunError(f"the data ended after step {self.step} of {self.config.steps}: it must be endless") from None
        for name, spec in batch_spec(self.config).items():
            shape = (spec.shape[0] // self.rows.count, spec.shape[1])
            if name not in batch or np.shape(batch[name]) != shape or batch[name].dtype != spec.dtype:
                found = f"{batch[name].dtype} {np.shape(batch[name])}" if name in batch else "missing"
                each = "" if self.rows.count == 1 else f" / {self.rows.count} processes"
                raise UserError(f"{name} of batch {self.step + 1} is {found}: must be {spec.dtype} {shape}, (batch_size{each}, seq_len)")
        return sharding.place_batch({name: np.asarray(batch[name]) for name in batch_spec(self.config)}, self.mesh, self.rows)

    def _count_codes(self, state: TrainState) -> list[tuple[str, codes.CodeCounts]]:
        now = codes.snapshot(state.params, self.config.model)
        counts = codes.count(now, self.earlier_codes)
        self.earlier_codes = now
        return counts

    def _settle(self, pending: _Pending) -> None:
        """Waits for a step's numbers, holds the run to its policy on non-finite ones, and logs them where it is time to."""
        metrics = jax.device_get(pending.metrics)
        if pending.signal is not None and (number := int(pending.signal)):
            self.agreed = signal.Signals(number)
        self.loss, self.non_finite = float(metrics.loss), int(metrics.non_finite)
        if not metrics.finite:
            self._non_finite(pending.step, metrics)
        if pending.counts is None:
            return
        pace = self.clock.lap(pending.step)
        ternary = codes.summarize(pending.counts)
        line: Line = {
            "kind": "train",
            "step": pending.step,
            "loss": self.loss,
            "perplexity": float(np.exp(np.float64(min(self.loss, 700.0)))),
            "learning_rate": float(metrics.learning_rate),
            "weight_decay": float(metrics.weight_decay),
            "grad_norm": float(metrics.grad_norm),
            "z_loss": float(metrics.z_loss),
            "tokens": int(metrics.tokens),
            "tokens_per_second": pace,
            "model_flop_utilisation": None if pace is None or self.peak_flops is None else pace * self.flops_per_token / self.peak_flops,
            "ternary": None if ternary is None else _fractions(ternary),
            "flips": None if ternary is None else ternary.flips,
            "flip_fraction": None if ternary is None or ternary.flips is None else ternary.flips / ternary.weights,
            "non_finite": self.non_finite,
        }
        self._log(line)

    def _log(self, line: Line) -> None:
        if self.logs is not None:
            self.logs.write(line)
        self.reporter.logged(line)

    def _non_finite(self, step: int, metrics: StepMetrics) -> None:
        what = f"step {step}: loss {float(metrics.loss):.4g} and gradient norm {float(metrics.grad_norm):.4g} must be finite"
        in_row, limit = int(metrics.non_finite_run), self.config.non_finite_limit
        if self.config.non_finite is NonFinite.SKIP and in_row < limit:
            self.reporter.warned(f"{what}; step skipped, {in_row} in a row of at most {limit - 1}")
            return
        self.checkpoints.wait()
        steps = self.checkpoints.steps
        kept = f"the last good checkpoint is {steps[-1]} in {self.checkpoints.directory}" if steps else "there is no checkpoint yet"
        rule = "non_finite=stop" if self.config.non_finite is NonFinite.STOP else f"non_finite_limit={limit} in a row"
        raise RunError(f"{what}; stopped, as {rule} says; {kept}")

    def _evaluate(self, state: TrainState) -> None:
        assert self.evaluate is not None
        begun = time.perf_counter()
        self.evaluation = {name: float(value) for name, value in self.evaluate(state.params).items()}
        self._log({"kind": "evaluation", "step": self.step, **self.evaluation})
        self.clock.pause(time.perf_counter() - begun)

    def _save(self, state: TrainState) -> None:
        self.reporter.saving(self.step)
        begun = time.perf_counter()
        self.checkpoints.save(state, self.data.get_state(), self.config)
        self.saved = self.step
        seconds = time.perf_counter() - begun
        self.save_seconds += seconds
        self.clock.pause(seconds)


def _check_memory(config: TrainConfig) -> None:
    """Raises UserError where parameters, gradients and moments alone exceed the memory of the devices: better now than killed later."""
    average = config.optimizer.ema_decay is not None
    parameters, limit = costs.parameters(config.model).total, device_memory()
    needed = 4 * (copies(config.optimizer) + 1) * parameters
    if limit is not None and jax.local_devices()[0].platform != "cpu":
        limit *= jax.device_count()
    if limit is not None and needed > limit:
        raise UserError(
            f"{parameters:,} parameters need {needed / 1e9:,.0f} GB to train (parameter, gradient and two moments"
            f"{', and the average' if average else ''} of 4 bytes each): must be at most the {limit / 1e9:,.0f} GB of "
            f"{'this machine' if jax.device_count() == 1 else 'its devices'}"
        )


def init_run(config: TrainConfig, optimizer: Optimizer) -> TrainState:
    """The state before the first step: parameters drawn from `config.seed`."""
    tokens = jnp.zeros((1, config.data.seq_len), jnp.int32)
    return init_state(Transformer(config.model).init(jax.random.key(config.seed), tokens)["params"], optimizer)


def last_state(config: TrainConfig, directory: Path, warn: Warn = _warn) -> TrainState:
    """The state of the newest whole checkpoint of the run in `directory`; arguments and errors are those of `checkpoints.read_params`."""
    target = jax.eval_shape(lambda: init_run(config, make_optimizer(config.optimizer, config.steps)))
    return read_state(directory / run_directory.CHECKPOINTS, target, warn)


def model_apply(config: TrainConfig) -> Apply:
    """The model as a function of parameters and tokens [B, T], and of how far it quantises, to logits [B, T, V]."""
    model = Transformer(config.model, gather=config.mesh.gather)

    def apply(params: Params, tokens: jax.Array, strength: jax.Array | None = None) -> jax.Array:
        output = model.apply({"params": params}, tokens, strength=strength)
        assert isinstance(output, Output)
        return output.logits

    return apply


def batch_spec(config: TrainConfig, mesh: Mesh | None = None) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and types of a batch, and where it lies on a mesh."""
    place = None if mesh is None else sharding.batch_sharding(mesh)
    spec = jax.ShapeDtypeStruct((config.batch_size, config.data.seq_len), jnp.int32, sharding=place)
    return {"tokens": spec, "targets": spec}


def _fractions(ternary: codes.TernaryStatistics) -> dict[str, Any]:
    names = ("minus", "zero", "plus")
    return {"all": dict(zip(names, ternary.fractions, strict=True))} | {
        kind: dict(zip(names, shares, strict=True)) for kind, shares in ternary.by_kind.items()
    }
