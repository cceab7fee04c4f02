"""The processes of one run: joining them, and agreeing on what one of them alone has seen.

One process a host (TPU), or one a GPU or a node (SLURM). The first, of index 0, leads: it alone writes logs and small files.
"""

import os
import socket
import sys
import time
from collections.abc import Callable
from typing import NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from bitnet_jax.errors import RunError, UserError

PATIENCE = 300.0
"""Seconds that process 0 may take to start, as JAX waits for the others; what is started by hand or by a queue comes at its own time."""
_MESSAGE = 2048
"""Bytes of an error that is passed on."""


def join(coordinator: str | None = None, processes: int | None = None, process: int | None = None) -> None:
    """Joins the run's processes; before anything that starts JAX's devices. Does nothing for a run of one process.

    Without arguments JAX looks where it runs: SLURM (`srun`), the hosts of a TPU pod, or Open MPI (`mpirun`).

    Args:
        coordinator: HOST:PORT of process 0, which all others can reach.
        processes: how many there are.
        process: index of this one.

    Raises:
        UserError: some of the three are given and not all, or a number is out of range.
        RunError: the others were not found in time.
    """
    given = {"coordinator": coordinator, "processes": processes, "process": process}
    missing = [name for name, value in given.items() if value is None]
    if 0 < len(missing) < 3:
        raise UserError(f"{' and '.join(sorted(set(given) - set(missing)))} must come with {' and '.join(missing)}")
    if coordinator is not None:
        assert processes is not None
        assert process is not None
        host, _, port = coordinator.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
            raise UserError(f"coordinator={coordinator!r} must be HOST:PORT")
        if processes < 1 or not 0 <= process < processes:
            raise UserError(f"process={process} of processes={processes} must be from 0 to {processes - 1}")
        if processes == 1:
            return
        if process > 0:
            _wait_for(host.strip("[]"), int(port))
    elif not _surroundings():
        return
    # JAX's own handler of SIGTERM would swallow one that comes before the loop's is in place: the run would go on to its end.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(coordinator, processes, process)
    except Exception as error:
        raise RunError(f"the processes of this run did not meet: {_first_line(error)}") from error


def _wait_for(host: str, port: int) -> None:
    """Returns once process 0 answers; raises RunError where it does not in time. JAX itself would end the process with a stack of C++."""
    end = time.monotonic() + PATIENCE
    while True:
        try:
            socket.create_connection((host, port), 5).close()
            return
        except OSError as error:
            if time.monotonic() > end:
                raise RunError(f"process 0 of this run does not answer at {host}:{port} in {PATIENCE:.0f} s: {error}") from error
        time.sleep(0.2)


def _surroundings() -> bool:
    """Whether the environment is that of one of several processes."""

    def several(name: str) -> bool:
        return os.environ.get(name, "").isdecimal() and int(os.environ[name]) > 1

    slurm = several("SLURM_NTASKS") and "SLURM_PROCID" in os.environ and "SLURM_STEP_NODELIST" in os.environ
    pod = "," in os.environ.get("TPU_WORKER_HOSTNAMES", "") or several("MEGASCALE_NUM_SLICES")
    return slurm or pod or several("OMPI_COMM_WORLD_SIZE")


def joined() -> bool:
    """Whether this is one of several processes."""
    return jax.distributed.is_initialized()


def leads() -> bool:
    """Whether this process writes logs and small files."""
    return jax.process_index() == 0


def led(action: Callable[[], object]) -> None:
    """Runs `action` in the first process; what it raises is raised in every one.

    Raises:
        UserError, RunError: as `action`.
    """
    if jax.process_count() == 1:
        action()
        return
    from jax.experimental import multihost_utils

    error: UserError | RunError | None = None
    if leads():
        try:
            action()
        except (UserError, RunError) as failure:
            error = failure
    text = b"" if error is None else (("U" if isinstance(error, UserError) else "R") + str(error)).encode()[:_MESSAGE]
    sent = np.frombuffer(text.ljust(_MESSAGE, b"\0"), np.uint8)
    got = bytes(np.asarray(multihost_utils.broadcast_one_to_all(sent), np.uint8)).rstrip(b"\0").decode(errors="replace")
    if error is not None:
        raise error
    if got:
        raise (UserError if got[0] == "U" else RunError)(got[1:])


def agree(well: bool) -> bool:
    """Whether all processes are well; all call this at the same point, and wait for one another."""
    return well if jax.process_count() == 1 else not int(everywhere(int(not well)))


def everywhere(number: int) -> jax.Array:
    """The largest `number`, an int32, of all processes, of which all call this at the same point. Dispatched, not waited for."""
    mesh = jax.make_mesh((jax.device_count(),), ("all",), axis_types=(AxisType.Auto,), devices=jax.devices())
    flags = jax.make_array_from_callback(
        (jax.device_count(),), NamedSharding(mesh, P("all")), lambda index: np.full(jax.device_count(), number, np.int32)[index]
    )
    return _largest(mesh)(flags)


def _largest(mesh: jax.sharding.Mesh) -> Callable[[jax.Array], jax.Array]:
    if mesh not in _PROGRAMS:
        _PROGRAMS[mesh] = jax.jit(jnp.max, out_shardings=NamedSharding(mesh, P()))
    return _PROGRAMS[mesh]


_PROGRAMS: dict[jax.sharding.Mesh, Callable[[jax.Array], jax.Array]] = {}


def leave(code: int) -> NoReturn:
    """Ends this process after an error, without waiting for others that may wait for it; the first one last, since all end with it."""
    if leads():
        time.sleep(2)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def lost(error: Exception) -> RunError:
    """What to say where a transfer between processes failed."""
    return RunError(f"another process of this run ended or cannot be reached: {_first_line(error)}; start all of them again to go on")


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
