"""`python -m bitnet_jax.cpu` makes the native library, so that its first use need not wait, or says in one line why there is none."""

import sys

from bitnet_jax.cpu import build
from bitnet_jax.errors import RunError, UserError


def main() -> int:
    """Prints the instruction sets of the library, or the reason why there is none, with exit code 1."""
    try:
        build.forget_failures()
        sys.stdout.write(f"native CPU kernels: {', '.join(build.load())}\n")
    except (OSError, RunError, UserError) as error:
        sys.stderr.write(f"{error}; the portable ones are used\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
