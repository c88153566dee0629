"""What runs leave for later runs: tokenised data and compiled programs, in $JAXSFT_CACHE or ~/.cache/jaxsft."""

import os
from pathlib import Path

import jax

PROGRAMS = 5 * 2**30  # bytes of compiled programs that are kept; those not used for longest go first


def folder() -> Path:
    """Where they lie."""
    return Path(os.environ.get("JAXSFT_CACHE") or "~/.cache/jaxsft").expanduser()


def keep_programs() -> None:
    """Has jax keep what it compiles, so that the same run starts at once the next time.

    Where jax was told of another folder or limit, by the environment or in its configuration, that holds;
    JAX_ENABLE_COMPILATION_CACHE=false turns it off.
    """
    if not jax.config.values["jax_compilation_cache_dir"]:
        jax.config.update("jax_compilation_cache_dir", str(folder() / "programs"))
        if jax.config.values["jax_compilation_cache_max_size"] == -1:
            jax.config.update("jax_compilation_cache_max_size", PROGRAMS)
